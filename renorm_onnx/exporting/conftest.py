"""A small network that the tests of exporting share, and its input."""

import torch
from torch import nn

from renorm_onnx.layers.modules import BatchRenorm2d

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def small(*more: nn.Module) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), BatchRenorm2d(3), *more)
    net[1].num_batches_tracked.fill_(1)
    return net.eval()

"""RepVGG in its training form: three parallel linear branches that are one convolution at inference.

Source: Ding et al. 2021 (arXiv:2101.03697), sections 3.1-3.4 and table 2. A block is
`relu(norm(conv3x3(x)) + norm(conv1x1(x)) + norm(x))`; the last term only where the shape stays. The identity
branch has no convolution to fold into: it disappears only when the branches are merged.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from models.parts import NormFactory, example_images, initialize_convolutions


class RepVGGBlock(nn.Module):
    """Sum of a 3x3, a 1x1 and, where shapes agree, an identity branch, each with its norm; then ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm3 = norm(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.norm1 = norm(out_channels)
        self.norm0 = norm(out_channels) if in_channels == out_channels and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        y = self.norm3(self.conv3(x)) + self.norm1(self.conv1(x))
        return torch.relu(y if self.norm0 is None else y + self.norm0(x))


def repvgg(
    depths: Sequence[int] = (2, 4, 14, 1),
    widths: Sequence[int] = (48, 96, 192, 1280),
    num_classes: int = 1000,
    in_channels: int = 3,
    norm: NormFactory = nn.BatchNorm2d,
) -> nn.Sequential:
    """Build RepVGG; the defaults are RepVGG-A0.

    With the defaults: 22 blocks, 61 norms, 9,108,968 parameters, 8,309,384 once the branches are merged.

    Args:
        depths: Blocks in each stage; the first of a stage has stride 2.
        widths: Channels of each stage. The stem has min(64, widths[0]).
        num_classes: Length of the output.
        in_channels: Of the images.
        norm: Makes each norm from its number of channels.

    Returns:
        A module from (N, in_channels, H, W) to logits (N, num_classes).
    """
    channels = min(64, widths[0])
    blocks: list[nn.Module] = [RepVGGBlock(in_channels, channels, 2, norm)]
    for depth, width in zip(depths, widths, strict=True):
        for index in range(depth):
            blocks.append(RepVGGBlock(channels, width, 2 if index == 0 else 1, norm))
            channels = width
    network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    initialize_convolutions(network)
    return network


example_inputs = partial(example_images, size=224)
"""One batch of ImageNet-sized images; options as `models.parts.example_images`."""

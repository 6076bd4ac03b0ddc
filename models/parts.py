"""What the networks share: the type of their `norm` argument, seeded example inputs and He initialization."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

NormFactory = Callable[[int], nn.Module]
"""Makes a norm layer from its number of channels: `nn.BatchNorm2d`, `BatchRenorm2d`, a `functools.partial` of one."""


def seeded_normal(*shape: int, seed: int) -> Tensor:
    """Draw standard normal numbers that depend on `shape` and `seed` alone.

    Args:
        shape: Sizes of the result.
        seed: Of a generator of its own; torch's global one is left alone.

    Returns:
        A float32 tensor of that shape.
    """
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def initialize_convolutions(network: nn.Module) -> None:
    """Draw every convolution's weight from N(0, 2 / fan_out) in place and zero its bias.

    Source: He et al. 2015 (arXiv:1502.01852), section 2.2, backward form. The draw uses torch's global generator.

    Args:
        network: Its Conv and ConvTranspose weights are overwritten.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

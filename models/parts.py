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


def example_images(
    batch: int = 2, *, in_channels: int = 3, size: int = 32, spatial_dims: int = 2, seed: int = 0
) -> tuple[Tensor, ...]:
    """Give one batch of square images, or of volumes as deep as they are wide, of standard normal numbers.

    Args:
        batch: N.
        in_channels: C.
        size: H and W, and D of a volume, in pixels; each network says in its own `example_inputs` which it expects.
        spatial_dims: 2 for images, 3 for volumes.
        seed: Of the numbers.

    Returns:
        One tensor of shape (N, C, H, W) or (N, C, D, H, W).
    """
    return (seeded_normal(batch, in_channels, *[size] * spatial_dims, seed=seed),)


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

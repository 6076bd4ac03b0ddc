"""DenseNet-BC for small images: every layer reads all earlier ones.

Source: Huang et al. 2017 (arXiv:1608.06993), sections 3 and 4.2: three dense blocks of n = (L - 4) / 6 bottleneck
layers, transitions that halve the channels. The norm that opens a layer reads a concatenation that later layers read
too, so nothing behind it can absorb it; the one between the two convolutions of a layer folds.
"""

from functools import partial

import torch
from torch import Tensor, nn

from models.parts import NormFactory, example_images, initialize_convolutions
from renorm_onnx.errors import InputError


class DenseLayer(nn.Module):
    """Append `growth` channels: norm, ReLU, conv 1x1 to 4 * growth, norm, ReLU, conv 3x3."""

    def __init__(self, in_channels: int, growth: int, norm: NormFactory) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.norm2 = norm(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, in_channels + growth, H, W)."""
        inner = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(inner)))], dim=1)


def densenet(
    depth: int = 100,
    growth: int = 12,
    num_classes: int = 10,
    in_channels: int = 3,
    norm: NormFactory = nn.BatchNorm2d,
) -> nn.Sequential:
    """Build DenseNet-BC with compression 0.5.

    With the defaults: 99 norms, 769,162 parameters (0.8 M in the paper's table 2).

    Args:
        depth: L = 6n + 4 with n >= 1 layers in each of the three blocks.
        growth: k, channels that each layer appends.
        num_classes: Length of the output.
        in_channels: Of the images.
        norm: Makes each norm from its number of channels.

    Returns:
        A module from (N, in_channels, H, W) to logits (N, num_classes); H and W at least 4.

    Raises:
        InputError: `depth` is not 6n + 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise InputError(f"densenet: depth={depth!r}, expected 6 * n + 4 for some n >= 1, such as 40 or 100")
    channels = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)]
    for block in range(3):
        for _ in range((depth - 4) // 6):
            layers.append(DenseLayer(channels, growth, norm))
            channels += growth
        layers += [norm(channels), nn.ReLU()]
        if block < 2:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    initialize_convolutions(network)
    return network


example_inputs = partial(example_images, size=32)
"""One batch of CIFAR-sized images; options as `models.parts.example_images`."""

"""Wide residual networks for small images: WRN-d-k, the network of the batch renormalization experiment.

Source: Zagoruyko & Komodakis 2016 (arXiv:1605.07146), table 1 and figure 1(d), in the variant of the well-known Keras
batch renormalization experiment: the first block of a group has no norm in front, and each group is followed by one::

    image ── conv 3x3, 16 ── norm ── ReLU ── group(16k, stride 1) ── group(32k, 2) ── group(64k, 2) ── mean ── linear

    group:         first block ── (N - 1) identity blocks ── norm ── ReLU
    first block:   conv(stride) ── norm ── ReLU ── conv            +  conv 1x1(stride) of the block's input
    identity block: norm ── ReLU ── conv ── dropout ── norm ── ReLU ── conv   +  the block's input

with d = 6N + 4. No convolution has a bias. Of its norms, those behind a convolution fold backwards; the norm that opens
an identity block reads a value that the skip connection reads too, so only a fold forwards could remove it.
"""

from functools import partial

import torch
from torch import Tensor, nn

from models.parts import NormFactory, example_images, initialize_convolutions
from renorm_onnx.errors import InputError


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class FirstBlock(nn.Module):
    """Change the number of channels: conv, norm, ReLU, conv, plus a 1x1 convolution of the input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.norm = norm(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        inner: Tensor = self.conv2(torch.relu(self.norm(self.conv1(x))))
        skip: Tensor = self.skip(x)
        return inner + skip


class IdentityBlock(nn.Module):
    """Keep the shape: norm, ReLU, conv, dropout, norm, ReLU, conv, plus the input."""

    def __init__(self, channels: int, dropout: float, norm: NormFactory) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = _conv3x3(channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = norm(channels)
        self.conv2 = _conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        inner: Tensor = self.dropout(self.conv1(torch.relu(self.norm1(x))))
        inner = self.conv2(torch.relu(self.norm2(inner)))
        return inner + x


def _group(
    channels: tuple[int, int], stride: int, blocks: int, dropout: float, norm: NormFactory, *, closing_norm: bool
) -> nn.Sequential:
    in_channels, out_channels = channels
    layers: list[nn.Module] = [FirstBlock(in_channels, out_channels, stride, norm)]
    layers += [IdentityBlock(out_channels, dropout, norm) for _ in range(blocks - 1)]
    if closing_norm:
        layers += [norm(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)


def wide_resnet(
    depth: int = 16,
    width: int = 4,
    num_classes: int = 10,
    in_channels: int = 3,
    norm: NormFactory = nn.BatchNorm2d,
    dropout: float = 0.0,
    final_norm: bool = True,
) -> nn.Sequential:
    """Build WRN-`depth`-`width`.

    With the defaults: 16 convolutions, 13 norms, 2,748,890 parameters.

    Args:
        depth: 6N + 4 with N >= 1 blocks in each of the three groups.
        width: The factor k on the channels (16, 32, 64) of the groups.
        num_classes: Length of the output.
        in_channels: Of the images.
        norm: Makes each norm from its number of channels.
        dropout: Probability inside the identity blocks.
        final_norm: Whether the last group is followed by norm and ReLU too; `False` reproduces the reference
            implementation, which ends without.

    Returns:
        A module from (N, in_channels, H, W) to logits (N, num_classes); H and W at least 1.

    Raises:
        InputError: `depth` is not 6N + 4, or `width` is below 1.
    """
    if depth < 10 or (depth - 4) % 6:
        raise InputError(f"wide_resnet: depth={depth!r}, expected 6 * N + 4 for some N >= 1, such as 10, 16, 22 or 28")
    if width < 1:
        raise InputError(f"wide_resnet: width={width!r}, expected a factor of at least 1 on 16, 32 and 64 channels")
    blocks = (depth - 4) // 6
    widths = [16, 16 * width, 32 * width, 64 * width]
    groups = [
        _group((widths[i], widths[i + 1]), 1 if i == 0 else 2, blocks, dropout, norm, closing_norm=final_norm or i < 2)
        for i in range(3)
    ]
    network = nn.Sequential(
        _conv3x3(in_channels, 16),
        norm(16),
        nn.ReLU(),
        *groups,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], num_classes),
    )
    initialize_convolutions(network)
    return network


example_inputs = partial(example_images, size=32)
"""One batch of CIFAR-sized images; options as `models.parts.example_images`."""

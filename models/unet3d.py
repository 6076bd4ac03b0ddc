"""The 3-D U-Net for dense volumetric segmentation, where batches are small because volumes are large.

Source: Cicek et al. 2016 (arXiv:1606.06650), figure 2, with padded convolutions, so that the output has the input's
size. Convolutions have biases, up-convolutions have none, as the paper's count of 19,069,955 parameters implies.
"""

from functools import partial

import torch
from torch import Tensor, nn

from models.parts import NormFactory, example_images, initialize_convolutions


def _double_conv(in_channels: int, between: int, out_channels: int, norm: NormFactory) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(in_channels, between, 3, padding=1),
        norm(between),
        nn.ReLU(),
        nn.Conv3d(between, out_channels, 3, padding=1),
        norm(out_channels),
        nn.ReLU(),
    )


class UNet3d(nn.Module):
    """Contract by max pooling, expand by up-convolution, joining each level with its counterpart."""

    def __init__(self, in_channels: int, num_classes: int, base: int, levels: int, norm: NormFactory) -> None:
        super().__init__()
        # Level i works on base * 2**(i + 1) channels; doubling happens before the pooling (paper, section 2).
        widths = [base * 2 ** (level + 1) for level in range(levels)]
        inputs = [in_channels, *widths[:-1]]
        self.down = nn.ModuleList(_double_conv(c, w // 2, w, norm) for c, w in zip(inputs, widths, strict=True))
        self.pool = nn.MaxPool3d(2)
        self.up = nn.ModuleList(nn.ConvTranspose3d(w, w, 2, 2, bias=False) for w in widths[:0:-1])
        self.join = nn.ModuleList(_double_conv(w + 2 * w, w, w, norm) for w in widths[-2::-1])
        self.head = nn.Conv3d(widths[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, D, H, W) to logits (N, num_classes, D, H, W)."""
        skips = []
        for index, down in enumerate(self.down):
            x = down(x if index == 0 else self.pool(x))
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([skip, up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


def unet3d(
    in_channels: int = 3,
    num_classes: int = 3,
    base: int = 32,
    levels: int = 4,
    norm: NormFactory = nn.BatchNorm3d,
) -> UNet3d:
    """Build a 3-D U-Net.

    With the defaults: 14 norms, 19,069,955 parameters besides those of the norms.

    Args:
        in_channels: Of the volumes.
        num_classes: Channels of the output.
        base: Channels behind the first convolution.
        levels: Resolutions, at least 1; each but the first halves depth, height and width.
        norm: Makes each norm from its number of channels.

    Returns:
        A module from (N, in_channels, D, H, W) to (N, num_classes, D, H, W); D, H, W multiples of 2**(levels - 1).
    """
    network = UNet3d(in_channels, num_classes, base, levels, norm)
    initialize_convolutions(network)
    return network


example_inputs = partial(example_images, size=16, spatial_dims=3)
"""One batch of volumes; options as `models.parts.example_images`, `size` a multiple of 8 for four levels."""

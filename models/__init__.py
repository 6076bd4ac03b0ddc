"""Networks that use BatchRenorm, one file each: a constructor with a `norm` argument, and `example_inputs`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from models import densenet, mlp, mobilenet_v2, repvgg, unet3d, wide_resnet


@dataclass(frozen=True)
class Entry:
    """One network of the table.

    Attributes:
        build: Its constructor; takes `norm=` and the options its file documents.
        example_inputs: Its seeded inputs; takes `batch`, `seed=` and sizes.
        spatial_dims: 0 for (N, C), 2 for images, 3 for volumes; says which of BatchRenorm1d/2d/3d fits.
        small: Options of `build` for a network of the same structure that runs in milliseconds.
        small_inputs: Options of `example_inputs` that fit the small network.
    """

    build: Callable[..., nn.Module]
    example_inputs: Callable[..., tuple[Tensor, ...]]
    spatial_dims: int
    small: Mapping[str, Any] = field(default_factory=dict)
    small_inputs: Mapping[str, Any] = field(default_factory=dict)


MODELS: Mapping[str, Entry] = {
    "wide_resnet": Entry(
        wide_resnet.wide_resnet, wide_resnet.example_inputs, 2, {"depth": 16, "width": 1}, {"size": 16}
    ),
    "mobilenet_v2": Entry(
        mobilenet_v2.mobilenet_v2,
        mobilenet_v2.example_inputs,
        2,
        {"width": 0.25, "num_classes": 10},
        {"size": 32},
    ),
    "densenet": Entry(densenet.densenet, densenet.example_inputs, 2, {"depth": 16, "growth": 4}, {"size": 8}),
    "repvgg": Entry(
        repvgg.repvgg,
        repvgg.example_inputs,
        2,
        {"depths": (1, 2), "widths": (8, 16), "num_classes": 10},
        {"size": 16},
    ),
    "unet3d": Entry(unet3d.unet3d, unet3d.example_inputs, 3, {"base": 4, "levels": 3}, {"size": 8}),
    "mlp": Entry(mlp.mlp, mlp.example_inputs, 0, {"widths": (32, 32)}, {}),
}
"""Every network of this folder by its name; `python -m export` writes each of them."""

"""The CrossQ policy network: a multilayer perceptron with a norm in front of every Linear.

Source: Bhatt et al. 2024 (arXiv:1902.05605). A norm in front of a Linear folds only forwards,
into the weights that follow; no runtime does that by itself, so this is where folding gains most.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from models.parts import NormFactory, seeded_normal
from renorm_onnx.errors import InputError


def mlp(
    in_features: int = 17,
    widths: Sequence[int] = (256, 256),
    out_features: int = 6,
    norm: NormFactory = nn.BatchNorm1d,
) -> nn.Sequential:
    """Build norm, Linear, ReLU, norm, Linear, ReLU, ..., norm, Linear.

    The default sizes are those of a policy for a 17-dimensional observation and 6 actions (HalfCheetah).

    Args:
        in_features: Length of an observation.
        widths: Of the hidden layers.
        out_features: Length of the output.
        norm: Makes each norm from its number of features.

    Returns:
        A module from (N, in_features) to (N, out_features) with len(widths) + 1 norms.

    Raises:
        InputError: A size is below 1.
    """
    sizes = [in_features, *widths, out_features]
    if min(sizes) < 1:
        raise InputError(f"mlp: layer sizes {tuple(sizes)}, expected at least 1 each")
    layers: list[nn.Module] = []
    for size, following in pairwise(sizes):
        layers += [norm(size), nn.Linear(size, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def example_inputs(batch: int = 2, *, in_features: int = 17, seed: int = 0) -> tuple[Tensor, ...]:
    """Give one batch of observations of standard normal numbers.

    Args:
        batch: N.
        in_features: Length of an observation.
        seed: Of the numbers.

    Returns:
        One tensor of shape (N, in_features).
    """
    return (seeded_normal(batch, in_features, seed=seed),)

"""Other libraries' batch renormalization layers, replaced by ours with equal evaluation.

None of the libraries is imported: a layer is known by the class that defines its forward and by what it holds. Each is
a row of `FOREIGN_LAYERS`; another library is another row. At evaluation every one of them computes, per channel,
gamma * (x - mean) / s + beta, with one of two things kept in its buffers::

    "var"      s = sqrt(var + eps)        taken over as it is
    "sigma"    s itself                   eps = min(its eps, smallest s^2), running_var = s^2 - eps
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from renorm_onnx.errors import InputError
from renorm_onnx.layers.functional import Stat
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, _BatchRenorm
from renorm_onnx.layers.schedules import CONSTANT, PAPER, HardSwitch, Schedule, linear
from renorm_onnx.layers.swap import check_module, home_of, plan_swaps, quoted, start_second_set, swap_layers

logger = logging.getLogger(__name__)


class BatchRenormNd(BatchRenorm1d):
    """Batch renormalization of (N, C) up to (N, C, D, H, W), for layers whose own class takes any rank."""

    ranks = (2, 3, 4, 5)  # type: ignore[assignment]


@dataclass(frozen=True)
class ForeignLayer:
    """What a layer of another library is called, and where it keeps what ours needs; all names are attributes."""

    library: str
    ours: dict[str, type[_BatchRenorm]]  # by name of the class, or of a base, that stands for a rank
    home: str  # name of the class that defines forward
    marks: tuple[str, ...]  # attributes that tell it from namesakes
    mean: str
    spread: str
    kind: Literal["var", "sigma"]  # what `spread` holds
    weight: str
    bias: str
    steps: str | None  # None: does not count
    r_max: str | float  # a name, or the value that the class fixes
    d_max: str | float
    stat: Stat  # of ours, what comes nearest in training
    schedule: Callable[[Any], Schedule]


def _torchrl_schedule(layer: Any) -> Schedule:
    if layer.warmup_steps <= 0:
        return CONSTANT
    return linear(0, layer.warmup_steps) if layer.smooth else HardSwitch(layer.warmup_steps)


def _uncounted_schedule(layer: Any) -> Schedule:
    """Bounds that grew with the samples, uncounted: their end if they are there, else the paper's way to it."""
    return CONSTANT if float(layer.r_max) >= layer.max_r_max else PAPER


_STANDARD: dict[str, Any] = {"mean": "running_mean", "weight": "weight", "bias": "bias", "steps": "num_batches_tracked"}
_BOX: dict[str, Any] = {
    "mean": "running_avg_mean",
    "spread": "running_avg_std",
    "kind": "sigma",
    "weight": "gamma",
    "bias": "beta",
}
_VAR: dict[str, Any] = {"spread": "running_var", "kind": "var"}
_TORCHRL: dict[str, Any] = {**_STANDARD, **_VAR, "r_max": "max_r", "d_max": "max_d", "schedule": _torchrl_schedule}
_MF1024: dict[str, Any] = {**_BOX, "r_max": "max_r_max", "d_max": "max_d_max", "schedule": _uncounted_schedule}
_RANKED: dict[str, type[_BatchRenorm]] = {
    "BatchRenorm1d": BatchRenorm1d,
    "BatchRenorm2d": BatchRenorm2d,
    "BatchRenorm3d": BatchRenorm3d,
}

FOREIGN_LAYERS: tuple[ForeignLayer, ...] = (
    ForeignLayer(
        library="torchrl",
        ours={"BatchRenorm1d": BatchRenormNd},
        home="BatchRenorm1d",
        marks=("warmup_steps", "smooth", "max_r"),
        stat="var_unbiased",
        **_TORCHRL,
    ),
    ForeignLayer(
        library="torch_em",
        ours=_RANKED,
        home="BatchRenormNd",
        marks=("warmup_steps", "smooth", "max_r"),
        stat="var_unbiased",
        **_TORCHRL,
    ),
    ForeignLayer(
        library="stable-baselines3-contrib",
        ours={"BatchRenorm": BatchRenorm1d},
        home="BatchRenorm",
        marks=("warmup_steps", "affine"),
        mean="ra_mean",
        spread="ra_var",
        kind="var",
        weight="scale",
        bias="bias",
        steps="steps",
        r_max="rmax",
        d_max="dmax",
        stat="var_unbiased",
        schedule=lambda layer: HardSwitch(layer.warmup_steps + 1),  # it asks whether steps > warmup_steps
    ),
    ForeignLayer(
        library="avalanche",
        ours={"BatchRenorm2D": BatchRenorm2d},
        home="BatchRenorm2D",
        marks=("r_max_inc_step",),
        steps=None,
        stat="sigma",
        **_MF1024,
    ),
    ForeignLayer(
        library="mf1024/Batch-Renormalization-PyTorch",
        ours={"BatchRenormalization2D": BatchRenorm2d},
        home="BatchRenormalization2D",
        marks=("r_max_inc_step",),
        steps=None,
        stat="sigma",
        **_MF1024,
    ),
    ForeignLayer(
        library="google-research/corenet",
        ours={"BatchRenorm": BatchRenormNd},
        home="BatchRenorm",
        marks=("num_batches_tracked",),
        r_max=3.0,
        d_max=5.0,
        stat="var_unbiased",
        schedule=lambda layer: PAPER,
        **_STANDARD,
        **_VAR,
    ),
    ForeignLayer(
        library="ludvb/batchrenorm",
        ours=_RANKED,
        home="BatchRenorm",
        marks=("affine", "num_batches_tracked"),
        spread="running_std",
        kind="sigma",
        r_max=3.0,
        d_max=5.0,
        stat="sigma",
        schedule=lambda layer: PAPER,
        **_STANDARD,
    ),
)


def adopt(module: nn.Module, **options: Any) -> nn.Module:
    """Replace other libraries' batch renormalization layers by ours, in place but for the root.

    For layers of torchrl, stable-baselines3-contrib, avalanche, and those of `FOREIGN_LAYERS` besides. Evaluation is
    equal within rounding. Training goes on by Algorithm 1 from the same statistics, step and bounds, with the schedule
    that comes nearest; it does not repeat their deviations from the paper.

    Parameters stay the same objects, so an optimizer goes on; where their shape becomes (C,) (avalanche keeps
    (1, C, 1, 1)), an optimizer that has stepped must be made anew. Adopt a live module: avalanche's statistics are not
    in its state dict. Subclasses with a forward of their own are left alone and named in a logged warning.

    Args:
        module: The model; may itself be such a layer.
        **options: For each layer instead of what it has, as in `BatchRenorm2d`: `r_max`, `d_max`, `schedule`, `stat`,
            `momentum`, `renorm_momentum`, `virtual_batch_size`.

    Returns:
        `module`, or its replacement if it is itself such a layer.

    Raises:
        InputError: `module` is no module.
        InputError: A layer's statistics were never learned or were lost, or a value cannot be used. The model is then
            as it was.
        TypeError: `options` names something that no layer takes.
    """
    check_module(module, "adopt")
    alone: list[str] = []

    def build(name: str, old: nn.Module) -> nn.Module | None:
        row = _row(old)
        if row is None:
            return None
        if isinstance(row, str):
            alone.append(f"{quoted(name)} ({row})")
            return None
        try:
            return _adopted(row, old, options)
        except InputError as error:
            raise InputError(f"adopt: {quoted(name)} of {row.library}: {error}") from None

    swaps = plan_swaps(module, build)
    if alone:
        logger.warning("adopt: left alone %s", "; ".join(alone))
    elif not swaps:
        logger.warning("adopt: found no layer of %s", ", ".join(row.library for row in FOREIGN_LAYERS))
    for swap in swaps:
        _flatten_parameters(swap.new)
    return swap_layers(module, swaps)


def _row(module: nn.Module) -> ForeignLayer | str | None:
    """The row of a layer; or why it cannot be replaced though it derives from one; or None."""
    if isinstance(module, _BatchRenorm):
        return None
    kinds = [kind.__name__ for kind in type(module).__mro__]
    home = home_of(module, "forward") or nn.Module
    for row in FOREIGN_LAYERS:
        needed = (*row.marks, row.mean, row.spread, row.weight, row.bias)
        if row.home not in kinds or not all(hasattr(module, name) for name in needed):
            continue
        if "forward" in vars(module):
            return "its forward was replaced on the instance"
        if home.__name__ != row.home or not _ranks(row, module):
            return f"{type(module).__name__} defines its own forward"
        return row
    return None


def _ranks(row: ForeignLayer, module: nn.Module) -> type[_BatchRenorm] | None:
    return next((row.ours[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in row.ours), None)


def _adopted(row: ForeignLayer, old: nn.Module, options: dict[str, Any]) -> _BatchRenorm:
    """One of our layers with the state of `old`, which is not changed."""
    kind = _ranks(row, old)
    assert kind is not None
    mean, spread, weight = (_vector(getattr(old, name)) for name in (row.mean, row.spread, row.weight))
    eps, momentum = float(_value(old, "eps")), _value(old, "momentum")
    learned = True
    if row.kind == "sigma":
        learned = _check_sigma(row, old, mean, spread)
        spread, eps = _variance(spread, eps) if learned else (torch.ones_like(spread), eps)
        mean = mean if learned else torch.zeros_like(mean)
    own = {
        "momentum": None if momentum is None else float(f"{float(momentum):.6g}"),  # some keep a float32 tensor
        "r_max": float(_value(old, row.r_max)),
        "d_max": float(_value(old, row.d_max)),
        "stat": row.stat,
        "schedule": row.schedule(old),
    }
    affine = bool(getattr(old, "affine", True))
    new = kind(mean.numel(), eps, affine=affine, bias=True, device="meta", **{**own, **options})
    if new.affine:
        new._parameters["weight"], new._parameters["bias"] = getattr(old, row.weight), getattr(old, row.bias)
    new._buffers["running_mean"], new._buffers["running_var"] = mean.to(weight.device), spread.to(weight.device)
    steps = 0 if row.steps is None else getattr(old, row.steps)
    new._buffers["num_batches_tracked"] = torch.as_tensor(steps, dtype=torch.long, device=weight.device)
    start_second_set(new)
    return new


def _flatten_parameters(layer: nn.Module) -> None:
    """Give the parameters of `layer` the shape (C,), in place: the objects stay, so an optimizer still holds them."""
    for parameter in layer.parameters(recurse=False):
        if parameter.dim() != 1:
            parameter.data = parameter.data.reshape(-1)
            parameter.grad = None if parameter.grad is None else parameter.grad.reshape(-1)


def _value(module: nn.Module, name: str | float) -> Any:
    return getattr(module, name) if isinstance(name, str) else name


def _vector(values: Tensor) -> Tensor:
    """(1, C, 1, ...) -> (C,); the same tensor where it is a vector already."""
    return values if values.dim() == 1 and not isinstance(values, nn.Parameter) else values.detach().reshape(-1)


def _check_sigma(row: ForeignLayer, old: nn.Module, mean: Tensor, sigma: Tensor) -> bool:
    """Whether the layer has learned statistics; its initial standard deviations, all 0, are no statistics.

    Raises:
        InputError: Weights were learned but statistics were not, or they cannot be used.
    """
    if bool((sigma == 0).all()):
        if bool((getattr(old, row.weight) == 1).all()) and bool((getattr(old, row.bias) == 0).all()):
            return False
        raise InputError(
            f"{row.spread} is 0 everywhere though {row.weight} and {row.bias} have been trained, expected learned "
            "statistics; they are not in that library's state dict, so adopt the module that was trained"
        )
    if not (bool(torch.isfinite(sigma).all()) and bool((sigma > 0).all()) and bool(torch.isfinite(mean).all())):
        raise InputError(f"{row.spread} lies in [{sigma.min().item()}, {sigma.max().item()}], expected numbers > 0")
    return True


def _variance(sigma: Tensor, eps: float) -> tuple[Tensor, float]:
    """running_var and eps with sqrt(running_var + eps) = sigma; the given eps where no variance falls below 0 by it."""
    square = sigma.detach().to("cpu", torch.float64).square()
    eps = min(eps, square.min().item())
    assert math.isfinite(eps)
    return (square - eps).clamp(min=0).to(sigma.device, sigma.dtype), eps

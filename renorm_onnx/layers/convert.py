"""BatchNorm to BatchRenorm in a model, and back.

Both are the same affine map at evaluation, by the same buffers under the same names, so nothing is computed here: the
new layer takes over the very parameters and buffers of the old one, and evaluation is equal to the bit.
"""

import functools
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from renorm_onnx.errors import InputError
from renorm_onnx.layers.activated import Activated, BatchRenormAct2d
from renorm_onnx.layers.distributed import SyncBatchRenorm, SyncBatchRenormAct
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, _BatchRenorm
from renorm_onnx.layers.schedules import CONSTANT, Bounds, Schedule, as_schedule, check_bounds
from renorm_onnx.layers.swap import (
    carry_attributes,
    check_module,
    home_of,
    plan_swaps,
    quoted,
    refuse_lazy,
    share_state,
    swap_layers,
    why_not,
)

logger = logging.getLogger(__name__)

_RENORM_OF: dict[type[_BatchNorm], type[_BatchRenorm]] = {
    nn.BatchNorm1d: BatchRenorm1d,
    nn.BatchNorm2d: BatchRenorm2d,
    nn.BatchNorm3d: BatchRenorm3d,
    nn.SyncBatchNorm: SyncBatchRenorm,
}  # torch's layer for the ranks of input that one of ours takes; where it takes more, only SyncBatchNorm does.
# Subclasses of torch's layers that go on with their modules `drop` and `act`: library and class that defines forward.
_ACTIVATED_OF: dict[tuple[str, str], type[Activated]] = {
    ("timm", "BatchNormAct2d"): BatchRenormAct2d,
    ("timm", "SyncBatchNormAct"): SyncBatchRenormAct,
}
# Names of layers that normalize by running statistics and do not derive from torch's: FrozenBatchNorm2d, InPlaceABN...
_UNRELATED = re.compile(r"batch_?norm|abn$", re.IGNORECASE)
# A call of batch norm in the code of one module: traced, or scripted.
_SCRIPTED = re.compile(r'aten::batch_norm\b|prim::Constant\[name="batch_norm"\]')
_NORM_BY_RANKS: dict[tuple[int, ...], type[_BatchNorm]] = {
    BatchRenorm1d.ranks: nn.BatchNorm1d,
    BatchRenorm2d.ranks: nn.BatchNorm2d,
    BatchRenorm3d.ranks: nn.BatchNorm3d,
}

# Beyond this step a schedule that still moves is taken to have no end.
_FOREVER = 2**40
_SPREAD = sorted({int(1.1**k) for k in range(int(math.log(_FOREVER, 1.1)))})


def convert_batchnorm(
    module: nn.Module, *, pretrained: bool | None = None, strict: bool = False, **options: Any
) -> nn.Module:
    """Turn every BatchNorm of a model into BatchRenorm, in place but for the root.

    `BatchNorm1d`, `2d`, `3d` and `SyncBatchNorm`, wherever they stand. Evaluation is equal to the bit. Parameters and
    buffers stay the same tensors, so optimizers, tied weights and `DistributedDataParallel` go on; a layer used twice
    stays one layer; training flags, hooks and attributes such as `qconfig` are kept. A layer without a counter, which
    torch allows, gets one. eps and momentum stay those of
    each layer (torch's default momentum is 0.1; for batch renormalization the paper uses 0.01).

    timm's `BatchNormAct2d` and `SyncBatchNormAct` keep the activation that they apply, under its name.

    Left alone, and named in a logged warning: other subclasses with a forward of their own, layers under
    parametrization or pruning, whatever else their state alone does not describe, batch normalization that does not
    derive from torch's (torchvision's `FrozenBatchNorm2d`), and models that were scripted, traced or exported, in which
    it is no layer.

    A schedule says how to come from batch normalization to renormalization, a way that a pretrained network has
    behind it. So where a layer has been trained (it has counted a batch, or its statistics are not 0 and 1),
    `num_batches_tracked` is raised to the first step at which the schedule has reached its end; a checkpoint keeps
    that. A layer with `momentum=None`, whose counter is the weight of its cumulative average, gets `schedule=None`
    instead, and so does one whose schedule has no end, as one that goes in cycles. For its end a schedule is asked far
    beyond any training; a function that cannot answer there, as a table, is for `pretrained=False`.

    >>> convert_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))[1].momentum
    0.1

    Args:
        module: The model; may itself be a BatchNorm.
        pretrained: Whether the layers start at the schedule's end; None decides for each layer as above.
        strict: Refuse a model of which a BatchNorm would be left alone. Nothing is changed then.
        **options: For each layer, as in `BatchRenorm2d`: `r_max`, `d_max`, `schedule`, `stat`, `momentum`, `eps`...

    Returns:
        `module`, or its replacement if it is itself a BatchNorm.

    Raises:
        InputError: `module` is no module.
        InputError: A lazy layer has not seen a batch yet; a cumulative average has no count; an option or a layer's own
            value cannot be used; `schedule` fails where its end is looked for; `strict` and a layer would be left
            alone. The model is then as it was.
        TypeError: `options` names something that no layer takes.
    """
    check_module(module, "convert_batchnorm")
    schedule = as_schedule(options.pop("schedule", "paper"), "convert_batchnorm")
    bounds = _checked_options(options)
    alone: list[str] = []
    trained: list[_BatchRenorm] = []

    def build(name: str, old: nn.Module) -> nn.Module | None:
        if not isinstance(old, _BatchNorm):
            if _is_unrelated(old):
                alone.append(f"{quoted(name)} ({type(old).__name__} does not derive from torch's BatchNorm)")
            elif _is_captured(old):
                alone.append(f"{quoted(name)} (captured code; convert the model before it is scripted or exported)")
            return None
        refuse_lazy(old, "convert_batchnorm", name)
        known = _ACTIVATED_OF.get(_origin(old))
        followers = () if known is None else known.followers
        reason = why_not(old, known=None if known is None else home_of(old, "forward"), children=followers)
        if reason:
            alone.append(f"{quoted(name)} ({reason})")
            return None
        new = _renormed(name, old, schedule, options)
        if pretrained if pretrained is not None else has_learned(old):
            trained.append(new)
        return new

    swaps = plan_swaps(module, build)
    if alone:
        if strict:
            raise InputError(f"convert_batchnorm(strict=True): cannot convert {'; '.join(alone)}")
        logger.warning("convert_batchnorm: left alone %s", "; ".join(alone))
    end = _end(schedule, bounds) if trained else None
    for layer in trained:
        _start_at_end(layer, end)
    logger.info("convert_batchnorm: %d layers, of which %d start at the schedule's end", len(swaps), len(trained))
    return swap_layers(module, swaps)


def _checked_options(options: dict[str, Any]) -> tuple[float, float]:
    """Refuse options before the first layer is looked at; return the bounds they set."""
    for name in ("num_features", "affine", "bias", "track_running_stats", "device", "dtype"):
        if name in options:
            raise InputError(
                f"convert_batchnorm: {name}={options[name]!r}, expected no such option: it is each layer's own"
            )
    probe = BatchRenorm2d(1, device="meta", **options)
    return probe.r_max, probe.d_max


def _renormed(name: str, old: _BatchNorm, schedule: Schedule, options: dict[str, Any]) -> _BatchRenorm:
    """A BatchRenorm with the state of `old`."""
    kind: Callable[..., _BatchRenorm] = next(ours for theirs, ours in _RENORM_OF.items() if isinstance(old, theirs))
    activated = _ACTIVATED_OF.get(_origin(old))
    if activated is not None:
        followers = {part: old._modules.get(part) or nn.Identity() for part in activated.followers}
        kind = functools.partial(activated, origin=type(old), **followers)
    # num_features may be stale (channel pruning edits the tensors); batch norm never reads it, our check does.
    state = [tensor for tensor in (old.running_mean, old.weight) if tensor is not None]
    features = state[0].numel() if state else old.num_features
    own = {"eps": old.eps, "momentum": old.momentum}
    try:
        new = kind(
            features,
            affine=old.affine,
            track_running_stats=old.track_running_stats,
            device="meta",
            schedule=schedule,
            **{**own, **options},
        )
    except InputError as error:
        raise InputError(f"convert_batchnorm: {quoted(name)}: {error}") from None
    carry_attributes(new, old)
    if isinstance(old, nn.SyncBatchNorm) and isinstance(new, SyncBatchRenorm):
        new.process_group = old.process_group
    share_state(new, old)
    if new.num_batches_tracked is None and new.running_mean is not None:
        if new.momentum is None and has_learned(old):
            raise InputError(
                f"convert_batchnorm: {quoted(name)} has momentum=None and num_batches_tracked=None, expected a count, "
                "which is the weight of its cumulative average; set num_batches_tracked, or pass momentum"
            )
        new._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=new.running_mean.device)
    return new


def _origin(layer: nn.Module) -> tuple[str, str]:
    """The library and the name of the class that defines the forward of `layer`."""
    home = home_of(layer, "forward") or nn.Module
    return home.__module__.partition(".")[0], home.__name__


def _is_unrelated(module: nn.Module) -> bool:
    """Whether a module is batch normalization of its own kind: by its name and by what it holds."""
    if isinstance(module, _BatchRenorm) or not _UNRELATED.search(type(module).__name__):
        return False
    return all(isinstance(getattr(module, name, None), torch.Tensor) for name in ("running_mean", "running_var"))


def _is_captured(module: nn.Module) -> bool:
    """Whether a module's code is a graph, of TorchScript or torch.fx, in which batch norm is a call and not a layer."""
    if isinstance(module, torch.jit.ScriptModule):
        own = "renorm" in module.original_name.lower()
        return not own and hasattr(module, "forward") and _SCRIPTED.search(str(module.graph)) is not None
    if not isinstance(module, torch.fx.GraphModule):
        return False
    return any(node.op == "call_function" and "batch_norm" in str(node.target) for node in module.graph.nodes)


def has_learned(layer: _BatchNorm | _BatchRenorm) -> bool:
    """Whether the layer's running statistics come from data; `update_stats` changes them, but counts no step."""
    mean, var, steps = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if mean is None or var is None or mean.is_meta:
        return False
    return bool((steps is not None and steps > 0) or mean.any() or (var != 1).any())


def _end(schedule: Schedule, bounds: Bounds) -> int | None:
    """The first step from which on the schedule no longer moves, or None if it moves for ever.

    Raises:
        InputError: The schedule does not answer as far out as its end has to be looked for.
    """

    def at(step: int) -> Bounds:
        try:
            found = schedule.bounds(step, *bounds)
        except Exception as error:
            raise InputError(
                f"convert_batchnorm: schedule {schedule!r} was asked for step {step}, because trained layers start at "
                f"its end, and raised {type(error).__name__}: {error}; let it answer at every step, or pass "
                "pretrained=False to start where the layers' num_batches_tracked is"
            ) from error
        return check_bounds(found, f"convert_batchnorm: schedule {schedule!r} at step {step} returned")

    last = at(2 * _FOREVER)
    before = -1  # not arrived
    while before < _FOREVER:
        after = _FOREVER  # arrived, unless it never does
        while after - before > 1:
            middle = (before + after) // 2
            before, after = (before, middle) if at(middle) == last else (middle, after)
        # Halving takes for granted that what has arrived stays; what goes in cycles leaves again.
        left = [step for k in _SPREAD for step in (after + k, 2 * _FOREVER - k) if at(step) != last]
        if not left:
            return after
        before = max(left)
    return None


def _start_at_end(layer: _BatchRenorm, end: int | None) -> None:
    """Let a layer, in place, go on as if the schedule lay behind it."""
    if layer.num_batches_tracked is None:
        return
    if end is None or layer.momentum is None:
        layer.schedule = CONSTANT
    else:
        layer.num_batches_tracked.clamp_(min=end)


def to_batchnorm(module: nn.Module) -> nn.Module:
    """Turn every BatchRenorm of a model into torch's BatchNorm, in place but for the root.

    For handing a trained model to code that knows torch's layers alone, such as `torch.ao.quantization`, before its
    `fuse_modules` or `prepare*`: evaluation is equal to the bit, parameters and buffers stay the same tensors. Training
    is not: it normalizes by the batch without r and d from then on. `SyncBatchRenorm`, and a layer adopted from a
    library whose layer takes any rank, become `torch.nn.SyncBatchNorm`, which alone of torch's layers takes any rank
    and is ordinary batch norm where no process group is initialized. A layer that was timm's becomes timm's again.

    Left alone, and named in a logged warning: subclasses with a forward of their own.

    Args:
        module: The model; may itself be a BatchRenorm.

    Returns:
        `module`, or its replacement if it is itself a BatchRenorm.

    Raises:
        InputError: `module` is no module, or a lazy layer has not seen a batch yet.
    """
    check_module(module, "to_batchnorm")
    alone: list[str] = []

    def build(name: str, old: nn.Module) -> nn.Module | None:
        if not isinstance(old, _BatchRenorm):
            return None
        refuse_lazy(old, "to_batchnorm", name)
        followers = old.followers if isinstance(old, Activated) else ()
        reason = why_not(old, children=followers)
        if reason:
            alone.append(f"{quoted(name)} ({reason})")
            return None
        kind = old.origin if isinstance(old, Activated) else _NORM_BY_RANKS.get(old.ranks, nn.SyncBatchNorm)
        with torch.device("meta"):
            new = kind(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
        for part in followers:
            setattr(new, part, getattr(old, part))
        if isinstance(old, SyncBatchRenorm) and isinstance(new, nn.SyncBatchNorm):
            new.process_group = old.process_group
        carry_attributes(new, old, but=_OUR_ATTRIBUTES)
        return share_state(new, old)

    swaps = plan_swaps(module, build)
    if alone:
        logger.warning("to_batchnorm: left alone %s", "; ".join(alone))
    return swap_layers(module, swaps)


# What a converted layer leaves behind, so that its pickle does not need this package.
_OUR_ATTRIBUTES = frozenset(vars(SyncBatchRenorm(1, device="meta"))) | {"origin"}

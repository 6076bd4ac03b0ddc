"""One training step of a layer: which bounds hold, which path computes it, what is learned from it.

The order is Algorithm 1's: r and d come from the running statistics as the previous step left them; afterwards those
statistics move, once.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from renorm_onnx.errors import InputError
from renorm_onnx.layers import functional, kernels, recomputation
from renorm_onnx.layers.clock import HostClock
from renorm_onnx.layers.functional import BatchStatistics
from renorm_onnx.layers.recomputation import Corrections, Memory
from renorm_onnx.layers.schedules import Schedule, float64

_PLAIN = (1.0, 0.0)


class Layer(Protocol):
    """What a step needs of the layer that takes it."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    num_features: int
    ranks: tuple[int, ...]
    track_running_stats: bool
    eps: float
    momentum: float | None
    renorm_momentum: float | None
    virtual_batch_size: int | None
    r_max: float
    d_max: float
    stat: str
    schedule: Schedule
    _buffers: dict[str, Tensor | None]
    _parameters: dict[str, torch.nn.Parameter | None]
    _memory: Memory
    _clock: HostClock

    @property
    def weight(self) -> Tensor | None:
        """Return gamma, shape (C,), or None for 1."""

    @property
    def bias(self) -> Tensor | None:
        """Return beta, shape (C,), or None for 0."""

    def _batch_statistics(self, x: Tensor, mask: Tensor | None) -> BatchStatistics: ...

    def _normalize(self, x: Tensor, mask: Tensor | None, batch: BatchStatistics, r: Tensor, d: Tensor) -> Tensor: ...

    def _statistics_are_its_own(self) -> bool: ...


class Reference(NamedTuple):
    """Where r and d are measured from."""

    mean: Tensor
    sigma: Tensor
    r_max: float | Tensor
    d_max: float | Tensor
    eps: float | Tensor  # a 0-d tensor on the native path, where adding a number to a vector is slow


class Part(NamedTuple):
    """What one ghost batch, or the whole batch, came to."""

    y: Tensor
    run: Corrections
    spread: Tensor  # as functional.observed_spread
    size: int | Tensor


def take_step(layer: Layer, x: Tensor, mask: Tensor | None) -> Tensor:
    """Normalize x by corrected batch statistics and move the layer's running ones, in place.

    Args:
        layer: In training mode, with running statistics.
        x: Shape (N, C, *), checked.
        mask: None, or valid positions, shape (N, *), checked.

    Returns:
        y of the shape and type of x.

    Raises:
        InputError: As `counter_of`, or the schedule returns bounds that cannot be used, or `vmap` or `functionalize`
            has taken x, but not the statistics.
    """
    step = counter_of(layer)
    eager = kernels.is_eager() and not isinstance(x, FakeTensor)
    if not eager and not torch.compiler.is_compiling():
        _refuse_captured_statistics(layer, x)
    parts = split(layer, x, mask)
    if eager and layer._memory.used and recomputation.is_repeated():
        runs = _repeated_runs(layer, parts)
        if runs:
            return _joined([_repeat(layer, *part, run) for part, run in zip(parts, runs, strict=True)])
    kept = eager and recomputation.may_be_repeated()
    unseen = recomputation.unseen if kept else nullcontext
    if (eager or torch.compiler.is_compiling()) and x.numel() == 0 and layer._statistics_are_its_own():
        if kept:
            layer._memory.keep(recomputation.NOTHING)
        if layer.momentum is not None:
            step.add_(1)
        return _of_nothing(layer, x)
    with unseen():
        # Elsewhere the bounds are computed where the counter is: on any device, and in any form of it.
        now = layer._clock.read(step) if kernels.available(step) else None
        reference = _reference(layer, x, step, now)
    done = [_run(layer, x_part, mask_part, reference, unseen) for x_part, mask_part in parts]
    with unseen():
        for part in done if kept else ():
            layer._memory.keep(part.run)
        counted = _learn(layer, done, reference, _momentum(layer, step, now), masked=mask is not None)
        step.add_(counted)
        if not isinstance(counted, Tensor):  # the host knows
            layer._clock.advanced(step)
    return _joined([part.y for part in done])


def _refuse_captured_statistics(layer: Layer, x: Tensor) -> None:
    mean = layer._buffers["running_mean"]
    if kernels.is_mapped(x) and mean is not None and not kernels.is_mapped(mean):
        raise InputError(
            f"{type(layer).__name__}: vmap or functionalize has taken x but not running_mean, which training writes in "
            "place; pass the buffers as arguments too, as with torch.func.functional_call, or call eval() first, or "
            "use track_running_stats=False"
        )


def counter_of(layer: Layer) -> Tensor:
    """Return the step of a layer, which torch's layers can do without and a schedule cannot.

    Raises:
        InputError: Somebody has taken it away.
    """
    step = layer.num_batches_tracked
    if step is None:
        raise InputError(
            f"{type(layer).__name__}: num_batches_tracked is None, expected a counter because the schedule of r and d "
            "goes by it; set it to torch.tensor(0)"
        )
    return step


def _of_nothing(layer: Layer, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)


def _momentum(layer: Layer, step: Tensor, now: int | None) -> float | Tensor:
    """The share of this batch: a cumulative average gives the n-th batch 1/n."""
    if layer.momentum is not None:
        return layer.momentum
    return 1 / (now + 1) if now is not None else (float64(step) + 1).reciprocal()


def split(layer: Layer, x: Tensor, mask: Tensor | None) -> Sequence[tuple[Tensor, Tensor | None]]:
    """Return the ghost batches of x with their masks, each of at least `virtual_batch_size` samples.

    Args:
        layer: Says how many samples a ghost batch has.
        x: Shape (N, C, *).
        mask: None, or of shape (N, *).

    Raises:
        InputError: A ghost batch has one value per channel.
    """
    if layer.virtual_batch_size is None or x.size(0) < 2 * layer.virtual_batch_size:
        return ((x, mask),)
    groups = x.size(0) // layer.virtual_batch_size
    xs = x.tensor_split(groups)
    if xs[-1].numel() == xs[-1].size(1):
        raise InputError(
            f"{type(layer).__name__}: {functional.ONE_VALUE} {tuple(xs[-1].shape)} of one ghost batch; "
            f"virtual_batch_size={layer.virtual_batch_size} is too small for x of shape {tuple(x.shape)}"
        )
    masks = [None] * groups if mask is None else mask.tensor_split(groups)
    return list(zip(xs, masks, strict=True))


def _joined(ys: Sequence[Tensor]) -> Tensor:
    return ys[0] if len(ys) == 1 else torch.cat(list(ys))


def _reference(layer: Layer, x: Tensor, step: Tensor, now: int | None) -> Reference:
    """The statistics and bounds that hold at this step, with numbers as bounds if the host knows the step."""
    which = "running" if layer.renorm_momentum is None else "renorm"
    mean, var = layer._buffers[f"{which}_mean"], layer._buffers[f"{which}_var"]
    assert mean is not None
    assert var is not None
    kind = functional.accumulation_type(x)
    bounds: tuple[float | Tensor, float | Tensor]
    if now is None:
        bounds = layer.schedule.bounds_on_device(step, layer.r_max, layer.d_max)
        eps: float | Tensor = layer.eps
    else:
        bounds = layer.schedule.checked(now, layer.r_max, layer.d_max, type(layer).__name__)
        eps = kernels.constant(layer.eps, kind)
    var = var if var.dtype == kind else var.to(kind)
    return Reference(mean, functional.deviation(var, eps), bounds[0], bounds[1], eps)


def _run(
    layer: Layer,
    x: Tensor,
    mask: Tensor | None,
    reference: Reference,
    unseen: Callable[[], AbstractContextManager[Any]],
) -> Part:
    if mask is None and _is_plain(reference) and layer._statistics_are_its_own() and kernels.available(x):
        y, mean, inverse = kernels.plain(x, layer.weight, layer.bias, layer.eps)
        with unseen():
            sigma = inverse.reciprocal()
            size = x.numel() // x.size(1)
            if layer.stat == "sigma":
                return Part(y, Corrections(mean, None, None), sigma, size)
            batch = BatchStatistics(mean, sigma.square().sub_(reference.eps).relu_(), size)
            return Part(y, Corrections(mean, None, None), functional.observed_spread(batch, sigma, layer.stat), size)
    batch = layer._batch_statistics(x, mask)
    with unseen():
        sigma = functional.deviation(batch.var, reference.eps)
        r, d = functional.corrections(batch.mean, sigma, *reference[:4])
        spread = functional.observed_spread(batch, sigma, layer.stat)
    y = layer._normalize(x, mask, batch, r, d)
    return Part(y, Corrections(batch.mean, r, d), spread, batch.size)


def _is_plain(reference: Reference) -> bool:
    # Never a question about a tensor's value: that would wait for the device, and hold for one step alone.
    return isinstance(reference.r_max, float) and (reference.r_max, reference.d_max) == _PLAIN


def _repeated_runs(layer: Layer, parts: Sequence[tuple[Tensor, Tensor | None]]) -> list[Corrections]:
    """What the runs that the present call repeats applied to each part; nothing where it repeats none."""
    found = []
    for x, mask in parts:
        run = layer._memory.repeated()
        if run is None and x.numel():
            run = layer._memory.nearest(layer._batch_statistics(x, mask).mean)
        if run is None:
            return []
        found.append(run)
    return found


def _repeat(layer: Layer, x: Tensor, mask: Tensor | None, run: Corrections) -> Tensor:
    """Apply again what the run under repetition applied; learn nothing."""
    if run is recomputation.NOTHING:
        return _of_nothing(layer, x)
    if run.r is None or run.d is None:
        return kernels.plain(x, layer.weight, layer.bias, layer.eps)[0]
    return layer._normalize(x, mask, layer._batch_statistics(x, mask), run.r, run.d)


def _learn(
    layer: Layer, parts: Sequence[Part], reference: Reference, momentum: float | Tensor, *, masked: bool
) -> int | Tensor:
    """Move the layer's statistics, in place, once, towards the mean over the ghost batches; return what that counts.

    It counts 1. In a cumulative average, whose weights are the counts, it counts 0 if no channel has learned anything:
    what the average started from would else keep a share for ever.
    """
    running_mean, running_var = layer._buffers["running_mean"], layer._buffers["running_var"]
    assert running_mean is not None
    assert running_var is not None
    mean, spread = parts[0].run.mean, parts[0].spread
    renorm_momentum: float | Tensor | None = layer.renorm_momentum
    taught: float | Tensor = 1
    if masked:
        # One valid position says nothing about a spread; such a part teaches nothing.
        # In the type of the statistics: a product of a bool with a Python number would be in torch's default type.
        sizes = torch.stack([torch.as_tensor(part.size, device=mean.device) for part in parts])  # (parts,)
        counts = (sizes >= 2).to(mean.dtype)
        share = counts / counts.sum().clamp(min=1)
        mean, spread = (_weighted(share, values) for values in _columns(parts))
        taught = counts.amax(0)
        momentum = momentum if layer.momentum == 0 else taught * momentum
        renorm_momentum = taught * renorm_momentum if renorm_momentum else renorm_momentum
    elif len(parts) > 1:
        mean, spread = (torch.stack(values).mean(0) for values in _columns(parts))
    eps, stat = reference.eps, layer.stat
    sigma: Tensor | None = reference.sigma
    renorm_mean, renorm_var = layer._buffers.get("renorm_mean"), layer._buffers.get("renorm_var")
    if renorm_mean is not None and renorm_var is not None and renorm_momentum is not None:
        functional.update_statistics(
            renorm_mean, renorm_var, mean, spread, momentum=renorm_momentum, eps=eps, stat=stat, sigma=sigma
        )
        sigma = None
    functional.update_statistics(
        running_mean, running_var, mean, spread, momentum=momentum, eps=eps, stat=stat, sigma=sigma
    )
    return 1 if layer.momentum is not None else ((spread < inf).any() * taught).to(torch.int64)


def _columns(parts: Iterable[Part]) -> tuple[list[Tensor], list[Tensor]]:
    return [part.run.mean for part in parts], [part.spread for part in parts]


def _weighted(share: Tensor, values: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(values))  # (parts, C)
    return (share.to(stacked.dtype).unsqueeze(1) * stacked).sum(0)

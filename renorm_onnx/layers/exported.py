"""A layer as operators that an exporter translates, inside `keep_ops`: its evaluation, and its training step.

The operators write nothing; the new statistics of a step are outputs, which are copied into the layer's buffers here.
"""

from math import inf

import torch
from torch import Tensor

from renorm_onnx.errors import InputError
from renorm_onnx.layers import functional
from renorm_onnx.layers import operators as operators  # registers them
from renorm_onnx.layers.schedules import float64
from renorm_onnx.layers.step import Layer, counter_of, split


def evaluate_exported(layer: Layer, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Normalize by the running statistics as one operator, into which the layer's options are written too.

    Args:
        layer: In evaluation.
        x: Shape (N, C, *), checked.
        mean: The layer's running mean, shape (C,).
        var: The layer's running variance, shape (C,).

    Returns:
        y of the shape and type of x.
    """
    y: Tensor = torch.ops.renorm_onnx.batch_renorm(x, *_gamma_and_beta(layer, mean), mean, var, *_numbers(layer))
    return y


def take_exported_step(layer: Layer, x: Tensor) -> Tensor:
    """Take one training step, as `step.take_step` does, as one operator per ghost batch; statistics move in place.

    The ghost batches are those of the example batch: a graph has a fixed number of them.

    Args:
        layer: In training mode, with running statistics.
        x: Shape (N, C, *), checked.

    Returns:
        y of the shape and type of x.

    Raises:
        InputError: As `counter_of`; or the layer splits its batch, and N is no number but a dimension that may change.
    """
    step = counter_of(layer)
    if layer.virtual_batch_size is not None and not isinstance(x.size(0), int):
        raise InputError(
            f"{type(layer).__name__}: virtual_batch_size={layer.virtual_batch_size} splits the batch, and a graph has "
            "a fixed number of parts; leave the batch out of dynamic_shapes, or set virtual_batch_size=None"
        )
    parts = [part for part, _ in split(layer, x, None)]
    outs = [_operator(layer, part, step) for part in parts]
    with torch.no_grad():
        finite = None if len(parts) == 1 else _all_finite(parts)
        for i, name in enumerate(_state(layer)):
            buffer, values = layer._buffers[name], [out[1 + i] for out in outs]
            assert buffer is not None
            # One part that is not finite keeps the mean over all from being so: then none of them teaches.
            buffer.copy_(values[0] if finite is None else torch.where(finite, _joined(name, values, layer), buffer))
        step.add_(1)
    return outs[0][0] if len(outs) == 1 else torch.cat([out[0] for out in outs])


def _state(layer: Layer) -> tuple[str, ...]:
    second = () if layer.renorm_momentum is None else ("renorm_mean", "renorm_var")
    return ("running_mean", "running_var", *second)


def _gamma_and_beta(layer: Layer, like: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.ones_like(like) if layer.weight is None else layer.weight
    return weight, torch.zeros_like(like) if layer.bias is None else layer.bias


def _numbers(layer: Layer) -> tuple[float | str, ...]:
    """Return what the operators keep of a layer's options; the momentum of a cumulative average is written as 0."""
    return (layer.eps, layer.momentum or 0.0, layer.r_max, layer.d_max, layer.stat)


def _operator(layer: Layer, x: Tensor, step: Tensor) -> tuple[Tensor, ...]:
    """Return y and, for every name of `_state`, its value after a step with `x` alone."""
    tensors = [layer._buffers[name] for name in _state(layer)]
    mean = tensors[0]
    assert mean is not None
    weight, bias = _gamma_and_beta(layer, mean)
    bounds = layer.schedule.bounds_on_device(step, layer.r_max, layer.d_max)
    seen = float64(step)
    share = (seen + 1).reciprocal() if layer.momentum is None else torch.full_like(seen, layer.momentum)
    numbers = _numbers(layer)
    out: tuple[Tensor, ...]
    if layer.renorm_momentum is None:
        out = torch.ops.renorm_onnx.batch_renorm_training(x, weight, bias, *tensors, *bounds, share, *numbers)
        return out
    second = (*tensors[2:], torch.full_like(seen, layer.renorm_momentum))
    out = torch.ops.renorm_onnx.batch_renorm_training_two_sets(
        x, weight, bias, *tensors[:2], *bounds, share, *second, *numbers
    )
    return out


def _joined(name: str, values: list[Tensor], layer: Layer) -> Tensor:
    """Return the statistic after a step towards the mean over the ghost batches, from a step towards each of them.

    Both are the same, since a step is linear in what is averaged: the mean, and sigma or the variance.
    """
    stacked = torch.stack(values)
    if layer.stat != "sigma" or name.endswith("mean"):
        return stacked.mean(0)
    return functional.deviation(stacked, layer.eps).mean(0).square().sub(layer.eps).relu()


def _all_finite(parts: list[Tensor]) -> Tensor:
    """Return which channels have a finite spread in every ghost batch, shape (C,)."""
    kind = functional.accumulation_type(parts[0])
    spreads = [part.to(kind).var([0, *range(2, part.dim())], correction=0) for part in parts]
    return (torch.stack(spreads) < inf).all(0)

"""Reductions, searches and running sums along axes."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from renorm_onnx.runtime.operators.call import Array, Call, Kernel, Result, as_integers, is_floating, normalize_axis
from renorm_onnx.runtime.operators.shaping import list_argument

_Reducer = Callable[[Array, tuple[int, ...], bool], Any]


def _mean(x: Array, axes: tuple[int, ...], keep: bool) -> Any:
    if is_floating(x):
        return x.mean(axis=axes, keepdims=keep)
    count = int(np.prod([x.shape[axis] for axis in axes]))
    return np.trunc(x.sum(axis=axes, keepdims=keep) / max(count, 1)).astype(x.dtype)


def _log_sum_exp(x: Array, axes: tuple[int, ...], keep: bool) -> Any:
    top = x.max(axis=axes, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0.0)
    total = np.log(np.exp(x - top).sum(axis=axes, keepdims=True)) + top
    return total if keep else np.squeeze(total, axis=axes)


def _extreme(x: Array, axes: tuple[int, ...], keep: bool, *, largest: bool) -> Any:
    if x.dtype.kind == "b":
        return (np.any if largest else np.all)(x, axis=axes, keepdims=keep)
    if is_floating(x):
        start = -np.inf if largest else np.inf
    else:
        start = np.iinfo(x.dtype).min if largest else np.iinfo(x.dtype).max
    return (np.max if largest else np.min)(x, axis=axes, keepdims=keep, initial=start)


_REDUCERS: Mapping[str, _Reducer] = {
    "ReduceSum": lambda x, axes, keep: x.sum(axis=axes, keepdims=keep),
    "ReduceMean": _mean,
    "ReduceMax": lambda x, axes, keep: _extreme(x, axes, keep, largest=True),
    "ReduceMin": lambda x, axes, keep: _extreme(x, axes, keep, largest=False),
    "ReduceProd": lambda x, axes, keep: x.prod(axis=axes, keepdims=keep),
    "ReduceL1": lambda x, axes, keep: np.abs(x).sum(axis=axes, keepdims=keep),
    "ReduceL2": lambda x, axes, keep: np.sqrt((x * x).sum(axis=axes, keepdims=keep)),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axis=axes, keepdims=keep),
    "ReduceLogSum": lambda x, axes, keep: np.log(x.sum(axis=axes, keepdims=keep)),
    "ReduceLogSumExp": _log_sum_exp,
}


def _reduction(name: str) -> Kernel:
    reducer = _REDUCERS[name]
    since = 13 if name == "ReduceSum" else 18  # the opset at which `axes` became an input

    def reduce(call: Call) -> Result:
        x = call.inputs[0]
        axes = list_argument(call, 1, "axes", since)
        if not axes:
            if call.opset >= since and call.integer("noop_with_empty_axes", 0):
                return x if name not in _POINTWISE else np.asarray(_POINTWISE[name](x))
            axes = list(range(x.ndim))
        chosen = tuple(normalize_axis(axis, x.ndim) for axis in axes) if x.ndim else ()
        return np.asarray(reducer(x, chosen, bool(call.integer("keepdims", 1)))).astype(x.dtype, copy=False)

    return reduce


_POINTWISE: Mapping[str, Callable[[Any], Any]] = {
    "ReduceL1": np.abs,
    "ReduceL2": np.abs,
    "ReduceSumSquare": np.square,
    "ReduceLogSum": np.log,
}  # what is left of a reduction over no axes at all


def _arg_extreme(call: Call) -> Result:
    x = call.inputs[0]
    axis = normalize_axis(call.integer("axis", 0), x.ndim)
    find = np.argmax if call.op_type == "ArgMax" else np.argmin
    if call.integer("select_last_index", 0):
        found = x.shape[axis] - 1 - find(np.flip(x, axis), axis=axis)
    else:
        found = find(x, axis=axis)
    return np.expand_dims(found, axis) if call.integer("keepdims", 1) else np.asarray(found)


def _top_k(call: Call) -> Result:
    """Largest or smallest k elements, the lower index first among equals; always sorted, as sorted=0 permits."""
    x = call.inputs[0]
    axis = normalize_axis(call.integer("axis", -1), x.ndim)
    k = call.integer("k", 0) if call.opset < 10 else as_integers(call.inputs[1])[0]
    order = np.argsort(x, axis=axis, kind="stable")
    if call.integer("largest", 1):
        backwards = np.argsort(np.flip(x, axis), axis=axis, kind="stable")
        order = np.flip(x.shape[axis] - 1 - backwards, axis)
    order = np.take(order, range(k), axis=axis)
    return np.take_along_axis(x, order, axis=axis), order.astype(np.int64)


def _running(call: Call) -> Result:
    x, axis = call.inputs[0], normalize_axis(as_integers(call.inputs[1])[0], call.inputs[0].ndim)
    accumulate = np.cumsum if call.op_type == "CumSum" else np.cumprod
    x = np.flip(x, axis) if call.integer("reverse", 0) else x
    result = accumulate(x, axis=axis, dtype=x.dtype)
    if call.integer("exclusive", 0):
        first = np.full_like(np.take(x, [0], axis=axis), 0 if call.op_type == "CumSum" else 1)
        result = np.concatenate([first, np.take(result, range(x.shape[axis] - 1), axis=axis)], axis=axis)
    return np.flip(result, axis) if call.integer("reverse", 0) else result


OPERATORS: Mapping[str, Kernel] = {
    **{name: _reduction(name) for name in _REDUCERS},
    "ArgMax": _arg_extreme,
    "ArgMin": _arg_extreme,
    "TopK": _top_k,
    "CumSum": _running,
    "CumProd": _running,
}
"""Reductions by name."""

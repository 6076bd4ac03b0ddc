"""Pooling: a window slides over the spatial axes; one pass per offset inside the window, vectorized over the rest."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from renorm_onnx.runtime.operators.call import Array, Call, Kernel, Result, UnusableError, is_floating
from renorm_onnx.runtime.operators.convolution import explicit_pads, window_slices


class _Windows:
    """Where the windows of one call lie.

    Source: ONNX AveragePool-19, MaxPool-12. With ceil_mode a last window may hang over the end, but must start inside
    the input or its leading padding.
    """

    def __init__(self, call: Call, spatial: Sequence[int]) -> None:
        rank = len(spatial)
        self.kernel = call.integers("kernel_shape") or ()
        self.strides = call.integers("strides") or (1,) * rank
        self.dilations = call.integers("dilations") or (1,) * rank
        self.pads = explicit_pads(call, spatial, self.kernel, self.strides, self.dilations)
        auto = call.text("auto_pad", "NOTSET")
        if auto.startswith("SAME") and max(self.dilations, default=1) > 1:
            raise UnusableError(f"auto_pad={auto!r} with dilations {self.dilations}: onnxruntime pads as if undilated")
        ceil = bool(call.integer("ceil_mode", 0)) and not auto.startswith("SAME")
        self.sizes: list[int] = []
        self.overhang: list[int] = []
        for n, k, s, d, (a, b) in zip(spatial, self.kernel, self.strides, self.dilations, self.pads, strict=True):
            span = n + a + b - (k - 1) * d - 1
            size = (math.ceil(span / s) if ceil else span // s) + 1
            if ceil and (size - 1) * s >= n + a:
                size -= 1
            if auto == "VALID" and size != span // s + 1:
                raise UnusableError("auto_pad='VALID' with ceil_mode=1: the specification has no last window")
            self.sizes.append(size)
            self.overhang.append(max((size - 1) * s + (k - 1) * d + 1 - (n + a + b), 0))
        if min(self.sizes, default=1) < 1:
            raise ValueError(f"a window of {self.kernel} does not fit an input of {tuple(spatial)}")

    def padded(self, x: Array, value: float) -> Array:
        """`x` with `value` in its padding and under the overhang."""
        pads = [(a, b + over) for (a, b), over in zip(self.pads, self.overhang, strict=True)]
        return np.pad(x, [(0, 0), (0, 0), *pads], constant_values=value)

    def views(self, padded: Array) -> list[Array]:
        """For each offset in the window, its element of every window: shape (N, C, *sizes)."""
        slices = window_slices(self.kernel, self.sizes, self.strides, self.dilations)
        return [padded[(slice(None), slice(None), *where)] for _, where in slices]


def _max_pool(call: Call) -> Result:
    x = call.inputs[0]
    windows = _Windows(call, x.shape[2:])
    lowest = -np.inf if is_floating(x) else np.iinfo(x.dtype).min
    views = windows.views(windows.padded(x, lowest))
    best = views[0].copy()
    if not call.wants(1):
        for view in views[1:]:
            np.maximum(best, view, out=best)
        return best
    spatial = x.shape[2:]
    order = "C" if call.integer("storage_order", 0) == 0 else "F"
    places = np.arange(math.prod(spatial)).reshape(spatial, order=order)  # type: ignore[call-overload]
    plane = np.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *[1] * len(spatial)) * math.prod(spatial)
    where = windows.views(windows.padded(np.broadcast_to(places, (1, 1, *spatial)), -1))
    index = np.broadcast_to(where[0], best.shape).copy()
    for view, place in zip(views[1:], where[1:], strict=True):
        better = (view > best) | ((index < 0) & (place >= 0))
        index = np.where(better, place, index)
        best = np.where(better, view, best)
    return best, index + plane


def _average_pool(call: Call) -> Result:
    x = call.inputs[0]
    windows = _Windows(call, x.shape[2:])
    total = sum(windows.views(windows.padded(x, 0.0)))
    ones = np.ones((1, 1, *x.shape[2:]))
    if call.integer("count_include_pad", 0):  # padding counts, but never what ceil_mode lets hang over
        ones = np.pad(ones, [(0, 0), (0, 0), *windows.pads], constant_values=1.0)
        counted = np.pad(ones, [(0, 0), (0, 0), *((0, over) for over in windows.overhang)])
    else:
        counted = windows.padded(ones, 0.0)
    return total / sum(windows.views(counted))


def _lp_pool(call: Call) -> Result:
    x, p = call.inputs[0], call.integer("p", 2)
    windows = _Windows(call, x.shape[2:])
    total = sum(np.abs(view) ** p for view in windows.views(windows.padded(x, 0.0)))
    return total ** (1 / p)


def _spatial(x: Array) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def _global_lp_pool(call: Call) -> Result:
    x, p = call.inputs[0], call.integer("p", 2)
    return np.sum(np.abs(x) ** p, axis=_spatial(x), keepdims=True) ** (1 / p)


def _max_unpool(call: Call) -> Result:
    x, indices = call.inputs[0], call.inputs[1]
    rank = x.ndim - 2
    kernel = call.integers("kernel_shape") or ()
    strides, pads = call.integers("strides") or (1,) * rank, call.integers("pads") or (0,) * (2 * rank)
    inferred = tuple(
        (n - 1) * s - a - b + k
        for n, s, a, b, k in zip(x.shape[2:], strides, pads[:rank], pads[rank:], kernel, strict=True)
    )
    shape = (*x.shape[:2], *inferred) if call.input(2) is None else tuple(int(n) for n in call.inputs[2])
    if shape[2:] != inferred:  # indices count places of the inferred shape
        places = np.unravel_index(indices, (*x.shape[:2], *inferred))
        indices = np.ravel_multi_index(places, shape)
    result = np.zeros(math.prod(shape))
    result[indices.ravel()] = x.ravel()
    return result.reshape(shape)


OPERATORS: Mapping[str, Kernel] = {
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "LpPool": _lp_pool,
    "GlobalMaxPool": lambda call: call.inputs[0].max(axis=_spatial(call.inputs[0]), keepdims=True),
    "GlobalAveragePool": lambda call: call.inputs[0].mean(axis=_spatial(call.inputs[0]), keepdims=True),
    "GlobalLpPool": _global_lp_pool,
    "MaxUnpool": _max_unpool,
}
"""Pooling operators by name."""

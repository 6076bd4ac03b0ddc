"""Resize and Upsample: one axis after the other, each a gather (nearest) or a sparse matrix of weights.

Source: ONNX Resize-19, ``coordinate_transformation_mode``, ``nearest_mode``, ``antialias``. What is a *choice* (output
sizes, which element is nearest) is made in float32, as the scales are stored and as runtimes do; weights are float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from renorm_onnx.runtime.operators.call import Array, Call, Kernel, Result, UnusableError, is_floating, normalize_axis


@dataclass(frozen=True, slots=True)
class _Axis:
    """How one axis is resized; `start` and `end` are its share of ``roi``."""

    index: int
    length: int
    resized: int
    scale: float
    start: float = 0.0
    end: float = 1.0

    def coordinates(self, mode: str, kind: Any) -> Any:
        """Where each output element lies in the input, computed in `kind` (np.float32 or np.float64)."""
        at = np.arange(self.resized, dtype=kind)
        scale, half = kind(self.scale), kind(0.5)
        if mode == "half_pixel" or (mode == "pytorch_half_pixel" and self.resized > 1):
            return (at + half) / scale - half
        if mode == "pytorch_half_pixel":
            return np.zeros(self.resized, dtype=kind)
        if mode == "half_pixel_symmetric":
            adjustment = kind(self.resized) / (scale * kind(self.length))
            return kind(self.length) / 2 * (1 - adjustment) + (at + half) / scale - half
        if mode == "asymmetric":
            return at / scale
        if mode == "tf_half_pixel_for_nn":
            return (at + half) / scale
        last, steps = kind(self.length - 1), kind(max(self.resized - 1, 1))
        if mode == "align_corners":
            return at * last / steps
        if mode == "tf_crop_and_resize":
            if self.resized == 1:
                return np.full(1, half * (kind(self.start) + kind(self.end)) * last)
            return kind(self.start) * last + at * (kind(self.end) - kind(self.start)) * last / steps
        raise UnusableError(f"coordinate_transformation_mode {mode!r} is not covered")


def _nearest(axis: _Axis, mode: str, rounding: str) -> Array:
    """Indices of the nearest input elements; "simple" is the rule of opsets before 11."""
    at = axis.coordinates(mode, np.float32)
    if rounding == "simple":
        found = np.ceil(at) if axis.scale < 1 else np.floor(at)
    elif rounding == "floor":
        found = np.floor(at)
    elif rounding == "ceil":
        found = np.ceil(at)
    elif rounding == "round_prefer_ceil":
        found = np.floor(at + np.float32(0.5))
    else:
        found = np.ceil(at - np.float32(0.5))
    return np.asarray(np.clip(found, 0, axis.length - 1), dtype=np.int64)


def cubic_kernel(distance: Array, a: float) -> Array:
    """Weight of a pixel at `distance`: Keys's cubic convolution kernel with parameter `a`."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _weights(axis: _Axis, call: Call, mode: str) -> Array:
    """Matrix (resized, length) whose rows interpolate one output element."""
    at = axis.coordinates(mode, np.float64)
    cubic = call.text("mode", "nearest") == "cubic"
    antialias = bool(call.integer("antialias", 0))
    shrink = min(axis.scale, 1.0) if antialias else 1.0
    reach = int(np.ceil((2 if cubic else 1) / shrink))
    taps = np.floor(at)[:, None].astype(np.int64) + np.arange(1 - reach, reach + 1)
    distance = (taps - at[:, None]) * shrink
    weights = (
        cubic_kernel(distance, call.number("cubic_coeff_a", -0.75)) if cubic else np.clip(1 - np.abs(distance), 0, None)
    )
    outside = (taps < 0) | (taps >= axis.length)
    if call.integer("exclude_outside", 0):
        weights = np.where(outside, 0.0, weights)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((axis.resized, axis.length))
    np.add.at(matrix, (np.arange(axis.resized)[:, None], np.clip(taps, 0, axis.length - 1)), weights)
    return matrix


def _axes(call: Call, x: Array, scales: Array | None, sizes: Array | None, roi: Array | None) -> list[_Axis]:
    chosen = [normalize_axis(axis, x.ndim) for axis in call.integers("axes") or range(x.ndim)]
    lengths = [x.shape[index] for index in chosen]
    if sizes is None:
        assert scales is not None
        factors = [float(scale) for scale in scales]
        resized = [int(np.floor(np.float32(n) * np.float32(s))) for n, s in zip(lengths, factors, strict=True)]
    else:
        resized, factors = _from_sizes(call, lengths, [int(n) for n in sizes])
    corners = np.zeros(2 * len(chosen)) if roi is None else roi
    starts, ends = corners[: len(chosen)], corners[len(chosen) :]
    return [
        _Axis(index, length, n, factor, float(start), float(end))
        for index, length, n, factor, start, end in zip(chosen, lengths, resized, factors, starts, ends, strict=True)
    ]


def _from_sizes(call: Call, lengths: Sequence[int], sizes: list[int]) -> tuple[list[int], list[float]]:
    policy = call.text("keep_aspect_ratio_policy", "stretch")
    factors = [size / length for size, length in zip(sizes, lengths, strict=True)]
    if policy == "stretch":
        return sizes, factors
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [int(np.floor(factor * length + 0.5)) for length in lengths], [factor] * len(lengths)


def _resized(call: Call, axes: Sequence[_Axis], transform: str, rounding: str) -> Array:
    x = call.inputs[0]
    nearest = call.text("mode", "nearest") == "nearest"
    if not nearest and not is_floating(x):
        raise UnusableError(f"interpolation of {x.dtype} is not covered")
    outside: list[tuple[int, Array]] = []
    for axis in axes:
        if axis.length == axis.resized and axis.scale == 1.0 and transform != "tf_crop_and_resize":
            continue
        if nearest:
            x = np.take(x, _nearest(axis, transform, rounding), axis=axis.index)
        else:
            x = np.moveaxis(np.tensordot(_weights(axis, call, transform), x, axes=(1, axis.index)), 0, axis.index)
        if transform == "tf_crop_and_resize":
            at = axis.coordinates(transform, np.float64)
            outside.append((axis.index, (at < 0) | (at > axis.length - 1)))
    for index, mask in outside:
        x = np.where(mask.reshape(-1, *[1] * (x.ndim - 1 - index)), call.number("extrapolation_value", 0.0), x)
    return np.asarray(x)


def _resize(call: Call) -> Result:
    x = call.inputs[0]
    if call.opset < 11:
        return _resized(call, _axes(call, x, call.inputs[1], None, None), "asymmetric", "simple")
    scales, sizes = (None if (value := call.input(i)) is None or value.size == 0 else value for i in (2, 3))
    if (scales is None) == (sizes is None):
        raise UnusableError("exactly one of scales and sizes must be given")
    transform = call.text("coordinate_transformation_mode", "half_pixel")
    roi = call.input(1) if transform == "tf_crop_and_resize" else None
    return _resized(
        call, _axes(call, x, scales, sizes, roi), transform, call.text("nearest_mode", "round_prefer_floor")
    )


def _upsample(call: Call) -> Result:
    scales = np.array(call.attributes["scales"]) if call.opset < 9 else call.inputs[1]
    return _resized(call, _axes(call, call.inputs[0], scales, None, None), "asymmetric", "simple")


OPERATORS: Mapping[str, Kernel] = {"Resize": _resize, "Upsample": _upsample}
"""Resizing operators by name."""

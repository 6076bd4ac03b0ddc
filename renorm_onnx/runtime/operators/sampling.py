"""Reading images between their pixels: GridSample and RoiAlign.

Each coordinate touches two pixels per axis (four for cubic) with the weights of an interpolation kernel. Where the
specification leaves the edges open, onnxruntime is followed: GridSample pads coordinates first, then pixels.
"""

import itertools
import math
from collections.abc import Mapping

import numpy as np

from renorm_onnx.runtime.operators.call import Array, Call, Kernel, Result, as_integers
from renorm_onnx.runtime.operators.resize import cubic_kernel


def _reflected(at: Array, low: float, high: float) -> Array:
    """Coordinates mirrored at `low` and `high` until they lie between them."""
    span = high - low
    if span <= 0:
        return np.full_like(at, low)
    distance = np.mod(at - low, 2 * span)
    return low + np.where(distance > span, 2 * span - distance, distance)


def _taps(at: Array, mode: str) -> list[tuple[Array, Array]]:
    """Pixels that a coordinate reads, each with its weight."""
    if mode == "nearest":
        return [(np.rint(at), np.ones_like(at))]
    base = np.floor(at)
    offsets = (0, 1) if mode == "linear" else (-1, 0, 1, 2)
    distances = [(base + offset, base + offset - at) for offset in offsets]
    if mode == "linear":
        return [(pixel, 1 - np.abs(distance)) for pixel, distance in distances]
    return [(pixel, cubic_kernel(distance, -0.75)) for pixel, distance in distances]


def _grid_sample(call: Call) -> Result:
    x, grid = call.inputs[:2]
    mode = call.text("mode", "linear")
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    padding, align = call.text("padding_mode", "zeros"), bool(call.integer("align_corners", 0))
    batch, lengths, points = x.shape[0], x.shape[2:], grid.shape[1:-1]
    per_axis = []
    for axis, length in enumerate(lengths):
        at = grid[..., len(lengths) - 1 - axis].reshape(batch, -1)  # the grid counts axes from the last one
        low, high = (0.0, length - 1.0) if align else (-0.5, length - 0.5)
        at = (at + 1) / 2 * (high - low) + low
        at = np.rint(at) if mode == "nearest" else at
        if padding == "border" and mode != "cubic":
            at = np.clip(at, 0, length - 1)
        elif padding == "reflection":
            at = np.where((at < low) | (at > high), _reflected(at, low, high), at)
        taps = []
        for pixel, weight in _taps(at, mode):
            if padding == "reflection":
                pixel = np.where((pixel < low) | (pixel > high), np.trunc(_reflected(pixel, low, high)), pixel)
            elif padding == "zeros":
                weight = np.where((pixel < 0) | (pixel > length - 1), 0.0, weight)
            taps.append((np.clip(pixel, 0, length - 1).astype(np.int64), weight))
        per_axis.append(taps)
    rows = np.arange(batch)[:, None]
    total = np.zeros((batch, math.prod(points), x.shape[1]))
    for corner in itertools.product(*per_axis):
        places = tuple(pixel for pixel, _ in corner)
        weight = math.prod((w for _, w in corner), start=np.ones(1))
        total += x[(rows, slice(None), *places)] * weight[..., None]
    return np.moveaxis(total, 2, 1).reshape(batch, x.shape[1], *points)


def _roi_samples(start: float, extent: float, count: int, ratio: int, length: int) -> tuple[Array, Array, Array, Array]:
    """Along one axis of one box: lower and upper pixel of each sample and their weights, each (count, samples)."""
    samples = ratio if ratio > 0 else max(math.ceil(extent / count), 1)
    steps = np.arange(count)[:, None] + (np.arange(samples) + 0.5) / samples
    at = start + steps * extent / count
    inside = (at >= -1) & (at <= length)
    at = np.clip(at, 0, length - 1)
    low = np.floor(at).astype(np.int64)
    return low, np.minimum(low + 1, length - 1), np.where(inside, 1 - (at - low), 0.0), np.where(inside, at - low, 0.0)


def _averaging(samples: tuple[Array, Array, Array, Array], length: int) -> Array:
    """The matrix (count, length) that averages interpolated samples."""
    low, high, low_weight, high_weight = samples
    matrix = np.zeros((low.shape[0], length))
    rows = np.arange(low.shape[0])[:, None]
    np.add.at(matrix, (rows, low), low_weight / low.shape[1])
    np.add.at(matrix, (rows, high), high_weight / low.shape[1])
    return matrix


def _largest(image: Array, vertical: tuple[Array, ...], horizontal: tuple[Array, ...]) -> Array:
    """mode="max" of RoiAlign: the largest *weighted corner* of any sample, as the specification's own code has it."""
    corners = []
    for (y, wy), (x, wx) in itertools.product(zip(vertical[:2], vertical[2:], strict=True),
                                              zip(horizontal[:2], horizontal[2:], strict=True)):  # fmt: skip
        values = image[:, y[:, None, :, None], x[None, :, None, :]]
        corners.append(values * wy[:, None, :, None] * wx[None, :, None, :])
    return np.asarray(np.max(corners, axis=0).max(axis=(3, 4)))


def _roi_align(call: Call) -> Result:
    """RoiAlign; before opset 16 without the shift by half a pixel, and boxes at least one pixel wide."""
    x, boxes, owners = call.inputs[:3]
    half = call.opset >= 16 and call.text("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    out = (call.integer("output_height", 1), call.integer("output_width", 1))
    ratio, scale = call.integer("sampling_ratio", 0), call.number("spatial_scale", 1.0)
    results = np.zeros((boxes.shape[0], x.shape[1], *out))
    for row, (box, owner) in enumerate(zip(boxes, as_integers(owners), strict=True)):
        left, top, right, bottom = (float(v) * scale - (0.5 if half else 0.0) for v in box)
        extents = (bottom - top, right - left) if half else (max(bottom - top, 1.0), max(right - left, 1.0))
        axes = [
            _roi_samples(start, extent, count, ratio, length)
            for start, extent, count, length in zip((top, left), extents, out, x.shape[2:], strict=True)
        ]
        if call.text("mode", "avg") == "max":
            results[row] = _largest(x[owner], *axes)
        else:
            vertical, horizontal = (_averaging(axis, n) for axis, n in zip(axes, x.shape[2:], strict=True))
            results[row] = vertical @ x[owner] @ horizontal.T
    return results


OPERATORS: Mapping[str, Kernel] = {"GridSample": _grid_sample, "RoiAlign": _roi_align}
"""Sampling operators by name."""

"""Windows, padding and resampling in exact rational arithmetic; see `exact_values_test`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray
HALF = Fraction(1, 2)
LOWEST = Fraction(-(2**127))


def taps_of(tap: Sequence[int], strides: Sequence[int], dilations: Sequence[int], out: Sequence[int]) -> list[slice]:
    """Where one tap of a kernel meets the (padded) image, for all positions of the window."""
    starts = [t * d for t, d in zip(tap, dilations, strict=True)]
    return [slice(b, b + s * (o - 1) + 1, s) for b, s, o in zip(starts, strides, out, strict=True)]


def auto_pads(
    a: Mapping[str, Any], sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """The pads of a window operator: begins, then ends."""
    auto, n = a.get("auto_pad", "NOTSET"), len(kernel)
    if auto == "NOTSET":
        return list(a.get("pads", [0] * (2 * n)))
    begins, ends = [0] * n, [0] * n
    for i in range(n if auto.startswith("SAME") else 0):
        reach = (kernel[i] - 1) * dilations[i] + 1
        total = max((math.ceil(sizes[i] / strides[i]) - 1) * strides[i] + reach - sizes[i], 0)
        begins[i] = total // 2 if auto == "SAME_UPPER" else total - total // 2
        ends[i] = total - begins[i]
    return begins + ends


def pool(kind: str) -> Any:
    """The pool of one kind: "max", "average" or "norm"."""

    def run(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, outputs: int) -> tuple[Array, Array]:
        x, kernel = inputs[0], a["kernel_shape"]
        n = len(kernel)
        strides, dilations = a.get("strides", [1] * n), a.get("dilations", [1] * n)
        pads = auto_pads(a, x.shape[2:], kernel, strides, dilations)
        ends = [x.shape[2 + i] + pads[n + i] for i in range(n)]
        counts = []
        for i in range(n):
            free = ends[i] + pads[i] - (kernel[i] - 1) * dilations[i] - 1
            count = (math.ceil(free / strides[i]) if a.get("ceil_mode", 0) else free // strides[i]) + 1
            # A window may not start in the padding at the end.
            counts.append(count - 1 if (count - 1) * strides[i] >= x.shape[2 + i] + pads[i] else count)
        y = np.full((*x.shape[:2], *counts), Fraction(0), dtype=object)
        indices = np.zeros(y.shape, np.int64)
        for place in np.ndindex(*counts):
            corner = [p * s - b for p, s, b in zip(place, strides, pads[:n], strict=True)]
            lines = [[c + k * d for k in range(m)] for c, m, d in zip(corner, kernel, dilations, strict=True)]
            cells = list(itertools.product(*lines))
            inside = [c for c in cells if all(0 <= v < x.shape[2 + i] for i, v in enumerate(c))]
            padded = [c for c in cells if all(v < ends[i] for i, v in enumerate(c))]
            for head in np.ndindex(*x.shape[:2]):
                values = [x[head + c] for c in inside]
                if not values:  # nothing but padding, of which runtimes make this
                    y[head + place] = LOWEST if kind == "max" else Fraction(0)
                elif kind == "max":
                    best = max(range(len(values)), key=values.__getitem__)
                    y[head + place] = values[best]
                    indices[head + place] = np.ravel_multi_index(head + inside[best], x.shape)
                elif kind == "average":
                    count = len(padded if a.get("count_include_pad", 0) else inside)
                    y[head + place] = sum(values, Fraction(0)) / count
                else:
                    assert a.get("p", 2) == 1, "only the sum of absolute values is rational"
                    y[head + place] = sum((abs(v) for v in values), Fraction(0))
        return y, indices

    return run


def pad(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, outputs: int) -> Array:
    """Pad in all modes; negative pads crop."""
    x, rank = inputs[0], inputs[0].ndim
    widths, fill = (a["pads"], Fraction(a.get("value", 0.0))) if opset < 11 else (inputs[1], Fraction(0))
    if opset >= 11 and len(inputs) > 2 and inputs[2] is not None:
        fill = inputs[2].reshape(-1)[0]
    axes = [int(i) % rank for i in inputs[3]] if len(inputs) > 3 and inputs[3] is not None else list(range(rank))
    begins, ends = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        begins[axis], ends[axis] = int(widths[i]), int(widths[len(axes) + i])
    for axis in range(rank):
        size = x.shape[axis]
        order = [_source(i, size, a.get("mode", "constant")) for i in range(-begins[axis], size + ends[axis])]
        taken = np.take(x, [0 if i is None else i for i in order], axis)
        outside = [i for i, o in enumerate(order) if o is None]
        taken[(*[slice(None)] * axis, outside)] = fill
        x = taken
    return x


def _source(position: int, size: int, mode: str) -> int | None:
    if 0 <= position < size:
        return position
    if mode == "constant":
        return None
    if mode == "edge":
        return min(max(position, 0), size - 1)
    if mode == "wrap":
        return position % size
    period = 2 * (size - 1)
    folded = position % period
    return folded if folded < size else period - folded


def resize(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, outputs: int) -> Array:
    """Resize and Upsample, one axis after the other, by the matrix of weights of that axis."""
    x, rank = inputs[0], inputs[0].ndim
    axes = [int(i) % rank for i in a.get("axes", range(rank))]
    scales = a.get("scales") or (inputs[1] if len(inputs) == 2 else inputs[2])
    sizes = inputs[3] if len(inputs) > 3 else None
    for i, axis in enumerate(axes):
        size = x.shape[axis]
        scale = Fraction(int(sizes[i]), size) if sizes is not None else Fraction(scales[i])
        length = int(sizes[i]) if sizes is not None else math.floor(size * scale)
        if scale == 1:
            continue
        rows = [_weights(p, size, length, scale, a, opset) for p in range(length)]
        parts = [np.take(x, [j for j, _ in row], axis) for row in rows]
        sums = [
            sum(np.take(part, k, axis) * w for k, (_, w) in enumerate(r)) for part, r in zip(parts, rows, strict=True)
        ]
        x = np.stack(sums, axis)
    return x


def _weights(
    p: int, size: int, length: int, scale: Fraction, a: Mapping[str, Any], opset: int
) -> list[tuple[int, Fraction]]:
    """Source positions and weights of output position `p`."""
    how = a.get("coordinate_transformation_mode", "half_pixel" if opset >= 11 else "asymmetric")
    at = {
        "asymmetric": lambda: p / scale,
        "half_pixel": lambda: (p + HALF) / scale - HALF,
        "pytorch_half_pixel": lambda: (p + HALF) / scale - HALF if length > 1 else Fraction(0),
        "align_corners": lambda: Fraction(p * (size - 1), length - 1) if length > 1 else Fraction(0),
    }[how]()
    mode = a.get("mode", "nearest")
    if mode == "nearest":
        way = a.get("nearest_mode", "round_prefer_floor" if opset >= 11 else "floor")
        chosen = {"floor": math.floor(at), "ceil": math.ceil(at), "round_prefer_floor": math.ceil(at - HALF)}
        chosen["round_prefer_ceil"] = math.floor(at + HALF)
        return [(min(max(chosen[way], 0), size - 1), Fraction(1))]
    base = math.floor(at)
    part = at - base
    if mode == "linear":
        found = [(base, 1 - part), (base + 1, part)]
    else:
        found = [(base + k, _cubic(part - k, Fraction(a.get("cubic_coeff_a", -0.75)))) for k in (-1, 0, 1, 2)]
    if a.get("exclude_outside", 0):
        found = [(i, w) for i, w in found if 0 <= i < size]
        total = sum(w for _, w in found)
        found = [(i, w / total) for i, w in found]
    return [(min(max(i, 0), size - 1), w) for i, w in found]


def _cubic(d: Fraction, k: Fraction) -> Fraction:
    d = abs(d)
    if d <= 1:
        return (k + 2) * d**3 - (k + 3) * d**2 + 1
    return k * d**3 - 5 * k * d**2 + 8 * k * d - 4 * k if d < 2 else Fraction(0)


def depth_to_space(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, outputs: int) -> Array:
    """DepthToSpace by its definition in the specification."""
    x, b = inputs[0], a["blocksize"]
    n, c, h, w = x.shape
    if a.get("mode", "DCR") == "DCR":
        y = x.reshape(n, b, b, c // b**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // b**2, b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // b**2, h * b, w * b)


def space_to_depth(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, outputs: int) -> Array:
    """SpaceToDepth by its definition in the specification."""
    x, b = inputs[0], a["blocksize"]
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * b**2, h // b, w // b)

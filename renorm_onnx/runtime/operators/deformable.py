"""DeformConv: a convolution whose taps read the image beside their places, between pixels.

With x of shape (N, C, H, W), W of shape (M, C/g, *k), offsets d and a mask, for each group (ONNX DeformConv-19, 22)::

    y[n, m, p] = b[m] + sum_{c, j} W[m, c, j] * mask[n, j, p] * x(n, c, p * stride + j * dilation - pad + d[n, j, p])

where x(...) interpolates between the four pixels around a place, and pixels outside the image are zero.
"""

import itertools
import math
from collections.abc import Mapping

import numpy as np

from renorm_onnx.runtime.operators.call import Array, Call, Kernel, Result, UnusableError


def _deform_conv(call: Call) -> Result:
    x, weight, offset = call.inputs[:3]
    if x.ndim != 4:
        raise UnusableError(f"not covered for an input of rank {x.ndim}")
    parts, kernel, size = call.integer("offset_group", 1), weight.shape[2:], offset.shape[2:]
    taps = math.prod(kernel)
    moved = offset.reshape(len(x), parts, taps, 2, *size)
    mask = call.input(4)
    weights = np.ones((1, parts, taps, 1, 1)) if mask is None else mask.reshape(len(x), parts, taps, *size)
    strides, dilations = (call.integers(name) or (1, 1) for name in ("strides", "dilations"))
    begin = (call.integers("pads") or (0, 0))[:2]
    grid = [np.arange(n) * stride - pad for n, stride, pad in zip(size, strides, begin, strict=True)]
    columns = np.empty((len(x), parts, x.shape[1] // parts, taps, *size))
    for tap, index in enumerate(itertools.product(*map(range, kernel))):
        along = [g + i * d for g, i, d in zip(grid, index, dilations, strict=True)]
        still = np.meshgrid(*along, indexing="ij")
        for part, images in enumerate(np.split(x, parts, axis=1)):
            places = [still[axis] + moved[:, part, tap, axis] for axis in range(2)]
            columns[:, part, :, tap] = _between(images, *places) * weights[:, part, tap][:, None]
    groups = call.integer("group", 1)
    patches = columns.reshape(len(x), groups, -1, math.prod(size))  # (C/g * taps) rows, for each group
    result = weight.reshape(groups, len(weight) // groups, -1) @ patches
    bias = call.input(3)
    return result.reshape(len(x), len(weight), *size) + (0.0 if bias is None else bias[:, None, None])


def _between(images: Array, rows: Array, columns: Array) -> Array:
    """Images (N, C, H, W) at places (N, *size) between their pixels: (N, C, *size)."""
    height, width = images.shape[2:]
    total = np.zeros((len(images), images.shape[1], *rows.shape[1:]))
    which = np.arange(len(images))[:, None, None]
    # Where a place is no number, so is what is read there.
    top, left = np.floor(rows), np.floor(columns)
    for down, right in itertools.product((0, 1), (0, 1)):
        y, x = top + down, left + right
        share = (1 - np.abs(y - rows)) * (1 - np.abs(x - columns))
        share = np.where((y < 0) | (y > height - 1) | (x < 0) | (x > width - 1), 0.0, share)
        pixels = [np.clip(np.nan_to_num(at), 0, n - 1).astype(np.int64) for at, n in ((y, height), (x, width))]
        total += np.moveaxis(images[which, :, pixels[0], pixels[1]], -1, 1) * share[:, None]
    return total


OPERATORS: Mapping[str, Kernel] = {"DeformConv": _deform_conv}
"""The operator by name."""

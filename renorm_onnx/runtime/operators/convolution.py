"""Convolution and its transpose, by one matrix product per group: patches are copied out, BLAS does the rest.

With x of shape (N, C, *in), W of shape (M, C/g, *k), for each group (ONNX operators Conv, ConvTranspose)::

    Conv           y[n, m, p] = b[m] + sum_{c, j} W[m, c, j] * x_padded[n, c, p * stride + j * dilation]
    ConvTranspose  y[n, m, p * stride + j * dilation - pad] += W[c, m, j] * x[n, c, p]
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from renorm_onnx.runtime.operators.call import Array, Call, Kernel, Result, UnusableError

_PATCH_BYTES = 64 * 2**20  # patches in memory at once


def window_slices(
    kernel: Sequence[int], sizes: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """For each offset inside a window, where the windows read it: one slice per spatial axis, `sizes` long."""
    for offset in itertools.product(*map(range, kernel)):
        starts = [j * dilation for j, dilation in zip(offset, dilations, strict=True)]
        yield (
            offset,
            tuple(
                slice(start, start + (size - 1) * stride + 1, stride)
                for start, size, stride in zip(starts, sizes, strides, strict=True)
            ),
        )


def explicit_pads(
    call: Call, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis, from ``pads`` or ``auto_pad``.

    SAME makes the output ceil(size / stride) long; an odd pixel goes to the end (SAME_UPPER) or the start (SAME_LOWER).
    """
    rank = len(sizes)
    auto = call.text("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = call.integers("pads") or (0,) * (2 * rank)
        return list(zip(pads[:rank], pads[rank:], strict=True))
    if auto == "VALID":
        return [(0, 0)] * rank
    result = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small = total // 2
        result.append((small, total - small) if auto == "SAME_UPPER" else (total - small, small))
    return result


def convolve(
    x: Array,
    weight: Array,
    *,
    pads: Sequence[tuple[int, int]],
    strides: Sequence[int],
    dilations: Sequence[int],
    group: int,
) -> Array:
    """Convolve in float64.

    Args:
        x: Shape (N, C, *in).
        weight: Shape (M, C / group, *kernel).
        pads: Zeros before and after each spatial axis.
        strides: Per spatial axis.
        dilations: Per spatial axis.
        group: Divides C and M.

    Returns:
        Shape (N, M, *out).
    """
    kernel = weight.shape[2:]
    if any(before < 0 or after < 0 for before, after in pads):
        raise ValueError(f"negative pads {list(pads)}")
    if any(before or after for before, after in pads):
        x = np.pad(x, [(0, 0), (0, 0), *pads])
    spatial = x.shape[2:]
    sizes = [(n - (k - 1) * d - 1) // s + 1 for n, k, s, d in zip(spatial, kernel, strides, dilations, strict=True)]
    batch, channels = x.shape[:2]
    if channels != weight.shape[1] * group or weight.shape[0] % group or min(sizes, default=1) < 1:
        raise ValueError(f"a weight of shape {weight.shape} in {group} groups does not fit an input of {x.shape}")
    rows = weight.reshape(group, weight.shape[0] // group, -1)  # (g, M/g, C/g * prod k)
    grouped = x.reshape(batch, group, channels // group, *spatial)
    result = np.empty((batch, group, rows.shape[1], *sizes))
    whole: tuple[Any, ...] = (slice(None),) * 3
    for here, block, tile in _tiles(batch, sizes, channels * math.prod(kernel)):
        tile_sizes = [tile, *sizes[1:]]
        if math.prod(kernel) == 1 and all(s == 1 for s in strides):
            patches = grouped[block][(*whole, slice(here, here + tile))]
        else:
            patches = np.empty((block.stop - block.start, group, channels // group, *kernel, *tile_sizes))
            offset_rows = grouped[block][(*whole, slice(here * strides[0], None))]
            for offset, where in window_slices(kernel, tile_sizes, strides, dilations):
                patches[(*whole, *offset)] = offset_rows[(*whole, *where)]
        product = np.matmul(rows, patches.reshape(patches.shape[0], group, rows.shape[2], -1))
        result[block][(*whole, slice(here, here + tile))] = product.reshape(-1, group, rows.shape[1], *tile_sizes)
    return result.reshape(batch, weight.shape[0], *sizes)


def _tiles(batch: int, sizes: Sequence[int], depth: int) -> Iterator[tuple[int, slice, int]]:
    """Parts of the output whose patches fit in memory: first row, samples, number of rows."""
    row = 8 * depth * math.prod(sizes[1:])
    samples = max(1, min(batch, _PATCH_BYTES // max(1, row * sizes[0])))
    rows = sizes[0] if row * sizes[0] <= _PATCH_BYTES else max(1, _PATCH_BYTES // row)
    for start in range(0, batch, samples):
        block = slice(start, min(start + samples, batch))
        for here in range(0, sizes[0], rows):
            yield here, block, min(rows, sizes[0] - here)


def convolution(call: Call, x: Array, weight: Array) -> Array:
    """Conv on promoted operands with the attributes of `call`, without a bias."""
    rank = x.ndim - 2
    strides = call.integers("strides") or (1,) * rank
    dilations = call.integers("dilations") or (1,) * rank
    kernel = weight.shape[2:]
    if (given := call.integers("kernel_shape")) is not None and given != kernel:
        raise ValueError(f"kernel_shape {given} differs from the weight's {kernel}")
    pads = explicit_pads(call, x.shape[2:], kernel, strides, dilations)
    return convolve(x, weight, pads=pads, strides=strides, dilations=dilations, group=call.integer("group", 1))


def _conv(call: Call) -> Result:
    result = convolution(call, call.inputs[0], call.inputs[1])
    bias = call.input(2)
    if bias is not None:
        result += bias.reshape(-1, *[1] * (result.ndim - 2))  # (M,) -> (M, 1, ...)
    return result


def _transposed_geometry(
    call: Call, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """What ConvTranspose crops before each spatial axis, and how long that axis then is.

    Source: ONNX ConvTranspose-11, "output_shape" and "auto_pad".
    """
    rank = len(sizes)
    extra = call.integers("output_padding") or (0,) * rank
    auto = call.text("auto_pad", "NOTSET")
    full = [
        (n - 1) * s + (k - 1) * d + 1 + e
        for n, s, k, d, e in zip(sizes, strides, kernel, dilations, extra, strict=True)
    ]
    shape = call.integers("output_shape")
    if shape is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        shape = tuple(n * s for n, s in zip(sizes, strides, strict=True))
    if shape is None:
        pads = (0,) * (2 * rank) if auto == "VALID" else call.integers("pads") or (0,) * (2 * rank)
        return list(pads[:rank]), [n - a - b for n, a, b in zip(full, pads[:rank], pads[rank:], strict=True)]
    if call.integers("output_shape") is None and any(n < wanted for n, wanted in zip(full, shape, strict=True)):
        raise UnusableError(f"auto_pad={auto!r} with windows that reach {tuple(full)} of {shape}: runtimes disagree")
    total = [max(n - wanted, 0) for n, wanted in zip(full, shape, strict=True)]
    before = [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in total]
    return before, list(shape)


def _conv_transpose(call: Call) -> Result:
    x, weight, bias = call.inputs[0], call.inputs[1], call.input(2)
    rank, group = x.ndim - 2, call.integer("group", 1)
    strides, dilations = call.integers("strides") or (1,) * rank, call.integers("dilations") or (1,) * rank
    kernel, sizes = weight.shape[2:], x.shape[2:]
    before, out_sizes = _transposed_geometry(call, sizes, kernel, strides, dilations)
    batch, channels, out_per_group = x.shape[0], x.shape[1], weight.shape[1]
    columns = weight.reshape(group, channels // group, -1).swapaxes(1, 2)  # (g, M/g * prod k, C/g)
    reach = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(sizes, strides, kernel, dilations, strict=True)]
    canvas = [max(n, b + out) for n, b, out in zip(reach, before, out_sizes, strict=True)]
    result = np.zeros((batch, group, out_per_group, *canvas))
    all_channels: tuple[Any, ...] = (slice(None), slice(None))
    for sample in range(batch):
        spread = np.matmul(columns, x[sample].reshape(group, channels // group, -1))
        spread = spread.reshape(group, out_per_group, *kernel, *sizes)
        for offset, where in window_slices(kernel, sizes, strides, dilations):
            result[sample][(*all_channels, *where)] += spread[(*all_channels, *offset)]
    inside = tuple(slice(b, b + out) for b, out in zip(before, out_sizes, strict=True))
    result = result.reshape(batch, group * out_per_group, *canvas)[(*all_channels, *inside)]
    return result if bias is None else result + bias.reshape(-1, *[1] * rank)


OPERATORS: Mapping[str, Kernel] = {"Conv": _conv, "ConvTranspose": _conv_transpose}
"""Floating-point convolutions by name."""

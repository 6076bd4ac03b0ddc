"""The dimensions that layers hand on: convolutions, pools, products, reductions, resampling.

Spatial sizes are worked out where they are fixed; everything else becomes a new `Dimension`. Source: the ONNX operator
specification, "output shape" of each operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.fact import Content, Dimension, Dims, Fact, Rule, computed
from renorm_onnx.fusion.fact_layout import LAYOUT_RULES, axes_of
from renorm_onnx.fusion.fact_rounding import rounding
from renorm_onnx.fusion.fact_rules import CONTENT_RULES, SAME_DIMS, attribute, broadcast, same_dims
from renorm_onnx.fusion.fact_selection import SELECTION_RULES

Facts = Sequence[Fact]
MAX_PRODUCTS = 1 << 30  # multiplications of two constant matrices

REDUCTIONS: Mapping[str, Callable[..., Any]] = {
    "ReduceMean": np.mean,
    "ReduceSum": np.sum,
    "ReduceMax": np.max,
    "ReduceMin": np.min,
    "ReduceProd": np.prod,
    "ReduceL1": lambda x, **where: np.sum(np.abs(x), **where),
    "ReduceL2": lambda x, **where: np.sqrt(np.sum(x * x, **where)),
    "ReduceSumSquare": lambda x, **where: np.sum(x * x, **where),
}


def _window(node: ir.Node, sizes: Dims, kernel: Sequence[int]) -> list[int | Dimension]:
    """Output sizes of a sliding window, one for each spatial size."""
    n = len(kernel)
    strides = attribute(node, "strides") or [1] * n
    dilations = attribute(node, "dilations") or [1] * n
    pads = attribute(node, "pads") or [0] * (2 * n)
    auto = attribute(node, "auto_pad", "NOTSET")
    result: list[int | Dimension] = []
    for i, size in enumerate(sizes):
        if not isinstance(size, int):
            result.append(Dimension())
            continue
        reach = (kernel[i] - 1) * dilations[i] + 1
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            result.append(math.ceil(size / strides[i]))
            continue
        free = size - reach + (0 if auto == "VALID" else pads[i] + pads[n + i])
        # Where the window does not fit, the specification makes nothing, and onnxruntime one if the strides are long.
        if free < 0 or attribute(node, "ceil_mode", 0):
            result.append(Dimension())
        else:
            result.append(free // strides[i] + 1)
    return result


def _conv(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    weight, dims = inputs[1].dims, inputs[0].dims
    if weight is None or len(weight) < 3:
        return [Fact(dtype=inputs[0].dtype)]
    batch, sizes = (dims[0], dims[2:]) if dims is not None and len(dims) == len(weight) else (Dimension(), None)
    kernel = weight[2:]
    if sizes is None or not all(isinstance(k, int) for k in kernel):
        return [Fact((batch, weight[0], *(Dimension() for _ in kernel)), dtype=inputs[0].dtype)]
    return [Fact((batch, weight[0], *_window(node, sizes, kernel)), dtype=inputs[0].dtype)]  # type: ignore[arg-type]


def _conv_transpose(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    weight, dims = inputs[1].dims, inputs[0].dims
    if weight is None or len(weight) < 3:
        return [Fact(dtype=inputs[0].dtype)]
    group, per_group = int(attribute(node, "group", 1)), weight[1]
    channels = per_group * group if isinstance(per_group, int) else Dimension()
    if dims is None or len(dims) != len(weight) or not all(isinstance(k, int) for k in weight[2:]):
        return [Fact((Dimension(), channels, *(Dimension() for _ in weight[2:])), dtype=inputs[0].dtype)]
    return [Fact((dims[0], channels, *_unwound(node, dims[2:], weight[2:])), dtype=inputs[0].dtype)]  # type: ignore[arg-type]


def _unwound(node: ir.Node, sizes: Dims, kernel: Sequence[int]) -> list[int | Dimension]:
    """Output sizes of a transposed convolution, one for each spatial size."""
    n = len(kernel)
    strides = attribute(node, "strides") or [1] * n
    dilations = attribute(node, "dilations") or [1] * n
    pads = attribute(node, "pads") or [0] * (2 * n)
    extra = attribute(node, "output_padding") or [0] * n
    if attribute(node, "output_shape") or attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        return [Dimension() for _ in sizes]
    return [
        (size - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 + extra[i] - pads[i] - pads[n + i]
        if isinstance(size, int)
        else Dimension()
        for i, size in enumerate(sizes)
    ]


def _of_integers(rule: Rule, *places: int, zero: int | None = None) -> Rule:
    """The rule of an operator on floats for that on integers.

    Args:
        rule: On floats.
        places: Where the operands stand.
        zero: Where the zero point of the output stands, which has its type; sums without one are INT32.
    """

    def integers(node: ir.Node, inputs: Facts, opset: int) -> Facts:
        kind = ir.DataType.INT32 if zero is None else inputs[zero].dtype
        return [f._replace(dtype=kind) for f in rule(node, [inputs[i] for i in places], opset)]

    return integers


def _pool(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims, kernel = inputs[0].dims, attribute(node, "kernel_shape")
    if dims is None or kernel is None or len(dims) != len(kernel) + 2:
        open_sizes = None if kernel is None else tuple(Dimension() for _ in range(len(kernel) + 2))
        return [Fact(open_sizes, dtype=inputs[0].dtype)]
    if str(attribute(node, "auto_pad", "NOTSET")).startswith("SAME") and max(attribute(node, "dilations") or [1]) > 1:
        # onnxruntime pads as if undilated, and makes less than the specification says.
        return [Fact((*dims[:2], *(Dimension() for _ in kernel)), dtype=inputs[0].dtype)]
    return [Fact((*dims[:2], *_window(node, dims[2:], kernel)), dtype=inputs[0].dtype)]


def _global_pool(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims = inputs[0].dims
    return [Fact(None if dims is None else (*dims[:2], *(1 for _ in dims[2:])), dtype=inputs[0].dtype)]


def _gemm(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    a, b = inputs[0].dims, inputs[1].dims
    rows = a[1 if attribute(node, "transA", 0) else 0] if a is not None and len(a) == 2 else Dimension()
    columns = b[0 if attribute(node, "transB", 0) else 1] if b is not None and len(b) == 2 else Dimension()
    return [Fact((rows, columns), dtype=inputs[0].dtype)]


def _matmul(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    a, b = inputs[0].dims, inputs[1].dims
    if a is None or b is None or not a or not b:
        return [Fact(dtype=inputs[0].dtype)]
    if (content := _matrix_product(inputs)) is not None:
        return [computed(content, inputs[0].dtype)]
    batch = broadcast([a[:-2], b[:-2]]) or ()
    tail = (() if len(a) == 1 else (a[-2],)) + (() if len(b) == 1 else (b[-1],))
    return [Fact(batch + tail, dtype=inputs[0].dtype)]


def _fused_matmul(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """FusedMatMul of onnxruntime: a product of matrices that may be transposed first."""
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return [Fact(dtype=inputs[0].dtype)]
    turned = []
    for given, name in zip(inputs, ("transA", "transB"), strict=True):
        dims = given.dims
        if dims is not None and len(dims) > 1 and attribute(node, name, 0):
            dims = (*dims[:-2], dims[-1], dims[-2])
        turned.append(Fact(dims, dtype=given.dtype))
    return _matmul(node, turned, opset)


def _matrix_product(inputs: Facts) -> Content | None:
    """The product of two constant matrices of moderate size."""
    if not all(i.is_constant and i.rank == 2 for i in inputs):
        return None
    (m, k), (_, n) = (i.dims or () for i in inputs)
    a, b = (i.elements() for i in inputs)
    if a is None or b is None or a.dtype.kind != "f" or m * k * n > MAX_PRODUCTS:  # type: ignore[operator]
        return None
    return np.asarray(a @ b)


def _recurrent(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """Outputs of LSTM, GRU and RNN: of each step, and of the last one; the recurrent weight has the hidden size."""
    x, recurrence = inputs[0].dims, inputs[2].dims
    if x is None or recurrence is None:
        return [Fact(dtype=inputs[0].dtype)]
    directions, hidden = recurrence[0], recurrence[2]
    batch_first = attribute(node, "layout", 0)
    steps, batch = (x[1], x[0]) if batch_first else (x[0], x[1])
    each = (batch, steps, directions, hidden) if batch_first else (steps, directions, batch, hidden)
    last = (batch, directions, hidden) if batch_first else (directions, batch, hidden)
    return [Fact(dims, dtype=inputs[0].dtype) for dims in (each, last, last)]


def _einsum(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    terms = einsum_terms(node)
    dims = [i.dims for i in inputs]
    if terms is None or any(d is not None and len(d) != len(t) for d, t in zip(dims, terms[0], strict=True)):
        return [Fact(dtype=inputs[0].dtype)]
    sizes: dict[str, list[Dims | None]] = {}
    for term, own in zip(terms[0], dims, strict=True):
        for place, name in enumerate(term):
            sizes.setdefault(name, []).append(None if own is None else (own[place],))
    # onnxruntime broadcasts a letter of size one, so a factor of unknown shape leaves the others' letters open.
    found = [broadcast(sizes.get(name, [None])) for name in terms[1]]
    return [Fact(tuple(Dimension() if d is None else d[0] for d in found), dtype=inputs[0].dtype)]


def einsum_terms(node: ir.Node) -> tuple[list[str], str] | None:
    """The letters of each operand of Einsum and of its output; None for an ellipsis, a diagonal or no arrow."""
    left, arrow, right = str(attribute(node, "equation", "")).replace(" ", "").partition("->")
    terms = left.split(",")
    plain = all(len(set(term)) == len(term) and (term + right).isalpha() for term in terms if term)
    return (terms, right) if arrow and plain and len(terms) == len(node.inputs) else None


def _grid_sample(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims, grid = inputs[0].dims, inputs[1].dims
    if dims is None or grid is None:
        return [Fact(dtype=inputs[0].dtype)]
    return [Fact((*dims[:2], *grid[1:-1]), dtype=inputs[0].dtype)]


def _reduce(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims, axes = inputs[0].dims, axes_of(node, inputs)
    if dims is None or (axes is None and (len(node.inputs) > 1 and node.inputs[1] is not None)):
        return [Fact(dtype=inputs[0].dtype)]
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        return [Fact(dims, dtype=inputs[0].dtype)]
    gone = set(range(len(dims))) if not axes else {a % len(dims) for a in axes}
    kept = attribute(node, "keepdims", 1)
    content = inputs[0].elements() if inputs[0].is_constant and gone else None
    if content is not None and content.dtype.kind == "f":
        reduced = REDUCTIONS[node.op_type](content, axis=tuple(sorted(gone)), keepdims=bool(kept))
        return [computed(reduced, inputs[0].dtype)]
    result = [1 if i in gone else d for i, d in enumerate(dims) if kept or i not in gone]
    return [Fact(tuple(result), dtype=inputs[0].dtype)]


def _pad(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims = inputs[0].dims
    if dims is None:
        return [Fact(dtype=inputs[0].dtype)]
    pads = attribute(node, "pads") if opset < 11 else inputs[1].fixed_integers()
    axes = inputs[3].fixed_integers() if len(inputs) > 3 and node.inputs[3] is not None else list(range(len(dims)))
    if pads is None or axes is None or len(pads) != 2 * len(axes):
        return [Fact(tuple(Dimension() for _ in dims), dtype=inputs[0].dtype)]
    result: list[int | Dimension] = list(dims)
    for i, axis in enumerate(a % len(dims) for a in axes):
        more = pads[i] + pads[len(axes) + i]
        size = dims[axis]
        result[axis] = size if more == 0 else size + more if isinstance(size, int) else Dimension()
    return [Fact(tuple(result), dtype=inputs[0].dtype)]


def _split(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims = inputs[0].dims
    if dims is None:
        return [Fact(dtype=inputs[0].dtype)] * len(node.outputs)
    axis = int(attribute(node, "axis", 0)) % len(dims)
    sizes = split_sizes(node, inputs, opset)
    content = inputs[0].elements() if inputs[0].is_constant else None
    if content is not None and sizes is not None and sum(sizes) == content.shape[axis]:
        parts = np.split(content, np.cumsum(sizes)[:-1], axis)
        return [computed(p, inputs[0].dtype) for p in parts]
    pieces = sizes if sizes is not None else [Dimension()] * len(node.outputs)
    return [Fact((*dims[:axis], p, *dims[axis + 1 :]), dtype=inputs[0].dtype) for p in pieces]


def split_sizes(node: ir.Node, inputs: Facts, opset: int) -> list[int] | None:
    """The lengths of Split's pieces, where proven; equal parts, the last one smaller, when none are given."""
    given = attribute(node, "split") if opset < 13 else None
    if given is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        given = inputs[1].fixed_integers()
        if given is None:
            return None
    if given is not None:
        return [int(g) for g in given]
    dims = inputs[0].dims
    size = None if dims is None else dims[int(attribute(node, "axis", 0)) % len(dims)]
    if not isinstance(size, int):
        return None
    count = len(node.outputs)
    part = math.ceil(size / count)
    return [part] * (count - 1) + [size - part * (count - 1)]


def _resample(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims = inputs[0].dims
    if dims is None:
        return [Fact(dtype=inputs[0].dtype)]
    kept = unscaled_axes(node, inputs, len(dims))
    return [Fact(tuple(d if i in kept else Dimension() for i, d in enumerate(dims)), dtype=inputs[0].dtype)]


def unscaled_axes(node: ir.Node, inputs: Facts, rank: int) -> set[int]:
    """The axes along which Upsample or Resize is proven to leave the size as it is."""
    axes = [int(a) % rank for a in attribute(node, "axes") or range(rank)]
    kept = set(range(rank)) - set(axes)
    scales = attribute(node, "scales")
    if scales is None:
        position = 1 if node.op_type == "Upsample" or len(inputs) == 2 else 2
        found = inputs[position].elements() if position < len(inputs) else None
        known = found is not None and found.dtype != object and found.size == len(axes) and inputs[position].exact
        scales = found.tolist() if found is not None and known else None
    if scales is not None:
        kept |= {a for a, s in zip(axes, scales, strict=False) if s == 1}
    sizes = inputs[3].integers() if len(inputs) > 3 else None
    dims = inputs[0].dims
    if sizes is not None and dims is not None and attribute(node, "keep_aspect_ratio_policy", "stretch") == "stretch":
        kept |= {a for a, s in zip(axes, sizes, strict=False) if s == dims[a]}
    if attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
        roi = inputs[1].elements()
        ends = [] if roi is None else list(zip(roi[: len(axes)], roi[len(axes) :], strict=True))
        kept -= set(axes) - {a for a, end in zip(axes, ends, strict=False) if end == (0, 1)}
    return kept


def _quantized(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """The same dimensions; the type is that of the scale (DequantizeLinear) or of the zero point (QuantizeLinear)."""
    if given := attribute(node, "output_dtype", 0):
        return [Fact(inputs[0].dims, dtype=ir.DataType(given))]
    if node.op_type == "DequantizeLinear":
        return [Fact(inputs[0].dims, dtype=inputs[1].dtype)]
    zero = inputs[2].dtype if len(inputs) > 2 and node.inputs[2] is not None else ir.DataType.UINT8
    return [Fact(inputs[0].dims, dtype=zero)]


def _dynamically_quantized(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """The integers, and one scale and zero point for all of them."""
    sizes, kinds = (inputs[0].dims, (), ()), (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
    return [Fact(dims, dtype=kind) for dims, kind in zip(sizes, kinds, strict=True)]


def _depth_to_space(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims, block = inputs[0].dims, attribute(node, "blocksize", 1)
    if dims is None or len(dims) != 4:
        return [Fact(dtype=inputs[0].dtype)]
    n, c, h, w = dims
    if node.op_type == "DepthToSpace":
        channels = c // block**2 if isinstance(c, int) else Dimension()
        sizes = [s * block if isinstance(s, int) else Dimension() for s in (h, w)]
    else:
        channels = c * block**2 if isinstance(c, int) else Dimension()
        sizes = [s // block if isinstance(s, int) else Dimension() for s in (h, w)]
    return [Fact((n, channels, *sizes), dtype=inputs[0].dtype)]


CONSTANT_OPERATORS = frozenset({*CONTENT_RULES, *LAYOUT_RULES, *REDUCTIONS, "MatMul", "Split"})

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(SAME_DIMS, same_dims),
    **CONTENT_RULES,
    **LAYOUT_RULES,
    **SELECTION_RULES,
    "AveragePool": _pool,
    "Conv": _conv,
    "ConvInteger": _of_integers(_conv, 0, 1),
    "ConvTranspose": _conv_transpose,
    "DeformConv": _conv,
    "DepthToSpace": _depth_to_space,
    "DynamicQuantizeLinear": _dynamically_quantized,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GridSample": _grid_sample,
    "LpPool": _pool,
    "MatMul": rounding(_matmul),
    "MatMulInteger": _of_integers(_matmul, 0, 1),
    "MaxPool": _pool,
    "Pad": _pad,
    "QLinearConv": _of_integers(_conv, 0, 3, zero=7),
    "QLinearMatMul": _of_integers(_matmul, 0, 3, zero=7),
    "QuantizeLinear": _quantized,
    "DequantizeLinear": _quantized,
    "Resize": _resample,
    "SpaceToDepth": _depth_to_space,
    "Split": _split,
    "Upsample": _resample,
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _global_pool),
    **dict.fromkeys(REDUCTIONS, rounding(_reduce)),
    **dict.fromkeys(("ReduceMax", "ReduceMin"), _reduce),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    # What onnxruntime makes of these when it optimizes a model.
    "com.microsoft::FusedConv": _conv,
    "com.microsoft::FusedGemm": _gemm,
    "com.microsoft::FusedMatMul": _fused_matmul,
    **dict.fromkeys((f"com.microsoft::{name}" for name in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")), same_dims),
}

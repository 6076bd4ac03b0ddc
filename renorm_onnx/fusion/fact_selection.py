"""The dimensions that operators hand on which pick, crop or scatter: regions of images, elements by index, unpooling.

Source: the ONNX operator specification, "output shape" of each operator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from renorm_onnx.fusion.fact import Dimension, Dims, Fact, Rule
from renorm_onnx.fusion.fact_rules import attribute

Facts = Sequence[Fact]


def _size(entries: Sequence[int | Dimension] | None, index: int = 0) -> int | Dimension:
    """One size of those that an operand holds; a new one where they are not known."""
    return Dimension() if entries is None or index >= len(entries) else entries[index]


def _regions(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """RoiAlign-10, MaxRoiPool-1: (regions, C, height, width)."""
    sizes = attribute(node, "pooled_shape") or [attribute(node, f"output_{name}", 1) for name in ("height", "width")]
    return [Fact((_size(inputs[1].dims), _size(inputs[0].dims, 1), *sizes), dtype=inputs[0].dtype)]


def _gather_elements(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """GatherElements-11: as many as there are indices."""
    return [Fact(inputs[1].dims, dtype=inputs[0].dtype)]


def _gather_nd(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """GatherND-11: the last axis of the indices counts through axes of the data, those behind them follow."""
    data, indices = inputs[0].dims, inputs[1].dims
    length = None if not indices else indices[-1]
    if data is None or indices is None or not isinstance(length, int):
        return [Fact(dtype=inputs[0].dtype)]
    return [Fact((*indices[:-1], *data[int(attribute(node, "batch_dims", 0)) + length :]), dtype=inputs[0].dtype)]


def _unpool(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """MaxUnpool-9: batch and channels stay; of sizes that are given onnxruntime accepts larger ones, there too."""
    dims = inputs[0].dims
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        given = inputs[2].integers()
        return [Fact(tuple(given) if given is not None else _all_open(dims), dtype=inputs[0].dtype)]
    return [Fact(None if dims is None else (*dims[:2], *(_all_open(dims[2:]) or ())), dtype=inputs[0].dtype)]


def _all_open(dims: Dims | None) -> Dims | None:
    return None if dims is None else tuple(Dimension() for _ in dims)


def _center_crop_pad(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """CenterCropPad-18: the sizes that are given, along `axes`."""
    dims = inputs[0].dims
    if dims is None:
        return [Fact(dtype=inputs[0].dtype)]
    axes = [int(a) % len(dims) for a in attribute(node, "axes") or range(len(dims))]
    sizes = dict(zip(axes, inputs[1].integers() or [Dimension() for _ in axes], strict=True))
    return [Fact(tuple(sizes.get(i, d) for i, d in enumerate(dims)), dtype=inputs[0].dtype)]


def _one_hot(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """OneHot-9: one axis more, as long as `depth` says."""
    dims = inputs[0].dims
    if dims is None:
        return [Fact(dtype=inputs[2].dtype)]
    axis = int(attribute(node, "axis", -1)) % (len(dims) + 1)
    return [Fact((*dims[:axis], _size(inputs[1].integers()), *dims[axis:]), dtype=inputs[2].dtype)]


def _compress(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """Compress-9: some elements of the flattened data, or some places along an axis."""
    dims, axis = inputs[0].dims, attribute(node, "axis")
    if axis is None:
        return [Fact((Dimension(),), dtype=inputs[0].dtype)]
    if dims is None:
        return [Fact(dtype=inputs[0].dtype)]
    place = int(axis) % len(dims)
    return [Fact((*dims[:place], Dimension(), *dims[place + 1 :]), dtype=inputs[0].dtype)]


def _top_k(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """TopK: k places along an axis, and where they were; k is an attribute before opset 10."""
    dims = inputs[0].dims
    kinds = inputs[0].dtype, ir.DataType.INT64
    if dims is None:
        return [Fact(dtype=kind) for kind in kinds]
    axis = int(attribute(node, "axis", -1)) % len(dims)
    given = attribute(node, "k") if opset < 10 else _size(inputs[1].integers())
    return [Fact((*dims[:axis], given, *dims[axis + 1 :]), dtype=kind) for kind in kinds]


def _columns_to_image(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """Col2Im-18: (N, C * elements of a block, blocks) becomes (N, C, *image)."""
    dims, image, block = inputs[0].dims, inputs[1].integers(), inputs[2].fixed_integers()
    if image is None:
        return [Fact(dtype=inputs[0].dtype)]
    rows, known = _size(dims, 1), block is not None and len(block) == len(image)
    channels = rows // math.prod(block or ()) if known and isinstance(rows, int) else Dimension()
    return [Fact((_size(dims), channels, *image), dtype=inputs[0].dtype)]


def _random_like(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """RandomNormalLike-1, RandomUniformLike-1, Bernoulli-15: the dimensions of the input."""
    kind = attribute(node, "dtype")
    return [Fact(inputs[0].dims, dtype=inputs[0].dtype if kind is None else ir.DataType(kind))]


def _true_or_false(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    return [Fact(inputs[0].dims, dtype=ir.DataType.BOOL)]


SELECTION_RULES: Mapping[str, Rule] = {
    "CenterCropPad": _center_crop_pad,
    "Col2Im": _columns_to_image,
    "Compress": _compress,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "MaxRoiPool": _regions,
    "MaxUnpool": _unpool,
    "OneHot": _one_hot,
    "RoiAlign": _regions,
    "TopK": _top_k,
    **dict.fromkeys(("RandomNormalLike", "RandomUniformLike", "Bernoulli"), _random_like),
    **dict.fromkeys(("IsInf", "IsNaN"), _true_or_false),
}

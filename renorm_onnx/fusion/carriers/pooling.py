"""Pools and reductions: a map along an axis that is not pooled passes, under conditions on its sign and the padding.

Before:
    ``y = s * pool(x) + t``
After:
    ``y = pool(s * x + t)``
Formula:
    A maximum or minimum commutes with s x + t for s > 0 (at s = 0 both are t); its padding never wins where a window
    sees any of the image, so it never sees t, and where the maximum lies (Indices) does not change. A mean is linear;
    its weights sum to one where the padding is not counted (count_include_pad = 0) or absent, and then a shift passes.
    A sum of n elements gives s sum(x) + t for sum(s x + t / n): n must be fixed. A norm (LpPool, ReduceL1, ReduceL2)
    passes s >= 0 without t. At the input the same holds the other way round, a sum turning t into n t. Reductions may
    drop axes, and the map's axis moves with them. Source: ONNX MaxPool, AveragePool, LpPool, Global*Pool,
    Reduce{Max,Min,Mean,Sum,L1,L2} in all versions.
Refuses when:
    the map runs along a pooled axis; a maximum, minimum or norm meets a negative scale; a mean that counts its
    padding, or a norm, meets a shift; a dilated window may see nothing but padding; Indices are read and a scale is
    zero; at the input, a sum in float16 meets a scale below one, without which it may overflow; axes or rank are not
    known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Step, refuse
from renorm_onnx.fusion.fact_layout import axes_of
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.report import Reason, Refusal

ORDER = ("MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin")
NORMS = ("LpPool", "GlobalLpPool", "ReduceL1", "ReduceL2")
SUMS = ("ReduceSum", *NORMS)


class Pooling(Carrier):
    """Operators that make one number of many."""

    operators = (
        *("MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"),
        *("ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2"),
    )
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Ask for the map at the input."""
        return self._pass(node, maps, desk, backward=True)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Hand the map on to the output."""
        return self._pass(node, maps, desk, backward=False)

    def _pass(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk, *, backward: bool) -> Step | Refusal:
        if set(maps) != {0}:
            return refuse(Reason.OUTPUTS, node, "is reached by its Indices, which are no such values")
        given = maps[0]
        pooled = self._pooled(node, desk)
        if isinstance(pooled, Refusal):
            return pooled
        if refusal := _unfit(node, given, desk):
            return refusal
        narrow = node.op_type in SUMS and desk.fact(node.inputs[0]).dtype == ir.DataType.FLOAT16
        if narrow and not backward and bool((abs(given.scale) < 1).any()):
            return refuse(Reason.OVERFLOW, node, "sums in FLOAT16, which may not hold what is not scaled down first")
        moved = self._moved(node, given, pooled, desk, backward=backward)
        if isinstance(moved, Refusal):
            return moved
        if given.has_shift and node.op_type == "ReduceSum":
            count = self._count(node, pooled, desk)
            if not count:
                return refuse(Reason.SHIFT, node, "sums a number of elements that is not fixed")
            moved = moved.with_shift(moved.shift / count if backward else moved.shift * count)
        return Step((), {0: moved})

    def _pooled(self, node: ir.Node, desk: Desk) -> set[int] | Refusal | None:
        """The axes that a reduction is over; None for a window, which leaves axes 0 and 1 alone, whatever the rank."""
        if not node.op_type.startswith("Reduce"):
            return None
        rank, facts = desk.fact(node.inputs[0]).rank, desk.inputs(node)
        axes = axes_of(node, facts)
        given = "axes" in node.attributes or (len(node.inputs) > 1 and node.inputs[1] is not None)
        if rank is None or (given and axes is None):
            return refuse(Reason.SHAPE, node, "reduces over axes that are not known", structural=True)
        if not axes:
            return set() if attribute(node, "noop_with_empty_axes", 0) else set(range(rank))
        return {a % rank for a in axes}

    def _moved(
        self, node: ir.Node, given: AffineMap, pooled: set[int] | None, desk: Desk, *, backward: bool
    ) -> AffineMap | Refusal:
        """The map along the axis that is the same one on the other side."""
        if not given.axes or (pooled is None and given.axes[-1] < 2):
            return given
        if pooled is None:
            return refuse(Reason.AXIS, node, f"pools axis {given.axes[-1]}, along which the map runs")
        rank = desk.fact(node.inputs[0]).rank
        assert rank is not None, "no reduction of an unknown rank has got here"
        gone = set() if attribute(node, "keepdims", 1) else pooled
        left = [i for i in range(rank) if i not in gone]
        hit = pooled.intersection(left[a] if backward else a for a in given.axes)
        if hit:
            return refuse(Reason.AXIS, node, f"pools axis {min(hit)}, along which the map runs")
        return given.moved(left.__getitem__ if backward else left.index)

    def _count(self, node: ir.Node, pooled: set[int] | None, desk: Desk) -> int:
        """How many elements are summed; 0 where that is not fixed."""
        dims = desk.dims(node.inputs[0])
        sizes = [] if dims is None or pooled is None else [dims[i] for i in pooled]
        fixed = [s for s in sizes if isinstance(s, int)]
        return math.prod(fixed) if dims is not None and len(fixed) == len(sizes) else 0


def _unfit(node: ir.Node, given: AffineMap, desk: Desk) -> Refusal | None:
    """Why the numbers of the map do not pass, wherever its axis lies."""
    if node.op_type in (*ORDER, *NORMS) and not given.is_monotone:
        return refuse(Reason.SIGN, node, "keeps the largest, smallest or absolute values: a negative scale cannot pass")
    if node.op_type in NORMS and given.has_shift:
        return refuse(Reason.SHIFT, node, "sums absolute values, so a shift does not pass")
    indices = len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output())
    if indices and bool((given.scale == 0).any()):
        return refuse(Reason.SIGN, node, "has Indices in use, and a scale of zero makes all elements equal")
    if node.op_type == "AveragePool" and given.has_shift and (why := _counts_padding(node)):
        return refuse(Reason.PADDING, node, f"{why}, and the zeros must not be shifted")
    if (node.op_type == "MaxPool" or (node.op_type == "AveragePool" and given.has_shift)) and _skips(node, desk):
        return refuse(Reason.PADDING, node, "may have a window all of whose elements are padding, which no map changes")
    return None


def _skips(node: ir.Node, desk: Desk) -> bool:
    """Whether a window may lie in the padding on both sides of the image: one whose steps are longer than that is."""
    kernel = attribute(node, "kernel_shape") or ()
    dilations, auto = attribute(node, "dilations") or [1] * len(kernel), attribute(node, "auto_pad", "NOTSET")
    pads = (attribute(node, "pads") if auto == "NOTSET" else None) or [int(auto.startswith("SAME"))] * 2 * len(kernel)
    steps = (d if a or b else 1 for d, a, b in zip(dilations, pads, pads[len(kernel) :], strict=False))
    return not _reaches(desk, node, list(steps))


def _reaches(desk: Desk, node: ir.Node, least: Sequence[int]) -> bool:
    """Whether the image is proven to have some least size along each of its axes; it has one of 1."""
    dims = desk.dims(node.inputs[0])
    sizes = (None,) * len(least) if dims is None else dims[2:]
    return all(n == 1 or (isinstance(s, int) and s >= n) for s, n in zip(sizes, least, strict=True))


def _counts_padding(node: ir.Node) -> str:
    """Why zeros enter the mean, as the end of a sentence; empty if none do."""
    if not attribute(node, "count_include_pad", 0):
        return ""
    auto, pads = attribute(node, "auto_pad", "NOTSET"), attribute(node, "pads")
    if attribute(node, "ceil_mode", 0):
        return "counts what lies beyond the end (ceil_mode=1)"
    if auto in ("SAME_UPPER", "SAME_LOWER") and any(k != 1 for k in attribute(node, "kernel_shape") or ()):
        return f"counts its padding (auto_pad={auto})"
    return f"counts its padding (pads={list(pads)})" if auto == "NOTSET" and pads and any(pads) else ""


CARRIERS = (Pooling(),)

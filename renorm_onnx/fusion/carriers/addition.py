"""Add, Sub, Sum, Mean: a scale passes to every operand, a shift to one; constants absorb what reaches them.

Before:
    ``y = s * (a + b) + t``                    ``y = (s * a + t) + (s * b + u)``
After:
    ``y = (s * a + t) + (s * b)``              ``y = s * (a + b) + (t + u)``
Formula:
    y = sum of k_i x_i with k = 1, 1 (Add, Sum), 1, -1 (Sub) or 1/n (Mean). At the output every x_i takes the scale;
    one of them, x, takes the shift t / (sum of the k_i at which x stands). At the inputs the scales must be one and
    the same, and the shifts add up; a shift alone ends in a constant operand, and a scale goes past a constant c:
    s x + t + c = s (x + c / s) + t, or for a small scale s (x + c) + (t + c - s c). Constants are widened to vary along
    the map.
    Source: ONNX Add, Sub, Sum, Mean in all versions.
Refuses when:
    a per-channel scale meets a computed operand that is not proven to have all the channels, or whose rank is
    unknown; no operand can take the shift; at the inputs, a computed operand that does not come from the norm would
    need the scale, or a constant one a scale of zero taken back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap, together
from renorm_onnx.fusion.carrier import Carrier, Desk, Edit, SetInput, Step, refuse
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.parameters import Parameter, largest
from renorm_onnx.fusion.report import Reason, Refusal
from renorm_onnx.fusion.sources import constant_operator

ABSORBING = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "DequantizeLinear")
# A scale below it leaves a constant as it is: W s would lose digits that c / s needs.
SMALL = 2.0**-10
# Numbers of a constant that is written out along the channels of a map: 256 KB as float32.
LARGEST_WIDENED = 1 << 16
# A scale from here on takes a constant along: x + c, rounded, would be multiplied by it.
LARGE = 4.0
BENDING = ("Relu", "LeakyRelu", "PRelu", "Mul", "Div")
PASSING = (
    *("Identity", "Dropout", "Relu", "LeakyRelu", "MaxPool", "AveragePool", "Reshape", "Transpose", "Flatten"),
    *("Squeeze", "Unsqueeze", "Add", "Sub", "Mul", "Neg", "Pad", "Resize", "Upsample", "DepthToSpace", "Cast"),
)


def aligned(given: AffineMap, rank: int | None, output_rank: int | None) -> AffineMap | None:
    """A map of the output seen from an operand that is broadcast to it; None where the operand lacks an axis of it."""
    if given.channels == 1:
        return given.reduced()
    if rank is None or output_rank is None or given.axes[0] < output_rank - rank:
        return None
    return given.moved(lambda axis: axis - (output_rank - rank))


def output_rank(node: ir.Node, desk: Desk) -> int | None:
    """Rank of an elementwise operator's output, counting constants as they will be."""
    ranks = []
    for index, value in enumerate(node.inputs):
        parameter = desk.parameter(node, index)
        ranks.append(len(parameter.shape) if parameter is not None else desk.fact(value).rank)
    known = [r for r in ranks if r is not None]
    return max(known) if known and len(known) == len(ranks) else None


def has_channels(value: ir.Value | None, given: AffineMap, desk: Desk) -> bool:
    """Whether `value` is proven to vary along the whole map, rather than to broadcast along it."""
    dims = desk.dims(value)
    lengths = zip(given.axes, given.scale.shape, strict=False)
    return not given.axes or (dims is not None and not given.periodic and all(dims[a] == n for a, n in lengths))


def outward(given: AffineMap, rank: int | None, output_rank: int | None) -> AffineMap | None:
    """A map of an operand seen from the output that it is broadcast to; None where a rank is not known."""
    if given.channels == 1:
        return given.reduced()
    return None if rank is None or output_rank is None else given.moved(lambda axis: axis + output_rank - rank)


def _fitted(parameter: Parameter, given: AffineMap, rank: int | None) -> AffineMap | None:
    """The map seen from a constant operand that has an element for each of its numbers; None for any other."""
    seen = aligned(given, len(parameter.shape), rank)
    lengths = () if seen is None else zip(seen.axes, seen.scale.shape, strict=False)
    return seen if all(parameter.shape[a] == n for a, n in lengths) else None


def widened(parameter: Parameter, given: AffineMap, rank: int | None, desk: Desk) -> Parameter | None:
    """``scale * parameter + shift`` for a constant operand, given axes of its own where the map needs them.

    None where that is not possible: the operand has another length there, or the opset is one in which operands do not
    broadcast (before 7).
    """
    own = len(parameter.shape)
    if given.periodic:
        return None
    if (seen := _fitted(parameter, given, rank)) is not None:
        return parameter.mapped(*seen.along(own))
    if rank is None or rank < own or desk.opset < 7:
        return None
    scale, shift = given.along(rank)
    first = min(rank - own, *given.axes)
    shape = scale.shape[first:]
    here = (1,) * (len(shape) - own) + parameter.shape
    if any(n not in (1, m) for n, m in zip(here, shape, strict=True) if m != 1):
        return None
    mapped = scale.reshape(shape) * parameter.float64() + shift.reshape(shape)
    return Parameter.new(np.asarray(mapped), parameter.dtype)


def map_operand(node: ir.Node, index: int, own: AffineMap, rank: int | None, desk: Desk) -> Step | Refusal:
    """Ask operand `index` to become ``own(operand)``, `own` being along an axis of the output."""
    parameter = desk.parameter(node, index)
    if attribute(node, "axis") is not None:
        return refuse(Reason.OPSET, node, "aligns its operands at an axis, as before opset 7", structural=True)
    if parameter is not None:
        changed = widened(parameter, own, rank, desk)
        if changed is None:
            return refuse(Reason.SHAPE, node, f"has operand {index} of shape {parameter.shape}, which is not widened")
        return Step((SetInput(node, index, changed),))
    value = node.inputs[index]
    seen = aligned(own, desk.fact(value).rank, rank)
    if seen is None or not has_channels(value, seen, desk):
        return refuse(Reason.SHAPE, node, f"has operand {index} that is not proven to vary along the map")
    return Step((), {index: seen})


def absorbs_soon(value: ir.Value | None, desk: Desk, *, shift: bool, limit: int = 8) -> bool:
    """Whether the way back from `value` looks like one that ends in an absorber: a guess that decides a preference.

    Args:
        value: Where the way begins.
        desk: Knows which operands are constant.
        shift: Whether a shift must go that way, and not a scale alone.
        limit: How many operators to look at.
    """
    for _ in range(limit):
        node = None if value is None else value.producer()
        if node is None or value is None or value.is_graph_output() or len(value.uses()) > 1:
            return False
        arithmetic = ("Add", "Sub") if shift else ("Mul", "Div")
        if node.op_type in arithmetic and any(desk.parameter(node, i) is not None for i in range(len(node.inputs))):
            return True
        if node.op_type in ABSORBING:
            return not (shift and node.op_type == "DequantizeLinear")
        if node.op_type not in PASSING or not node.inputs or (shift and node.op_type in BENDING):
            return False
        value = node.inputs[0]
    return False


class Addition(Carrier):
    """Sums of two or more operands with fixed coefficients."""

    operators = ("Add", "Sub", "Sum", "Mean")
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale every operand, shift one."""
        demand = maps[0]
        rank = output_rank(node, desk)
        takers = _takers(node, demand, rank, desk) if demand.has_shift else []
        if isinstance(takers, Refusal):
            return takers
        share = sum(coefficient(node, i) for i in takers)
        edits: list[Edit] = []
        onward: dict[int, AffineMap] = {}
        for index in range(len(node.inputs)):
            own = demand.without_shift()
            if index in takers:
                own = demand.with_shift(demand.shift / share)
            if own.is_identity:
                continue
            answer = map_operand(node, index, own, rank, desk)
            if isinstance(answer, Refusal):
                return answer
            edits.extend(answer.edits)
            onward.update(answer.onward)
        return Step(tuple(edits), onward)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Hand on the scale that all operands share; add up the shifts, into a constant if there is one."""
        if attribute(node, "axis") is not None:
            return refuse(Reason.OPSET, node, "aligns its operands at an axis, as before opset 7", structural=True)
        rank = output_rank(node, desk)
        total: AffineMap | None = None
        for index, given in maps.items():
            seen = outward(given, desk.fact(node.inputs[index]).rank, rank)
            if seen is None:
                return refuse(Reason.SHAPE, node, "has operands of unknown rank")
            seen = seen.with_shift(seen.shift * coefficient(node, index))
            total = seen if total is None else _sum(total, seen)
            if total is None:
                return refuse(Reason.CONFLICT, node, "gets operands that lack different scales")
        assert total is not None, "some operand brought the node here"
        if len(maps) < len(node.inputs) and total.has_scale:
            return _commuted(node, total, rank, desk, [i for i in range(len(node.inputs)) if i not in maps])
        for index in () if total.has_scale or not total.has_shift else range(len(node.inputs)):
            parameter = desk.parameter(node, index)
            share = total.with_shift(total.shift / coefficient(node, index))
            changed = None if parameter is None else widened(parameter, share, rank, desk)
            if changed is not None:
                return Step((SetInput(node, index, changed),))
        return Step((), {0: total})


def _takers(node: ir.Node, demand: AffineMap, rank: int | None, desk: Desk) -> list[int] | Refusal:
    """The positions of the one operand that takes the shift: a constant if possible, else the likeliest."""
    indices = range(len(node.inputs))
    for index in indices:
        parameter = desk.parameter(node, index)
        if parameter is not None and widened(parameter, demand, rank, desk) is not None:
            return [index]
    fits = []
    for index in indices:
        value = node.inputs[index]
        seen = aligned(demand, desk.fact(value).rank, rank)
        if desk.parameter(node, index) is None and seen is not None and has_channels(value, seen, desk):
            places = [i for i in indices if node.inputs[i] is value]
            if sum(coefficient(node, i) for i in places):
                fits.append(places)
    if not fits:
        return refuse(Reason.SHAPE, node, "has no operand that is proven to take a shift along the map")
    return next((f for f in fits if absorbs_soon(node.inputs[f[0]], desk, shift=True)), fits[0])


def _commuted(
    node: ir.Node, total: AffineMap, rank: int | None, desk: Desk, constants: Sequence[int]
) -> Step | Refusal:
    """``s x + t + c = s (x + c / s) + t``: a constant stays as far from x, in units of x, as it was.

    Where s is next to nothing, or the quotient too large, ``s x + t + c = s (x + c) + (t + c - s c)``; and where there
    is a shift that goes on anyway, and s is too small to multiply much of what is rounded in ``x + c``.
    """
    link = constant_operator(node, desk)
    if link is None or not set(link.map.axes) <= set(total.axes):
        return _divided(node, total, rank, desk, constants)
    index = 1 if node.inputs[0] is link.data else 0
    total, added = together(total, link.map)
    left = np.abs(total.scale) < (LARGE if total.has_shift else SMALL)
    if left.all():
        return Step((), {0: total.with_shift(total.shift + added.shift - total.scale * added.shift)})
    own = total._replace(scale=1.0 / np.where(left, 1.0, total.scale), shift=np.zeros(left.shape))
    constant = desk.parameter(node, index)
    changed = None if constant is None else widened(constant, own, rank, desk)
    limit = 0.0 if changed is None else min(largest(changed.dtype), desk.max_weight)
    if changed is None or not np.abs(changed.float64()).max(initial=0.0) <= limit:
        left, changed = np.full(left.shape, True), None
    onward = np.where(left, total.shift + added.shift - total.scale * added.shift, total.shift)
    return Step(() if changed is None else (SetInput(node, index, changed),), {0: total.with_shift(onward)})


def _divided(node: ir.Node, total: AffineMap, rank: int | None, desk: Desk, constants: Sequence[int]) -> Step | Refusal:
    """``s x + t + c = s (x + c / s) + t``, for constants that do not run along the map alone."""
    known = {index: p for index in constants if (p := desk.parameter(node, index)) is not None}
    if len(known) < len(constants):
        return refuse(Reason.SCALE, node, "adds an operand that does not come from the norm")
    if (np.abs(total.scale) < SMALL).any():
        return refuse(Reason.SCALE, node, "adds a constant, which a scale next to nothing would take with it")
    inverse = AffineMap(1 / total.scale, np.zeros(total.shift.shape), total.axes, total.periodic)
    edits: list[Edit] = []
    for index, parameter in known.items():
        grown = math.prod(parameter.shape) * total.channels
        if grown > LARGEST_WIDENED and _fitted(parameter, total, rank) is None:
            why = f"has a constant that would grow from {parameter.shape} to {grown} numbers"
            return refuse(Reason.SHAPE, node, why)
        changed = widened(parameter, inverse, rank, desk)
        if changed is None:
            return refuse(Reason.SHAPE, node, f"has operand {index}, a constant that is not widened")
        edits.append(SetInput(node, index, changed))
    return Step(tuple(edits), {0: total})


def _sum(one: AffineMap, two: AffineMap) -> AffineMap | None:
    """What a sum lacks when its operands lack `one` and `two`; None unless they lack the same scale."""
    one, two = together(one, two)
    return one.with_shift(one.shift + two.shift) if np.array_equal(one.scale, two.scale) else None


def coefficient(node: ir.Node, index: int) -> float:
    """What operand `index` is multiplied by in the sum."""
    if node.op_type == "Mean":
        return 1.0 / len(node.inputs)
    return -1.0 if node.op_type == "Sub" and index == 1 else 1.0


CARRIERS = (Addition(),)

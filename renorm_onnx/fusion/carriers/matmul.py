"""MatMul: absorbs a scale into its constant factor; a shift becomes an Add behind it.

Before:
    ``y = s * (A B) + t``                 ``y = (s * A + t) B``
After:
    ``y = A (B s) + t``                   ``y = A (s B) + t B``
Formula:
    A is (..., M, K) and B is (..., K, N). At the output a map along N scales the columns of B, one along M the rows
    of A, one along a leading axis the factor that has this axis. At the input a map along K scales the other factor
    along K, and its shift adds sum_k t[k] B[..., k, n]; a scale along any other axis passes to the output. A factor
    of one axis is (K,): its M or N is missing in the output. Source: ONNX MatMul-1, 9, 13.
Refuses when:
    the ranks are not known; at the output, a shift alone arrives and neither factor is constant (an Add would stay
    an Add); at the input, the other factor is not constant, or a shift runs along another axis than K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import AddAfter, Carrier, Desk, Step, refuse
from renorm_onnx.fusion.carriers.gemm import element_type
from renorm_onnx.fusion.carriers.quantized import weight_of
from renorm_onnx.fusion.parameters import Array, Parameter
from renorm_onnx.fusion.report import Reason, Refusal
from renorm_onnx.fusion.sources import constant_operator


class MatMul(Carrier):
    """Matrix product of two tensors, with leading axes that broadcast."""

    operators = ("MatMul",)
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale one factor; add the shift behind."""
        demand = maps[0]
        constant = [desk.parameter(node, i) is not None for i in range(2)]
        ranks = [desk.fact(v).rank for v in node.inputs]
        rank = _output_rank(ranks)
        if demand.periodic and demand.has_shift:
            return refuse(Reason.SHAPE, node, "has an output of open size along which the shift repeats itself")
        if rank is None and (demand.axes or demand.has_shift):
            return refuse(Reason.SHAPE, node, "has operands of unknown rank", structural=True)
        onward: dict[int, AffineMap] = {}
        if demand.has_scale:
            target = self._scaled_factor(node, demand, constant, ranks, desk)
            if isinstance(target, Refusal):
                return target
            onward[target[0]] = target[1]
        if not demand.has_shift:
            return Step((), onward)
        if not onward and not any(constant):
            return refuse(Reason.SHIFT, node, "has no constant factor, and the shift would stay an Add")
        if desk.opset < 7 and demand.axes not in ((), ((rank or 0) - 1,)):
            return refuse(
                Reason.OPSET, node, "would need an Add that broadcasts along the last axes, as from opset 7 on"
            )
        dtype = element_type(node, desk)
        if dtype is None:
            return refuse(Reason.DTYPE, node, "has an unknown element type")
        # (C,) -> (C, 1, ...): right-aligned against the output.
        shape = demand.along(rank or 0)[1].shape[demand.axes[0] :] if demand.axes else ()
        return Step((AddAfter(node, Parameter.new(demand.shift.reshape(shape), dtype)),), onward)

    def _scaled_factor(
        self, node: ir.Node, demand: AffineMap, constant: Sequence[bool], ranks: Sequence[int | None], desk: Desk
    ) -> tuple[int, AffineMap] | Refusal:
        """The factor that takes the scale, and what is asked of it."""
        scale = demand.without_shift()
        if not demand.axes:
            return (0 if constant[0] and not constant[1] else 1), scale
        fits = []
        for side in range(2):
            places = {axis: axis_in_factor(axis, side, ranks) for axis in demand.axes}
            dims = desk.dims(node.inputs[side])
            if dims is None or None in places.values():
                continue
            own = scale.moved(lambda axis, places=places: places[axis] or 0)  # type: ignore[misc]
            # M and N cannot broadcast, leading axes can.
            if all(
                dims[p] == n or (p >= len(dims) - 2 and not isinstance(dims[p], int))
                for p, n in zip(own.axes, own.scale.shape, strict=True)
            ):
                fits.append((side, own))
        if not fits:
            return refuse(Reason.SHAPE, node, f"has no factor that is proven to vary along axes {demand.axes}")
        return next((f for f in fits if constant[f[0]]), fits[-1])

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale the other factor along K; what the shift contributes is added behind."""
        if len(maps) != 1:
            return refuse(Reason.WEIGHT, node, "gets both of its factors from the norm")
        [(side, given)] = maps.items()
        ranks = [desk.fact(v).rank for v in node.inputs]
        if ranks[0] is None or ranks[1] is None or not ranks[0] or not ranks[1]:
            return refuse(Reason.SHAPE, node, "has operands of unknown rank", structural=True)
        other = weight_of(node, 1 - side, desk)
        if given.axes not in ((), (_inner_axis(side, ranks),)) or (other is None and not given.has_shift):
            return self._pass_outer(node, side, given, ranks)
        if other is None:
            return refuse(Reason.WEIGHT, node, "has a weight that is not constant")
        inner = _inner_axis(1 - side, ranks)
        given = given.counted(_inner_axis(side, ranks), other.shape[inner])
        if given.axis is not None and given.channels != other.shape[inner]:
            return refuse(Reason.AXIS, node, f"sums over {other.shape[inner]} elements, the map has {given.channels}")
        own = given.on_axis(inner)
        demands = {1 - side: own.without_shift()} if given.has_scale else {}
        if not given.has_shift:
            return Step((), {}, demands)
        total = _contracted(other, own.along(len(other.shape))[1], inner)
        if desk.opset < 7 and (total.ndim != 1 or side):
            return refuse(
                Reason.OPSET, node, "would need an Add that broadcasts along the last axes, as from opset 7 on"
            )
        if total.ndim == 1 and side == 0 and following_add(node, desk):
            return Step((), {0: AffineMap.of(1.0, total, (_output_rank(ranks) or 1) - 1)}, demands)
        if (total.ndim > 1 or side) and ranks[side] != 1 and ranks[1 - side] != 1:
            total = np.expand_dims(total, -2 if side == 0 else -1)  # (..., N) -> (..., 1, N); (..., M) -> (..., M, 1)
        return Step((AddAfter(node, Parameter.new(total, other.dtype)),), {}, demands)

    def _pass_outer(self, node: ir.Node, side: int, given: AffineMap, ranks: Sequence[int | None]) -> Step | Refusal:
        """A scale along an axis that is not summed over scales the product along the same axis."""
        if given.has_shift:
            return refuse(Reason.AXIS, node, "does not sum over the axis that the map runs along")
        places = {axis_in_factor(axis, side, ranks): axis for axis in range(_output_rank(ranks) or 0)}
        if _inner_axis(side, ranks) in given.axes:
            return refuse(Reason.WEIGHT, node, "has a weight that is not constant")
        return Step((), {0: given.moved(places.__getitem__)})


def following_add(node: ir.Node, desk: Desk) -> bool:
    """Whether the only reader of `node` is an Add of a constant that runs along one axis: a bias to be completed."""
    value = node.outputs[0]
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return False
    reader = next(iter(uses)).node
    return reader.op_type == "Add" and reader.graph is node.graph and constant_operator(reader, desk) is not None


def _contracted(factor: Parameter, shift: Array, inner: int) -> Array:
    """``sum over axis inner of factor * shift``, in the memory of one block of rows."""
    if len(factor.shape) < 3:
        return factor.contract(shift, axis=inner)
    return np.concatenate([(block * shift).sum(axis=inner) for _, block in factor.blocks()])


def _inner_axis(side: int, ranks: Sequence[int | None]) -> int:
    """The axis of a factor that is summed over: the last of A, the last but one of B."""
    rank = ranks[side] or 0
    return rank - 1 if side == 0 or rank == 1 else rank - 2


def _output_rank(ranks: Sequence[int | None]) -> int | None:
    """Rank of the product; None where an operand's rank is not known."""
    if ranks[0] is None or ranks[1] is None:
        return None
    matrix = int(ranks[0] > 1) + int(ranks[1] > 1)
    return max(ranks[0] - 2, ranks[1] - 2, 0) + matrix


def axis_in_factor(axis: int, side: int, ranks: Sequence[int | None]) -> int | None:
    """Where an axis of the product lies in factor `side`; None where that factor has no such axis."""
    a, b = ranks[0] or 0, ranks[1] or 0
    leading = max(a - 2, b - 2, 0)
    if axis < leading:
        own = axis - (leading - max((a, b)[side] - 2, 0))
        return own if own >= 0 else None
    name = [n for n, there in (("M", a > 1), ("N", b > 1)) if there][axis - leading]
    if name == "M":
        return a - 2 if side == 0 else None
    return b - 1 if side == 1 else None


CARRIERS = (MatMul(),)

"""Gemm: absorbs a map at its output, and at its input where the other factor is constant.

Before:
    ``y = s * (alpha A' B' + beta C) + t``             ``y = alpha (s * A' + t) B' + beta C``
After:
    ``y = alpha A' (B' s) + (s beta C + t)``           ``y = alpha A' (s B') + (beta C + alpha t B')``
Formula:
    A' is (M, K) and B' is (K, N), after transA and transB. At the output a map along axis 1 scales the columns of
    B', one along axis 0 the rows of A'. At the input a map along K scales the rows of the other factor, and its
    shift adds alpha * sum_k t[k] B'[k, n] to column n. C broadcasts from (), (1), (N), (1, N), (M, 1) or (M, N) and
    is widened to what the map needs; where it is rewritten, beta is folded into it and becomes 1. Source: ONNX
    Gemm-6, 7, 9, 11, 13.
Refuses when:
    a computed C broadcasts along the map; at the input, the other factor is not constant, or the map runs along M or N
    together with a shift or a C.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Edit, SetAttribute, SetInput, Step, refuse
from renorm_onnx.fusion.carriers.quantized import no_weight, weight_of
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.parameters import Array, Parameter
from renorm_onnx.fusion.report import Reason, Refusal


def element_type(node: ir.Node, desk: Desk) -> ir.DataType | None:
    """The float type in which `node` computes, from any operand or the output; operands of integers say where."""
    known = [desk.fact(v).dtype for v in (*node.inputs, *node.outputs) if v is not None]
    return next((d for d in known if d is not None and d.is_floating_point()), None)


class Gemm(Carrier):
    """General matrix product with an added matrix."""

    operators = ("Gemm",)

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale the columns of B (or the rows of A), map C."""
        demand = maps[0]
        if demand.axis not in (None, 0, 1):
            return refuse(Reason.AXIS, node, f"has two axes, the map runs along axis {demand.axis}")
        if element_type(node, desk) is None:
            return refuse(Reason.DTYPE, node, "has an unknown element type", structural=True)
        added = self._map_c(node, demand, desk)
        if isinstance(added, Refusal):
            return added
        edits, onward = added
        if demand.has_scale:
            factor = self._scaled_factor(node, demand, desk)
            axis = demand.axis
            if axis is not None and attribute(node, ("transA", "transB")[factor], 0):
                axis = 1 - axis
            onward[factor] = demand.without_shift().on_axis(axis)
        return Step(tuple(edits), onward)

    def _scaled_factor(self, node: ir.Node, demand: AffineMap, desk: Desk) -> int:
        """Which factor has the map's axis: A has the rows, B the columns; any will do for a uniform map."""
        if demand.axis is not None:
            return demand.axis
        return 0 if desk.parameter(node, 0) is not None and desk.parameter(node, 1) is None else 1

    def _map_c(self, node: ir.Node, demand: AffineMap, desk: Desk) -> tuple[list[Edit], dict[int, AffineMap]] | Refusal:
        """What the map asks of C: a rewritten constant, or a demand on a computed one."""
        beta = float(attribute(node, "beta", 1.0))
        if not desk.has_input(node, 2) or beta == 0:
            return (self._set_c(node, demand.along(2)[1], desk), {}) if demand.has_shift else ([], {})
        scale, shift = demand.along(2)
        constant = desk.parameter(node, 2)
        if constant is not None:
            return self._set_c(node, scale * (beta * constant.float64()) + shift, desk, constant), {}
        dims = desk.dims(node.inputs[2])
        if demand.axis is None:
            return [], {2: AffineMap.of(demand.scale, demand.shift / beta, None)}
        axis = None if dims is None else demand.axis - (2 - len(dims))
        if dims is None or axis is None or axis < 0 or dims[axis] != demand.channels:
            return refuse(Reason.SHAPE, node, "adds a computed C that is not proven to vary along the map")
        return [], {2: AffineMap.of(demand.scale, demand.shift / beta, axis)}

    def _set_c(self, node: ir.Node, c: Array, desk: Desk, old: Parameter | None = None) -> list[Edit]:
        """Make C the matrix `c`, of as few axes as it had or needs, and beta one."""
        dtype = old.dtype if old is not None else element_type(node, desk)
        rank = 1 if old is None else len(old.shape)
        while c.ndim > rank and c.shape[0] == 1:
            c = c[0]
        assert dtype is not None, "checked before"
        edits: list[Edit] = [SetInput(node, 2, Parameter.new(c, dtype))]
        if attribute(node, "beta", 1.0) != 1.0:
            edits.append(SetAttribute(node, ir.AttrFloat32("beta", 1.0)))
        if desk.opset < 7 and old is None:  # C had all M rows, unless this was set
            edits.append(SetAttribute(node, ir.AttrInt64("broadcast", 1)))
        return edits

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale the rows of the other factor, add what the shift contributes to C."""
        if len(maps) != 1 or 2 in maps:
            return refuse(Reason.WEIGHT, node, "gets more than one of its factors from the norm")
        [(side, given)] = maps.items()
        transposed = [bool(attribute(node, name, 0)) for name in ("transA", "transB")]
        inner = (1 - side) ^ transposed[side]  # the axis of this factor that is summed over
        if given.axis not in (None, inner):
            return self._pass_outer(node, side, given, desk)
        other = weight_of(node, 1 - side, desk)
        if other is None:
            return no_weight(node, 1 - side, desk)
        axis = side ^ transposed[1 - side]
        own = given.on_axis(axis)
        if given.axis is not None and given.channels != other.shape[axis]:
            return refuse(Reason.AXIS, node, f"sums over {other.shape[axis]} elements, the map has {given.channels}")
        demands = {1 - side: own.without_shift()} if given.has_scale else {}
        if not given.has_shift:
            return Step((), {}, demands)
        total = float(attribute(node, "alpha", 1.0)) * other.contract(own.along(2)[1], axis=axis)
        added = self._map_c(node, AffineMap.of(1.0, total, 1 - side), desk)
        return added if isinstance(added, Refusal) else Step(tuple(added[0]), {}, demands | added[1])

    def _pass_outer(self, node: ir.Node, side: int, given: AffineMap, desk: Desk) -> Step | Refusal:
        """A map along M or N scales rows or columns of the product, if nothing else is added to it."""
        if given.has_shift or (desk.has_input(node, 2) and attribute(node, "beta", 1.0) != 0):
            return refuse(Reason.AXIS, node, "does not sum over the axis that the map runs along")
        return Step((), {0: given.on_axis(side)})


CARRIERS = (Gemm(),)

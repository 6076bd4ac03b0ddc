"""Mul, Div, Neg: a scale is absorbed by a constant factor or passes to one factor; a shift passes a number only.

Before:
    ``y = s * (a b)``              ``y = (s * a) b``, ``y = (s * a + t) c``       ``y = s * (-x) + t``
After:
    ``y = (s * a) b``              ``y = s * (a b)``, ``y = (s c) a + t c``       ``y = -(s * x - t)``
Formula:
    At the output the scale goes to one factor (to the numerator of a quotient), a constant one first. At the inputs the
    scales of all factors multiply (one of a divisor is turned over) and end in a constant factor or, turned over, in a
    constant divisor, widened to vary along the map. A shift only goes past a constant c: (s x + t) c = s (c x) + t c.
    Source: ONNX Mul, Div, Neg in all versions.
Refuses when:
    a shift arrives at the output of a product, or at an input that is multiplied by something computed, or is
    divided by; a computed factor is not proven to vary along the map; a divisor lacks a scale of zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from renorm_onnx.fusion.affine import IDENTITY, AffineMap, together
from renorm_onnx.fusion.carrier import Carrier, Desk, SetInput, Step, refuse
from renorm_onnx.fusion.carriers.addition import (
    absorbs_soon,
    map_operand,
    output_rank,
    outward,
    widened,
)
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.report import Reason, Refusal
from renorm_onnx.fusion.sources import constant_operator


class Multiplication(Carrier):
    """Products and quotients of two operands."""

    operators = ("Mul", "Div")
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale one factor."""
        demand = maps[0]
        if demand.has_shift:
            return refuse(Reason.SHIFT, node, "multiplies, and a shift of its output is no shift of an input")
        if node.op_type == "Mul" and node.inputs[0] is node.inputs[1]:
            return refuse(Reason.SCALE, node, "squares its input")
        rank = output_rank(node, desk)
        answers = [map_operand(node, i, demand, rank, desk) for i in ((0, 1) if node.op_type == "Mul" else (0,))]
        steps = [a for a in answers if isinstance(a, Step)]
        if not steps:
            return answers[0]
        likely = (s for s in steps if s.edits or any(absorbs_soon(node.inputs[i], desk, shift=False) for i in s.onward))
        return next(likely, steps[0])

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Hand on the product of the scales; a shift only where the other factor is constant."""
        if attribute(node, "axis") is not None:
            return refuse(Reason.OPSET, node, "aligns its operands at an axis, as before opset 7", structural=True)
        rank = output_rank(node, desk)
        if any(m.has_shift for m in maps.values()):
            return self._shifted(node, maps, rank, desk)
        total = IDENTITY
        for index, given in maps.items():
            seen = outward(given, desk.fact(node.inputs[index]).rank, rank)
            if seen is None:
                return refuse(Reason.SHAPE, node, "has operands of unknown rank")
            if node.op_type == "Div" and index == 1:
                if (seen.scale == 0).any():
                    return refuse(Reason.SCALE, node, "divides by an operand that lacks a scale of zero")
                seen = AffineMap(1.0 / seen.scale, seen.shift, seen.axes, seen.periodic)
            total = total.then(seen)
        for index in (0, 1) if node.op_type == "Mul" else (0,):
            parameter = desk.parameter(node, index)
            changed = None if parameter is None else widened(parameter, total, rank, desk)
            if changed is not None:
                return Step((SetInput(node, index, changed),))
        divisor = desk.parameter(node, 1) if node.op_type == "Div" and (total.scale != 0).all() else None
        turned = total._replace(scale=1.0 / total.scale)
        changed = None if divisor is None else widened(divisor, turned, rank, desk)
        return Step((), {0: total}) if changed is None else Step((SetInput(node, 1, changed),))

    def _shifted(self, node: ir.Node, maps: Mapping[int, AffineMap], rank: int | None, desk: Desk) -> Step | Refusal:
        """``(s x + t) c = s (c x) + t c``: the map goes past the constant."""
        link = constant_operator(node, desk)
        if link is None or len(maps) != 1 or node.inputs[next(iter(maps))] is not link.data:
            return refuse(Reason.SHIFT, node, "multiplies a shift by something that is not a constant along one axis")
        [given] = maps.values()
        seen = outward(given, desk.fact(link.data).rank, rank)
        if seen is None:
            return refuse(Reason.SHAPE, node, "has operands of unknown rank")
        seen, factor = together(seen, link.map)
        return Step((), {0: seen.with_shift(factor.scale * seen.shift)})


class Negation(Carrier):
    """The opposite number."""

    operators = ("Neg",)
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """``s (-x) + t = -(s x - t)``."""
        return Step((), {0: maps[0].with_shift(-maps[0].shift)})

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """``-(s x + t) = s (-x) - t``."""
        return Step((), {0: maps[0].with_shift(-maps[0].shift)})


CARRIERS = (Multiplication(), Negation())

"""Max, Min, Where, Abs: a map passes to all operands of which one is taken; an absolute value passes a scale's size.

Before:
    ``y = s * max(a, b) + t``        ``y = max(s * a + t, b)``        ``y = s * abs(x)``, ``y = abs(s * x)``
After:
    ``y = max(s * a + t, s * b + t)``    ``y = s * max(a, (b - t) / s) + t``    ``y = abs(s * x)``, ``y = |s| abs(x)``
Formula:
    s x + t keeps order for s > 0, and makes all operands equal for s = 0; which operand Where takes, no map decides.
    Every operand takes the same map, a constant one at once. At the inputs the operands must lack one and the same map,
    or be constants c, which become (c - t) / s. A stored infinity (the masked scores of attention) stays one, of the
    other sign where s < 0. Source: ONNX Max, Min, Where, Abs in all versions.
Refuses when:
    a scale is negative (but for Where, and Abs at the input); a shift meets Abs; a computed operand does not vary along
    the map, or does not come from the norm; a scale is zero at the input beside a constant, or meets an infinity.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Edit, SetInput, Step, refuse
from renorm_onnx.fusion.carriers.addition import map_operand, output_rank, outward, widened
from renorm_onnx.fusion.report import Reason, Refusal


class Selection(Carrier):
    """One of two operands, element by element, as a third one says."""

    operators: tuple[str, ...] = ("Where",)
    many_axes = True
    ordered = False

    def _operands(self, node: ir.Node) -> list[int]:
        """The places of the operands of which one is taken."""
        return [1, 2]

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Ask every operand for the map."""
        demand = maps[0]
        if self.ordered and not demand.is_monotone:
            return refuse(Reason.SIGN, node, "keeps the largest or smallest: a negative scale cannot pass")
        rank = output_rank(node, desk)
        edits: list[Edit] = []
        onward: dict[int, AffineMap] = {}
        for index in self._operands(node):
            answer = map_operand(node, index, demand, rank, desk)
            if isinstance(answer, Refusal):
                return answer
            edits.extend(e for e in answer.edits if not _is_same(e, desk))
            onward.update(answer.onward)
        return Step(tuple(edits), onward)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Hand on the map that all operands lack; give constants its inverse."""
        rank = output_rank(node, desk)
        found = [outward(m, desk.fact(node.inputs[i]).rank, rank) for i, m in maps.items()]
        seen = [m for m in found if m is not None]
        if len(seen) < len(found):
            return refuse(Reason.SHAPE, node, "has operands of unknown rank")
        if not all(m.equals(seen[0]) for m in seen):
            return refuse(Reason.CONFLICT, node, "gets operands that lack different maps")
        given = seen[0]
        others = [i for i in self._operands(node) if i not in maps]
        if self.ordered and not given.is_monotone:
            return refuse(Reason.SIGN, node, "keeps the largest or smallest: only a positive scale can pass")
        if others and (given.scale == 0).any():
            return refuse(Reason.SCALE, node, "has another operand, which a scale of zero would lose")
        edits: list[Edit] = []
        inverse = given._replace(scale=1.0 / given.scale, shift=-given.shift / given.scale) if others else given
        for index in others:
            parameter = desk.parameter(node, index)
            changed = None if parameter is None else widened(parameter, inverse, rank, desk)
            if changed is None:
                return refuse(Reason.SCALE, node, "has another operand, which does not come from the norm")
            edits.append(SetInput(node, index, changed))
        return Step(tuple(e for e in edits if not _is_same(e, desk)), {0: given})


class Extreme(Selection):
    """The largest or smallest of some operands, element by element."""

    operators = ("Max", "Min")
    ordered = True

    def _operands(self, node: ir.Node) -> list[int]:
        return list(range(len(node.inputs)))


def _is_same(edit: Edit, desk: Desk) -> bool:
    """Whether an edit gives a constant the numbers that it has: the zero of ``max(x, 0)`` stays one number."""
    old = desk.parameter(edit.node, edit.index) if isinstance(edit, SetInput) else None
    if old is None or not isinstance(edit, SetInput):
        return False
    return bool((old.float64() == edit.parameter.float64()).all())


class Absolute(Carrier):
    """The size of a number without its sign."""

    operators = ("Abs",)
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass a scale that is not negative."""
        if maps[0].has_shift:
            return refuse(Reason.SHIFT, node, "bends at zero, so a shift does not pass")
        if not maps[0].is_monotone:
            return refuse(Reason.SIGN, node, "is never negative, so a negative scale does not pass")
        return Step((), {0: maps[0]})

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Hand on the size of a scale."""
        if maps[0].has_shift:
            return refuse(Reason.SHIFT, node, "bends at zero, so a shift does not pass")
        return Step((), {0: maps[0]._replace(scale=np.abs(maps[0].scale))})


CARRIERS = (Selection(), Extreme(), Absolute())

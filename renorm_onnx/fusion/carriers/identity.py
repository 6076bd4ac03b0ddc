"""Identity, Dropout, Cast: a map passes unchanged through what does not change numbers.

Before:
    ``y = s * identity(x) + t``
After:
    ``y = identity(s * x + t)``
Formula:
    Dropout at inference is the identity; its mask does not depend on x. A Cast to a float type that holds every
    number of the type it reads is exact, so the map may be applied before it or after it; a fold is then rounded in
    the type of the operator that absorbs it. Source: ONNX Identity, Dropout-6, 7, 10, 12, 13, 22, Cast.
Refuses when:
    Dropout is in training mode; Cast narrows, or one of its types is no float or is not known. Backward, the planner
    also asks `ranges` whether the type that a Cast reads holds what the norm computes.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Step, refuse
from renorm_onnx.fusion.fact_rounding import holds
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.report import Reason, Refusal


class Identity(Carrier):
    """Operators that hand on their input at inference."""

    operators = ("Identity", "Dropout", "Cast", "CastLike")
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass the map to the input."""
        return self._pass(node, maps, desk)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass the map to the output."""
        return self._pass(node, maps, desk)

    def _pass(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        if node.op_type.startswith("Cast") and (why := _narrows(node, desk)):
            return refuse(Reason.DTYPE, node, why)
        if node.op_type == "Dropout" and _trains(node, desk):
            return refuse(Reason.TRAINING, node, "is in training mode, or that is not known", structural=True)
        if set(maps) != {0}:
            return refuse(Reason.OUTPUTS, node, "is reached by another operand or output than its data")
        return Step((), {0: maps[0]})


def _narrows(node: ir.Node, desk: Desk) -> str:
    """Why a Cast may change numbers, as the end of a sentence; empty if it cannot."""
    source = desk.fact(node.inputs[0]).dtype
    target = desk.fact(node.outputs[0]).dtype
    if not holds(target, source):
        return f"rounds from {source.name if source else 'an unknown type'} to {target.name if target else 'another'}"
    return ""


def _trains(node: ir.Node, desk: Desk) -> bool:
    if desk.opset < 7:
        return not attribute(node, "is_test", 0)
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    flag = desk.fact(node.inputs[2]).elements()
    return flag is None or flag.dtype == object or bool(flag.any())


CARRIERS = (Identity(),)

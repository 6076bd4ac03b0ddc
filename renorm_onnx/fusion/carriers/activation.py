"""Relu, LeakyRelu, PRelu, ThresholdedRelu, Clip: a positive scale passes, and moves the bounds.

Before:
    ``y = s * relu(x)``              ``y = s * clip(x, low, high)``, ``y = s * (x if x > a else 0)``
After:
    ``y = relu(s * x)``              ``y = clip(s * x, s low, s high)``, ``... if s x > s a ...``
Formula:
    For s > 0, s f(x) = f(s x) where f is homogeneous: Relu, LeakyRelu and PRelu, whose slopes stay. At s = 0 both
    sides are zero. s clip(x, l, h) + t = clip(s x + t, s l + t, s h + t) for s > 0; for s < 0 the bounds change
    places. They are single numbers, so s l + t must be the same for all channels: of a bound of zero, or one that is
    absent, it is for any scale. ThresholdedRelu likewise without t. At the input all is turned over: what passes
    forward is the map, and the bounds become (bound - t) / s. Source: ONNX Relu, LeakyRelu, PRelu, ThresholdedRelu,
    Clip (bounds are attributes before opset 11).
Refuses when:
    a scale is negative or there is a shift (but for Clip); scales of a bounded function are zero or of both signs; a
    bound would have to differ between channels, or is not constant; a negative scale meets a lower bound above the
    upper one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Edit, SetAttribute, SetInput, Step, refuse
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.parameters import Parameter
from renorm_onnx.fusion.report import Reason, Refusal


class Rectifier(Carrier):
    """Functions with f(s x) = s f(x) for s >= 0."""

    operators = ("Relu", "LeakyRelu", "PRelu")
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass a scale that is not negative."""
        return self._pass(node, maps)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass a scale that is not negative."""
        if set(maps) != {0}:
            return refuse(Reason.WEIGHT, node, "gets its slope from the norm")
        return self._pass(node, maps)

    def _pass(self, node: ir.Node, maps: Mapping[int, AffineMap]) -> Step | Refusal:
        given = maps[0]
        if given.has_shift:
            return refuse(Reason.SHIFT, node, "bends at zero, so a shift does not pass")
        if not given.is_monotone:
            return refuse(Reason.SIGN, node, "bends at zero, so a negative scale does not pass")
        return Step((), {0: given})


class Bounded(Carrier):
    """Functions that bend where a constant says, which moves with the map."""

    operators = ("Clip", "ThresholdedRelu")
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass a map that keeps the bounds single numbers; bounds b become s b + t."""
        return self._pass(node, maps[0], maps[0], desk)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass a map that keeps the bounds single numbers; bounds b become (b - t) / s."""
        if set(maps) != {0}:
            return refuse(Reason.WEIGHT, node, "gets its bounds from the norm")
        given = maps[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = given._replace(scale=1.0 / given.scale, shift=-given.shift / given.scale)
        return self._pass(node, given, inverse, desk)

    def _pass(self, node: ir.Node, given: AffineMap, bound: AffineMap, desk: Desk) -> Step | Refusal:
        if given.has_shift and node.op_type == "ThresholdedRelu":
            return refuse(Reason.SHIFT, node, "jumps to zero, so a shift does not pass")
        found = _bounds(node, desk)
        if isinstance(found, Refusal):
            return found
        if not found:
            return Step((), {0: given})
        turned = node.op_type == "Clip" and bool((given.scale < 0).all())
        if turned and found.get(1, -np.inf) > found.get(2, np.inf):
            return refuse(Reason.SIGN, node, "has a lower bound above the upper one, which wins, and would lose turned")
        if not turned and not (given.scale > 0).all():
            return refuse(Reason.SIGN, node, "has bounds, which scales of both signs, or of zero, do not pass")
        moved: dict[int, float] = {}
        for place, value in found.items():
            values = np.unique(bound.scale * value + bound.shift)
            if values.size > 1:
                return refuse(Reason.SCALE, node, "has one bound for all channels, which would have to differ")
            moved[3 - place if turned else place] = float(values[0])
        if moved.keys() != found.keys():
            return refuse(Reason.SIGN, node, "has one bound, which a negative scale makes the other one")
        return Step(tuple(_set_bound(node, i, v, desk) for i, v in moved.items() if v != found[i]), {0: given})


def _bounds(node: ir.Node, desk: Desk) -> dict[int, float] | Refusal:
    """The bounds by their place among the operands, 1 the lower and 2 the upper one."""
    if node.op_type == "ThresholdedRelu":
        return {1: float(attribute(node, "alpha", 1.0))}
    if desk.opset < 11:
        given = {1: attribute(node, "min"), 2: attribute(node, "max")}
        return {i: float(v) for i, v in given.items() if v is not None}
    found = {}
    for index in (i for i in (1, 2) if desk.has_input(node, i)):
        parameter = desk.parameter(node, index)
        if parameter is None:
            return refuse(Reason.NOT_CONSTANT, node, "has a bound that is not constant", structural=True)
        found[index] = float(parameter.float64().reshape(-1)[0])
    return found


def _set_bound(node: ir.Node, place: int, value: float, desk: Desk) -> Edit:
    if node.op_type == "ThresholdedRelu":
        return SetAttribute(node, ir.AttrFloat32("alpha", value))
    if desk.opset < 11:
        return SetAttribute(node, ir.AttrFloat32(("min", "max")[place - 1], value))
    old = desk.parameter(node, place)
    assert old is not None, "read before"
    return SetInput(node, place, Parameter.new(np.full(old.shape, value), old.dtype))


CARRIERS = (Rectifier(), Bounded())

"""Relu, LeakyRelu, PRelu, ThresholdedRelu, Clip: a positive scale passes, and moves the bounds.

Before:
    ``y = s * relu(x)``              ``y = s * clip(x, low, high)``, ``y = s * (x if x > a else 0)``
After:
    ``y = relu(s * x)``              ``y = clip(s * x, s low, s high)``, ``... if s x > s a ...``
Formula:
    For s > 0, s f(x) = f(s x) where f is homogeneous: Relu, LeakyRelu and PRelu, whose slopes stay. At s = 0 both
    sides are zero. Clip takes one map for all elements, since its bounds are single numbers: s clip(x, l, h) + t =
    clip(s x + t, s l + t, s h + t). ThresholdedRelu likewise without t. At the input all is turned over: what
    passes forward is the map, and the bounds become (bound - t) / s. Source: ONNX Relu, LeakyRelu, PRelu,
    ThresholdedRelu, Clip (bounds are attributes before opset 11).
Refuses when:
    a scale is negative; there is a shift (Clip: only of a map per channel); Clip or ThresholdedRelu meets a scale
    per channel, or zero; a bound is not constant.
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

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass a map with one positive scale for all elements; bounds b become s b + t."""
        return self._pass(node, maps[0], maps[0], desk)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass a map with one positive scale for all elements; bounds b become (b - t) / s."""
        if set(maps) != {0}:
            return refuse(Reason.WEIGHT, node, "gets its bounds from the norm")
        given = maps[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = AffineMap(1.0 / given.scale, -given.shift / given.scale, given.axes)
        return self._pass(node, given, inverse, desk)

    def _pass(self, node: ir.Node, given: AffineMap, bound: AffineMap, desk: Desk) -> Step | Refusal:
        if given.has_shift and node.op_type == "ThresholdedRelu":
            return refuse(Reason.SHIFT, node, "jumps to zero, so a shift does not pass")
        if not (given.scale > 0).all():
            return refuse(Reason.SIGN, node, "has a bound, so only a positive scale passes")
        if given.channels > 1:
            return refuse(Reason.SCALE, node, "has one bound for all channels, the map is one per channel")
        number = AffineMap.of(bound.scale, bound.shift, None)
        edits = _moved_attributes(node, number) if _has_attributes(node, desk) else _moved_inputs(node, number, desk)
        return edits if isinstance(edits, Refusal) else Step(edits, {0: given})


def _has_attributes(node: ir.Node, desk: Desk) -> bool:
    return node.op_type == "ThresholdedRelu" or desk.opset < 11


def _moved_attributes(node: ir.Node, bound: AffineMap) -> tuple[Edit, ...]:
    names = ("alpha",) if node.op_type == "ThresholdedRelu" else ("min", "max")
    edits: list[Edit] = []
    for name in names:
        given = attribute(node, name, 1.0 if name == "alpha" else None)
        if given is not None:
            edits.append(SetAttribute(node, ir.AttrFloat32(name, float(bound.scale[0] * given + bound.shift[0]))))
    return tuple(edits)


def _moved_inputs(node: ir.Node, bound: AffineMap, desk: Desk) -> tuple[Edit, ...] | Refusal:
    edits: list[Edit] = []
    for index in (1, 2):
        if not desk.has_input(node, index):
            continue
        parameter = desk.parameter(node, index)
        if parameter is None:
            return refuse(Reason.NOT_CONSTANT, node, "has a bound that is not constant", structural=True)
        moved = parameter.float64() * bound.scale.reshape(()) + bound.shift.reshape(())
        edits.append(SetInput(node, index, Parameter.new(moved, parameter.dtype)))
    return tuple(edits)


CARRIERS = (Rectifier(), Bounded())

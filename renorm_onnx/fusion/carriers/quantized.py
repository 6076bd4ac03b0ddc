"""DequantizeLinear: its scale absorbs a scale, so that a quantized weight stays quantized; its integers a whole shift.

Before:
    ``y = s * ((q - zero_point) scale) + t``
After:
    ``y = (q + t / (s scale) - zero_point) (s scale)``
Formula:
    A scale per channel needs one number for each channel in DequantizeLinear: scale has shape (D,) along `axis`,
    or, in blocks, the rank of q with blocks along `axis`. One number for the whole tensor takes a uniform map, and
    becomes one for each channel otherwise, with its zero point. A shift is a bias that is quantized: it is added to
    the integers if it is a whole number of steps, and within their range. Source: ONNX DequantizeLinear-10, 13, 19,
    21, 23.
Refuses when:
    the shift is no whole number of steps, or q is not constant; the map runs along another axis than the scales, or
    within blocks; one scale would have to become many before opset 13.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Edit, SetAttribute, SetInput, Step, refuse
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.facts import Dims
from renorm_onnx.fusion.parameters import Parameter, numpy_type
from renorm_onnx.fusion.report import Reason, Refusal

INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.INT32)


class DequantizeLinear(Carrier):
    """Integers made numbers by a scale and a zero point."""

    operators = ("DequantizeLinear",)

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale the scale, move the integers."""
        demand = maps[0]
        scale, dims = desk.parameter(node, 1), desk.dims(node.inputs[0])
        if scale is None:
            return refuse(Reason.WEIGHT, node, "has a scale that is not constant", structural=True)
        step = self._scaled(node, demand.without_shift(), scale, dims, desk)
        if isinstance(step, Refusal) or not demand.has_shift:
            return step
        added = _shifted_integers(node, demand, scale, desk)
        return added if isinstance(added, Refusal) else Step((*step.edits, added), step.onward)

    def _scaled(
        self, node: ir.Node, demand: AffineMap, scale: Parameter, dims: Dims | None, desk: Desk
    ) -> Step | Refusal:
        """Scale the scale, which becomes one for each channel where it must."""
        if demand.axis is None or demand.channels == 1:
            return Step((), {1: demand.reduced()})
        if dims is None or dims[demand.axis] != demand.channels:
            return refuse(Reason.SHAPE, node, "is not proven to vary along the map")
        axis = int(attribute(node, "axis", 1)) % len(dims)
        if attribute(node, "block_size", 0):
            if scale.shape[demand.axis] != demand.channels:
                return refuse(Reason.AXIS, node, f"has one scale for each block along axis {axis}")
            return Step((), {1: demand})
        if len(scale.shape) == 1 and scale.shape[0] == demand.channels and axis == demand.axis:
            return Step((), {1: demand.on_axis(0)})
        if any(n != 1 for n in scale.shape):
            return refuse(Reason.AXIS, node, f"has its scales along axis {axis}, the map runs along {demand.axis}")
        if desk.opset < 13:
            return refuse(Reason.OPSET, node, "has one scale for all channels, as always before opset 13")
        many = Parameter.new(scale.float64().reshape(-1) * demand.scale, scale.dtype)
        edits: list[Edit] = [SetInput(node, 1, many), SetAttribute(node, ir.AttrInt64("axis", demand.axis))]
        if desk.has_input(node, 2):
            zero = _integers(node, 2, desk)
            if zero is None:
                return refuse(Reason.SCALE, node, "has one zero point for all channels, which is not a known integer")
            edits.append(SetInput(node, 2, Parameter.new(np.full(demand.channels, zero.float64().flat[0]), zero.dtype)))
        return Step(tuple(edits))


def _integers(node: ir.Node, index: int, desk: Desk) -> Parameter | None:
    """A constant integer operand, as it will be; None where it is not constant or of a type that is no integer here."""
    if (node, index) in desk.pending:
        return desk.pending[node, index]
    fact = desk.fact(node.inputs[index])
    found = fact.elements()
    if found is None or found.dtype == object or fact.dtype not in INTEGERS:
        return None
    return Parameter.new(found.astype(np.float64), fact.dtype)


def _shifted_integers(node: ir.Node, demand: AffineMap, scale: Parameter, desk: Desk) -> Edit | Refusal:
    """The integers, moved by the steps that make up the shift."""
    integers = _integers(node, 0, desk)
    if integers is None or attribute(node, "block_size", 0):
        return refuse(Reason.SHIFT, node, "holds integers that are not constant, which do not take a shift")
    rank = len(integers.shape)
    axis = int(attribute(node, "axis", 1)) % rank if rank else 0
    shape = [-1 if i == axis else 1 for i in range(rank)] if scale.float64().size > 1 else [1] * rank
    gain, shift = demand.along(rank)
    step = gain * scale.float64().reshape(shape)
    with np.errstate(all="ignore"):
        moved = integers.float64() + np.rint(shift / step)
    limits = np.iinfo(numpy_type(integers.dtype))
    exact = (np.rint(shift / step) * step == shift).all()
    if not exact or not ((moved >= limits.min) & (moved <= limits.max)).all():
        return refuse(Reason.SHIFT, node, "holds integers, and the shift is no whole number of their steps")
    return SetInput(node, 0, Parameter.new(moved, integers.dtype))


CARRIERS = (DequantizeLinear(),)

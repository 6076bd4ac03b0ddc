"""DequantizeLinear: its scale absorbs a scale, so that a quantized weight stays quantized.

Before:
    ``y = s * ((q - zero_point) scale)``
After:
    ``y = (q - zero_point) (s scale)``
Formula:
    A scale per channel needs one number for each channel in DequantizeLinear: scale has shape (D,) along `axis`,
    or, in blocks, the rank of q with blocks along `axis`. One number for the whole tensor takes a uniform map, and
    becomes one for each channel where no zero point would have to follow. Source: ONNX DequantizeLinear-10, 13, 19,
    21, 23.
Refuses when:
    there is a shift, which integers cannot take; the map runs along another axis than the scales, or within blocks;
    the one scale of a tensor with a zero point would have to become many.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, SetAttribute, SetInput, Step, refuse
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.parameters import Parameter
from renorm_onnx.fusion.report import Reason, Refusal


class DequantizeLinear(Carrier):
    """Integers made numbers by a scale and a zero point."""

    operators = ("DequantizeLinear",)

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale the scale."""
        demand = maps[0]
        if demand.has_shift:
            return refuse(Reason.SHIFT, node, "holds integers, which do not take a shift")
        scale, dims = desk.parameter(node, 1), desk.dims(node.inputs[0])
        if scale is None:
            return refuse(Reason.WEIGHT, node, "has a scale that is not constant", structural=True)
        if demand.axis is None or demand.channels == 1:
            return Step((), {1: demand.on_axis(None)})
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
        if desk.opset < 13 or desk.has_input(node, 2):
            return refuse(Reason.SCALE, node, "has one scale and one zero point for all channels")
        many = Parameter.new(scale.float64().reshape(-1) * demand.scale, scale.dtype)
        return Step((SetInput(node, 1, many), SetAttribute(node, ir.AttrInt64("axis", demand.axis))))


CARRIERS = (DequantizeLinear(),)

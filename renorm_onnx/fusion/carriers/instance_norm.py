"""InstanceNormalization, GroupNormalization, LayerNormalization, RMSNormalization: their scale and bias absorb a map.

Before:
    ``y = s * (norm(x) scale + B) + t``           ``y = norm(x + t) scale + B``
After:
    ``y = norm(x) (s scale) + (s B + t)``         ``y = norm(x) scale + B``
Formula:
    The scale runs along the channels (InstanceNormalization; GroupNormalization from opset 21), has one number for
    each group (GroupNormalization-18), or the shape of the normalized axes (LayerNormalization, RMSNormalization).
    Each subtracts a mean (but RMSNormalization), so a shift that is constant within each normalized set is removed
    anyway. A scale at the input is not, because epsilon is added to the variance. Source: ONNX
    InstanceNormalization-1, 6, 22, GroupNormalization-18, 21, LayerNormalization-17, RMSNormalization-23.
Refuses when:
    the map does not run along the axis of the scale; groups would need more than one number; RMSNormalization meets
    a shift; at the input, there is a scale, or a shift that varies within a normalized set; scale or bias are
    computed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Edit, SetInput, Step, refuse
from renorm_onnx.fusion.carriers.addition import aligned
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.parameters import Parameter
from renorm_onnx.fusion.report import Reason, Refusal


def _refuse_scale(node: ir.Node) -> Refusal:
    return refuse(Reason.SCALE, node, "adds epsilon to the variance, so a scale of its input does not cancel exactly")


class ChannelNorm(Carrier):
    """Norms over space, or groups of channels and space, with a scale and bias along axis 1."""

    operators = ("InstanceNormalization", "GroupNormalization")

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale the scale, map the bias."""
        demand = maps[0]
        if demand.axis not in (None, 1):
            return refuse(Reason.AXIS, node, f"has its channels on axis 1, the map runs along axis {demand.axis}")
        if demand.axis is not None and _has_group_scale(node, desk):
            grouped = _by_group(demand, int(attribute(node, "num_groups", 1)))
            if grouped is None:
                return refuse(Reason.SCALE, node, "has one scale for each group of channels, the map one per channel")
            demand = grouped
        onward = {2: demand.on_axis(0)}
        if demand.has_scale:
            onward[1] = demand.without_shift().on_axis(0)
        return Step((), onward)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Drop a shift that the subtraction of the mean removes."""
        if set(maps) != {0}:
            return refuse(Reason.WEIGHT, node, "gets its scale or bias from the norm")
        given = maps[0]
        if given.has_scale:
            return _refuse_scale(node)
        if given.axis not in (None, 1):
            return refuse(Reason.AXIS, node, f"normalizes over axis {given.axis}, along which the map runs")
        groups = int(attribute(node, "num_groups", 1)) if node.op_type == "GroupNormalization" else 0
        if given.axis == 1 and groups and _by_group(given, groups) is None:
            return refuse(Reason.SHIFT, node, "normalizes over channels that have different shifts")
        return Step()


def _has_group_scale(node: ir.Node, desk: Desk) -> bool:
    return node.op_type == "GroupNormalization" and desk.opset < 21


def _by_group(given: AffineMap, groups: int) -> AffineMap | None:
    """The map with one entry for each group of neighbouring channels; None where a group has several."""
    if given.channels % groups:
        return None
    scale, shift = (v.reshape(groups, -1) for v in (given.scale, given.shift))
    if (scale != scale[:, :1]).any() or (shift != shift[:, :1]).any():
        return None
    return AffineMap(scale[:, 0], shift[:, 0], given.axes)


class TailNorm(Carrier):
    """Norms over the last axes, with a scale and bias of their shape."""

    operators = ("LayerNormalization", "RMSNormalization")

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale the scale, map the bias."""
        if set(maps) != {0}:
            return refuse(Reason.OUTPUTS, node, "is reached by its statistics, which are no such values")
        demand, rank = maps[0], desk.fact(node.inputs[0]).rank
        scale = desk.parameter(node, 1)
        if scale is None:
            return refuse(Reason.WEIGHT, node, "has a scale that is not constant", structural=True)
        seen = aligned(demand, len(scale.shape), rank)
        if seen is None or (seen.axis is not None and scale.shape[seen.axis] != seen.channels):
            return refuse(Reason.AXIS, node, f"has a scale of shape {scale.shape}, which the map does not run along")
        gain, offset = seen.along(len(scale.shape))
        edits: list[Edit] = [SetInput(node, 1, scale.scaled(gain))] if demand.has_scale else []
        if node.op_type == "RMSNormalization":
            if demand.has_shift:
                return refuse(Reason.SHIFT, node, "has no bias that could take a shift")
            return Step(tuple(edits))
        bias = desk.parameter(node, 2)
        if bias is None and desk.has_input(node, 2):
            return refuse(Reason.WEIGHT, node, "has a bias that is not constant", structural=True)
        if bias is None:
            added = np.broadcast_to(offset, scale.shape).copy()
            return Step(
                (*edits, SetInput(node, 2, Parameter.new(added, scale.dtype))) if demand.has_shift else tuple(edits)
            )
        if bias.shape != scale.shape:
            return refuse(Reason.SHAPE, node, f"has a scale of shape {scale.shape} and a bias of shape {bias.shape}")
        return Step((*edits, SetInput(node, 2, bias.mapped(gain, offset))))

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Drop a shift that the subtraction of the mean removes."""
        if set(maps) != {0}:
            return refuse(Reason.WEIGHT, node, "gets its scale or bias from the norm")
        given, rank = maps[0], desk.fact(node.inputs[0]).rank
        if given.has_scale:
            return _refuse_scale(node)
        if node.op_type == "RMSNormalization" or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
            return refuse(Reason.SHIFT, node, "does not remove a shift, or has statistics in use that show it")
        if given.axis is not None and (rank is None or given.axis >= int(attribute(node, "axis", -1)) % rank):
            return refuse(Reason.AXIS, node, f"normalizes over axis {given.axis}, along which the map runs")
        return Step()


CARRIERS = (ChannelNorm(), TailNorm())

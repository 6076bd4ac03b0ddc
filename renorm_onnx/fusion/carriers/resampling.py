"""Resize, Upsample, GridSample: a map passes along an axis that is not resampled; its shift, if the weights sum to one.

Before:
    ``y = s * resize(x) + t``
After:
    ``y = resize(s * x + t)``
Formula:
    Each element is a weighted sum of elements along the resized axes, so a scale passes. The weights of nearest,
    linear and cubic interpolation sum to one, also at the border, where elements are repeated (or left out and the
    rest divided by its sum: exclude_outside), so a shift passes too. tf_crop_and_resize puts a constant outside the
    image, which takes a scale only if it is zero; GridSample puts zeros there, unless it repeats the border or
    reflects. Source: ONNX Upsample-7, 9, 10, Resize-10, 11, 13, 18, 19, GridSample-16, 20, 22.
Refuses when:
    the map's axis is resized, or not proven not to be; a shift meets tf_crop_and_resize, antialias, or zeros outside
    the image; the grid comes from the norm.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Step, refuse
from renorm_onnx.fusion.fact_dims import unscaled_axes
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.report import Reason, Refusal


class Resampling(Carrier):
    """Interpolation onto another grid."""

    operators = ("Resize", "Upsample")

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass the map to the input."""
        return self._pass(node, maps, desk)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass the map to the output."""
        return self._pass(node, maps, desk)

    def _pass(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        if set(maps) != {0}:
            return refuse(Reason.SHAPE, node, "gets its sizes from the norm")
        given, rank = maps[0], desk.fact(node.inputs[0]).rank
        if given.axis is not None:
            kept = set() if rank is None else unscaled_axes(node, desk.inputs(node), rank)
            if given.axis not in kept:
                return refuse(Reason.AXIS, node, f"is not proven to leave axis {given.axis} as it is")
        if attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
            if given.has_shift or attribute(node, "extrapolation_value", 0.0) != 0:
                return refuse(Reason.SHIFT, node, "puts a constant outside the image")
        elif given.has_shift and attribute(node, "antialias", 0):
            return refuse(Reason.SHIFT, node, "filters with weights that are not proven to sum to one (antialias)")
        return Step((), {0: given})


class Sampling(Carrier):
    """Interpolation at places that another operand names."""

    operators = ("GridSample",)

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass the map to the image."""
        return self._pass(node, maps)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass the map to what is read."""
        return self._pass(node, maps)

    def _pass(self, node: ir.Node, maps: Mapping[int, AffineMap]) -> Step | Refusal:
        if set(maps) != {0}:
            return refuse(Reason.WEIGHT, node, "gets its grid from the norm")
        given = maps[0]
        if given.axis not in (None, 0, 1):
            return refuse(Reason.AXIS, node, f"reads between the places of axis {given.axis}, which the map runs along")
        if given.has_shift and attribute(node, "padding_mode", "zeros") == "zeros":
            return refuse(Reason.PADDING, node, "reads zeros outside the image, which must not be shifted")
        return Step((), {0: given})


CARRIERS = (Resampling(), Sampling())

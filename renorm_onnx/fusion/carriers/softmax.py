"""Softmax, LogSoftmax: a shift of all that they compare is no shift of the result.

Before:
    ``y = softmax(x + t)``
After:
    ``y = softmax(x)``
Formula:
    exp(x_i + t) / sum_j exp(x_j + t) = exp(x_i) / sum_j exp(x_j), for a t that is the same for all j. From opset 13
    on j runs along `axis`, by default the last; before, along all axes from `axis` on, by default 1. Source: ONNX
    Softmax-1, 11, 13, LogSoftmax.
Refuses when:
    anything arrives at the output; there is a scale; the shift varies along an axis that is summed over.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Step, refuse
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.report import Reason, Refusal


class Softmax(Carrier):
    """Exponentials divided by their sum."""

    operators = ("Softmax", "LogSoftmax")
    many_axes = True

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Drop a shift that does not vary among what is summed."""
        given, rank = maps[0], desk.fact(node.inputs[0]).rank
        if given.has_scale:
            return refuse(Reason.SCALE, node, "takes exponentials, so a scale does not cancel")
        begin = int(attribute(node, "axis", -1 if desk.opset >= 13 else 1))
        if given.axes and rank is None:
            return refuse(Reason.SHAPE, node, "has an input of unknown rank", structural=True)
        begin = begin % rank if rank else begin
        summed = {begin} if desk.opset >= 13 else set(range(begin, rank or 0))
        if summed.intersection(given.axes):
            return refuse(Reason.AXIS, node, f"sums over axis {begin}, along which the map runs")
        return Step()


CARRIERS = (Softmax(),)

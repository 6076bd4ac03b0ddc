"""Conv, DeformConv: absorb a map at their output, always; at their input, unless padding sees the shift.

Before:
    ``y = s * (W conv x + b) + t``                 ``y = W conv (s * x + t) + b``
After:
    ``y = (s W) conv x + (s b + t)``               ``y = (W s) conv x + (b + sum W t)``
Formula:
    Output: s scales axis 0 of W, (C_out, C_in/group, *k). Input: s scales axis 1; channel i of group g meets
    W[o, i - g C_in/group], and a constant t at every position adds sum over (i, *k) of W[o, i, *k] t[i] to b[o].
    DeformConv reads x between its elements, at weights that do not depend on it. Source: ONNX Conv-1, 11, 22,
    DeformConv-19, 22.
Refuses when:
    the map does not run along the channels; at the input, W is not constant, or t is not zero and pads are not zero,
    because the zeros of the padding are not shifted, or DeformConv might read beyond the border.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, SetInput, Step, refuse
from renorm_onnx.fusion.carriers.quantized import no_weight, weight_of
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.parameters import Parameter
from renorm_onnx.fusion.report import Reason, Refusal


def bias_demand(
    node: ir.Node, index: int, given: AffineMap, desk: Desk
) -> tuple[list[SetInput], dict[int, AffineMap]] | Refusal:
    """What a map of the output asks of a bias of shape (C,): a demand where there is one, else a new constant t."""
    if desk.has_input(node, index):
        return [], {index: given.on_axis(0)}
    if not given.has_shift:
        return [], {}
    dtype = desk.fact(node.inputs[1]).dtype or desk.fact(node.outputs[0]).dtype
    if dtype is None:
        return refuse(Reason.DTYPE, node, "has no bias, and its element type is not known")
    return [SetInput(node, index, Parameter.new(given.shift, dtype))], {}


def padding_sees_shift(node: ir.Node, kernel: tuple[int, ...]) -> str:
    """Why a value outside the image reaches the window, as the end of a sentence; empty if none does."""
    if node.op_type == "DeformConv":
        return "may read zeros beyond the border"
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        return "" if all(k == 1 for k in kernel) else f"pads with zeros (auto_pad={auto})"
    pads = attribute(node, "pads") if auto == "NOTSET" else None
    return f"pads with zeros (pads={list(pads)})" if pads and any(pads) else ""


class Conv(Carrier):
    """Convolution of 1 to 3 spatial dimensions, grouped or not."""

    operators = ("Conv", "DeformConv")

    def _bias(self, node: ir.Node) -> int:
        """Where the bias stands among the operands."""
        return 3 if node.op_type == "DeformConv" else 2

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale the filters, map the bias."""
        demand = maps[0]
        if demand.axis not in (None, 1):
            return refuse(Reason.AXIS, node, f"has its channels on axis 1, the map runs along axis {demand.axis}")
        dims = desk.dims(node.inputs[1])
        if dims is None or not isinstance(dims[0], int):
            return refuse(Reason.WEIGHT, node, "has a weight of unknown shape", structural=True)
        full = demand.spread(dims[0], 1)
        if full.channels != dims[0]:
            return refuse(Reason.AXIS, node, f"has {dims[0]} channels, the map {full.channels}")
        bias = bias_demand(node, self._bias(node), full, desk)
        if isinstance(bias, Refusal):
            return bias
        edits, onward = bias
        if full.has_scale:
            onward[1] = full.without_shift().on_axis(0)
        return Step(tuple(edits), onward)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale the filters' input channels, add what the shift contributes to the bias."""
        if set(maps) != {0}:
            return refuse(Reason.WEIGHT, node, "gets its weight or bias from the norm")
        given = maps[0]
        weight = weight_of(node, 1, desk)
        if weight is None:
            return no_weight(node, 1, desk)
        if given.axis not in (None, 1):
            return refuse(Reason.AXIS, node, f"has its channels on axis 1, the map runs along axis {given.axis}")
        group = int(attribute(node, "group", 1))
        out, per_group, *kernel = weight.shape
        full = given.spread(per_group * group, 1)
        if full.channels != per_group * group:
            return refuse(Reason.AXIS, node, f"reads {per_group * group} channels, the map has {full.channels}")
        demands = {1: scale_of_filters(given, out, per_group, group)} if full.has_scale else {}
        if not full.has_shift:
            return Step((), {}, demands)
        if why := padding_sees_shift(node, tuple(kernel)):
            return refuse(Reason.PADDING, node, f"{why}, and the zeros must not be shifted")
        # (C_in,) -> (C_out, C_in/group, 1, ...): row o belongs to group o // (C_out/group).
        shift = np.repeat(full.shift.reshape(group, per_group), out // group, axis=0)
        total = weight.contract(shift.reshape(*shift.shape, *[1] * len(kernel)), axis=1)
        bias = bias_demand(node, self._bias(node), AffineMap.of(1.0, total, 0), desk)
        return bias if isinstance(bias, Refusal) else Step(tuple(bias[0]), {}, demands | bias[1])


def scale_of_filters(given: AffineMap, rows: int, per_group: int, group: int) -> AffineMap:
    """The scale of filters of shape (rows, per_group, *k) that a map of per_group channels for each group comes to.

    The channels are those of a Conv's input, or of a ConvTranspose's output; row i is of group i // (rows / group).
    """
    scale = given.without_shift()
    if group == 1 or given.is_uniform:
        return scale
    scales = np.repeat(given.scale.reshape(group, per_group), rows // group, axis=0)
    return AffineMap(scales, np.zeros(scales.shape), (0, 1)).reduced()


CARRIERS = (Conv(),)

"""ConvTranspose: absorbs a map at its output; at its input a scale, and a shift where no border sees less of it.

Before:
    ``y = s * (W convT x + b) + t``                ``y = W convT (s * x + t) + b``
After:
    ``y = (s W) convT x + (s b + t)``              ``y = (W s) convT x + (b + sum W t)``
Formula:
    W is (C_in, C_out/group, *k). Output channel o = g C_out/group + j is scaled in W[i, j] for every i of group g.
    An input channel i scales W[i]. A constant t at every position adds, at each output position, the sum of W[i, j,
    *k] t[i] over the taps k that meet the image: all of them only for stride 1 and a border of (k - 1) dilation
    cropped by pads. Source: ONNX ConvTranspose-1, 11, 22.
Refuses when:
    the map does not run along the channels; at the input, W is computed, or t is not zero and some output position
    misses a tap (stride > 1, a border that is not cropped).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Step, refuse
from renorm_onnx.fusion.carriers.conv import bias_demand, scale_of_filters
from renorm_onnx.fusion.carriers.quantized import no_weight, weight_of
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.report import Reason, Refusal


class ConvTranspose(Carrier):
    """Transposed convolution, grouped or not."""

    operators = ("ConvTranspose",)

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale the filters of each output channel, map the bias."""
        demand = maps[0]
        if demand.axis not in (None, 1):
            return refuse(Reason.AXIS, node, f"has its channels on axis 1, the map runs along axis {demand.axis}")
        dims = desk.dims(node.inputs[1])
        if dims is None or not isinstance(dims[0], int) or not isinstance(dims[1], int):
            return refuse(Reason.WEIGHT, node, "has a weight of unknown shape", structural=True)
        group = int(attribute(node, "group", 1))
        full = demand.spread(dims[1] * group, 1)
        if full.channels != dims[1] * group:
            return refuse(Reason.AXIS, node, f"has {dims[1] * group} channels, the map {full.channels}")
        bias = bias_demand(node, 2, full, desk)
        if isinstance(bias, Refusal):
            return bias
        edits, onward = bias
        if not full.has_scale:
            return Step(tuple(edits), onward)
        onward[1] = scale_of_filters(full, dims[0], dims[1], group)
        return Step(tuple(edits), onward)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale the filters of each input channel, add what the shift contributes to the bias."""
        if set(maps) != {0}:
            return refuse(Reason.WEIGHT, node, "gets its weight or bias from the norm")
        given = maps[0]
        weight = weight_of(node, 1, desk)
        if weight is None:
            return no_weight(node, 1, desk)
        if given.axis not in (None, 1):
            return refuse(Reason.AXIS, node, f"has its channels on axis 1, the map runs along axis {given.axis}")
        inputs, per_group, *kernel = weight.shape
        full = given.spread(inputs, 1)
        if full.channels != inputs:
            return refuse(Reason.AXIS, node, f"reads {inputs} channels, the map has {full.channels}")
        demands = {1: given.without_shift().on_axis(0)} if full.has_scale else {}
        if not full.has_shift:
            return Step((), {}, demands)
        if why := missing_taps(node, kernel):
            return refuse(Reason.PADDING, node, f"{why}, so the shift does not reach every position alike")
        group = int(attribute(node, "group", 1))
        spatial = tuple(range(2, len(weight.shape)))
        taps = np.concatenate([block.sum(axis=spatial) for _, block in weight.blocks()]) * full.shift[:, None]
        total = taps.reshape(group, inputs // group, per_group).sum(axis=1).reshape(-1)
        bias = bias_demand(node, 2, AffineMap.of(1.0, total, 0), desk)
        return bias if isinstance(bias, Refusal) else Step(tuple(bias[0]), {}, demands | bias[1])


def missing_taps(node: ir.Node, kernel: list[int]) -> str:
    """Why some output position meets fewer taps of the kernel than another, as the end of a sentence; empty if none."""
    n = len(kernel)
    strides = attribute(node, "strides") or [1] * n
    dilations = attribute(node, "dilations") or [1] * n
    extra = attribute(node, "output_padding") or [0] * n
    auto = attribute(node, "auto_pad", "NOTSET")
    pads = (attribute(node, "pads") if auto == "NOTSET" else None) or [0] * (2 * n)
    if any(s != 1 for s in strides):
        return f"has strides={list(strides)}"
    if attribute(node, "output_shape"):
        return "derives its pads from output_shape"
    for i, size in enumerate(kernel):
        border = (size - 1) * dilations[i]
        if pads[i] < border or pads[n + i] - extra[i] < border:
            return f"has a border of partial sums (kernel {size}, pads={list(pads)})"
    return ""


CARRIERS = (ConvTranspose(),)

"""LSTM, GRU, RNN: at their input, the weight of the input absorbs a scale and the bias a shift.

Before:
    ``gates = W (s * x + t) + Wb + R h + Rb``
After:
    ``gates = (W s) x + (Wb + W t) + R h + Rb``
Formula:
    W is (directions, G hidden, C) and meets x only in the product W x, where x is (sequence, batch, C), or with
    layout=1 (batch, sequence, C): its last axis carries the map either way. B is (directions, 2 G hidden), the first
    half of which is Wb. G is 4 for LSTM, 3 for GRU, 1 for RNN. Source: ONNX LSTM-7, 14, 22, GRU, RNN.
Refuses when:
    anything arrives at an output, which the next step of the sequence reads too; the map runs along another axis than
    the last, or reaches another operand than x; W is not constant.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, SetInput, Step, refuse
from renorm_onnx.fusion.carriers.quantized import no_weight, weight_of
from renorm_onnx.fusion.parameters import Parameter
from renorm_onnx.fusion.report import Reason, Refusal


class Recurrent(Carrier):
    """Layers that read a sequence step by step."""

    operators = ("LSTM", "GRU", "RNN")

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale the columns of W, add what the shift contributes to the first half of B."""
        if set(maps) != {0}:
            return refuse(Reason.WEIGHT, node, "gets a weight, a length or a state from the norm")
        given, weight = maps[0], weight_of(node, 1, desk)
        if weight is None:
            return no_weight(node, 1, desk)
        if given.axis not in (None, 2):
            return refuse(Reason.AXIS, node, f"reads its features along axis 2, the map runs along axis {given.axis}")
        directions, rows, columns = weight.shape
        full = given.spread(columns, 2)
        if full.channels != columns:
            return refuse(Reason.AXIS, node, f"reads {columns} features, the map has {full.channels}")
        demands = {1: given.without_shift()} if full.has_scale else {}
        if not full.has_shift:
            return Step((), {}, demands)
        added, shift = np.zeros((directions, 2 * rows)), full.along(3)[1]
        added[:, :rows] = np.concatenate([(block * shift).sum(axis=2) for _, block in weight.blocks()])
        if desk.has_input(node, 3):
            return Step((), {}, demands | {3: AffineMap(np.ones(added.shape), added, (0, 1))})
        return Step((SetInput(node, 3, Parameter.new(added, weight.dtype)),), {}, demands)


CARRIERS = (Recurrent(),)

"""A norm before a recurrent layer goes into its input weights, judged by the formulas of ONNX in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest

from renorm_onnx.fusion.conftest import Builder, assert_same, largest_difference, operators
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.report import Reason

C, HIDDEN = 5, 3
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def model_of(
    operator: str, *, bias: bool = True, directions: int = 1, shape: Sequence[int] = (C,), last: str = ""
) -> onnx.ModelProto:
    """Mul, Add, recurrent layer; `last` says what is done to its first output."""
    b = Builder()
    rows = GATES[operator] * HIDDEN
    h = b.node("Add", b.node("Mul", "x", b.normal(*shape)), b.normal(*shape))
    weights = [b.normal(directions, rows, C), b.normal(directions, rows, HIDDEN)]
    if bias:
        weights.append(b.normal(directions, 2 * rows))
    more = {} if directions == 1 else {"direction": "bidirectional"}
    if operator == "GRU":
        more["linear_before_reset"] = 1  # by which the two halves of the bias differ
    y = b.node(operator, h, *weights, hidden_size=HIDDEN, out="" if last else "y", **more)
    if last:
        b.node(last, y, b.normal(HIDDEN), out="y")
    return b.model({"x": ["t", 2, C]}, ["y"])


@pytest.mark.parametrize("operator", GATES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
def test_a_chain_before_a_recurrent_layer_goes_into_its_weights(operator, bias, directions):
    model = model_of(operator, bias=bias, directions=directions)
    fused, _ = fuse(model)
    assert operators(fused) == [operator]
    assert_same(model, fused, t=4)


def test_a_uniform_map_is_absorbed_and_one_along_another_axis_is_not():
    model = model_of("LSTM", shape=())
    fused, _ = fuse(model)
    assert operators(fused) == ["LSTM"]
    assert_same(model, fused, t=4)
    fused, report = fuse(model_of("LSTM", shape=(2, 1)))
    assert operators(fused) == ["Mul", "Add", "LSTM"]
    assert [r.reason for r in report.entries[0].refusals] == [Reason.GRAPH_INPUT, Reason.AXIS]


def test_nothing_goes_backward_into_a_recurrent_layer():
    _, report = fuse(model_of("GRU", last="Mul"))
    assert [(e.outcome, e.reason) for e in report.entries[1:]] == [("kept", Reason.OPERATOR)]
    b = Builder()
    weights = [b.normal(1, 12, C), b.normal(1, 12, HIDDEN)]
    b.node("Mul", b.node("LSTM", "x", *weights, hidden_size=HIDDEN), b.normal(), out="y")
    _, report = fuse(b.model({"x": [4, 2, C]}, ["y"]))
    assert report.entries[0].reason == Reason.OPERATOR


def test_a_shift_added_to_the_wrong_half_of_the_bias_or_no_shift_is_seen():
    model = model_of("GRU")
    fused, _ = fuse(model)
    [layer] = fused.graph.node
    for change in (lambda v: np.roll(v, v.shape[1] // 2, axis=1), lambda v: v * 0):
        wrong = onnx.ModelProto.FromString(fused.SerializeToString())
        stored = next(i for i in wrong.graph.initializer if i.name == layer.input[3])
        stored.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(stored)), stored.name))
        assert largest_difference(model, wrong, t=4) > 1e-3


@pytest.mark.parametrize(
    ("place", "refusal"),
    [
        (1, (Reason.WEIGHT, "RNN 'rnn_y' has a weight that is not constant")),
        (3, (Reason.GRAPH_INPUT, "'w' is an input of the graph")),
    ],
)
def test_a_weight_or_a_bias_that_is_an_input_is_refused(place, refusal):
    b = Builder()
    h = b.node("Add", b.node("Mul", "x", b.normal(C)), b.normal(C))
    weights = {1: b.normal(1, HIDDEN, C), 2: b.normal(1, HIDDEN, HIDDEN), 3: b.normal(1, 2 * HIDDEN)}
    shape = {1: [1, HIDDEN, C], 3: [1, 2 * HIDDEN]}[place]
    weights[place] = "w"
    b.node("RNN", h, *weights.values(), hidden_size=HIDDEN, out="y")
    _, report = fuse(b.model({"x": ["t", 2, C], "w": shape}, ["y"]))
    assert [(r.reason, r.detail) for r in report.entries[0].refusals[1:]] == [refusal]


def test_what_computes_a_bias_is_asked_for_the_shift():
    b = Builder()
    h = b.node("Add", b.node("Mul", "x", b.normal(C)), b.normal(C))
    bias = b.node("Add", "w", b.normal(1, 2 * HIDDEN))
    b.node("RNN", h, b.normal(1, HIDDEN, C), b.normal(1, HIDDEN, HIDDEN), bias, hidden_size=HIDDEN, out="y")
    model = b.model({"x": ["t", 2, C], "w": [1, 2 * HIDDEN]}, ["y"])
    fused, _ = fuse(model)
    assert operators(fused) == ["Add", "RNN"]
    assert_same(model, fused, t=4)

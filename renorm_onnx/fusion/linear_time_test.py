"""The work of a fusion grows as the model does: counted in operators asked, so that no clock is involved."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from renorm_onnx.fusion import engine
from renorm_onnx.fusion.carriers import load_carriers
from renorm_onnx.fusion.conftest import Builder, assert_same
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.report import FusionReport


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[onnx.ModelProto], tuple[int, FusionReport]]:
    """Fuse a model; give how many answers of operators that took, and the report."""
    count = 0

    class Counting:
        def __init__(self, carrier: object) -> None:
            self._carrier = carrier

        def __getattr__(self, name: str) -> object:
            nonlocal count
            count += name in ("backward", "forward")
            return getattr(self._carrier, name)

    wrapped = {operator: Counting(carrier) for operator, carrier in load_carriers().items()}
    monkeypatch.setattr(engine, "load_carriers", lambda: wrapped)

    def run(model: onnx.ModelProto) -> tuple[int, FusionReport]:
        nonlocal count
        count = 0
        _, report = fuse(model)
        return count, report

    return run


def stacked_diamonds(depth: int, start: str) -> onnx.ModelProto:
    """`start`, then each value is added to itself passed through Identity, then a norm."""
    b = Builder()
    x = b.node("Conv", "x", b.normal(4, 4, 1, 1)) if start == "Conv" else b.node(start, "x")
    for _ in range(depth):
        x = b.node("Add", x, b.node("Identity", x))
    # Without a shift, since a shift enters an Add through one operand only.
    (scale, _, _, variance), zero = b.statistics(4), b.constant([0.0] * 4)
    return b.model({"x": ["n", 4, 5, 5]}, [b.node("BatchNormalization", x, scale, zero, zero, variance)])


@pytest.mark.parametrize(("start", "folded"), [("Conv", 1), ("Softmax", 0)])
def test_stacked_diamonds_are_walked_once(
    asked: Callable[[onnx.ModelProto], tuple[int, FusionReport]], start: str, folded: int
) -> None:
    count, report = asked(stacked_diamonds(22, start))
    assert len(report.folded) == folded
    # Forward, the output of the graph refuses at once.
    assert 2 * 22 <= count <= 2 * 22 + 2


def test_a_chain_of_ten_thousand_operators_is_walked_once(
    asked: Callable[[onnx.ModelProto], tuple[int, FusionReport]],
) -> None:
    b = Builder()
    x = b.node("Conv", "x", b.normal(4, 4, 1, 1))
    for _ in range(10_000):
        x = b.node("Identity", x)
    count, report = asked(b.model({"x": ["n", 4, 5, 5]}, [b.norm(x, 4)]))
    assert len(report.folded) == 1
    assert 10_000 <= count <= 10_010


@pytest.mark.parametrize("way", ["backward", "forward"])
def test_many_norms_behind_one_obstacle_walk_the_way_to_it_once(
    asked: Callable[[onnx.ModelProto], tuple[int, FusionReport]], way: str
) -> None:
    norms, length = 60, 200
    b = Builder()
    if way == "backward":
        x = b.node("Softmax", "x", axis=1)
        for _ in range(length):
            x = b.node("Identity", x)
        sizes = b.constant([4] * norms)
        pieces = [b.fresh() for _ in range(norms)]
        b.nodes.append(onnx.helper.make_node("Split", [x, sizes], pieces, name="split", axis=1))
        outputs = [b.node("Sigmoid", b.norm(piece, 4)) for piece in pieces]
    else:
        pieces = [b.norm(b.node("Softmax", "x", axis=i), 4 * norms) for i in (1, 2) for _ in range(norms // 2)]
        x = b.node("Concat", *pieces, axis=1)
        for _ in range(length):
            x = b.node("Identity", x)
        outputs = [b.node("Sigmoid", x)]
    count, report = asked(b.model({"x": ["n", 4 * norms, 5, 5]}, outputs))
    assert len(report.kept) == norms
    assert count <= 4 * (norms + length), count


@pytest.mark.parametrize("blocks", [20, 80])
def test_the_norms_of_a_residual_stream_walk_it_once(
    asked: Callable[[onnx.ModelProto], tuple[int, FusionReport]], blocks: int
) -> None:
    b = Builder()
    x = "x"
    for _ in range(blocks):
        branch = b.node("Sigmoid", b.node("Conv", x, b.normal(4, 4, 1, 1)))
        x = b.node("Add", x, b.node("Add", branch, b.normal(1, 4, 1, 1)))
    count, report = asked(b.model({"x": ["n", 4, 5, 5]}, [x]))
    assert [e.outcome for e in report.entries] == ["kept"] * blocks
    assert blocks <= count <= 6 * blocks, count


def test_a_dead_end_for_one_norm_is_none_for_another_that_is_cut_off_before_it() -> None:
    b = Builder()
    shifts = [b.constant(np.reshape(shift, (1, 4, 1, 1))) for shift in ([1.0, 2, 0, 0], [0.0, 0, 3, 4])]
    terms = [b.node("Add", b.node(operator, "x"), s) for operator, s in zip(("Sigmoid", "Tanh"), shifts, strict=True)]
    starts, ends, axes = (b.constant(np.array([n])) for n in (0, 2, 1))
    y = b.node("Sigmoid", b.node("Slice", b.node("Add", *terms), starts, ends, axes))
    _, report = fuse(b.model({"x": ["n", 4, 5, 5]}, [y]))
    assert [e.outcome for e in report.entries] == ["kept", "folded"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_dead_end_behind_one_piece_is_none_for_another_piece_of_the_same_value(order: int) -> None:
    b = Builder()
    joined = b.node("Concat", *[b.node("Softmax", "x", axis=1), b.conv("x", 4, 4, 1)][::order], axis=1)
    starts, ends, axes = ([b.constant(np.array([n])) for n in numbers] for numbers in ((0, 4), (4, 8), (1, 1)))
    pieces = [b.node("Slice", joined, *bounds) for bounds in zip(starts, ends, axes, strict=True)]
    _, report = fuse(b.model({"x": ["n", 4, 5, 5]}, [b.node("Sigmoid", b.norm(piece, 4)) for piece in pieces]))
    assert [e.outcome for e in report.entries] == ["kept", "folded"][::order]


@pytest.mark.parametrize("pairs", [20, 80])
def test_a_deep_network_asks_each_convolution_once(
    asked: Callable[[onnx.ModelProto], tuple[int, FusionReport]], pairs: int
) -> None:
    b = Builder()
    x = "x"
    for _ in range(pairs):
        x = b.node("Relu", b.norm(b.node("Conv", x, b.normal(4, 4, 1, 1)), 4))
    count, report = asked(b.model({"x": ["n", 4, 5, 5]}, [x]))
    assert len(report.folded) == pairs == count


@pytest.mark.parametrize("operator", ["Slice", "Gather"])
def test_operators_that_cut_up_one_value_are_asked_once_what_they_read(
    asked: Callable[[onnx.ModelProto], tuple[int, FusionReport]], operator: str
) -> None:
    """The norm behind each must know that no other reads the same; one of two that do stays."""
    pieces = 30
    for both in (False, True):
        b = Builder()
        x, axis, outputs = b.conv("x", 4, 2 * pieces, 1), b.constant(np.array([1])), []
        for i in range(pieces):
            start, end = (b.constant(np.array([2 * i + n])) for n in (0, 2))
            places = b.constant(np.array([2 * i, 2 * i + 1]))
            cut = [start, end, axis] if operator == "Slice" else [places]
            piece = b.node(operator, x, *cut, **({} if operator == "Slice" else {"axis": 1}))
            outputs.append(b.norm(piece, 2))
        again = [b.node("Gather", x, b.constant(np.array([5])), axis=1)] if both else []
        model = b.model({"x": ["n", 4, 5, 5]}, [*outputs, *again])
        count, report = asked(model)
        assert len(report.folded) == pieces - both
        assert count <= 12 * pieces, count
        assert_same(model, fuse(model)[0])


def test_models_of_many_outputs_shared_statistics_and_old_inputs_are_cleaned_whole() -> None:
    b = Builder()
    shared = b.statistics(4)
    outputs = []
    for _ in range(50):
        x = b.node("Conv", "x", b.normal(4, 4, 1, 1))
        outputs.append(b.node("BatchNormalization", x, *shared))
    model = b.model({"x": ["n", 4, 5, 5]}, outputs)
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    fused, report = fuse(model)
    assert len(report.folded) == 50
    assert [o.name for o in fused.graph.output] == outputs
    assert {t.name for t in fused.graph.initializer} | {"x"} == {i.name for i in fused.graph.input}
    assert len(fused.graph.initializer) == 100
    assert len(fused.graph.node) == 50

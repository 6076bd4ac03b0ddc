"""Norms of which the shape is not proven are reported, with the operator that hides it; other arithmetic is not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import helper

from renorm_onnx.fusion.conftest import Builder, operators
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.report import Reason

C = 5


def behind(
    lines: Sequence[tuple[str, tuple[int, ...]]], *, between: Sequence[str] = (), size: int | str | None = None
) -> onnx.ModelProto:
    """A chain of constants of those shapes, behind an operator that nobody knows or, with a `size`, an input."""
    b = Builder(seed=3)
    h = "x" if size is not None else b.node("Riddle", "x", out="riddle", domain="someone")
    for operator in between:
        h = b.node(operator, h)
    for operator, shape in lines:
        h = b.node(operator, h, b.normal(*shape))
    y = b.node("Gemm", h, b.normal(C, 3))
    model = b.model({"x": ["n", 4 if size is None else size]}, [y], opset=20)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(y, 1, ["n", 3]))
    return model


def test_a_number_behind_such_a_norm_is_folded_as_before() -> None:
    model = behind([("Sub", (1, C)), ("Mul", (C,)), ("Add", ())])
    fused, report = fuse(model)
    [kept] = report.norms
    assert (len(kept.nodes), kept.reason, report.affines_folded) == (2, Reason.SHAPE, 1)
    assert "Add" not in operators(fused)


@pytest.mark.parametrize(
    "lines",
    [
        [("Mul", (C,)), ("Add", (C,))],
        [("Sub", (C,)), ("Div", (C,)), ("Mul", (C,)), ("Add", (C,))],
        [("Sub", (1, C)), ("Mul", (C,))],
        [("Mul", ()), ("Mul", (C, 1, 1)), ("Add", (C, 1, 1))],
    ],
)
@pytest.mark.parametrize("between", [(), ("Relu", "Identity")])
def test_a_norm_behind_an_unknown_shape_is_kept_and_names_it(
    lines: list[tuple[str, tuple[int, ...]]], between: Sequence[str]
) -> None:
    model = behind(lines, between=between)
    fused, report = fuse(model)
    [kept] = report.norms
    assert (kept.form, kept.outcome, kept.reason) == ("chain", "kept", Reason.SHAPE)
    start = next(i for i, (_, shape) in enumerate(lines) if shape)
    assert len(kept.nodes) == len(lines) - start
    assert kept.detail.endswith(
        f"is not proven to have {C} channels; the shape of someone::Riddle 'riddle_riddle' is unknown"
    )
    assert operators(fused)[-len(lines) - 1 + start :] == operators(model)[-len(lines) - 1 + start :]
    assert report.changed == bool(start)


@pytest.mark.parametrize(
    "lines",
    [
        [("Add", (C,))],
        [("Mul", (C,))],
        [("Mul", (C,)), ("Add", ())],
        [("Mul", (1,)), ("Add", (C,))],
        [("Mul", (4,)), ("Add", (C,))],
        [("Mul", (C, C)), ("Add", (C, C))],
    ],
)
def test_what_is_no_norm_is_not_reported_behind_an_unknown_shape(lines: list[tuple[str, tuple[int, ...]]]) -> None:
    assert not fuse(behind(lines))[1].norms


@pytest.mark.parametrize(("size", "norms"), [(C, ["folded"]), (C + 1, []), ("c", [])])
def test_a_chain_of_known_shape_is_what_it_was(size: int | str, norms: list[str]) -> None:
    """Along an axis of open size the first constant broadcasts, and the second is folded alone."""
    assert [n.outcome for n in fuse(behind([("Mul", (C,)), ("Add", (C,))], size=size))[1].norms] == norms


@pytest.mark.parametrize("divide", ["Div", "Mul"])
def test_the_scale_and_bias_of_a_layer_normalization_are_not_reported(divide: str) -> None:
    b = Builder()
    h = b.node("Riddle", "x", domain="someone")
    h = b.node("Sub", h, b.node("ReduceMean", h, b.constant(np.array([-1]))))
    spread = b.node("ReduceMean", b.node("Mul", h, h), b.constant(np.array([-1])))
    root = b.node("Sqrt", b.node("Add", spread, b.constant(1e-5)))
    h = b.node(divide, h, root if divide == "Div" else b.node("Reciprocal", root))
    y = b.node("Add", b.node("Mul", h, b.normal(C)), b.normal(C))
    model = b.model({"x": ["n", C]}, [y], opset=20)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(y, 1, ["n", C]))
    assert not fuse(model)[1].norms


def test_the_bias_of_a_product_begins_no_norm() -> None:
    b = Builder()
    h = b.node("MatMul", b.node("Riddle", "x", domain="someone"), b.normal(4, C))
    y = b.node("Mul", b.node("Add", h, b.normal(C)), b.normal(C))
    model = b.model({"x": ["n", 4]}, [y], opset=20)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(y, 1, ["n", C]))
    assert not fuse(model)[1].norms


def test_a_function_that_hides_the_shape_is_opened() -> None:
    model = behind([("Mul", (C,)), ("Add", (C,))])
    weight = helper.make_tensor("w", 1, [4, C], np.arange(4.0 * C) / 7)
    body = [
        helper.make_node("Constant", [], ["w"], value=weight),
        helper.make_node("MatMul", ["X", "w"], ["m"]),
        helper.make_node("Relu", ["m"], ["Y"]),
    ]
    function = helper.make_function("someone", "Riddle", ["X"], ["Y"], body, [helper.make_opsetid("", 20)])
    model.functions.append(function)
    fused, report = fuse(model)
    assert [n.outcome for n in report.norms] == ["folded"]
    assert "Mul" not in operators(fused)


def test_a_run_that_is_no_norm_is_looked_at_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from renorm_onnx.fusion import unproven

    count, operands = 0, unproven._operands

    def counting(*args: object) -> object:
        nonlocal count
        count += 1
        return operands(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(unproven, "_operands", counting)
    assert not fuse(behind([("Add", (C,))] * 1000))[1].norms
    assert count <= 2 * 1000 * (unproven.LONGEST + 1)

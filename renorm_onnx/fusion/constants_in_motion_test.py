"""Constants that are computed inside the model, while folds change what computes them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from renorm_onnx.fusion.conftest import Builder, assert_same, operators
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.fact_dims import CONSTANT_OPERATORS, RULES
from renorm_onnx.fusion.facts import Facts
from renorm_onnx.fusion.parameters import Parameter

C = 4
SIZES = [{"b": 2, "w": 5}, {"b": C, "w": C}, {"b": 1, "w": 1}]


def chain(b: Builder, x: str, out: str | None = None) -> str:
    scale = b.constant(b.rng.uniform(0.5, 2, (C, 1, 1)))
    return b.node("Add", b.node("Mul", x, scale), b.normal(C, 1, 1), out=out)


@pytest.mark.parametrize("norm", ["BatchNormalization", "chain", "Mul"])
@pytest.mark.parametrize("shape", [(1, C, 1, 1), (C, 1, 1), (C, C, 1), (1, C, 1), (1, 1, C, 1)])
@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div"])
def test_two_expanded_constants_keep_the_size_that_each_gives_the_other(operator: str, shape: tuple, norm: str) -> None:
    b = Builder()
    sizes = b.node("Shape", "x")
    one, two = (b.node("Expand", b.constant(b.rng.uniform(0.5, 2, shape)), sizes) for _ in range(2))
    both = b.node(operator, one, two)
    if norm == "Mul":
        b.node("Mul", both, b.constant(b.rng.uniform(0.5, 2, (C, 1, 1))), out="y")
    else:
        chain(b, both, "y") if norm == "chain" else b.norm(both, C, out="y")
    model = b.model({"x": ["b", C, C, "w"]}, ["y"])
    fused, report = fuse(model)
    for at in SIZES:
        assert_same(model, fused, **at)
    if operator in ("Add", "Sub") and norm == "BatchNormalization" and len(shape) == 4 and shape[1] == C:
        assert not report.kept


@pytest.mark.parametrize("operator", ["Add", "Sub"])
@pytest.mark.parametrize("second", ["BatchNormalization", "chain"])
@pytest.mark.parametrize("first", ["BatchNormalization", "chain"])
@pytest.mark.parametrize("between", ["", "Neg"])
def test_a_constant_that_took_up_a_norm_is_read_as_it_is_now(
    between: str, first: str, second: str, operator: str
) -> None:
    b = Builder()
    conv = b.conv("x", 3, C)
    constant = b.node("Add", b.normal(1, C, 1, 1), b.normal(1, C, 1, 1))
    constant = b.node(between, constant) if between else constant
    constant = chain(b, constant) if first == "chain" else b.norm(constant, C)
    total = b.node(operator, conv, constant)
    chain(b, total, "y") if second == "chain" else b.norm(total, C, out="y")
    model = b.model({"x": [2, 3, 6, 6]}, ["y"])
    fused, report = fuse(model)
    assert_same(model, fused)
    assert not report.kept
    assert operators(fused) == ["Conv"]
    assert not fuse(fused)[1].changed


def test_what_does_not_follow_from_a_changed_operand_is_still_known() -> None:
    """A fold into a convolution leaves the constant beside it where it is."""
    b = Builder()
    offset = b.node("Mul", b.normal(1, C, 1, 1), b.constant(np.array(1.5)))
    b.node("Add", b.norm(b.conv("x", 3, C), C), offset, out="y")
    model = b.model({"x": [2, 3, 6, 6]}, ["y"])
    fused, report = fuse(model)
    assert_same(model, fused)
    assert not report.kept


def test_all_that_is_computed_from_a_changed_operand_is_known_anew() -> None:
    b = Builder()
    b.node("Add", b.constant(np.arange(4.0), "a"), b.constant(np.ones(4)), out="e")
    b.node("Neg", "e", out="n")
    b.node("Expand", "n", b.node("Shape", "x"), out="wide")
    b.node("Mul", b.normal(C), b.normal(C), out="apart")
    b.node("Add", b.node("Mul", "wide", "apart"), "x", out="y")
    model = ir.from_proto(b.model({"x": ["b", C]}, ["y"]))
    facts = Facts(model, RULES, CONSTANT_OPERATORS)
    values = {output.name: output for node in model.graph for output in node.outputs}
    before = {name: facts[value] for name, value in values.items()}
    changed = values["e"].producer()
    facts.operands = {(changed, 1): Parameter.new(np.full(4, 10.0), ir.DataType.FLOAT)}
    facts.change(changed)
    for name, sign, found in (
        ("e", 1, facts[values["e"]].content),
        ("n", -1, facts[values["n"]].content),
        ("wide", -1, facts[values["wide"]].unexpanded.content),
    ):
        np.testing.assert_array_equal(found, sign * (np.arange(4.0) + 10), name)
    assert facts[values["wide"]].dims == before["wide"].dims
    assert facts[values["apart"]] is before["apart"]
    assert facts[values["y"]] is before["y"]

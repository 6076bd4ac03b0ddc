"""Gemm absorbs maps at both sides, with every legal C, alpha, beta and transposition."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from renorm_onnx.fusion.carriers.exact_folding_test import assert_fuses, bn, build, is_valid, norm, operators, quarters
from renorm_onnx.fusion.report import Reason

ADDED = [None, (), (1,), (6,), (1, 6), (5, 1), (5, 6)]


def product(c: object, *, trans_a: int = 0, trans_b: int = 0, alpha: float = 0.5, beta: float = 0.25) -> str:
    """The text of a Gemm that reads a, B and maybe C."""
    attributes = f"transA={trans_a}, transB={trans_b}, alpha={alpha}, beta={beta}"
    return f"Gemm<{attributes}>(a, B{'' if c is None else ', C'})"


def constants(c: tuple[int, ...] | None, trans_b: int = 0) -> dict[str, np.ndarray]:
    b = quarters([3, 6])
    return {"B": b.T if trans_b else b} | ({} if c is None else {"C": quarters(c, 2)})


@pytest.mark.parametrize("c", ADDED)
@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0)])
def test_a_norm_behind_gemm_is_absorbed(c: tuple[int, ...] | None, trans_a: int, trans_b: int) -> None:
    body = f"y0 = {product(c, trans_a=trans_a, trans_b=trans_b)} y = {bn('y0')}"
    inputs = "double[3,5] a" if trans_a else "double[5,3] a"
    fused = assert_fuses(build(body, inputs, "y", **constants(c, trans_b), **norm(6)))
    assert operators(fused) == {"Gemm": 1}


@pytest.mark.parametrize("c", ADDED)
@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1)])
def test_a_norm_before_gemm_is_absorbed(c: tuple[int, ...] | None, trans_a: int, trans_b: int) -> None:
    body = f"a = {bn('x')} y = {product(c, trans_a=trans_a, trans_b=trans_b)}"
    assert operators(assert_fuses(build(body, "double[5,3] x", "y", **constants(c, trans_b), **norm(3)))) == {"Gemm": 1}


@pytest.mark.parametrize("c", ADDED)
def test_a_chain_along_the_rows_scales_the_constant_left_factor(c: tuple[int, ...] | None) -> None:
    body = f"y0 = {product(c)} y1 = Mul(k, y0) y = Add(y1, l)"
    model = build(
        body,
        "double[3,6] B",
        "y",
        a=quarters([5, 3]),
        k=quarters([5, 1]),
        l=quarters([5, 1], 1),
        **({} if c is None else {"C": quarters(c, 2)}),
    )
    assert operators(assert_fuses(model)) == {"Gemm": 1}


def test_a_c_that_did_not_count_is_broadcast_where_it_comes_to_count() -> None:
    """Before opset 7, C is of shape (M, N) unless an attribute says otherwise."""
    body = "y0 = Gemm<beta=0.0>(a, B, C) y = BatchNormalization<epsilon=0.0, is_test=1>(y0, bn_s, bn_b, bn_m, bn_v)"
    model = build(body, "double[5,3] a", "y", opset=6, **constants((5, 6)), **norm(6))
    [node] = assert_fuses(model).graph.node
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (values["beta"], values["broadcast"]) == (1.0, 1)
    assert is_valid(model)


def test_a_uniform_chain_is_absorbed_on_both_sides() -> None:
    body = f"a = Add(x, u) y0 = {product(None)} y1 = Mul(y0, k) y = Sub(l, y1)"
    model = build(body, "double[5,3] x", "y", B=quarters([3, 6]), u=[0.75], k=np.array(2.5), l=[[1.5]])
    assert operators(assert_fuses(model)) == {"Gemm": 1}


def test_a_computed_c_takes_its_part_of_the_map() -> None:
    body = f"C = MatMul(x, V) y0 = {product(())} y = {bn('y0')}"
    model = build(body, "double[5,3] a, double[5,2] x", "y", B=quarters([3, 6]), V=quarters([2, 6], 3), **norm(6))
    assert operators(assert_fuses(model)) == {"MatMul": 1, "Add": 1, "Gemm": 1}
    body = f"C = MatMul(x, V) y0 = {product(())} y1 = Mul(y0, k) y = Sub(l, y1)"
    weights = {"B": quarters([3, 6]), "V": quarters([2, 6], 3), "k": np.array(2.5), "l": np.array(1.5)}
    model = build(body, "double[5,3] a, double[5,2] x", "y", **weights)
    assert operators(assert_fuses(model)) == {"MatMul": 1, "Add": 1, "Gemm": 1}


def test_a_computed_c_that_broadcasts_is_refused() -> None:
    body = f"C = Abs(x) y0 = {product(())} y = {bn('y0')}"
    for shape in ("5,1", "H,W"):
        sizes = "double[H,3] a" if shape == "H,W" else "double[5,3] a"
        weights = {"B": quarters([3, 5])}
        assert_fuses(build(body, f"{sizes}, double[{shape}] x", "y", **weights, **norm(5)), [Reason.SHAPE])


def test_maps_that_gemm_cannot_take_are_refused() -> None:
    body = f"C = {bn('x')} y = {product(())}"
    model = build(body, "double[5,3] a, double[5,6] x", "y", B=quarters([3, 6]), **norm(6))
    assert_fuses(model, [Reason.WEIGHT])
    body = f"a = {bn('x')} y = Gemm(a, B)"
    assert_fuses(build(body, "double[5,3] x, double[3,6] B", "y", **norm(3)), [Reason.WEIGHT])
    body = "a = Add(x, k) y = Gemm(a, B)"
    assert_fuses(build(body, "double[5,3] x", "y", B=quarters([3, 6]), k=quarters([5, 1])), [Reason.AXIS])


def test_two_norms_around_gemm_round_once() -> None:
    body = f"a = {bn('x', 'p')} y0 = {product((6,))} y = {bn('y0')}"
    model = build(body, "double[5,3] x", "y", **constants((6,)), **norm(3, "p"), **norm(6, seed=4))
    assert operators(assert_fuses(model)) == {"Gemm": 1}


@pytest.mark.parametrize("c", ADDED)
def test_a_chain_along_the_axis_that_a_transposed_factor_sums_over_is_absorbed(c: tuple[int, ...] | None) -> None:
    body = f"x0 = Mul(x, k) a = Add(x0, l) y = {product(c, trans_a=1, trans_b=1)}"
    chain = {"k": quarters([3, 1], 5), "l": quarters([3, 1], 6)}
    assert operators(assert_fuses(build(body, "double[3,5] x", "y", **constants(c, 1), **chain))) == {"Gemm": 1}


@pytest.mark.parametrize("c", ADDED)
@pytest.mark.parametrize("trans_b", [0, 1])
def test_a_chain_before_the_right_factor_scales_the_constant_left_one(c: tuple[int, ...] | None, trans_b: int) -> None:
    body = f"x0 = Mul(x, k) B = Add(x0, l) y = {product(c, trans_b=trans_b)}"
    shape = [3] if trans_b else [3, 1]
    weights = {"a": quarters([5, 3]), "k": quarters(shape, 5), "l": quarters(shape, 6)}
    weights |= {} if c is None else {"C": quarters(c, 2)}
    inputs = "double[6,3] x" if trans_b else "double[3,6] x"
    assert operators(assert_fuses(build(body, inputs, "y", **weights))) == {"Gemm": 1}


@pytest.mark.parametrize(("line", "shape"), [("g = Gemm(a, B)", [5, 1]), ("g = Gemm<transA=1>(a, C)", [1, 3])])
def test_a_scale_of_rows_goes_past_gemm_into_what_sums_over_them(line: str, shape: list[int]) -> None:
    weights = {"B": quarters([3, 6]), "C": quarters([5, 6], 1)} | {"k": quarters(shape, 2)}
    name = line[-2]
    body = f"a = Mul(x, k) {line} y = MatMul(A, g)"
    used = {n: w for n, w in weights.items() if n in ("k", name)} | {"A": quarters([2, 3 if name == "C" else 5], 3)}
    assert operators(assert_fuses(build(body, "double[5,3] x", "y", **used))) == {"Gemm": 1, "MatMul": 1}

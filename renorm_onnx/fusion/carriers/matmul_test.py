"""MatMul absorbs a scale into its constant factor, whichever side that is on, and a shift as an Add behind it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from renorm_onnx.fusion import engine
from renorm_onnx.fusion.carriers.exact_folding_test import SIZES, assert_fuses, bn, build, norm, operators, quarters
from renorm_onnx.fusion.report import Reason


def test_a_norm_behind_matmul_becomes_its_bias() -> None:
    fused = assert_fuses(build(f"a = MatMul(x, B) y = {bn('a')}", "double[5,3] x", "y", B=quarters([3, 6]), **norm(6)))
    assert operators(fused) == {"MatMul": 1, "Add": 1}


@pytest.mark.parametrize("add", ["Add(a, c)", "Add(c, a)"])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (1,), (), (5, 6), (5, 1)])
def test_a_norm_behind_matmul_and_add_meets_the_add_first(add: str, shape: tuple[int, ...]) -> None:
    body = f"a = MatMul(x, B) e = {add} y = {bn('e')}"
    fused = assert_fuses(build(body, "double[5,3] x", "y", B=quarters([3, 6]), c=quarters(shape, 3), **norm(6)))
    assert operators(fused) == {"MatMul": 1, "Add": 1}


@pytest.mark.parametrize("left", ["3", "2,3", "N,2,3", "H,1,2,3"])
@pytest.mark.parametrize("right", [(3,), (3, 6), (2, 3, 6)])
def test_a_channel_map_on_the_last_axis_is_absorbed_by_the_right_factor(left: str, right: tuple[int, ...]) -> None:
    if left == "N,2,3" and right == (2, 3, 6):
        left = "2,2,3"
    body = "a = MatMul(x, B) e = Mul(a, k) y = Add(l, e)"
    width = 1 if len(right) == 1 else 6
    model = build(body, f"double[{left}] x", "y", B=quarters(right), k=quarters([width]), l=quarters([width], 1))
    if left == "3" and len(right) == 1:
        model = build(body, f"double[{left}] x", "y", B=quarters(right), k=quarters([]), l=quarters([], 1))
    assert operators(assert_fuses(model)) == {"MatMul": 1, "Add": 1}


@pytest.mark.parametrize("right", ["3", "3,2", "N,3,2"])
def test_a_map_along_the_rows_is_absorbed_by_a_constant_left_factor(right: str) -> None:
    shape = (6,) if right == "3" else (6, 1)
    body = "a = MatMul(A, x) e = Mul(a, k) y = Sub(e, l)"
    model = build(body, f"double[{right}] x", "y", A=quarters([6, 3]), k=quarters(shape), l=quarters(shape, 1))
    assert operators(assert_fuses(model)) == {"MatMul": 1, "Add": 1}


def test_a_map_along_a_leading_axis_goes_to_the_factor_that_has_it() -> None:
    body = "a = MatMul(x, B) y = Mul(a, k)"
    fused = assert_fuses(build(body, "double[N,2,5,3] x", "y", B=quarters([2, 3, 6]), k=quarters([2, 1, 1])))
    assert operators(fused) == {"MatMul": 1}
    assert_fuses(
        build(body, "double[N,2,5,3] x", "y", B=quarters([1, 3, 6]), k=quarters([2, 1, 1])), [Reason.GRAPH_INPUT]
    )


@pytest.mark.parametrize("right", [(4, 6), (4,), (2, 4, 6)])
def test_a_norm_before_matmul_scales_the_rows_of_its_weight(right: tuple[int, ...]) -> None:
    body = f"n = {bn('x')} y = MatMul(n, B)"
    fused = assert_fuses(build(body, "double[5,4] x", "y", B=quarters(right), **norm(4)))
    assert operators(fused) == {"MatMul": 1, "Add": 1}


@pytest.mark.parametrize("left", [(6, 5), (5,), (2, 6, 5)])
def test_a_map_before_matmul_scales_the_columns_of_a_constant_left_factor(left: tuple[int, ...]) -> None:
    body = "e = Mul(x, k) n = Add(e, l) y = MatMul(A, n)"
    model = build(body, "double[N,5,4] x", "y", A=quarters(left), k=quarters([5, 1]), l=quarters([5, 1], 1))
    assert operators(assert_fuses(model)) == {"MatMul": 1, "Add": 1}


def test_a_shift_before_matmul_is_taken_by_the_add_that_follows() -> None:
    body = f"n = {bn('x')} a = MatMul(n, B) y = Add(a, c)"
    fused = assert_fuses(build(body, "double[5,4] x", "y", B=quarters([4, 6]), c=quarters([6], 2), **norm(4)))
    assert operators(fused) == {"MatMul": 1, "Add": 1}


def test_one_norm_before_three_products_goes_into_all_of_them() -> None:
    body = f"n = {bn('x')} q = MatMul(n, Q) k = MatMul(n, K) v0 = MatMul(n, V) v = Add(v0, c)"
    weights = {"Q": quarters([4, 2]), "K": quarters([4, 2], 1), "V": quarters([4, 2], 2), "c": quarters([2], 3)}
    fused = assert_fuses(build(body, "double[5,4] x", "q, k, v", **weights, **norm(4)))
    assert operators(fused) == {"MatMul": 3, "Add": 3}


def test_a_shift_along_an_axis_that_is_not_summed_is_refused() -> None:
    body = "n = Add(x, k) y = MatMul(n, B)"
    assert_fuses(build(body, "double[5,4] x", "y", B=quarters([4, 6]), k=quarters([5, 1])), [Reason.AXIS])


def test_a_number_passes_a_product_of_two_computed_factors() -> None:
    body = "a = MatMul(x, B) b = MatMul(x, C) s = Mul(a, k) y0 = MatMul(s, b) y1 = MatMul(y0, D) y = Abs(y1)"
    weights = {n: quarters([4, 4], i) for i, n in enumerate("BCD")}
    assert operators(assert_fuses(build(body, "double[4,4] x", "y", k=np.array(2.5), **weights)))["Mul"] == 0


def test_a_shift_behind_two_computed_factors_stays_an_add() -> None:
    body = "a = MatMul(x, z) y = Add(a, k)"
    assert_fuses(build(body, "double[5,4] x, double[4,6] z", "y", k=quarters([6])), [Reason.SHIFT])


def test_the_axis_of_a_square_product_is_not_mixed_up() -> None:
    """onnxruntime 1.31.1 folds this BatchNormalization along the wrong axis."""
    body = f"a = MatMul(x, B) t = Transpose<perm=[1,0]>(a) y = {bn('t')}"
    assert_fuses(build(body, "double[6,6] x", "y", B=quarters([6, 6]), **norm(6)), [Reason.GRAPH_INPUT])


def test_before_opset_7_only_a_shift_along_the_last_axis_is_put_behind_a_product() -> None:
    norm_6 = "BatchNormalization<epsilon=0.0, is_test=1>"
    operands = "bn_s, bn_b, bn_m, bn_v"
    text = f"a = MatMul(x, B) y = {norm_6}(a, {operands})"
    fused = assert_fuses(build(text, "double[5,3] x", "y", opset=6, B=quarters([3, 6]), **norm(6)))
    assert operators(fused) == {"MatMul": 1, "Add": 1}
    assert_fuses(build(text, "double[2,4,3] x", "y", opset=6, B=quarters([3, 6]), **norm(4)), [Reason.OPSET])
    text = f"a = {norm_6}(x, {operands}) y = MatMul(a, B)"
    fused = assert_fuses(build(text, "double[5,3] x", "y", opset=6, B=quarters([3, 6]), **norm(3)))
    assert operators(fused) == {"MatMul": 1, "Add": 1}
    text = text.replace("MatMul(a, B)", "MatMul(B, a)")
    assert_fuses(build(text, "double[2,5,3] x", "y", opset=6, B=quarters([3, 5]), **norm(5)), [Reason.OPSET])


HEADS = {"p": np.array([0, 0, 2, 3]), "q": np.array([0, 0, 6])}


def test_a_scale_behind_attention_goes_into_the_values_of_all_heads() -> None:
    text = "v = MatMul(x, B) r = Reshape(v, p) t = Transpose<perm=[0,2,1,3]>(r) o = MatMul(a, t) "
    text += "u = Transpose<perm=[0,2,1,3]>(o) j = Reshape(u, q) y = Mul(j, k)"
    inputs = "double[N,L,5] x, double[N,2,L,L] a"
    fused = assert_fuses(build(text, inputs, "y", B=quarters([5, 6]), k=quarters([6], 1), **HEADS))
    assert operators(fused) == {"MatMul": 2, "Reshape": 2, "Transpose": 2}
    assert_fuses(
        build(text, "double[N,L,5] x, double[N,1,L,L] a", "y", B=quarters([5, 6]), k=quarters([6], 1), **HEADS)
    )
    turned = text.replace("MatMul(a, t)", "MatMul(t, a)")
    model = build(turned, "double[N,L,5] x, double[N,2,3,3] a", "y", B=quarters([5, 6]), k=quarters([6], 1), **HEADS)
    assert_fuses(model, [Reason.GRAPH_INPUT])


def test_a_scale_before_attention_goes_forward_past_the_weights_of_all_heads() -> None:
    text = "n = Mul(x, k) r = Reshape(n, p) t = Transpose<perm=[0,2,1,3]>(r) o = MatMul(a, t) "
    text += "u = Transpose<perm=[0,2,1,3]>(o) j = Reshape(u, q) y = MatMul(j, B)"
    inputs = "double[N,L,6] x, double[N,2,L,L] a"
    fused = assert_fuses(build(text, inputs, "y", B=quarters([6, 5]), k=quarters([6], 1), **HEADS))
    assert operators(fused) == {"MatMul": 2, "Reshape": 2, "Transpose": 2}
    summed = text.replace("MatMul(a, t)", "MatMul(t, a)")
    inputs = "double[N,L,6] x, double[N,2,3,3] a"
    assert_fuses(build(summed, inputs, "y", B=quarters([6, 5]), k=quarters([6], 1), **HEADS), [Reason.WEIGHT])


def test_a_shift_goes_into_the_branch_that_does_not_bend() -> None:
    text = f"a = Conv(x, W) r = Relu(a) c = Conv(x, V) d = Add(r, c) y = {bn('d')}"
    weights = {"W": quarters([4, 3, 1, 1]), "V": quarters([4, 3, 1, 1], 3)}
    fused = assert_fuses(build(text, "double[N,3,H,W] x", "y", **weights, **norm(4, positive=True)))
    assert operators(fused) == {"Conv": 2, "Relu": 1, "Add": 1}


@pytest.mark.parametrize(("first", "kept"), [("Add(z, k)", Reason.WEIGHT), ("Mul(z, k)", Reason.WEIGHT)])
def test_a_map_that_a_computed_product_refuses_does_not_keep_another_behind_it(first: str, kept: Reason) -> None:
    text = (
        f"z = Relu(x) a = {first} t = Transpose<perm=[0,2,1]>(a) b = Mul(t, n) u = Transpose<perm=[0,2,1]>(b) "
        "v = Relu(w) q = MatMul(u, v) y = MatMul(q, W)"
    )
    constants = {"k": quarters([5]), "n": np.array(-2.0), "W": quarters([3, 3], 1)}
    fused = assert_fuses(build(text, "double[2,4,5] x, double[2,5,3] w", "y", **constants), [kept])
    assert operators(fused) == {"Relu": 2, first[:3]: 1, "Transpose": 2, "MatMul": 2}


def test_numbers_that_repeat_along_an_open_axis_are_counted_by_the_weight() -> None:
    """Joining an open axis with the channels makes them repeat; how often, only the weight of the product says."""
    body = f"n = {bn('x')} r = Reshape(n, shape) t = Transpose<perm = [1, 0]>(r) y = MatMul(t, B)"
    rows = 4 * SIZES["N"]
    fused = assert_fuses(build(body, "double[N,4,3] x", "y", B=quarters([rows, 6]), shape=np.array([-1, 3]), **norm(4)))
    assert operators(fused) == {"Reshape": 1, "Transpose": 1, "MatMul": 1, "Add": 1}


def test_a_shift_before_a_weight_that_holds_an_infinity_stays() -> None:
    """The sign of ``(x + t) * inf`` is that of the sum; ``x * inf + t * inf`` may be no number."""
    weight = quarters([4, 3])
    weight[1, 2] = -np.inf
    _, report = engine.fuse(
        build(f"c = {bn('x')} y = MatMul(c, W)", "double[N,4] x", "y", W=quarters([4, 3]), **norm(4))
    )
    assert not report.kept
    model = build(f"c = {bn('x')} y = MatMul(c, W)", "double[N,4] x", "y", W=quarters([4, 3]), **norm(4))
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "W"))
    _, report = engine.fuse(model)
    assert [r.reason for r in report.kept[0].refusals] == [Reason.GRAPH_INPUT, Reason.OVERFLOW]

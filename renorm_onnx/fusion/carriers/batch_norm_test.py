"""Two normalizations in a row become one, from whichever side they meet."""

from __future__ import annotations

import numpy as np
import pytest

from renorm_onnx.fusion.carriers.exact_folding_test import assert_fuses, bn, build, norm, operators, quarters
from renorm_onnx.fusion.report import Reason


@pytest.mark.parametrize(
    "text", [f"c = Mul(x, k) e = Add(c, l) y = {bn('e')}", f"e = {bn('x')} c = Mul(k, e) y = Sub(l, c)"]
)
def test_a_chain_beside_a_norm_is_absorbed_by_it(text: str) -> None:
    constants = {"k": np.array([2.0, -0.5, 4.0, -2.0]).reshape(4, 1, 1), "l": quarters([1, 4, 1, 1], 1)}
    fused = assert_fuses(build(text, "double[N,4,H,W] x", "y", **constants, **norm(4)), [Reason.GRAPH_INPUT])
    assert operators(fused) == {"BatchNormalization": 1}


def test_two_norms_become_one() -> None:
    text = f"a = {bn('x', 'p')} y = {bn('a')}"
    fused = assert_fuses(
        build(text, "double[N,4,H] x", "y", **norm(4, "p", powers=True), **norm(4, seed=3)), [Reason.GRAPH_INPUT]
    )
    assert operators(fused) == {"BatchNormalization": 1}


def test_a_channel_scaled_by_zero_becomes_constant() -> None:
    first = norm(4, "p", powers=True)
    first["p_s"][1] = 0.0
    text = f"a = {bn('x', 'p')} r = Abs(x) q = Add(a, a) y = {bn('q')}"
    fused = assert_fuses(build(text, "double[N,4,H] x", "y", **first, **norm(4, seed=3)), [Reason.GRAPH_INPUT])
    assert operators(fused)["BatchNormalization"] == 1


def test_a_norm_in_training_mode_absorbs_nothing() -> None:
    text = "a, m1, v1 = BatchNormalization<training_mode=1>(x, s, b, m, v) y = Mul(a, k)"
    constants = {"s": quarters([4]), "b": quarters([4], 1), "m": quarters([4], 2), "v": quarters([4], 3, positive=True)}
    model = build(text, "double[N,4,H] x", "y", k=np.array(2.5), **constants)
    assert_fuses(model, [Reason.TRAINING, Reason.TRAINING])


def test_a_vector_has_one_channel_and_no_axis_for_it() -> None:
    """ONNX BatchNormalization-15: of an input of one dimension, C is 1."""
    text = f"a = MatMul(x, B) y = {bn('a')}"
    fused = assert_fuses(build(text, "double[5,3] x", "y", B=quarters([3]), **norm(1)))
    assert operators(fused) == {"MatMul": 1, "Add": 1}
    text = f"a = {bn('x')} y = MatMul(a, B)"
    fused = assert_fuses(build(text, "double[3] x", "y", B=quarters([3, 2]), **norm(1)))
    assert operators(fused) == {"MatMul": 1, "Add": 1}
    text = f"e = {bn('x')} a = Relu(e) y = {bn('a')}"
    assert_fuses(build(text, "double[3] x", "y", **norm(1)), [Reason.GRAPH_INPUT, Reason.SHIFT])

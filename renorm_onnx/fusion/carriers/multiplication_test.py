"""Products: a scale goes to one factor, a shift only through constants."""

from __future__ import annotations

import numpy as np
import pytest

from renorm_onnx.fusion.carriers.exact_folding_test import (
    assert_fuses,
    backward,
    bn,
    build,
    forward,
    norm,
    operators,
    quarters,
)
from renorm_onnx.fusion.report import Reason

WEIGHTS = {"W": quarters([4, 3, 1, 1]), "V": quarters([4, 3, 1, 1], 1)}


@pytest.mark.parametrize("body", ["Mul(a, g)", "Mul(g, a)", "Div(a, g)"])
def test_a_scale_behind_a_gate_goes_to_the_branch_that_absorbs(body: str) -> None:
    text = f"a = Conv(x, W) h = Conv(x, V) g = Clip(h, lo) d = {body} y = {bn('d')}"
    model = build(text, "double[N,3,H,W] x", "y", lo=np.array(0.5), **WEIGHTS, **norm(4, shift=False))
    assert operators(assert_fuses(model))["BatchNormalization"] == 0


def test_a_shift_behind_a_product_is_refused() -> None:
    text = f"a = Conv(x, W) g = Conv(x, V) d = Mul(a, g) y = {bn('d')}"
    assert_fuses(build(text, "double[N,3,H,W] x", "y", **WEIGHTS, **norm(4)), [Reason.SHIFT])


def test_a_square_is_refused() -> None:
    backward("d = Mul(c, c)", 4, [Reason.SCALE], shift=False)


@pytest.mark.parametrize("shape", [(4, 5), (4, 4, 5), (1, 4, 1, 5), (2, 1, 4, 1)])
def test_a_constant_factor_over_positions_absorbs_the_scale(shape: tuple[int, ...]) -> None:
    fused = backward("d = Mul(k, c)", 4, shift=False, k=quarters(shape, 3))
    assert operators(fused) == {"Conv": 1, "Mul": 1}
    fused = forward("d = Mul(c, k)", 4, shift=False, k=quarters(shape, 3))
    assert operators(fused) == {"Conv": 1, "Mul": 1}


def test_the_divisor_takes_no_scale() -> None:
    text = f"a = Abs(z) h = Conv(x, V) g = Clip(h, lo) d = Div(a, g) y = {bn('d')}"
    constants = {"lo": np.array(0.5)} | WEIGHTS | norm(4, shift=False)
    model = build(text, "double[N,3,4,5] x, double[N,4,4,5] z", "y", **constants)
    assert_fuses(model, [Reason.SIGN])


@pytest.mark.parametrize("lines", ["n = Neg(c) d = Neg(n)", "d = Neg(c)", "m = Neg(c) d = Mul(m, k)"])
def test_signs_and_numbers_pass_on_both_sides(lines: str) -> None:
    backward(lines, 4, k=quarters([]))
    forward(lines, 4, k=quarters([]))


def test_a_scale_goes_forward_through_a_gate() -> None:
    forward("g = Abs(x) d = Mul(g, c)", 4, shift=False)
    forward("g = Abs(x) d = Mul(g, c)", 4, [Reason.SHIFT])
    forward("g = Clip(x, lo) d = Div(c, g)", 4, shift=False, lo=np.array(0.5))


@pytest.mark.parametrize("last", ["Mul(p, k)", "Mul(k, p)", "Div(p, k)"])
def test_a_map_goes_forward_past_a_constant_of_its_axis(last: str) -> None:
    lines = f"p = MaxPool<kernel_shape=[2,2]>(c) d = {last}"
    constant = np.array([2.0, -0.5, 4.0, -2.0]).reshape(4, 1, 1)
    fused = forward(lines, 4, positive=True, k=constant)
    assert operators(fused) == {"MaxPool": 1, "Conv": 1}


def test_a_quotient_lacks_the_inverse_of_what_its_divisor_lacks() -> None:
    text = "g = Clip(x, lo) c = Mul(g, k) d = Div(z, c) y = Conv(d, W)"
    scale = np.array([2.0, -0.5, 4.0]).reshape(3, 1, 1)
    constants = {"lo": np.array(0.5), "k": scale, "W": WEIGHTS["W"]}
    fused = assert_fuses(build(text, "double[N,3,H,W] x, double[N,3,H,W] z", "y", **constants))
    assert operators(fused) == {"Clip": 1, "Div": 1, "Conv": 1}
    constants["k"] = scale * 0.0 + np.array([1.0, 0.5, 0.25]).reshape(3, 1, 1)
    assert_fuses(build(text, "double[N,3,H,W] x, double[N,3,H,W] z", "y", **constants))


@pytest.mark.parametrize("operator", ["Mul", "Add", "Sub"])
def test_maps_along_different_axes_meet_in_one_along_both(operator: str) -> None:
    """One map arrives along the rows and along the columns; the layer over the flattened image takes their meeting."""
    norm = "Mul" if operator == "Mul" else "Add"
    text = f"c = {norm}(x, k) e = Transpose<perm=[0,2,1,3]>(c) d = {operator}(c, e) f = Flatten(d) y = Gemm(f, B)"
    model = build(text, "double[N,4,4,5] x", "y", k=quarters([4, 1, 1]), B=quarters([80, 2], 2))
    assert operators(assert_fuses(model)) == {"Transpose": 1, operator: 1, "Flatten": 1, "Gemm": 1}


def test_a_constant_numerator_or_divisor_over_positions_takes_the_inverse() -> None:
    places = np.random.default_rng(3).choice([0.5, 2.0, -4.0], (4, 5))
    fused = forward("d = Div(c, k)", 4, inputs="double[N,4,4,5] x", shift=False, powers=True, k=places)
    assert operators(fused) == {"Div": 1, "Conv": 1}
    text = "g = Clip(x, lo) c = Mul(g, s) y = Div(k, c)"
    scale = np.array([2.0, -0.5, 4.0]).reshape(3, 1, 1)
    model = build(text, "double[N,3,4,5] x", "y", lo=np.array(0.5), s=scale, k=places)
    assert operators(assert_fuses(model)) == {"Clip": 1, "Div": 1}


def test_a_map_goes_forward_past_a_constant_that_goes_no_further_itself() -> None:
    """The negative constant is stopped by the second maximum, the positive map before it is not."""
    lines = "p = MaxPool<kernel_shape=[2,2]>(c) m = Mul(p, k) d = MaxPool<kernel_shape=[1,2]>(m)"
    constants = norm(4, positive=True) | {"k": np.array([2.0, -0.5, 4.0, -2.0]).reshape(4, 1, 1)}
    text = f"c = {bn('x')} {lines} y = Conv(d, W)"
    fused = assert_fuses(build(text, "double[N,4,H,W] x", "y", W=quarters([3, 4, 1, 1]), **constants), [Reason.SIGN])
    assert operators(fused) == {"MaxPool": 2, "Mul": 1, "Conv": 1}


def test_a_chain_that_took_up_a_norm_along_another_axis_says_why_it_stays() -> None:
    body = (
        f"b = Conv(x, W) i = Identity(b) c = Add(q, i) n = {bn('c')} h = Mul(n, k) a = Sub(q, h) y = {bn('a', 'last')}"
    )
    constants = {"W": quarters([4, 4, 1, 1]), "k": quarters([5, 1]), "q": quarters([5, 1], 2)}
    model = build(body, "double[N,4,5,2] x", "y", **constants, **norm(4), **norm(4, "last", 3))
    fused = assert_fuses(model, [Reason.AXIS, Reason.AXIS])
    assert operators(fused) == {"Conv": 1, "Identity": 1, "Add": 1, "Mul": 1, "Sub": 1}

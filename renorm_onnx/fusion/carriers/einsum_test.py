"""Einsum is a linear layer whose axes have letters: it absorbs at its output and at its input."""

from __future__ import annotations

from typing import Any

import pytest

from renorm_onnx.fusion.carriers.exact_folding_test import (
    assert_fuses,
    assert_same,
    bn,
    build,
    norm,
    operators,
    quarters,
)
from renorm_onnx.fusion.report import Reason

IMAGE = "double[N,4,H,W] x"


def behind(equation: str, inputs: str, norms: str, kept: list[Reason], **constants: Any) -> dict[str, int]:
    """The operators that are left of ``x -> Einsum -> norms``."""
    text = f'e = Einsum<equation="{equation}">({inputs}) {norms}'
    return operators(assert_fuses(build(text, constants.pop("given", IMAGE), "y", **constants), kept))


@pytest.mark.parametrize(
    ("equation", "inputs", "weight"),
    [("bchw,oc->bohw", "x, w", (5, 4)), ("oc, bchw -> bohw", "w, x", (5, 4)), ("bchw,co->bohw", "x, w", (4, 5))],
)
def test_a_norm_behind_a_channel_product_leaves_an_add(equation: str, inputs: str, weight: tuple[int, ...]) -> None:
    more = {"w": quarters(weight), **norm(5)}
    assert behind(equation, inputs, f"y = {bn('e')}", [], **more) == {"Einsum": 1, "Add": 1}
    body = f"f = Mul(e, s) g = Add(f, t) y = {bn('g')}"
    more |= {"s": quarters([5, 1, 1], 3), "t": quarters([5, 1, 1], 4)}
    assert behind(equation, inputs, body, [], **more) == {"Einsum": 1, "Add": 1}


def test_each_head_has_its_own_numbers() -> None:
    given = "double[N,3,6] x"
    weights = {"w": quarters([2, 6, 5]), "s": quarters([2, 1, 1], 3), "t": quarters([2, 1, 1], 4)}
    body = "f = Mul(e, s) y = Add(f, t)"
    assert behind("btc,hcd->bhtd", "x, w", body, [], given=given, **weights) == {"Einsum": 1, "Add": 1}
    weights |= {"s": quarters([5], 3), "t": quarters([5], 4)}
    assert behind("btc,hcd->bhtd", "x, w", body, [], given=given, **weights) == {"Einsum": 1, "Add": 1}


def test_only_computed_factors_take_a_scale_but_no_shift() -> None:
    text = 'a = Conv(x, U) b = Conv(x, V) e = Einsum<equation="bchw,bdhw->bcd">(a, b)'
    weights = {
        "U": quarters([5, 4, 1, 1]),
        "V": quarters([3, 4, 1, 1], 1),
        "s": quarters([3], 2),
        "t": quarters([3], 3),
    }
    fused = assert_fuses(build(f"{text} y = Mul(e, s)", IMAGE, "y", **weights))
    assert operators(fused) == {"Conv": 2, "Einsum": 1}
    assert_fuses(build(f"{text} y = Add(e, t)", IMAGE, "y", **weights), [Reason.SHIFT])


@pytest.mark.parametrize("equation", ["bchw,oc->bohw", "bchw,oc->bo", "bchw,oc->ohw", "bchw,oc->"])
def test_a_norm_before_a_channel_product_is_absorbed(equation: str) -> None:
    text = f'e = {bn("x")} y = Einsum<equation="{equation}">(e, w)'
    given = IMAGE if equation.endswith("bohw") else "double[2,4,3,5] x"
    fused = assert_fuses(build(text, given, "y", w=quarters([5, 4]), **norm(4)))
    assert operators(fused)["BatchNormalization"] == 0
    assert operators(fused)["Add"] == 1
    if equation == "bchw,oc->bo":
        assert_fuses(build(text, IMAGE, "y", w=quarters([5, 4]), **norm(4)), [Reason.SHIFT])


def test_what_a_shift_contributes_goes_on_into_the_bias_behind() -> None:
    text = f'e = {bn("x")} f = Einsum<equation="bchw,oc->bohw">(e, w) y = Add(f, k)'
    fused = assert_fuses(build(text, IMAGE, "y", w=quarters([5, 4]), k=quarters([5, 1, 1], 2), **norm(4)))
    assert operators(fused) == {"Einsum": 1, "Add": 1}


def test_a_number_for_each_element_of_an_axis_that_is_kept_passes() -> None:
    text = 'a = Mul(x, s) e = Einsum<equation="bchw,hk->bckw">(a, w) y = Conv(e, V)'
    more = {"s": quarters([4, 1, 1]), "w": quarters([3, 2]), "V": quarters([2, 4, 1, 1])}
    fused = assert_fuses(build(text, "double[N,4,3,W] x", "y", **more))
    assert operators(fused) == {"Einsum": 1, "Conv": 1}
    shifted = text.replace("Mul(x, s)", bn("x"))
    assert_fuses(build(shifted, "double[N,4,3,W] x", "y", **more, **norm(4)), [Reason.WEIGHT])


def test_what_cannot_be_proven_is_refused() -> None:
    for equation in ("b...,oc->bo...", "bchw,oc", "bccw,oc->bow"):
        sizes = "double[2,4,4,5] x" if equation == "bccw,oc->bow" else "double[2,4,3,5] x"
        text = f'e = {bn("x")} y = Einsum<equation="{equation}">(e, w)'
        assert_fuses(build(text, sizes, "y", w=quarters([5, 4]), **norm(4)), [Reason.SHAPE])
    text = f'e = {bn("x")} v = Relu(e) y = Einsum<equation="bchw,bchw->bc">(e, v)'
    assert_fuses(build(text, IMAGE, "y", **norm(4)), [Reason.SHIFT])
    alone = 'm = Mul(x, k) y = Einsum<equation="bchw->bhw">(m)'
    assert_fuses(build(alone, IMAGE, "y", k=quarters([4, 1, 1])), [Reason.WEIGHT])
    one = 'm = Mul(x, k) y = Einsum<equation="bchw,oc->bohw">(m, w)'
    assert_fuses(build(one, IMAGE, "y", k=quarters([4, 1, 1]), w=quarters([5, 1])), [Reason.SHAPE])


def test_a_fold_along_the_wrong_letter_is_seen() -> None:
    text = 'y = Einsum<equation="bchw,{}->bohw">(x, w)'
    one, two = (build(text.format(order), IMAGE, "y", w=quarters([4, 4])) for order in ("oc", "co"))
    with pytest.raises(AssertionError, match="differs at"):
        assert_same(one, two)


def test_a_weight_that_broadcasts_a_letter_counts_every_element_of_it() -> None:
    weights = {"w": quarters([3, 1]), "s": quarters([1], 2), "t": quarters([1], 3)}
    text = 'a = Mul(x, s) b = Add(a, t) y = Einsum<equation="bc,oc->bo">(b, w)'
    fused = assert_fuses(build(text, "double[N,4] x", "y", **weights))
    assert operators(fused) == {"Einsum": 1, "Add": 1}
    assert_fuses(build(text, "double[N,W] x", "y", **weights), [Reason.SHIFT])


def test_a_norm_that_both_factors_read_stays() -> None:
    text = f'c = {bn("x")} y = Einsum<equation="bchw,bdhw->bcd">(c, c)'
    assert_fuses(build(text, IMAGE, "y", **norm(4)), [Reason.WEIGHT])

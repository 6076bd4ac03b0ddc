"""Activations pass a positive scale, and bounds move with a uniform map."""

from __future__ import annotations

import numpy as np
import pytest

from renorm_onnx.fusion.carriers.exact_folding_test import assert_fuses, backward, build, forward, operators, quarters
from renorm_onnx.fusion.report import Reason

RECTIFIERS = ["Relu(c)", "LeakyRelu<alpha=0.25>(c)", "PRelu(c, k)"]


@pytest.mark.parametrize("operator", RECTIFIERS)
def test_a_rectifier_passes_a_positive_scale_alone(operator: str) -> None:
    slope = {"k": quarters([4, 1, 1], 5)}
    for way in (backward, forward):
        way(f"d = {operator}", 4, positive=True, shift=False, **slope)
        way(f"d = {operator}", 4, [Reason.SHIFT], positive=True, **slope)
        way(f"d = {operator}", 4, [Reason.SIGN], shift=False, **slope)


@pytest.mark.parametrize("k", [2.0, 0.5])
def test_clip_moves_its_bounds(k: float) -> None:
    bounds = {"lo": np.array(-0.5), "hi": np.array(1.25), "k": np.array(k), "l": np.array([0.75])}
    body = "c = Conv(x, W) d = Clip(c, lo, hi) m = Mul(d, k) y = Add(m, l)"
    model = build(body, "double[N,3,H,W] x", "y", W=quarters([4, 3, 1, 1]), **bounds)
    assert operators(assert_fuses(model)) == {"Conv": 1, "Clip": 1}
    body = "m = Mul(x, k) c = Sub(m, l) d = Clip(c, , hi) y = Conv(d, W)"
    bounds = {"hi": np.array(1.25), "k": np.array(k), "l": np.array([0.75])}
    model = build(body, "double[N,3,H,W] x", "y", W=quarters([4, 3, 1, 1]), **bounds)
    assert operators(assert_fuses(model)) == {"Conv": 1, "Clip": 1}


def test_bounds_are_operands_from_opset_11_on() -> None:
    body = "c = Conv(x, W) d = Clip(c, lo, hi) y = Mul(d, k)"
    constants = {"lo": np.array(-0.5), "hi": np.array(1.25), "k": np.array(1.5), "W": quarters([4, 3, 1, 1])}
    assert operators(assert_fuses(build(body, "double[N,3,H,W] x", "y", opset=11, **constants)))["Mul"] == 0


def test_bounds_in_attributes_move_too() -> None:
    body = "c = Conv(x, W) d = Clip<min=0.0, max=6.0>(c) m = Mul(d, k) y = Add(m, l)"
    constants = {"W": quarters([4, 3, 1, 1]), "k": np.array(1.5), "l": np.array(0.25)}
    assert operators(assert_fuses(build(body, "double[N,3,H,W] x", "y", opset=10, **constants))) == {
        "Conv": 1,
        "Clip": 1,
    }
    body = "c = Conv(x, W) d = ThresholdedRelu<alpha=0.5>(c) y = Mul(d, k)"
    constants.pop("l")
    assert_fuses(build(body, "double[N,3,H,W] x", "y", **constants))


def test_one_bound_for_all_channels_takes_no_map_per_channel() -> None:
    bounds = {"lo": np.array(0.0), "hi": np.array(6.0)}
    backward("d = Clip(c, lo, hi)", 4, [Reason.SCALE], positive=True, **bounds)
    forward("d = Clip(c, lo, hi)", 4, [Reason.SIGN], **bounds)


def test_a_bound_of_zero_takes_any_positive_scale_and_none_takes_any_map() -> None:
    for way in (backward, forward):
        way("d = Clip(c, lo)", 4, positive=True, shift=False, lo=np.array(0.0))
        way("d = Clip(c, lo)", 4, [Reason.SCALE], positive=True, lo=np.array(0.0))
        way("d = Clip(c, , hi)", 4, positive=True, shift=False, hi=np.array(0.0))
        way("d = Clip(c)", 4)
    backward("d = Clip<min=0.0>(c)", 4, positive=True, shift=False, opset=10)


@pytest.mark.parametrize("opset", [20, 10])
def test_bounds_change_places_under_a_negative_scale(opset: int) -> None:
    clip = "Clip(c, lo, hi)" if opset > 10 else "Clip<min=-0.5, max=1.25>(c)"
    bounds = {"lo": np.array(-0.5), "hi": np.array(1.25)} if opset > 10 else {}
    constants = {"k": np.array(-2.0), "l": np.array([0.75]), "W": quarters([4, 3, 1, 1])}
    for body in (
        f"c = Conv(x, W) d = {clip} m = Mul(d, k) y = Add(m, l)",
        f"m = Mul(x, k) c = Sub(m, l) d = {clip} y = Conv(d, W)",
    ):
        model = build(body, "double[N,3,H,W] x", "y", opset=opset, **constants, **bounds)
        assert operators(assert_fuses(model)) == {"Conv": 1, "Clip": 1}
    body = "c = Conv(x, W) d = Clip(c, lo) m = Mul(d, k) y = Add(m, l)"
    assert_fuses(build(body, "double[N,3,H,W] x", "y", lo=np.array(-0.5), **constants), [Reason.SIGN])


@pytest.mark.parametrize("opset", [20, 10])
@pytest.mark.parametrize(("k", "kept"), [(-2.0, [Reason.SIGN]), (2.0, [])])
def test_a_lower_bound_above_the_upper_one_keeps_its_place(opset: int, k: float, kept: list[Reason]) -> None:
    """All becomes the upper bound then (Clip-13), which a negative scale would make the lower one."""
    clip = "Clip(c, lo, hi)" if opset > 10 else "Clip<min=1.5, max=0.25>(c)"
    bounds = {"lo": np.array(1.5), "hi": np.array(0.25)} if opset > 10 else {}
    weights = {"k": np.array(k), "W": quarters([4, 3, 1, 1])}
    for body in (f"c = Conv(x, W) d = {clip} y = Mul(d, k)", f"c = Mul(x, k) d = {clip} y = Conv(d, W)"):
        assert_fuses(build(body, "double[N,3,H,W] x", "y", opset=opset, **weights, **bounds), kept)


def test_a_jump_takes_no_shift() -> None:
    body = "c = Conv(x, W) d = ThresholdedRelu<alpha=0.5>(c) y = Add(d, k)"
    model = build(body, "double[N,3,H,W] x", "y", W=quarters([4, 3, 1, 1]), k=np.array(1.5))
    assert_fuses(model, [Reason.SHIFT])


def test_a_bound_that_is_not_constant_is_refused() -> None:
    text = "lo = ReduceMin<keepdims=0>(x) c = Conv(x, W) d = Clip(c, lo) y = Mul(d, k)"
    constants = {"W": quarters([4, 3, 1, 1]), "k": np.array(1.5)}
    assert_fuses(build(text, "double[N,3,H,W] x", "y", **constants), [Reason.NOT_CONSTANT])

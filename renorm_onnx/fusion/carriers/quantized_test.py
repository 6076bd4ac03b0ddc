"""Quantized weights stay quantized: their scales absorb a scale."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper

from renorm_onnx.fusion.carriers.exact_folding_test import assert_fuses, bn, build, norm, operators, quarters
from renorm_onnx.fusion.report import Reason

RNG = np.random.default_rng(0)
WEIGHT = RNG.integers(-9, 10, (4, 3, 1, 1)).astype(np.int8)
IMAGE = "double[N,3,H,W] x"
SCALES = {"q": WEIGHT, "qs": np.array([0.5, 0.25, 2.0, 0.75]), "qz": np.array([0, 1, 2, -1], np.int8)}


def test_a_norm_behind_a_convolution_with_quantized_weights_is_absorbed() -> None:
    text = f"w = DequantizeLinear<axis=0>(q, qs, qz) c = Conv(x, w) y = {bn('c')}"
    fused = assert_fuses(build(text, IMAGE, "y", opset=21, **SCALES, **norm(4)))
    assert operators(fused) == {"DequantizeLinear": 1, "Conv": 1}
    assert next(i for i in fused.graph.initializer if i.name == "q").data_type == 3


def test_one_scale_becomes_many_and_its_zero_point_with_it() -> None:
    text = f"w = DequantizeLinear(q, qs) c = Conv(x, w, b) y = {bn('c')}"
    weights = {"q": WEIGHT, "qs": np.array(0.5), "b": quarters([4])}
    assert_fuses(build(text, IMAGE, "y", opset=21, **weights, **norm(4)))
    text = f"w = DequantizeLinear(q, qs, qz) c = Conv(x, w, b) y = {bn('c')}"
    model = build(text, IMAGE, "y", opset=21, **weights, qz=np.array(1, np.int8), **norm(4))
    assert operators(assert_fuses(model)) == {"DequantizeLinear": 1, "Conv": 1}
    assert_fuses(build(text, IMAGE, "y", opset=10, **weights, qz=np.array(1, np.int8), **norm(4)), [Reason.OPSET])
    text = f"z = Squeeze(p) {text}".replace("qz", "z")
    model = build(text, f"{IMAGE}", "y", opset=21, **weights, p=np.array([2], np.int8), **norm(4))
    assert operators(assert_fuses(model))["BatchNormalization"] == 0


@pytest.mark.parametrize(("kind", "low"), [(np.int32, -(2**31)), (np.int8, -128), (np.uint8, 0)])
def test_a_whole_number_of_steps_is_added_to_the_integers_of_a_bias(kind: type, low: int) -> None:
    text = "b = DequantizeLinear<axis=0>(p, qs) c = Conv(x, W, b) n = Mul(c, s) y = Add(n, k)"
    weights = {"p": np.arange(4).astype(kind), "qs": SCALES["qs"], "W": quarters([4, 3, 1, 1])}
    scale = np.array([2.0, -0.5, 0.25, 4.0])
    steps = np.array([1, 3, 0, 2])
    shift = (steps * scale * SCALES["qs"]).reshape(4, 1, 1)
    more = {"s": scale.reshape(4, 1, 1), "opset": 21}
    fused = assert_fuses(build(text, IMAGE, "y", k=shift, **weights, **more))
    assert operators(fused) == {"DequantizeLinear": 1, "Conv": 1}
    moved = next(i for i in fused.graph.initializer if i.name.startswith("p_"))
    assert numpy_helper.to_array(moved).dtype == kind
    assert list(numpy_helper.to_array(moved)) == [1, 4, 2, 5]
    assert_fuses(build(text, IMAGE, "y", k=shift * 1.25, **weights, **more), [Reason.SHIFT])
    weights["p"] = np.array([low] * 4).astype(kind)
    assert_fuses(build(text, IMAGE, "y", k=-shift, **weights, **more), [Reason.SHIFT])


def test_a_quantized_bias_takes_no_shift() -> None:
    text = f"b = DequantizeLinear<axis=0>(p, qs) c = Conv(x, W, b) y = {bn('c')}"
    weights = {"p": np.arange(4, dtype=np.int32), "qs": SCALES["qs"], "W": quarters([4, 3, 1, 1])}
    assert_fuses(build(text, IMAGE, "y", opset=21, **weights, **norm(4)), [Reason.SHIFT])
    assert_fuses(build(text, IMAGE, "y", opset=21, **weights, **norm(4, shift=False)))


def test_scales_along_another_axis_are_refused() -> None:
    text = f"w = DequantizeLinear<axis=1>(q, qs) c = Conv(x, w) y = {bn('c')}"
    model = build(text, IMAGE, "y", opset=21, q=WEIGHT, qs=np.array([0.5, 2.0, 0.25]), **norm(4))
    assert_fuses(model, [Reason.AXIS])
    square = np.tile(WEIGHT[:, :1], (1, 4, 1, 1))
    model = build(text, "double[N,4,H,W] x", "y", opset=21, q=square, qs=SCALES["qs"], **norm(4))
    assert_fuses(model, [Reason.AXIS])

"""Quantized weights stay quantized: their scales absorb a scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

from renorm_onnx.fusion.carriers.exact_folding_test import (
    assert_fuses,
    assert_same,
    bn,
    build,
    norm,
    operators,
    quarters,
)
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.report import Reason

RNG = np.random.default_rng(0)
WEIGHT = RNG.integers(-9, 10, (4, 3, 1, 1)).astype(np.int8)
IMAGE, IMAGE4 = "double[N,3,H,W] x", "double[N,4,H,W] x"
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


def test_integers_may_lie_at_either_end_of_their_range() -> None:
    text = f"w = DequantizeLinear(q, qs, qz) c = Conv(x, w) y = {bn('c')}"
    for kind, end in ((np.int8, -128), (np.int8, 127), (np.uint8, 255), (np.int16, -32768)):
        ends = {"q": np.full((4, 3, 1, 1), end, kind), "qs": np.array(0.5), "qz": np.array(end, kind)}
        ends["q"][0] = 0
        fused = assert_fuses(build(text, IMAGE, "y", opset=21, **ends, **norm(4)))
        assert operators(fused)["BatchNormalization"] == 0
    text = "b = DequantizeLinear(p, qs) c = Conv(x, W, b) y = Add(c, k)"
    ends = {"p": np.full(4, -126, np.int8), "qs": np.array(0.5), "W": quarters([4, 3, 1, 1])}
    assert_fuses(build(text, IMAGE, "y", opset=21, k=np.array(-1.0), **ends))
    assert_fuses(build(text, IMAGE, "y", opset=21, k=np.array(-1.5), **ends), [Reason.SHIFT])


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


def before(
    read: str, kept: Sequence[Reason] = (), *, inputs: str = "double[N,4,H,W] x", given: str = "x", **constants: Any
) -> dict[str, int]:
    """``x -> norm -> read``, a linear operator with a quantized weight `w`; the operators that are left."""
    text = f"{read.partition(';')[0]} d = {given} y = {read.partition(';')[2]}"
    fused = assert_fuses(build(text, inputs, "y", opset=21, **constants), kept)
    stored = [i for i in fused.graph.initializer if i.name.startswith("q") and i.data_type == TensorProto.INT8]
    assert stored, "the weight is no longer quantized"
    return operators(fused)


SQUARE = RNG.integers(-9, 10, (4, 4, 1, 1)).astype(np.int8)
PLAIN = {"q": SQUARE, "qs": np.array(0.5), "qz": np.array(3, np.int8), "b": quarters([4])}
EACH = PLAIN | {"qs": SCALES["qs"], "qz": SCALES["qz"]}


def test_a_quantized_weight_takes_what_comes_before_it_where_its_scales_run_along_the_input() -> None:
    norms = norm(4)
    read = "w = DequantizeLinear(q, qs, qz);Conv(d, w, b)"
    assert before(read, given=bn("x"), **PLAIN, **norms) == {"DequantizeLinear": 1, "Conv": 1}
    along_input = "w = DequantizeLinear<axis=1>(q, qs, qz);Conv(d, w, b)"
    assert before(along_input, given=bn("x"), **EACH, **norms)["BatchNormalization"] == 0
    one, two = (f"w = DequantizeLinear<axis={i}>(q, qs, qz) y = Conv(x, w, b)" for i in (0, 1))
    with pytest.raises(AssertionError, match="differs at"):
        assert_same(build(one, IMAGE4, "y", opset=21, **EACH), build(two, IMAGE4, "y", opset=21, **EACH))
    depthwise = EACH | {"q": SQUARE[:, :1]}
    read = "w = DequantizeLinear<axis=0>(q, qs, qz);Conv<group=4>(d, w, b)"
    assert before(read, given=bn("x"), **depthwise, **norms)["BatchNormalization"] == 0
    read = "w = DequantizeLinear<axis=0>(q, qs, qz);ConvTranspose(d, w, b)"
    assert before(read, given=bn("x"), **EACH, **norms)["BatchNormalization"] == 0


def test_a_quantized_weight_whose_scales_run_along_its_output_takes_a_shift_and_one_scale_for_all() -> None:
    read = "w = DequantizeLinear<axis=0>(q, qs, qz);Conv(d, w, b)"
    shift = {"k": quarters([1, 4, 1, 1])}
    assert before(read, given="Add(x, k)", **EACH, **shift) == {"DequantizeLinear": 1, "Conv": 1}
    assert before(read, given="Mul(x, k)", k=np.array(-0.75), **EACH) == {"DequantizeLinear": 1, "Conv": 1}
    assert before(read, [Reason.AXIS], given=bn("x"), **EACH, **norm(4))["BatchNormalization"] == 1
    padded = "w = DequantizeLinear<axis=0>(q, qs, qz);Conv<pads=[1,1,1,1]>(d, w, b)"
    before(padded, [Reason.PADDING], given="Add(x, k)", **EACH, **shift)


def test_a_quantized_bias_takes_the_sum_of_a_shift_only_in_whole_steps() -> None:
    read = "w = DequantizeLinear(q, qs, qz) b = DequantizeLinear(p, ps);Conv(d, w, b)"
    more = {"q": SQUARE, "qs": np.array(0.5), "qz": np.array(3, np.int8), "ps": np.array(0.125)}
    more |= {"p": np.arange(4, dtype=np.int32), "k": quarters([1, 4, 1, 1])}
    assert before(read, given="Add(x, k)", **more) == {"DequantizeLinear": 2, "Conv": 1}
    before(read, [Reason.SHIFT], given="Add(x, k)", **(more | {"ps": np.array(1.0)}))


def test_quantized_factors_of_products_take_what_comes_before_them() -> None:
    matrix = {"q": SQUARE[..., 0, 0], "qs": SCALES["qs"], "qz": SCALES["qz"]}
    given = "Add(m, t)"
    more = {"s": quarters([4]), "t": quarters([4], 5)}
    for read in ("MatMul(d, w)", "Gemm(d, w)"):
        text = f"w = DequantizeLinear<axis=0>(q, qs, qz) m = Mul(x, s);{read}"
        found = before(text, inputs="double[N,4] x", given=given, **matrix, **more)
        assert found["Mul"] == 0
    text = "w = DequantizeLinear<axis=1>(q, qs, qz) m = Mul(x, s);Gemm<transB=1>(d, w)"
    assert before(text, inputs="double[N,4] x", given=given, **matrix, **more)["Mul"] == 0
    text = "w = DequantizeLinear<axis=1>(q, qs, qz) m = Mul(x, s);Gemm(d, w)"
    before(text, [Reason.AXIS], inputs="double[N,4] x", given=given, **matrix, **more)


def test_blocks_of_a_quantized_weight_are_read_as_they_are() -> None:
    more = {"q": SQUARE[..., 0, 0], "qs": np.array([[0.5], [2.0], [0.25], [1.0]]), "t": quarters([4])}
    text = "w = DequantizeLinear<axis=1, block_size=4>(q, qs);MatMul(d, w)"
    assert before(text, inputs="double[N,4] x", given="Add(x, t)", **more) == {
        "DequantizeLinear": 1,
        "MatMul": 1,
        "Add": 1,
    }


def test_a_quantized_weight_that_another_reads_stays() -> None:
    text = f"w = DequantizeLinear(q, qs) d = {bn('x')} y = Conv(d, w) z = Conv(x, w)"
    model = build(text, IMAGE4, "y, z", opset=21, q=SQUARE, qs=np.array(0.5), **norm(4))
    assert_fuses(model, [Reason.CONSUMER])
    computed = text.replace("(q, qs)", "(p, qs)").replace("w = ", "p = Cast<to=3>(x) w = ")
    model = build(computed, "double[4,4,1,1] x", "y, z", opset=21, qs=np.array(0.5), **norm(4))
    assert_fuses(model, [Reason.WEIGHT])


def test_a_quantized_weight_of_other_integers_stays_and_is_not_said_to_be_read_elsewhere() -> None:
    text = f"w = DequantizeLinear(q, qs) d = {bn('x')} y = Conv(d, w)"
    narrow = SQUARE.clip(-8, 7).astype(ml_dtypes.int4)
    model = build(text, IMAGE4, "y", opset=21, q=narrow, qs=np.array(0.5, np.float32), **norm(4))
    [kept] = fuse(model)[1].kept
    assert kept.refusals[-1].reason == Reason.DTYPE
    assert "something else than constant INT8, UINT8" in kept.detail


def test_a_uniform_map_scales_every_scale_and_channels_lie_on_axis_1_unless_it_is_said() -> None:
    text = "w = DequantizeLinear<axis=0>(q, qs, qz) c = Conv(x, w) y = Mul(c, k)"
    assert operators(assert_fuses(build(text, IMAGE, "y", opset=21, k=np.array(-1.5), **SCALES)))["Mul"] == 0
    text = f"w = DequantizeLinear(q, qs) c = ConvTranspose(x, w) y = {bn('c')}"
    model = build(text, IMAGE, "y", opset=21, q=WEIGHT.reshape(3, 4, 1, 1), qs=SCALES["qs"], **norm(4))
    assert operators(assert_fuses(model)) == {"DequantizeLinear": 1, "ConvTranspose": 1}


def test_scales_of_blocks_take_a_map_along_the_axis_that_has_one_for_each_channel() -> None:
    blocks = {"q": RNG.integers(-9, 10, (4, 6)).astype(np.int8), "qs": quarters([4, 3], 2), "s": quarters([4, 1])}
    text = "w = DequantizeLinear<axis=1, block_size=2>(q, qs) m = MatMul(w, x) y = Mul(m, s)"
    fused = assert_fuses(build(text, "double[6,N] x", "y", opset=21, **blocks))
    assert operators(fused) == {"DequantizeLinear": 1, "MatMul": 1}
    blocks["s"] = quarters([6])
    text = "w = DequantizeLinear<axis=1, block_size=2>(q, qs) m = MatMul(x, w) y = Mul(m, s)"
    assert_fuses(build(text, "double[N,4] x", "y", opset=21, **blocks), [Reason.AXIS])

"""Quantized weights stay quantized: their scales absorb a scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, numpy_helper

from renorm_onnx.fusion.carrier import Step
from renorm_onnx.fusion.carriers import quantized
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
from renorm_onnx.runtime.session import open_session

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
    [codes] = [i for i in fused.graph.initializer if i.name == "q"]
    assert codes == numpy_helper.from_array(constants["q"], "q"), "the codes of the weight changed"
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


def test_a_shift_goes_into_a_product_rather_than_into_a_quantized_bias_beside_it() -> None:
    text = f"w = DequantizeLinear(q, qs) b = DequantizeLinear(p, ps) c = MatMul(x, w) d = Add(b, c) y = {bn('d')}"
    more = {"q": SQUARE[..., 0, 0], "qs": np.array(0.5), "p": np.arange(4, dtype=np.int32), "ps": np.array(0.375)}
    fused = assert_fuses(build(text, "double[N,4] x", "y", opset=21, **more, **norm(4)))
    assert operators(fused) == {"DequantizeLinear": 2, "MatMul": 1, "Add": 2}


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


# 4 by 6 codes, for a weight (N, K) of 4 outputs and 6 inputs.
CODES = RNG.integers(-7, 8, (4, 6)).astype(np.int8)
NARROW = {
    "int4": (ml_dtypes.int4, TensorProto.INT4),
    "uint4": (ml_dtypes.uint4, TensorProto.UINT4),
    "float8": (ml_dtypes.float8_e4m3fn, TensorProto.FLOAT8E4M3FN),
    "float8 of range": (ml_dtypes.float8_e5m2, TensorProto.FLOAT8E5M2),
}


def narrow(kind: str) -> dict[str, Any]:
    """Codes of a narrow type with one scale and one zero point, of that type as well."""
    dtype = NARROW[kind][0]
    return {"q": abs(CODES).astype(dtype), "qs": np.array(0.5), "qz": np.array(3).astype(dtype)}


@pytest.mark.parametrize("kind", NARROW)
def test_codes_of_4_bits_and_of_broken_numbers_stay_while_their_scales_take_the_map(kind: str) -> None:
    text = "w = DequantizeLinear(q, qs, qz) t = Transpose(w);MatMul(d, t)"
    found = before(text, inputs="double[N,6] x", given="Mul(x, s)", s=quarters([6]), **narrow(kind))
    assert found == {"DequantizeLinear": 1, "Transpose": 1, "MatMul": 1}
    found = before(text, inputs="double[N,6] x", given=bn("x"), **narrow(kind), **norm(6))
    assert found == {"DequantizeLinear": 1, "Transpose": 1, "MatMul": 1, "Add": 1}
    behind = f"w = DequantizeLinear(q, qs, qz) c = Gemm<transB=1>(x, w) y = {bn('c')}"
    fused = assert_fuses(build(behind, "double[N,6] x", "y", opset=21, **narrow(kind), **norm(4)))
    assert operators(fused) == {"DequantizeLinear": 1, "Gemm": 1}
    kinds = {i.name: i.data_type for i in fused.graph.initializer}
    zero = next(name for name in kinds if name.startswith("qz_"))
    assert kinds[zero] == kinds["q"] == NARROW[kind][1]
    other = narrow(kind) | {"qz": np.array(2).astype(NARROW[kind][0])} | norm(4)
    moved = build(behind, "double[N,6] x", "y", opset=21, **other)
    with pytest.raises(AssertionError, match="differs at"):
        assert_same(moved, fused)


def test_a_bias_of_4_bits_takes_no_shift() -> None:
    text = "b = DequantizeLinear(q, qs) c = Conv(x, W, b) y = Add(c, k)"
    more = {"q": CODES[0, :4].astype(ml_dtypes.int4), "qs": np.array(0.5), "k": np.array(0.5)}
    assert_fuses(build(text, IMAGE, "y", opset=21, W=quarters([4, 3, 1, 1]), **more), [Reason.SHIFT])


# What tools write between DequantizeLinear and the operator that reads the weight: from (4, 6) to what it needs.
MATRIX = "double[N,6] x"
LAYOUTS = {
    "Transpose": ("t = Transpose<perm=[1,0]>(w)", "MatMul(d, t)", MATRIX),
    "Identity, Transpose": ("i = Identity(w) t = Transpose<perm=[1,0]>(i)", "Gemm(d, t)", MATRIX),
    "Reshape": ("t = Reshape(w, r)", "Conv(d, t)", "double[N,6,H,W] x"),
    "Unsqueeze": ("t = Unsqueeze(w, u)", "Conv(d, t)", "double[N,6,H,W] x"),
    "Unsqueeze, Squeeze": ("v = Unsqueeze(w, u) t = Squeeze(v, u)", "Gemm<transB=1>(d, t)", MATRIX),
    "Flatten": ("v = Unsqueeze(w, u) t = Flatten<axis=1>(v)", "Gemm<transB=1>(d, t)", MATRIX),
    "Transpose, Unsqueeze": ("v = Transpose(w) t = Unsqueeze(v, u)", "ConvTranspose(d, t)", "double[N,6,H,W] x"),
    "Transpose for Einsum": ("t = Transpose(w)", 'Einsum<equation="nk,km->nm">(d, t)', MATRIX),
}
SHAPES = {"r": np.array([4, 6, 1, 1]), "u": np.array([2, 3])}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quantized_weight_is_found_behind_a_change_of_layout(layout: str) -> None:
    moves, read, inputs = LAYOUTS[layout]
    operator = read[: min(i for i in (read.find("("), read.find("<")) if i > 0)]
    for attributes, scale in (("", np.array(0.5)), ("<axis=1>", quarters([6], 3)), ("<axis=0>", quarters([4], 3))):
        text = f"w = DequantizeLinear{attributes}(q, qs) {moves}"
        constants = {"q": CODES, "qs": scale, **{k: v for k, v in SHAPES.items() if f", {k})" in moves}}
        stays = attributes == "<axis=0>"  # one scale for each output channel, and the norm has one for each input
        found = before(f"{text};{read}", [Reason.AXIS] * stays, inputs=inputs, given=bn("x"), **constants, **norm(6))
        assert found[operator] == 1
        assert found["BatchNormalization"] == stays
        behind = f"{text} c = {read.replace('(d,', '(x,')} y = {bn('c')}"
        model = build(behind, inputs, "y", opset=21, **constants, **norm(4))
        stays = attributes == "<axis=1>"
        assert operators(assert_fuses(model, [Reason.AXIS] * stays))["BatchNormalization"] == stays


def test_blocks_take_a_map_that_changes_between_them_alone() -> None:
    blocks = {"q": CODES.astype(ml_dtypes.int4), "qs": quarters([4, 3], 2)}
    read = "w = DequantizeLinear<axis=1, block_size=2>(q, qs) t = Transpose(w);MatMul(d, t)"
    halves = np.repeat(quarters([3]), 2)
    found = before(read, inputs=MATRIX, given="Mul(x, s)", s=halves, **blocks)
    assert found == {"DequantizeLinear": 1, "Transpose": 1, "MatMul": 1}
    before(read, [Reason.AXIS], inputs=MATRIX, given="Mul(x, s)", s=np.roll(halves, 1), **blocks)
    before(read, inputs=MATRIX, given="Add(x, s)", s=quarters([6]), **blocks)
    last = {"q": CODES[:, :5], "qs": quarters([4, 3], 2), "s": np.array([2, 2, -0.5, -0.5, 3.0])}
    before(read, inputs="double[N,5] x", given="Mul(x, s)", **last)
    naive = lambda node, demand, axis, block: Step((), {1: demand.take(slice(0, 6, block), axis)})  # noqa: E731
    with (
        mock.patch.object(quantized, "_scaled_blocks", naive),
        pytest.raises(AssertionError, match="differs at"),
    ):
        before(read, inputs=MATRIX, given="Mul(x, s)", s=np.roll(halves, 1), **blocks)


def test_blocks_that_are_written_as_rows_of_a_matrix_take_the_same_maps() -> None:
    """As quantizers wrote it before opset 21: (N K / B, B) with one scale for each row."""
    rows = {"q": CODES.reshape(12, 2), "qs": quarters([12], 2), "r": np.array([4, 6])}
    text = "w = DequantizeLinear<axis=0>(q, qs) v = Reshape(w, r) t = Transpose(v)"
    halves = np.repeat(quarters([3]), 2)
    before(f"{text};MatMul(d, t)", inputs=MATRIX, given="Mul(x, s)", s=halves, **rows)
    before(f"{text};MatMul(d, t)", [Reason.AXIS], inputs=MATRIX, given="Mul(x, s)", s=np.roll(halves, 1), **rows)
    model = build(f"{text} c = MatMul(x, t) y = {bn('c')}", MATRIX, "y", opset=21, **rows, **norm(4))
    assert operators(assert_fuses(model))["BatchNormalization"] == 0


def test_one_quantized_weight_takes_what_all_of_its_readers_ask_for() -> None:
    text = f"w = DequantizeLinear(q, qs) d = {bn('x')} y = Conv(d, w) e = Relu(x) z = Conv({{}}, w)"
    shared = {"q": SQUARE, "qs": np.array(0.5), **norm(4)}
    fused = assert_fuses(build(text.format("d"), IMAGE4, "y, z", opset=21, **shared))
    assert operators(fused) == {"DequantizeLinear": 1, "Conv": 2, "Relu": 1}
    model = build(text.format("e"), IMAGE4, "y, z", opset=21, **shared)
    assert_fuses(model, [Reason.CONSUMER])


def test_a_weight_of_codes_or_scales_that_are_computed_says_so() -> None:
    for given, constants in (("(p, qs)", {"qs": np.array(0.5)}), ("(q, r)", {"q": SQUARE})):
        text = (
            f"p = Cast<to=3>(x) r = ReduceMax<keepdims=0>(x) w = DequantizeLinear{given} d = {bn('x')} y = Conv(d, w)"
        )
        model = build(text, "double[4,4,1,1] x", "y", opset=21, **constants, **norm(4))
        [kept] = fuse(model)[1].kept
        assert kept.refusals[-1].reason == Reason.WEIGHT
        assert "'w' makes a weight of codes, scales or zero points that are not constant" in kept.detail


def test_a_shift_goes_on_into_a_bias_that_is_computed_but_not_from_the_same_norm() -> None:
    weights = {"W": quarters([4, 4]), "V": quarters([3, 4], 1)}
    text = f"g = MatMul(z, V) d = {bn('x')} y = Gemm<alpha=0.5, beta=2.0>(d, W, g)"
    fused = assert_fuses(build(text, "double[N,4] x, double[N,3] z", "y", **weights, **norm(4)))
    assert operators(fused) == {"MatMul": 1, "Add": 1, "Gemm": 1}
    part = norm(4)
    part |= {"bn_s": part["bn_v"] ** 0.5 * [2, 3, -1, 1], "bn_b": np.array([1, 2, 3, part["bn_m"][3]])}
    cut = {"i": np.array([3]), "j": np.array([4]), "a": np.array([1]), "r": np.array([4])}
    text = f"d = {bn('x')} e = Slice(d, i, j, a) b = Reshape(e, r) y = Conv(d, W, b)"
    model = build(text, "double[1,4,2,2] x", "y", W=quarters([4, 4, 1, 1]), **cut, **part)
    assert_fuses(model, [Reason.CONFLICT])


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


# What onnxruntime computes with codes: both factors are made of them, and behind stands a norm of 4 channels.
CODED = "u = Cast<to=3>(x) a = DequantizeLinear(u, us) w = DequantizeLinear<axis=0>(q, qs)"
CODES_IN = {"us": np.array(0.25), "q": WEIGHT, "qs": SCALES["qs"]}


@pytest.mark.parametrize("gain", [0.0, 2.0**-17])
def test_a_dead_channel_stays_out_of_the_steps_of_a_product_of_codes(gain: float) -> None:
    text = f"{CODED} c = Conv(a, w) y = {bn('c')}"
    dead = norm(4) | {"bn_s": np.array([1.5, gain, -1, 0.5]), "bn_v": np.ones(4)}
    model = build(text, IMAGE, "y", opset=21, **CODES_IN, **dead)
    assert operators(assert_fuses(model, [Reason.SCALE]))["BatchNormalization"] == 1
    assert "would get 1 channel of a step too small" in fuse(model)[1].kept[0].detail
    weak = dead | {"bn_s": np.array([1.5, 2.0**-15, -1, 0.5])}
    assert operators(assert_fuses(build(text, IMAGE, "y", opset=21, **CODES_IN, **weak)))["BatchNormalization"] == 0
    read = "w = DequantizeLinear<axis=0>(q, qs) c = Conv(x, w)"
    model = build(f"{read} y = {bn('c')}", IMAGE, "y", opset=21, q=WEIGHT, qs=SCALES["qs"], **dead)
    assert operators(assert_fuses(model))["BatchNormalization"] == 0


def test_onnxruntime_loses_the_bias_of_a_dead_channel() -> None:
    """Seen in 1.31.1: WeightBiasQuantization divides the bias by the steps of both factors, be they zero."""
    ends = {name: np.array(scale, np.float32) for name, scale in (("xs", 0.03), ("ys", 0.1))}
    codes = {"z": np.array(128, np.uint8), "q": np.eye(4, dtype=np.int8) * 40, "qs": np.full(4, 0.02, np.float32)}
    zero = {"bn_s": [0.0, 1, 2, 1], "bn_b": [1.0, -1, 0.5, 0], "bn_m": [0.25] * 4, "bn_v": [1.0] * 4}
    constants = ends | codes | {name: np.array(numbers, np.float32) for name, numbers in zero.items()}
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y) {'
        "u = QuantizeLinear(x, xs, z) a = DequantizeLinear(u, xs, z) w = DequantizeLinear<axis=1>(q, qs)"
        f"c = MatMul(a, w) n = {bn('c')} v = QuantizeLinear(n, ys, z) y = DequantizeLinear(v, ys, z) }}"
    )
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    feeds = {"x": np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)}

    def error(fused: onnx.ModelProto) -> float:
        want, got = (open_session(m, "cpu", optimize=o).run(feeds)["y"] for m, o in ((model, "off"), (fused, "all")))
        return float(np.abs(want - got).max())

    assert error(fuse(model)[0]) < 1e-5
    with mock.patch.object(quantized, "DEAD", -1.0):
        assert error(fuse(model)[0]) > 0.9

"""Pools and reductions pass a map under conditions on its sign and their padding."""

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

PADDED = "kernel_shape=[3,2], pads=[1,0,1,1], strides=[2,1]"
ORDERED = [f"MaxPool<{PADDED}>(c)", "MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(c)", "GlobalMaxPool(c)"]
MEANS = [
    f"AveragePool<{PADDED}>(c)",
    "AveragePool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(c)",
    "AveragePool<kernel_shape=[2,3], count_include_pad=1>(c)",
    "GlobalAveragePool(c)",
]


@pytest.mark.parametrize("pool", ORDERED)
def test_a_maximum_passes_a_scale_that_is_not_negative(pool: str) -> None:
    backward(f"d = {pool}", 4, positive=True)
    forward(f"d = {pool}", 4, positive=True)
    backward(f"d = {pool}", 4, [Reason.SIGN])
    forward(f"d = {pool}", 4, [Reason.SIGN])


@pytest.mark.parametrize("pool", MEANS)
def test_a_mean_passes_every_map(pool: str) -> None:
    backward(f"d = {pool}", 4)
    forward(f"d = {pool}", 4)


@pytest.mark.parametrize(
    "attributes", [f"{PADDED}, count_include_pad=1", 'kernel_shape=[2,2], auto_pad="SAME_UPPER", count_include_pad=1']
)
def test_a_mean_that_counts_its_padding_refuses_a_shift(attributes: str) -> None:
    pool = f"d = AveragePool<{attributes}>(c)"
    backward(pool, 4, [Reason.PADDING])
    forward(pool, 4, [Reason.PADDING])
    backward(pool, 4, shift=False)
    forward(pool, 4, shift=False)


def test_norms_of_windows_pass_a_positive_scale_alone() -> None:
    lines = "d = LpPool<kernel_shape=[2,2], p=1>(c)"
    backward(lines, 4, [Reason.SHIFT], positive=True)
    backward(lines, 4, [Reason.SIGN], shift=False)
    backward(lines, 4, positive=True, shift=False)
    forward(lines, 4, positive=True, shift=False)


@pytest.mark.parametrize("axes", [[2, 3], [-1], [0, 2]])
@pytest.mark.parametrize("operator", ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"])
def test_a_reduction_of_other_axes_passes(operator: str, axes: list[int]) -> None:
    size = "double[2,3,4,4] x"
    backward(f"d = {operator}(c, a)", 4, inputs=size, opset=20, positive=True, a=np.array(axes))
    forward(f"d = {operator}(c, a)", 4, inputs="double[2,4,4,4] x", positive=True, a=np.array(axes))


def test_the_axis_of_the_map_moves_with_the_axes_that_are_dropped() -> None:
    lines = "e = Transpose<perm=[2,3,0,1]>(c) d = ReduceMean<keepdims=0>(e, a)"
    backward(lines, 4, a=np.array([0, 1]))
    text = f"c = {bn('x')} e = {lines.split('d = ')[1]} y = MatMul(e, B)".replace("(e, a)", "(c, a)")
    model = build(text, "double[N,4,H,W] x", "y", a=np.array([2, 3]), B=quarters([4, 5]), **norm(4))
    assert operators(assert_fuses(model)) == {"ReduceMean": 1, "MatMul": 1, "Add": 1}


def test_reductions_of_old_opsets_have_attributes() -> None:
    backward("d = ReduceMean<axes=[2,-1]>(c)", 4, opset=12)
    backward("d = ReduceSum<axes=[2,3]>(c)", 4, opset=11, inputs="double[N,3,4,4] x")


def test_a_sum_of_an_open_number_of_elements_refuses_a_shift() -> None:
    backward("d = ReduceSum(c, a)", 4, [Reason.SHIFT], a=np.array([2, 3]))
    backward("d = ReduceSum(c, a)", 4, shift=False, a=np.array([2, 3]))


def test_a_reduction_over_the_channels_is_refused() -> None:
    text = f"c = {bn('x')} d = ReduceMean<keepdims=0>(c, a) y = MatMul(d, B)"
    model = build(text, "double[N,4,4,5] x", "y", a=np.array([1]), B=quarters([5, 2]), **norm(4))
    assert_fuses(model, [Reason.AXIS])
    text = f"c = {bn('x')} d = ReduceMean<keepdims=0>(c, a) y = Conv(d, W)"  # over as many rows as there were channels
    model = build(text, "double[N,4,4,5] x", "y", a=np.array([-3]), W=quarters([3, 4, 1]), **norm(4))
    assert_fuses(model, [Reason.AXIS])


def test_indices_in_use_allow_no_scale_of_zero() -> None:
    text = f"c = {bn('x')} d, i = MaxPool<kernel_shape=[2,2]>(c) y = Conv(d, W) z = Identity(i)"
    parameters = norm(4, positive=True)
    model = build(text, "double[N,4,H,W] x", "y, z", W=quarters([3, 4, 1, 1]), **parameters)
    assert_fuses(model)
    parameters["bn_s"][2] = 0.0
    model = build(text, "double[N,4,H,W] x", "y, z", W=quarters([3, 4, 1, 1]), **parameters)
    assert_fuses(model, [Reason.SIGN])
    text = text.replace("z = Identity(i)", "").replace("d, i =", "d, z =")
    model = build(text, "double[N,4,H,W] x", "y, z", W=quarters([3, 4, 1, 1]), **parameters)
    assert_fuses(model, [Reason.SIGN])


def test_a_norm_goes_through_global_pooling_and_flatten_into_gemm() -> None:
    text = f"c = {bn('x')} p = GlobalAveragePool(c) f = Flatten(p) y = Gemm<transB=1>(f, B, b)"
    model = build(text, "double[N,4,H,W] x", "y", B=quarters([3, 4]), b=quarters([3]), **norm(4))
    assert operators(assert_fuses(model))["BatchNormalization"] == 0


def test_a_map_along_an_axis_of_space_is_refused_where_the_rank_of_the_image_is_not_known() -> None:
    """Which sizes of an open batch are one is not known; the pool has four axes, of which it leaves two alone."""
    text = f"e = Squeeze(x) p = MaxPool<kernel_shape=[2,2]>(e) d = Transpose<perm=[0,2,3,1]>(p) y = {bn('d')}"
    assert_fuses(build(text, "double[N,5,4,5] x", "y", **norm(3, positive=True)), [Reason.AXIS])


@pytest.mark.parametrize("operator", ["ReduceMean", "ReduceMax"])
def test_a_reduction_without_axes_is_one_over_all_of_them_or_over_none(operator: str) -> None:
    text = f"a = Conv(x, W) b = Mul(a, k) c = {operator}(b) y = Conv(c, V)"
    weights = {"W": quarters([4, 3, 1, 1]), "k": abs(quarters([4, 1, 1])), "V": quarters([2, 1, 1, 1])}
    assert operators(assert_fuses(build(text, "double[N,3,4,5] x", "y", **weights)))["Mul"] == 0
    text = f"a = Mul(x, k) c = {operator}(a) d = Expand(c, p) y = Conv(d, V)"
    weights = {"k": weights["k"], "p": np.array([1, 4, 2, 2]), "V": quarters([2, 4, 1, 1])}
    assert_fuses(build(text, "double[N,4,4,5] x", "y", **weights), [Reason.AXIS])
    backward(f"d = {operator}<noop_with_empty_axes=1>(c)", 4, positive=True)


@pytest.mark.parametrize("pads", ["pads=[1,1]", 'auto_pad="SAME_UPPER"'])
@pytest.mark.parametrize("operator", ["MaxPool", "AveragePool"])
def test_a_dilated_window_may_see_nothing_but_padding(operator: str, pads: str) -> None:
    """Of kernel 2 and dilation 4 over 3 elements, of which onnxruntime makes the lowest number, or a mean of zero."""
    for dilation, size, kept in ((4, "L", [Reason.PADDING]), (4, "4", []), (5, "4", [Reason.PADDING]), (1, "L", [])):
        line = f"d = {operator}<kernel_shape=[2], dilations=[{dilation}], {pads}>(c)"
        backward(line, 4, kept, inputs=f"double[N,3,{size}] x", positive=True)
        forward(line, 4, kept, inputs=f"double[N,4,{size}] x", positive=True)
    line = f"d = {operator}<kernel_shape=[2], dilations=[4]>(c)"
    backward(line, 4, inputs="double[N,3,5] x", positive=True)


@pytest.mark.parametrize("opset", [18, 20])
def test_a_mean_passes_a_shift_whatever_the_size_of_the_image(opset: int) -> None:
    """One smaller than the window has no mean, by the specification; onnxruntime makes one of it in old opsets."""
    line = "d = AveragePool<kernel_shape=[2,2], strides=[2,1], count_include_pad=1>(c)"
    for way, channels in ((backward, 3), (forward, 4)):
        way(line, 4, [], inputs=f"double[N,{channels},H,W] x", opset=opset)


def test_indices_that_nobody_reads_lose_their_name_where_they_change() -> None:
    """A scale of zero makes all elements equal, so that the first is the largest; behind the fold it is another."""
    text = f"r = Relu(x) c = {bn('r')} p, i = MaxPool<kernel_shape=[2,2]>(c) y = Conv(p, W)"
    parameters = norm(3, positive=True)
    parameters["bn_s"][0] = 0
    model = build(text, "double[N,3,H,W] x", "y", W=quarters([4, 3, 1, 1]), **parameters)
    fused = assert_fuses(model)
    assert operators(fused)["BatchNormalization"] == 0
    assert "i" not in [o for node in fused.graph.node for o in node.output]

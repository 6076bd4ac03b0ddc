"""Convolutions absorb a map at their output, and at their input unless zeros of the padding are not shifted."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from renorm_onnx.fusion.carriers.exact_folding_test import assert_fuses, bn, build, norm, operators, quarters
from renorm_onnx.fusion.conftest import Builder, assert_same
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.report import Reason

GEOMETRIES = ["", "pads=[1,0,0,1]", "strides=[2,1], dilations=[1,2]", 'auto_pad="SAME_UPPER"']


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_behind_a_convolution_is_absorbed(geometry: str, group: int, bias: bool) -> None:
    weights = {"W": quarters([8, 4 // group, 2, 2])} | ({"b": quarters([8], 2)} if bias else {})
    attributes = ", ".join(a for a in (f"group={group}", geometry) if a)
    body = f"c = Conv<{attributes}>(x, W{', b' if bias else ''}) y = {bn('c')}"
    fused = assert_fuses(build(body, "double[N,4,H,W] x", "y", **weights, **norm(8)))
    assert operators(fused) == {"Conv": 1}


@pytest.mark.parametrize("sizes", ["L", "L,H", "L,2,2"])
def test_convolutions_of_one_to_three_dimensions_absorb_on_both_sides(sizes: str) -> None:
    rank = sizes.count(",") + 1
    weights = {"W": quarters([4, 4, *[1] * rank])}
    body = f"a = {bn('x', 'p')} c = Conv(a, W) y = {bn('c')}"
    model = build(body, f"double[N,4,{sizes}] x", "y", **weights, **norm(4), **norm(4, "p", seed=5))
    assert operators(assert_fuses(model)) == {"Conv": 1}


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_before_an_unpadded_convolution_is_absorbed(group: int, bias: bool) -> None:
    weights = {"W": quarters([8, 4 // group, 3, 2])} | ({"b": quarters([8], 2)} if bias else {})
    body = f"c = {bn('x')} y = Conv<group={group}, strides=[1,2]>(c, W{', b' if bias else ''})"
    assert operators(assert_fuses(build(body, "double[N,4,H,W] x", "y", **weights, **norm(4)))) == {"Conv": 1}


@pytest.mark.parametrize("pads", ["pads=[0,0,0,1]", 'auto_pad="SAME_LOWER"'])
def test_a_shift_before_a_padded_convolution_is_refused(pads: str) -> None:
    body = f"c = {bn('x')} y = Conv<{pads}>(c, W)"
    model = build(body, "double[N,4,H,W] x", "y", W=quarters([8, 4, 2, 2]), **norm(4))
    assert_fuses(model, [Reason.PADDING])


@pytest.mark.parametrize("pads", ["pads=[1,1,1,1]", 'auto_pad="SAME_LOWER"'])
def test_a_scale_alone_before_a_padded_convolution_is_absorbed(pads: str) -> None:
    body = f"c = {bn('x')} y = Conv<{pads}>(c, W)"
    assert_fuses(build(body, "double[N,4,H,W] x", "y", W=quarters([8, 4, 3, 3]), **norm(4, shift=False)))


def test_a_norm_is_absorbed_by_all_its_readers_or_by_none() -> None:
    body = f"c = {bn('x')} y = Conv(c, W) z = Conv(c, V, b)"
    weights = {"W": quarters([8, 4, 2, 2]), "V": quarters([3, 4, 1, 1], 3), "b": quarters([3], 4)}
    assert_fuses(build(body, "double[N,4,H,W] x", "y, z", **weights, **norm(4)))
    body = f"c = {bn('x')} y = Conv(c, W) z = Abs(c)"
    assert_fuses(build(body, "double[N,4,H,W] x", "y, z", W=weights["W"], **norm(4)), [Reason.SHIFT])


def test_a_weight_that_two_convolutions_share_is_copied_before_it_changes() -> None:
    body = f"c = Conv(x, W) y = {bn('c')} z = Conv(x, W)"
    fused = assert_fuses(build(body, "double[N,4,H,W] x", "y, z", W=quarters([4, 4, 2, 2]), **norm(4)))
    assert len(fused.graph.initializer) == 3


def test_a_convolution_that_is_read_elsewhere_is_left_alone() -> None:
    body = f"c = Conv(x, W) y = {bn('c')} z = Relu(c)"
    model = build(body, "double[N,4,H,W] x", "y, z", W=quarters([4, 4, 2, 2]), **norm(4))
    assert_fuses(model, [Reason.CONSUMER])
    body = f"c = Conv(x, W) y = {bn('c')}"
    model = build(body, "double[N,4,H,W] x", "y, c", W=quarters([4, 4, 2, 2]), **norm(4))
    assert_fuses(model, [Reason.GRAPH_OUTPUT])


def test_a_computed_weight_is_refused() -> None:
    body = f"c = Conv(x, w) y = {bn('c')}"
    assert_fuses(build(body, "double[N,4,H,W] x, double[4,4,1,1] w", "y", **norm(4)), [Reason.GRAPH_INPUT])
    body = f"c = {bn('x')} y = Conv(c, w)"
    assert_fuses(build(body, "double[N,4,H,W] x, double[4,4,1,1] w", "y", **norm(4)), [Reason.WEIGHT])


def test_a_map_along_another_axis_is_refused_even_where_the_sizes_agree() -> None:
    body = "c = Conv(x, W) y = Mul(c, k)"
    model = build(body, "double[N,4,5,5] x", "y", W=quarters([4, 4, 2, 2]), k=quarters([4]))
    assert_fuses(model, [Reason.AXIS])


def test_a_shift_before_pads_of_zero_is_absorbed() -> None:
    """Exporters write pads where there are none."""
    body = f"c = {bn('x')} y = Conv<pads=[0,0,0,0]>(c, W)"
    assert operators(assert_fuses(build(body, "double[N,4,H,W] x", "y", W=quarters([8, 4, 2, 2]), **norm(4)))) == {
        "Conv": 1
    }


def deformable(*, before: bool, shift: bool = True, bias: bool = True) -> tuple[Counter[str], list[Reason]]:
    """What is left of a deformable convolution with a norm on one side, and the refusals."""
    b = Builder()
    h = b.norm("x", 4) if before and shift else b.node("Mul", "x", b.normal(4, 1, 1)) if before else "x"
    parameters = [b.normal(6, 2, 3, 3), "offset", *([b.normal(6)] if bias else [""]), "mask"]
    h = b.node("DeformConv", h, *parameters, group=2, pads=[1, 1, 1, 1])
    y = b.node("Relu", h) if before else b.norm(h, 6)
    model = b.model({"x": [2, 4, 5, 6], "offset": [2, 18, 5, 6], "mask": [2, 9, 5, 6]}, [y], opset=19)
    fused, report = fuse(model)
    assert_same(model, fused)
    return operators(fused), [r.reason for e in report.entries for r in e.refusals]


@pytest.mark.parametrize("bias", [True, False])
def test_a_deformable_convolution_absorbs_a_norm_behind_it_and_a_scale_before_it(*, bias: bool) -> None:
    assert deformable(before=False, bias=bias) == ({"DeformConv": 1}, [])
    assert deformable(before=True, shift=False, bias=bias) == ({"DeformConv": 1, "Relu": 1}, [])
    assert deformable(before=True, bias=bias)[1] == [Reason.GRAPH_INPUT, Reason.PADDING]


def test_one_number_for_all_channels_goes_into_every_group() -> None:
    body = "c = Mul(x, k) d = Add(c, l) y = Conv<group=2>(d, W)"
    constants = {"W": quarters([6, 2, 2, 2]), "k": np.array(-1.5), "l": np.array(0.75)}
    assert operators(assert_fuses(build(body, "double[N,4,H,W] x", "y", **constants))) == {"Conv": 1}


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose", "InstanceNormalization"])
def test_a_norm_of_parameters_stays(operator: str) -> None:
    """It would have to change the numbers that something else is multiplied by."""
    vector = operator == "InstanceNormalization"
    inputs = f"double[N,4,H,W] x, {'double[4] z, double[4] m' if vector else 'double[4,4,1,1] z'}"
    shape = [4] if vector else [4, 1, 1]
    body = f"e = Mul(z, k) c = Add(e, l) y = {operator}(x, c{', m' if vector else ''})"
    assert_fuses(build(body, inputs, "y", k=quarters(shape), l=quarters(shape, 1)), [Reason.WEIGHT])

"""ConvTranspose absorbs at its output; a shift at its input only where every position meets every tap."""

from __future__ import annotations

import pytest

from renorm_onnx.fusion.carriers.exact_folding_test import assert_fuses, bn, build, norm, operators, quarters
from renorm_onnx.fusion.report import Reason

GEOMETRIES = ["", "strides=[2,1], pads=[1,0,0,1]", "strides=[2,2], output_padding=[1,0]", "dilations=[2,1]"]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_behind_a_transposed_convolution_is_absorbed(geometry: str, group: int, bias: bool) -> None:
    weights = {"W": quarters([4, 2, 2, 3])} | ({"b": quarters([2 * group], 2)} if bias else {})
    attributes = ", ".join(a for a in (f"group={group}", geometry) if a)
    body = f"c = ConvTranspose<{attributes}>(x, W{', b' if bias else ''}) y = {bn('c')}"
    fused = assert_fuses(build(body, "double[N,4,H,W] x", "y", **weights, **norm(2 * group)))
    assert operators(fused) == {"ConvTranspose": 1}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("group", [1, 2])
def test_a_scale_before_a_transposed_convolution_is_absorbed(geometry: str, group: int) -> None:
    attributes = ", ".join(a for a in (f"group={group}", geometry) if a)
    body = f"c = {bn('x')} y = ConvTranspose<{attributes}>(c, W)"
    model = build(body, "double[N,4,H,W] x", "y", W=quarters([4, 3, 2, 3]), **norm(4, shift=False))
    assert operators(assert_fuses(model)) == {"ConvTranspose": 1}


@pytest.mark.parametrize(
    ("kernel", "geometry"),
    [
        ([1, 1], ""),
        ([2, 2], "pads=[1,1,1,1]"),
        ([2, 1], "pads=[1,0,1,0]"),
        ([2, 2], "dilations=[2,1], pads=[2,1,3,1], output_padding=[1,0]"),
    ],
)
@pytest.mark.parametrize("group", [1, 2])
def test_a_shift_is_absorbed_where_every_position_meets_every_tap(kernel: list[int], geometry: str, group: int) -> None:
    attributes = ", ".join(a for a in (f"group={group}", geometry) if a)
    body = f"c = {bn('x')} y = ConvTranspose<{attributes}>(c, W, b)"
    model = build(body, "double[N,4,6,5] x", "y", W=quarters([4, 3, *kernel]), b=quarters([3 * group], 3), **norm(4))
    assert operators(assert_fuses(model)) == {"ConvTranspose": 1}


@pytest.mark.parametrize(
    "geometry",
    [
        "",
        "pads=[1,1,0,1]",
        "pads=[0,1,1,1]",
        "strides=[2,2]",
        "dilations=[2,1], pads=[1,1,1,1]",
        "strides=[2,2], pads=[1,1,1,1]",
        "dilations=[2,1], pads=[2,1,2,1], output_padding=[1,0]",
        "output_shape=[4,5]",
    ],
)
def test_a_shift_is_refused_where_a_border_meets_fewer_taps(geometry: str) -> None:
    body = (
        f"c = {bn('x')} y = ConvTranspose<{geometry}>(c, W)" if geometry else f"c = {bn('x')} y = ConvTranspose(c, W)"
    )
    model = build(body, "double[N,4,H,W] x", "y", W=quarters([4, 3, 2, 2]), **norm(4))
    assert_fuses(model, [Reason.PADDING])


def test_computed_weights_are_refused() -> None:
    body = f"c = ConvTranspose<group=2>(x, w) y = {bn('c')}"
    assert_fuses(build(body, "double[N,4,H,W] x, double[4,3,1,1] w", "y", **norm(6)), [Reason.GRAPH_INPUT])
    body = f"c = {bn('x')} y = ConvTranspose(c, w)"
    assert_fuses(build(body, "double[N,4,H,W] x, double[4,3,1,1] w", "y", **norm(4)), [Reason.WEIGHT])


def test_a_map_along_another_axis_is_refused() -> None:
    model = build(
        "c = ConvTranspose(x, W) y = Mul(c, k)", "double[N,4,4,4] x", "y", W=quarters([4, 4, 1, 1]), k=quarters([4])
    )
    assert_fuses(model, [Reason.AXIS])

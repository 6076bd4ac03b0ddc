"""Interpolation passes a map along the channels."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from renorm_onnx.fusion.carriers.exact_folding_test import assert_fuses, backward, build, forward, quarters
from renorm_onnx.fusion.conftest import Builder, assert_same
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.report import FusionReport, Reason

SCALES = np.array([1, 1, 2, 1.5], np.float32)
WAYS = [
    'mode="nearest"',
    'mode="linear", coordinate_transformation_mode="half_pixel"',
    'mode="linear", coordinate_transformation_mode="align_corners"',
    'mode="cubic", coordinate_transformation_mode="pytorch_half_pixel"',
    'mode="cubic", exclude_outside=1, coordinate_transformation_mode="asymmetric"',
]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_interpolation_passes_every_map(way: str) -> None:
    backward(f"d = Resize<{way}>(c, , r)", 4, r=SCALES)
    forward(f"d = Resize<{way}>(c, , r)", 4, r=SCALES)


def test_sizes_axes_and_old_opsets_are_understood() -> None:
    backward('d = Resize<mode="nearest", axes=[2,3]>(c, , , z)', 4, z=np.array([6, 5]))
    backward('d = Resize<mode="nearest">(c, , , z)', 4, z=np.array([2, 4, 6, 5]), inputs="double[2,3,4,5] x")
    backward('d = Upsample<mode="nearest">(c, r)', 4, opset=9, r=np.array([1, 1, 2, 2], np.float32))
    backward('d = Upsample<mode="nearest", scales=[1.0, 1.0, 2.0, 2.0]>(c)', 4, opset=8)
    backward('d = Resize<mode="linear">(c, r)', 4, opset=10, r=np.array([1, 1, 2, 2], np.float32))


def test_resized_channels_are_refused() -> None:
    scales = np.array([1, 2, 1, 1], np.float32)
    backward('d = Resize<mode="nearest">(c, , r)', 8, [Reason.AXIS], r=scales)
    backward('d = Resize<mode="nearest">(c, , , z)', 8, [Reason.AXIS], z=np.array([2, 8, 6, 5]))
    # An open batch is not proven to stay; the channels are.
    backward('d = Resize<mode="nearest">(c, , , z)', 4, z=np.array([2, 4, 6, 5]))


def test_a_uniform_map_passes_resized_channels() -> None:
    body = 'c = Conv(x, W) d = Resize<mode="linear">(c, , r) m = Mul(d, k) y = Add(m, l)'
    constants = {"r": np.array([1, 2, 1, 1], np.float32), "k": np.array(-1.5), "l": np.array(0.25)}
    assert_fuses(build(body, "double[N,3,H,W] x", "y", W=quarters([4, 3, 1, 1]), **constants))


def test_channels_that_move_but_keep_their_number_are_refused() -> None:
    """A scale of 1.2 makes 4 channels of 4, but not the same ones."""
    scales = np.array([1, 1.2, 1, 1], np.float32)
    backward('d = Resize<mode="nearest">(c, , r)', 4, [Reason.AXIS], r=scales)
    forward('d = Resize<mode="nearest">(c, , r)', 4, [Reason.AXIS], r=scales)


@pytest.mark.parametrize(
    ("outside", "shift", "reasons"), [(0.0, False, []), (0.0, True, [Reason.SHIFT]), (0.5, False, [Reason.SHIFT])]
)
def test_a_constant_outside_the_image_takes_a_scale_only_if_it_is_zero(
    outside: float, shift: bool, reasons: list[Reason]
) -> None:
    b = Builder()
    corners = b.constant([0, 0, -0.5, 0.25, 1, 1, 1.5, 0.75])
    way = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": outside}
    h = b.node("Resize", b.conv("x", 3, 4, 1), corners, b.constant(SCALES), **way)
    y = b.node("Add" if shift else "Mul", h, b.normal(4, 1, 1))
    model = b.model({"x": ["n", 3, 5, 6]}, [y])
    fused, report = fuse(model)
    assert [r.reason for e in report.entries for r in e.refusals][:1] == reasons
    assert_same(model, fused)


@pytest.mark.parametrize(("corners", "reasons"), [([0, 1], []), ([0.25, 1], [Reason.AXIS]), ([0, 0.5], [Reason.AXIS])])
def test_channels_that_are_cut_by_a_region_of_interest_are_refused(corners: list[float], reasons: list[Reason]) -> None:
    """A scale of one leaves them as they are only where the region is all of them."""
    b = Builder()
    first, last = corners
    region = b.constant(np.array([0.0, first, 0, 0, 1, last, 1, 1]))
    sizes = b.constant(np.array([2, 4, 7, 6]))
    way = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}
    zero = [b.constant(np.zeros(4)) for _ in range(2)]
    cut = b.node("Resize", b.conv("x", 3, 4, 1), region, "", sizes, **way)
    y = b.node("BatchNormalization", cut, b.constant([0.5, -2.0, 1.5, 3.0]), *zero, b.constant([1.0, 2.0, 0.5, 1.0]))
    model = b.model({"x": [2, 3, 5, 6]}, [y])
    fused, report = fuse(model)
    assert [r.reason for e in report.entries for r in e.refusals][:1] == reasons
    assert_same(model, fused)


def sampled(way: str, *, before: bool, shift: bool = True) -> tuple[onnx.ModelProto, onnx.ModelProto, FusionReport]:
    """A model with a norm before or behind GridSample, the same fused, and the report."""
    b = Builder()
    attributes = dict(item.split("=") for item in way.split())
    zero = [b.constant(np.zeros(4)) for _ in range(2)]
    parameters = [b.constant([0.5, -2.0, 1.5, 3.0]), *zero, b.constant([1.0, 2.0, 0.5, 1.0])]

    def norm(x: str) -> str:
        return b.norm(x, 4) if shift else b.node("BatchNormalization", x, *parameters)

    h = norm("x") if before else b.conv("x", 4, 4, 1)
    h = b.node("GridSample", h, "grid", **attributes)
    model = b.model({"x": [2, 4, 5, 6], "grid": [2, 3, 3, 2]}, [b.conv(h, 4, 5, 1) if before else norm(h)], opset=20)
    return model, *fuse(model)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("way", ["mode=linear padding_mode=border", "mode=cubic padding_mode=reflection"])
def test_what_a_grid_reads_within_the_image_takes_every_map(way: str, *, before: bool) -> None:
    model, fused, report = sampled(way, before=before)
    assert not report.kept
    assert_same(model, fused)


@pytest.mark.parametrize("before", [True, False])
def test_zeros_outside_the_image_take_a_scale_only(*, before: bool) -> None:
    model, fused, report = sampled("mode=nearest", before=before, shift=False)
    assert not report.kept
    assert_same(model, fused)
    assert Reason.PADDING in [r.reason for r in sampled("mode=nearest", before=before)[2].kept[0].refusals]


def test_a_grid_that_a_norm_computes_is_refused() -> None:
    b = Builder()
    grid = b.node("Mul", "grid", b.constant([0.5, 2.0]))
    model = b.model({"x": [2, 4, 5, 6], "grid": [2, 3, 3, 2]}, [b.node("GridSample", "x", grid)], opset=20)
    assert fuse(model)[1].entries[0].refusals[-1].reason == Reason.WEIGHT
    b = Builder()
    wide = b.node("Mul", b.node("GridSample", b.node("Relu", "x"), "grid"), b.normal(3))
    model = b.model({"x": [2, 4, 5, 6], "grid": [2, 3, 3, 2]}, [wide], opset=20)
    assert fuse(model)[1].entries[0].refusals[0].reason == Reason.AXIS


def test_filters_whose_weights_are_not_proven_to_sum_to_one_take_a_scale_alone() -> None:
    for go in (backward, forward):
        go('d = Resize<mode="nearest", antialias=1>(c, , r)', 4, [Reason.SHIFT], r=SCALES)
        go('d = Resize<mode="nearest", antialias=1>(c, , r)', 4, shift=False, r=SCALES)

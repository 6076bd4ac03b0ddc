import numpy as np
import pytest

from renorm_onnx.fusion.conftest import Builder, assert_same, operators
from renorm_onnx.fusion.engine import FuseOptions, fuse

C = 8
IMAGE = {"x": ["n", C, "h", "w"]}


def rep_vgg(*, group: int = 1, stride: int = 1, identity: bool = True) -> Builder:
    b = Builder()
    r = b.node("Relu", "x")
    wide = b.norm(b.conv(r, C, C, 3, pads=[1] * 4, strides=[stride] * 2, group=group), C)
    small = b.norm(b.conv(r, C, C, 1, strides=[stride] * 2, group=group), C)
    total = b.node("Add", wide, small)
    if identity and stride == 1:
        total = b.node("Add", b.norm(r, C), total)
    b.node("Relu", total, out="y")
    return b


@pytest.mark.parametrize(("group", "stride"), [(1, 1), (2, 1), (C, 1), (1, 2), (4, 2)])
def test_rep_vgg_blocks_become_one_convolution(group, stride):
    model = rep_vgg(group=group, stride=stride).model(IMAGE, ["y"])
    fused, report = fuse(model)
    assert operators(fused) == ["Relu", "Conv", "Relu"]
    assert not report.kept
    assert_same(model, fused, h=7, w=9)


def test_the_switch_keeps_branches_apart():
    model = rep_vgg().model(IMAGE, ["y"])
    fused, report = fuse(model, FuseOptions(merge_branches=False))
    assert operators(fused).count("Conv") == 2
    assert report.branches_merged == 0
    assert_same(model, fused, h=7, w=9)


def test_a_norm_behind_merged_branches_folds_too():
    b = Builder()
    total = b.node("Add", b.conv("x", C, C, 3, pads=[1] * 4), b.conv("x", C, C, 1))
    b.norm(total, C, out="y")
    model = b.model(IMAGE, ["y"])
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv"]
    assert_same(model, fused)


def test_a_residual_over_one_convolution_becomes_that_convolution():
    b = Builder()
    b.node("Add", "x", b.conv("x", C, C, 3, pads=[1] * 4), out="y")
    model = b.model(IMAGE, ["y"])
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv"]
    assert_same(model, fused)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"kernel": 3, "dilations": [2, 2], "pads": [2] * 4}, {"kernel": 1}),
        (
            {"kernel": 3, "dilations": [2, 2], "pads": [3, 2, 1, 2]},
            {"kernel": 3, "dilations": [2, 2], "pads": [1, 2, 3, 2]},
        ),
        ({"kernel": 5, "pads": [2] * 4}, {"kernel": 3, "pads": [0, 1, 2, 1]}),
    ],
)
def test_kernels_are_added_where_their_taps_agree(one, two):
    b = Builder()
    first, second = (b.conv("x", C, C, **dict(k)) for k in (one, two))
    b.node("Add", first, second, out="y")
    model = b.model({"x": ["n", C, 9, 10]}, ["y"])
    fused, report = fuse(model)
    assert_same(model, fused)
    assert operators(fused) == ["Conv"]
    assert report.branches_merged == 1
    assert report.changed


@pytest.mark.parametrize(
    "change",
    [
        {"strides": [1, 1], "dilations": [2, 2], "pads": [2] * 4},
        {"group": 2},
        {"auto_pad": "SAME_UPPER", "pads": None},
    ],
)
def test_convolutions_that_read_at_other_places_stay_apart(change):
    b = Builder()
    plain = {"pads": [1] * 4}
    other = {k: v for k, v in (plain | change).items() if v is not None}
    b.node("Add", b.conv("x", C, C, 3, **plain), b.conv("x", C, C, 3, **other), out="y")
    model = b.model(IMAGE, ["y"])
    fused, report = fuse(model)
    assert report.branches_merged == 0
    assert_same(model, fused, h=9, w=9)


@pytest.mark.parametrize(
    ("side", "one", "two"), [(3, {}, {"pads": [1] * 4}), (1, {"strides": [2, 2]}, {"pads": [1] * 4})]
)
def test_one_position_that_broadcasts_over_many_stays_apart(side, one, two):
    b = Builder()
    b.node("Add", b.conv("x", C, C, side, **one), b.conv("x", C, C, side, **two), out="y")
    model = b.model({"x": ["n", C, side, side]}, ["y"])
    fused, report = fuse(model)
    assert report.branches_merged == 0
    assert_same(model, fused)


def test_long_thin_kernels_do_not_become_a_large_one():
    b = Builder()
    w1, w2 = b.normal(C, C, 7, 1), b.normal(C, C, 1, 7)
    b.node("Add", b.node("Conv", "x", w1, pads=[3, 0, 3, 0]), b.node("Conv", "x", w2, pads=[0, 3, 0, 3]), out="y")
    assert fuse(b.model(IMAGE, ["y"]))[1].branches_merged == 0


def test_a_branch_that_others_read_stays():
    b = Builder()
    one, two = b.conv("x", C, C, 1), b.conv("x", C, C, 1)
    model = b.model(IMAGE, [b.node("Add", one, two), b.node("Relu", two)])
    fused, report = fuse(model)
    assert report.branches_merged == 0
    assert_same(model, fused)


def test_an_identity_that_broadcasts_is_not_merged():
    b = Builder()
    b.node("Add", "x", b.node("Conv", "x", b.normal(C, 1, 1, 1)), out="y")
    model = b.model({"x": ["n", 1, 5, 5]}, ["y"])
    fused, report = fuse(model)
    assert report.branches_merged == 0
    assert_same(model, fused)


def test_x_added_to_itself_is_left_alone():
    b = Builder()
    c = b.conv("x", C, C, 1)
    b.node("Add", c, c, out="y")
    model = b.model(IMAGE, ["y"])
    fused, report = fuse(model)
    assert report.branches_merged == 0
    assert_same(model, fused)


def test_merged_weights_are_rounded_once():
    b = Builder()
    w1, w2 = b.normal(C, C, 1, 1, name="w1"), b.normal(C, C, 1, 1, name="w2")
    n = b.norm(b.node("Conv", "x", w1), C)
    b.node("Add", n, b.node("Conv", "x", w2), out="y")
    model = b.model(IMAGE, ["y"])
    fused, _ = fuse(model)
    from onnx import numpy_helper

    stored = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    s, _, _, var = (stored[k] for k in model.graph.node[1].input[1:])
    exact = stored["w1"] * (s / np.sqrt(var + float(np.float32(1e-5)))).reshape(-1, 1, 1, 1) + stored["w2"]
    got = next(numpy_helper.to_array(t) for t in fused.graph.initializer if len(t.dims) == 4)
    assert np.array_equal(got, exact.astype(np.float32))

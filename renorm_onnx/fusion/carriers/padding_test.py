"""A border passes a map if its one value can."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto

from renorm_onnx.fusion import engine
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

AROUND = np.array([0, 0, 1, 2, 0, 0, 0, 1])


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_a_border_of_copies_passes_every_map(mode: str) -> None:
    lines = f'd = Pad<mode="{mode}">(c, p)'
    backward(lines, 4, p=AROUND)
    forward(lines, 4, p=AROUND)


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_copies_of_channels_take_copies_of_the_map(mode: str) -> None:
    pads = np.array([0, 2, 0, 0, 0, 1, 0, 0])
    forward(f'd = Pad<mode="{mode}">(c, p)', 7, p=pads)
    backward(f'd = Pad<mode="{mode}">(c, p)', 7, [Reason.CONFLICT], p=pads)
    text = f'c = Conv(x, W) d = Pad<mode="{mode}">(c, p) y = {bn("d")}'
    copies = {k: np.pad(v, (2, 1), mode=mode) for k, v in norm(4).items()}
    fused = assert_fuses(build(text, "double[N,3,H,W] x", "y", W=quarters([4, 3, 1, 1]), p=pads, **copies))
    assert operators(fused) == {"Conv": 1, "Pad": 1}
    forward(f'd = Pad<mode="{mode}">(c, p)', 6, p=np.array([0, 2, 0, 0, 0, 0, 0, 0]))
    pads[1] = -1
    forward(f'd = Pad<mode="{mode}">(c, p)', 4, [Reason.AXIS], p=pads)


def test_a_border_of_channels_before_a_layer_stays_as_it_is() -> None:
    pads = np.array([0, 1, 0, 0, 0, 2, 0, 0])
    for value in (0.0, 0.5):
        forward("d = Pad(c, p, v)", 7, p=pads, v=np.array(value))
    pads[2] = 1
    forward("d = Pad(c, p)", 7, [Reason.PADDING], p=pads)
    forward("d = Pad(c, p)", 7, shift=False, p=pads)
    text = "c = Mul(x, k) d = Pad(c, p, v) y = Conv(d, W)"
    constants = {"k": np.array(2.0), "p": pads, "v": np.array(0.5), "W": quarters([3, 7, 1, 1])}
    fused = assert_fuses(build(text, "double[N,4,H,W] x", "y", **constants))
    assert operators(fused) == {"Pad": 1, "Conv": 1}
    constants["k"] = np.array([2.0, 2.0, 2.0, 2.0]).reshape(4, 1, 1)
    assert_fuses(build(text, "double[N,4,H,W] x", "y", **constants), [Reason.PADDING])


def test_a_zero_border_passes_a_scale_and_refuses_a_shift() -> None:
    backward("d = Pad(c, p)", 4, shift=False, p=AROUND)
    backward("d = Pad(c, p)", 4, [Reason.PADDING], p=AROUND)
    forward("d = Pad(c, p)", 4, shift=False, p=AROUND)
    forward("d = Pad(c, p)", 4, [Reason.PADDING], p=AROUND)


def test_the_border_takes_a_uniform_map() -> None:
    body = "c = Conv(x, W) d = Pad(c, p, v) e = Mul(d, k) y = Add(e, l)"
    numbers = {"k": np.array(-1.5), "l": np.array([0.75]), "v": np.array(0.5)}
    model = build(body, "double[N,3,H,W] x", "y", W=quarters([4, 3, 2, 2]), p=AROUND, **numbers)
    assert operators(assert_fuses(model)) == {"Conv": 1, "Pad": 1}
    body = "c = Mul(x, k) e = Add(c, l) d = Pad(e, p) y = Conv(d, W)"
    numbers = {"k": np.array(-2.0), "l": np.array([0.75])}
    model = build(body, "double[N,3,H,W] x", "y", W=quarters([4, 3, 2, 2]), p=AROUND, **numbers)
    assert operators(assert_fuses(model)) == {"Conv": 1, "Pad": 1}


def test_the_border_can_carry_a_shift_that_gives_it_one_value() -> None:
    """All channels map 1 to -3: u = 1 stands where -3 stood."""
    scale = np.array([2.0, -4.0, 0.5]).reshape(3, 1, 1)
    body = "c = Mul(x, k) e = Add(c, l) d = Pad(e, p, v) y = Conv(d, W)"
    constants = {"k": scale, "l": -3.0 - scale, "v": np.array(-3.0), "p": AROUND, "W": quarters([4, 3, 2, 2])}
    assert operators(assert_fuses(build(body, "double[N,3,H,W] x", "y", **constants))) == {"Conv": 1, "Pad": 1}
    body = "c = Conv(x, W) d = Pad(c, p, v) m = Mul(d, k) y = Add(m, l)"
    constants = {"k": scale, "l": -3.0 - scale, "v": np.array(1.0), "p": AROUND, "W": quarters([3, 3, 2, 2])}
    assert operators(assert_fuses(build(body, "double[N,3,H,W] x", "y", **constants))) == {"Conv": 1, "Pad": 1}


def test_padded_channels_must_agree_with_the_value() -> None:
    pads = np.array([0, 1, 0, 0, 0, 1, 0, 0])
    backward("d = Pad(c, p)", 6, shift=False, p=pads)
    body = "c = Conv(x, W) d = Pad(c, p) y = Add(d, l)"
    shift = np.array([0.5, 1, 2, 3, 4, 0.5]).reshape(6, 1, 1)
    constants = {"W": quarters([4, 3, 1, 1]), "p": pads, "l": shift}
    assert operators(assert_fuses(build(body, "double[N,3,H,W] x", "y", **constants))) == {"Conv": 1, "Pad": 1}
    constants["l"] = shift[::-1] + shift
    constants["l"][0] = 9.0
    assert_fuses(build(body, "double[N,3,H,W] x", "y", **constants), [Reason.PADDING])


def test_cropping_passes_every_map_and_crops_one_along_its_own_axis() -> None:
    for way in (backward, forward):
        way("d = Pad(c, p)", 4, p=-AROUND // 2)
        way("d = Pad(c, p)", 2, p=np.array([0, -1, 0, 0, 0, -1, 0, 0]))
        way("d = Pad(c, p)", 4, shift=False, p=np.array([0, -1, 0, 0, 0, 1, 0, 0]))


def test_pads_by_axes_and_pads_of_old_opsets() -> None:
    backward("d = Pad(c, p, , a)", 4, shift=False, p=np.array([1, 0, 0, 2]), a=np.array([-1, 2]))
    backward('d = Pad<pads=[0,0,1,2,0,0,0,1], mode="edge">(c)', 4, opset=10)
    body = "c = Conv(x, W) d = Pad<pads=[0,0,1,1,0,0,1,1], value=0.5>(c) y = Mul(d, k)"
    weights = {"W": quarters([4, 3, 2, 2]), "k": np.array(-1.5)}
    assert_fuses(build(body, "double[N,3,H,W] x", "y", opset=9, **weights))
    body = "c = Conv(x, W) d = Pad(c, p, v) y = Mul(d, k)"
    assert_fuses(build(body, "double[N,3,H,W] x", "y", opset=11, p=AROUND, v=np.array(0.5), **weights))


def test_one_scale_with_shifts_that_differ_gives_the_border_no_one_value() -> None:
    forward_only = "c = Mul(x, k) e = Add(c, l) d = Pad(e, p) y = Conv(d, W)"
    constants = {"k": np.array(2.0), "l": quarters([4, 1, 1]), "p": AROUND, "W": quarters([3, 4, 2, 2])}
    assert_fuses(build(forward_only, "double[N,4,H,W] x", "y", **constants), [Reason.PADDING])


def test_a_new_border_has_the_type_of_the_image_and_not_that_of_the_pads() -> None:
    """Nothing but the type is proven about what is squeezed, and so about what is pooled."""
    body = "e = Squeeze(x) a = MatMul(e, B) b = GlobalMaxPool(a) d = Pad(b, p, v) y = Mul(d, k)"
    constants = {"B": quarters([5, 4]), "p": AROUND, "v": np.array(0.5), "k": np.array(2.0)}
    fused = assert_fuses(build(body, "double[N,3,4,5] x", "y", **constants))
    assert operators(fused) == {"Squeeze": 1, "MatMul": 1, "GlobalMaxPool": 1, "Pad": 1}
    border = fused.graph.node[-1].input[2]
    assert {i.name: i.data_type for i in fused.graph.initializer}[border] == TensorProto.DOUBLE


def test_a_new_border_of_unknown_type_is_refused() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20, "other": 1]> g (float[1,3,4,4] x) => (float[1,3,6,6] y)'
        "<float[3,3,1,1] W = {1,2,3,4,5,6,7,8,9}, int64[8] p = {0,0,1,1,0,0,1,1}, double[1] l = {2.0}>"
        "{ e = other.Half(x) c = Conv(e, W) d = Pad(c, p) y = Add(d, l) }"
    )
    [entry] = engine.fuse(model)[1].entries
    assert Reason.DTYPE in [r.reason for r in entry.refusals]


def test_pads_and_values_that_are_not_constant_are_refused() -> None:
    sizes = "s = Shape<end=1>(z) p = Concat<axis=0>(n, s)"
    places = {"n": np.array([0, 1, 0, 0, 0, 0, 0])}
    inputs, weights = "double[N,4,H,W] x, double[N] z", {"W": quarters([4, 4, 1, 1])}
    behind, before = f"c = Conv(x, W) d = Pad(c, p) y = {bn('d')}", f"c = {bn('x')} d = Pad(c, p) y = Conv(d, V)"
    constants = weights | places | norm(5, shift=False)
    assert_fuses(build(f"{sizes} {behind}", inputs, "y", **constants), [Reason.SHAPE])
    constants = {"V": quarters([3, 5, 1, 1])} | places | norm(4, shift=False)
    assert_fuses(build(f"{sizes} {before}", inputs, "y", **constants), [Reason.SHAPE])
    value = "v = ReduceMax<keepdims=0>(z)"
    for text, more in ((behind, {"W": weights["W"]}), (before, {"V": weights["W"]})):
        model = build(f"{value} {text.replace('Pad(c, p)', 'Pad(c, p, v)')}", inputs, "y", p=AROUND, **more, **norm(4))
        assert_fuses(model, [Reason.NOT_CONSTANT])


def test_a_scale_of_zero_gives_no_border_back() -> None:
    body = "c = Mul(x, k) e = Add(c, l) d = Pad(e, p, v) y = Conv(d, W)"
    constants = {"k": np.array(0.0), "l": np.array(0.75), "v": np.array(0.5), "W": quarters([3, 4, 2, 2])}
    assert_fuses(build(body, "double[N,4,H,W] x", "y", p=AROUND, **constants), [Reason.PADDING])

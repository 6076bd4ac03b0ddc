"""Extremes pass what keeps order, absolute values what keeps the sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from renorm_onnx.fusion import engine
from renorm_onnx.fusion.carriers.exact_folding_test import (
    assert_fuses,
    assert_same,
    backward,
    bn,
    build,
    forward,
    norm,
    operators,
    quarters,
)
from renorm_onnx.fusion.report import Reason

WEIGHTS = {"W": quarters([4, 3, 1, 1]), "V": quarters([4, 3, 1, 1], 1)}


@pytest.mark.parametrize("operator", ["Max", "Min"])
def test_every_operand_of_an_extreme_takes_a_positive_map(operator: str) -> None:
    text = f"a = Conv(x, W) b = Conv(x, V) d = {operator}(a, b, k) y = {bn('d')}"
    constants = {**WEIGHTS, "k": quarters([4, 1, 1], 2)}
    fused = assert_fuses(build(text, "double[N,3,H,W] x", "y", **constants, **norm(4, positive=True)))
    assert operators(fused) == {"Conv": 2, operator: 1}
    assert_fuses(build(text, "double[N,3,H,W] x", "y", **constants, **norm(4)), [Reason.SIGN])
    lone = text.replace("b = Conv(x, V)", "b = Relu(x)").replace("(a, b, k)", "(a, b)")
    model = build(lone, "double[N,3,H,W] x", "y", W=quarters([3, 3, 1, 1]), **norm(3, positive=True))
    assert_fuses(model, [Reason.SHIFT])


@pytest.mark.parametrize("operator", ["Max", "Min"])
def test_a_constant_that_is_compared_gets_the_inverse_of_a_positive_map(operator: str) -> None:
    """Scales are powers of two, by which float64 divides exactly."""
    text = f"m = Mul(x, s) c = Add(m, t) d = {operator}(k, c) y = Conv(d, W)"
    for s, kept in ((np.array([0.5, 2, 4, 1]), []), (np.array([0.5, -2, 4, 1]), [Reason.SIGN])):
        constants = {"s": s.reshape(4, 1, 1), "t": quarters([4, 1, 1]), "k": quarters([4, 1, 1], 3)}
        assert_fuses(build(text, "double[N,4,H,W] x", "y", W=quarters([3, 4, 1, 1]), **constants), kept)
    forward(f"z = Relu(x) d = {operator}(c, z)", 4, [Reason.SCALE], positive=True)
    forward(f"d = {operator}(c, c)", 4, positive=True)
    forward(f"d = {operator}(c, c)", 4, [Reason.SIGN])
    text = f"m = Mul(x, s) d = {operator}(k, m) y = Conv(d, W)"
    constants = {"s": np.array([0.5, 0.0, 4, 1]).reshape(4, 1, 1), "k": quarters([4, 1, 1], 3)}
    assert_fuses(build(text, "double[N,4,H,W] x", "y", W=quarters([3, 4, 1, 1]), **constants), [Reason.SCALE])


def test_maps_that_differ_do_not_pass_an_extreme() -> None:
    forward("e = Gather<axis=1>(c, i) d = Max(c, e)", 4, [Reason.CONFLICT], positive=True, i=np.array([1, 0, 3, 2]))


def test_a_rectifier_that_is_written_as_a_maximum_keeps_its_zero() -> None:
    fused = backward("d = Max(c, k)", 4, positive=True, shift=False, k=np.array(0.0))
    assert {i.name: list(i.dims) for i in fused.graph.initializer}["k"] == []


def test_an_absolute_value_passes_the_size_of_a_scale() -> None:
    backward("d = Abs(c)", 4, positive=True, shift=False)
    backward("d = Abs(c)", 4, [Reason.SIGN], shift=False)
    backward("d = Abs(c)", 4, [Reason.SHIFT], positive=True)
    forward("d = Abs(c)", 4, shift=False)
    forward("d = Abs(c)", 4, [Reason.SHIFT])


def test_a_constant_shift_within_softmax_cancels() -> None:
    for shape, opset, axis, kept in (
        ([], 20, "", []),
        ([4, 1], 20, "", []),
        ([3], 20, "", [Reason.AXIS]),
        ([4, 1], 13, "", []),
        ([4, 1], 12, "", [Reason.AXIS]),
        ([4, 1], 20, "<axis=1>", [Reason.AXIS]),
        ([2, 1, 1], 11, "", []),
        ([4, 1], 11, "", [Reason.AXIS]),
        ([3], 11, "", [Reason.AXIS]),
    ):
        model = build(f"a = Add(x, k) y = Softmax{axis}(a)", "double[2,4,3] x", "y", opset=opset, k=quarters(shape))
        fused: onnx.ModelProto = assert_fuses(model, kept)
        assert kept or operators(fused) == {"Softmax": 1}
    assert_fuses(build("a = Mul(x, k) y = Softmax(a)", "double[2,4,3] x", "y", k=np.array(2.0)), [Reason.SCALE])


def test_a_scale_that_softmax_refuses_does_not_keep_a_shift_behind_it() -> None:
    text = "z = Relu(x) m = Mul(z, s) n = Transpose<perm=[0,2,1]>(m) a = Add(n, k) y = Softmax<axis=1>(a)"
    constants = {"s": quarters([4, 1]), "k": quarters([4], 1)}
    fused: onnx.ModelProto = assert_fuses(build(text, "double[2,4,3] x", "y", **constants), [Reason.SCALE])
    assert operators(fused) == {"Relu": 1, "Mul": 1, "Transpose": 1, "Softmax": 1}


MASK = {"zero": np.array(0.0), "half": np.array(0.5)}


def test_what_a_mask_chooses_from_takes_any_map() -> None:
    """Exporters write ``masked_fill`` so."""
    text = f"m = Greater(x, half) c = Conv(x, W) d = Where(m, c, zero) y = {bn('d')}"
    image, weights = "double[N,1,H,W] x", {"W": quarters([4, 1, 1, 1]), **MASK}
    fused = assert_fuses(build(text, image, "y", **weights, **norm(4)))
    assert operators(fused) == {"Greater": 1, "Conv": 1, "Where": 1}
    both = f"m = Greater(x, half) a = Conv(x, W) b = Conv(x, V) d = Where(m, a, b) y = {bn('d')}"
    fused = assert_fuses(build(both, image, "y", V=quarters([4, 1, 1, 1], 1), **weights, **norm(4)))
    assert operators(fused) == {"Greater": 1, "Conv": 2, "Where": 1}
    lone = both.replace("b = Conv(x, V)", "b = Relu(x)")
    assert_fuses(build(lone, image, "y", **weights, **norm(4)), [Reason.SHAPE])


def test_a_map_goes_past_a_mask_if_what_it_chooses_is_constant_or_lacks_it_too() -> None:
    """Scales are powers of two, by which float64 divides exactly."""
    text = f"m = Greater(z, half) c = {bn('x')} d = Where(m, zero, c) y = Conv(d, W)"
    given, weights = "double[N,4,H,W] x, double[N,1,H,W] z", {"W": quarters([3, 4, 1, 1]), **MASK}
    fused = assert_fuses(build(text, given, "y", **weights, **norm(4, powers=True)))
    assert operators(fused) == {"Greater": 1, "Where": 1, "Conv": 1}
    for other, reason in (("z", Reason.SCALE), ("x", Reason.SCALE)):
        model = build(text.replace("zero", other), given, "y", **weights, **norm(4, powers=True))
        assert_fuses(model, [reason])
    same = text.replace("d = Where(m, zero, c)", "e = Identity(c) d = Where(m, e, c)")
    assert operators(assert_fuses(build(same, given, "y", **weights, **norm(4))))["BatchNormalization"] == 0
    dead = {"s": np.array([1.0, 0, 2, 4]).reshape(4, 1, 1), **weights}
    lost = text.replace(bn("x"), "Mul(x, s)")
    assert_fuses(build(lost, given, "y", **dead), [Reason.SCALE])


def masked(lines: str, kept: Sequence[Reason] = (), **constants: Any) -> onnx.ModelProto:
    """``x -> Conv -> lines``, where `lines` make `y` of `c` and of the mask `k`, of which every other place is set."""
    mask = np.arange(20).reshape(4, 5) % 2 == 1
    weights = {"W": quarters([4, 3, 1, 1]), "b": quarters([4], 2), "k": mask}
    return assert_fuses(build(f"c = Conv(x, W, b) {lines}", "double[N,3,H,W] x", "y", **(weights | constants)), kept)


def test_a_stored_infinity_stays_one_under_a_map_and_is_turned_over_by_a_negative_scale() -> None:
    text = f"d = Where(k, i, c) y = {bn('d')}"
    channels = norm(4)
    assert {-1.0, 1.0} == set(np.sign(channels["bn_s"]))
    for end in (-np.inf, np.inf):
        fused = masked(text, i=np.array(end), **channels)
        assert operators(fused) == {"Conv": 1, "Where": 1}
    stored = np.concatenate([numpy_helper.to_array(i).reshape(-1) for i in fused.graph.initializer])
    assert {-np.inf, np.inf} <= set(stored), "one sign in each channel"
    masked("d = Where(k, c, i) s = Mul(d, m) y = Add(s, t)", i=np.array(-np.inf), m=np.array(0.25), t=np.array(-3.0))
    mixed = np.array([-np.inf, 0.75, np.inf, -1.5]).reshape(4, 1, 1)
    masked(text, i=mixed, **channels)
    with pytest.raises(AssertionError, match="differs at"):
        assert_same(masked(text, i=mixed, **channels), masked(text, i=mixed[::-1], **channels))


def test_an_infinity_goes_along_forward_and_with_sums_and_bounds() -> None:
    powers = norm(4, powers=True)
    read = "Where(k, i, c) y = Conv(d, V)"
    model = build(
        f"c = {bn('x')} d = {read}",
        "double[1,4,4,5] x",
        "y",
        k=np.zeros((4, 5), bool),
        i=np.array(np.inf),
        V=quarters([3, 4, 1, 1]),
        **powers,
    )
    assert operators(assert_fuses(model)) == {"Where": 1, "Conv": 1}
    causal = np.triu(np.full((4, 5), -np.inf), 1)
    masked(f"d = Add(c, i) y = {bn('d')}", i=causal, **norm(4))
    masked("d = Add(c, i) s = Mul(d, m) y = Add(s, i)", [Reason.NON_FINITE], i=np.array(-np.inf), m=np.array(0.5))
    masked(f"d = Max(c, i) y = {bn('d')}", i=np.array(-np.inf), **norm(4, positive=True))


def test_an_infinity_that_would_be_no_number_or_a_number_that_would_be_infinite_stays() -> None:
    text = f"d = Where(k, i, c) y = {bn('d')}"
    none = norm(4) | {"bn_s": np.array([0.5, 0.0, -2.0, 0.75])}
    unshifted = none | {"bn_b": np.zeros(4), "bn_m": np.zeros(4)}
    for parameters, shape in ((none, []), (unshifted, []), (unshifted, [4, 1, 1])):
        model = build(
            f"c = Conv(x, W) {text}",
            "double[N,3,H,W] x, double[4,5] z",
            "y",
            W=quarters([4, 3, 1, 1]),
            k=np.zeros((4, 5), bool),
            i=np.full(shape, -np.inf),
            **parameters,
        )
        assert_fuses(model, [Reason.NON_FINITE])
    single = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[1,3] x, bool[1,3] k) => (float[1,3] y)'
        "<float[3,3] W = {1,2,3,4,5,6,7,8,9}, float i = {-3e38}, float m = {2.0}>"
        "{ c = MatMul(x, W) d = Where(k, i, c) y = Mul(d, m) }"
    )
    assert engine.fuse(single)[1].entries[0].reason == Reason.OVERFLOW

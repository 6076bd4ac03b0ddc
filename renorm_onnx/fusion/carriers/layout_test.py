"""Maps follow their channels through operators that only rearrange elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from renorm_onnx.fusion.affine import AffineMap
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
from renorm_onnx.fusion.carriers.layout import rearranged
from renorm_onnx.fusion.conftest import Builder
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.fact import Dimension
from renorm_onnx.fusion.report import Reason

N, M = Dimension(), Dimension()
SAME = [
    ("d = Reshape(c, p)", {"p": [0, 4, -1]}),
    ("d = Reshape(c, p)", {"p": [0, 0, 0, 0]}),
    ("d = Reshape(c, p)", {"p": [0, 4, 1, -1]}),
    ("e = Unsqueeze(c, p) d = Squeeze(e, p)", {"p": [2]}),
    ("e = Unsqueeze(c, p) d = Squeeze(e, q)", {"p": [-1, -2], "q": [4, -1]}),
    ("e = Unsqueeze(c, p) d = Squeeze(e, q)", {"p": [1], "q": [-4]}),
    ("d = Transpose<perm=[0,1,3,2]>(c)", {}),
    ("e = Transpose<perm=[0,2,3,1]>(c) d = Transpose<perm=[0,3,1,2]>(e)", {}),
    ("e = Transpose(c) d = Transpose(e)", {}),
    ("d = Expand(c, p)", {"p": [1, 4, 1, 1]}),
    ("d = Expand(c, p)", {"p": [2, 1, 1, 1]}),
]


@pytest.mark.parametrize(("lines", "constants"), SAME)
def test_a_norm_behind_a_rearrangement_is_absorbed(lines: str, constants: dict[str, list[int]]) -> None:
    backward(lines, 4, **{k: np.array(v) for k, v in constants.items()})


@pytest.mark.parametrize(("lines", "constants"), [c for c in SAME if c[1].get("p") != [0, 4, -1]])
def test_a_norm_before_a_rearrangement_is_absorbed(lines: str, constants: dict[str, list[int]]) -> None:
    forward(lines, 4, **{k: np.array(v) for k, v in constants.items()})


@pytest.mark.parametrize("flat", ["Flatten(c)", "Flatten<axis=-3>(c)", "Reshape(c, p)", "Reshape(c, q)"])
def test_a_norm_before_a_flattened_image_goes_into_gemm(flat: str) -> None:
    constants = {"p": np.array([0, -1]), "q": np.array([-1, 80]), "B": quarters([80, 3])}
    text = f"c = {bn('x')} f = {flat} y = Gemm(f, B)"
    model = build(text, "double[N,4,4,5] x", "y", **constants, **norm(4))
    assert operators(assert_fuses(model))["BatchNormalization"] == 0


def test_a_flattened_image_of_open_size_is_refused() -> None:
    text = f"c = {bn('x')} f = Flatten(c) y = Gemm(f, B)"
    model = build(text, "double[N,4,H,5] x", "y", B=quarters([80, 3]), **norm(4))
    assert_fuses(model, [Reason.SHAPE])


def test_channels_that_a_reshape_mixes_with_other_axes_are_refused() -> None:
    """The sizes agree, the elements do not."""
    backward("d = Reshape(c, p)", 4, [Reason.AXIS], inputs="double[4,3,4,4] x", p=np.array([2, 4, 8, 4]), filters=4)
    backward("e = Transpose<perm=[0,2,1,3]>(c) d = Reshape(e, p)", 4, [Reason.SHAPE], p=np.array([0, 4, -1, 2]))


def test_equal_names_of_open_sizes_prove_nothing() -> None:
    text = f"c = Conv(x, W) s = Shape(z) d = Reshape(c, s) y = {bn('d')}"
    model = build(text, "double[N,3,H,H] x, double[N,4,H,H] z", "y", W=quarters([4, 3, 1, 1]), **norm(4))
    assert_fuses(model, [Reason.SHAPE])


def test_a_reshape_by_the_sizes_of_its_own_input_is_understood() -> None:
    text = "s = Shape<start=0, end=2>(c) t = Concat<axis=0>(s, p) d = Reshape(c, t)"
    backward(text, 4, p=np.array([-1]))


SHUFFLE = "e = Reshape(c, p) f = Transpose<perm=[0,2,1,3,4]>(e) d = Reshape(f, q)"
SHUFFLED = {"p": np.array([0, 2, 3, 4, 5]), "q": np.array([0, 6, 4, 5])}
HEADS = {"p": np.array([0, 0, 2, 3]), "q": np.array([0, 0, 6])}


def test_a_norm_goes_through_a_channel_shuffle_both_ways() -> None:
    backward(SHUFFLE, 6, filters=6, inputs="double[N,3,4,5] x", **SHUFFLED)
    text = f"c = {bn('x')} {SHUFFLE} y = Conv(d, W)"
    fused = assert_fuses(build(text, "double[N,6,4,5] x", "y", W=quarters([3, 6, 1, 1]), **SHUFFLED, **norm(6)))
    assert operators(fused) == {"Reshape": 2, "Transpose": 1, "Conv": 1}


def test_a_shuffle_of_images_of_open_size_keeps_its_sizes_by_their_shape() -> None:
    text = "s = Shape<start=2>(c) g = Concat<axis=0>(p, s) h = Concat<axis=0>(q, s) "
    constants = {"p": np.array([-1, 2, 3]), "q": np.array([-1, 6])}
    backward(text + SHUFFLE.replace("c, p", "c, g").replace("f, q", "f, h"), 6, filters=6, **constants)


def test_a_positive_scale_passes_relu_within_a_shuffle_and_a_constant_there_is_mapped() -> None:
    more = "e = Reshape(c, p) r = Relu(e) f = Transpose<perm=[0,2,1,3,4]>(r) d = Reshape(f, q)"
    sizes = {"filters": 6, "inputs": "double[N,3,4,5] x"}
    backward(more, 6, positive=True, shift=False, **sizes, **SHUFFLED)
    backward(more.replace("Relu(e)", "Add(e, k)"), 6, k=quarters([1, 2, 3, 1, 1]), **sizes, **SHUFFLED)
    backward(more.replace("Relu(e)", "Add(e, k)"), 6, k=quarters([1, 3, 4, 5]), **sizes, **SHUFFLED)


def test_pixels_that_are_shuffled_by_hand_pass_what_their_channels_share() -> None:
    text = "e = Reshape(c, p) f = Transpose<perm=[0,1,4,2,5,3]>(e) d = Reshape(f, q)"
    sizes = {"p": np.array([0, 2, 2, 2, 4, 5]), "q": np.array([0, 2, 8, 10])}
    backward(text, 2, filters=8, inputs="double[N,3,4,5] x", **sizes)
    text = f"a = Conv(x, W) c = {bn('a')} {text} y = Conv(d, V)"
    weights = {"W": quarters([8, 3, 1, 1]), "V": quarters([3, 2, 1, 1])}
    assert_fuses(build(text, "double[N,3,4,5] x", "y", **weights, **sizes, **norm(8)))
    text = text.replace("a = Conv(x, W)", "a = Relu(x)")
    assert_fuses(build(text, "double[N,8,4,5] x", "y", **weights, **sizes, **norm(8)), [Reason.AXIS])


def test_heads_of_attention_are_split_and_joined() -> None:
    text = "a = MatMul(x, B) r = Reshape(a, p) t = Transpose<perm=[0,2,1,3]>(r) u = Relu(t) "
    text += "v = Transpose<perm=[0,2,1,3]>(u) j = Reshape(v, q) y = Mul(j, k)"
    fused = assert_fuses(build(text, "double[N,L,5] x", "y", B=quarters([5, 6]), k=abs(quarters([6])), **HEADS))
    assert operators(fused) == {"MatMul": 1, "Reshape": 2, "Transpose": 2, "Relu": 1}


def test_channels_joined_to_an_open_batch_repeat_themselves() -> None:
    lines = "e = Flatten<axis=2>(c) f = Abs(e) d = Reshape(e, p)"
    back = {"p": np.array([-1, 4, 4, 5])}
    backward(lines.replace("f = Abs(e) ", ""), 4, inputs="double[N,3,4,5] x", **back)
    backward(
        lines.replace("f = Abs(e) d = Reshape(e, p)", "f = Relu(e) d = Reshape(f, p)"),
        4,
        inputs="double[N,3,4,5] x",
        positive=True,
        shift=False,
        **back,
    )
    forward(lines.replace("f = Abs(e) ", ""), 4, inputs="double[N,4,4,5] x", **back)


def test_what_needs_an_element_for_each_channel_refuses_a_map_that_repeats_itself() -> None:
    back = {"p": np.array([-1, 4, 4, 5]), "inputs": "double[N,3,4,5] x"}
    for line, reason in (
        ("f = MatMul(e, B)", Reason.SHAPE),
        ("f = Add(e, z)", Reason.SHAPE),
        ("f = Slice(e, o, i, o)", Reason.SHAPE),
    ):
        constants = {"B": quarters([20, 20]), "z": quarters([8, 1]), "o": np.array([0]), "i": np.array([8])}
        used = {k: v for k, v in constants.items() if k in line}
        backward(f"e = Flatten<axis=2>(c) {line} d = Reshape(f, p)", 4, [reason], **back, **used)


def test_a_scale_that_repeats_itself_passes_a_product_of_rows() -> None:
    lines = "e = Flatten<axis=2>(c) f = MatMul(e, B) d = Reshape(f, p)"
    more = {"p": np.array([-1, 4, 4, 5]), "B": quarters([20, 20]), "shift": False}
    backward(lines, 4, inputs="double[N,3,4,5] x", **more)
    forward(lines, 4, inputs="double[N,4,4,5] x", **more)


def test_a_batch_of_fixed_size_repeats_the_map_in_full() -> None:
    found = rearranged(AffineMap.of([1, 2, 3], 0.0, 1), (N, 3), (6,))
    assert found is not None
    assert (found.axes, found.periodic, list(found.scale)) == ((0,), frozenset(), [1, 2, 3, 1, 2, 3])
    found = rearranged(AffineMap.of([1, 2, 3], 0.0, 1), (N, 3, 2), (M,))
    assert found is not None
    assert (found.axes, found.periodic, list(found.scale)) == ((0,), frozenset({0}), [1, 1, 2, 2, 3, 3])
    assert rearranged(found, (M,), (N, 3, 2)).equals(AffineMap.of([1, 2, 3], 0.0, 1))
    assert rearranged(found, (M,), (6, N)) is None
    assert rearranged(AffineMap.of([1, 2, 3], 0.0, 1), (N, 3, M), (M,)) is None
    assert rearranged(AffineMap.of([1, 2, 3], 0.0, 0), (3, N), (M,)) is None


def test_sizes_that_share_no_factor_are_counted_through() -> None:
    given = AffineMap.of([1, 2], 0.0, 0)
    found = rearranged(given, (2, 3), (3, 2))
    assert found is not None
    assert (found.axes, found.scale.tolist()) == ((0, 1), [[1, 1], [1, 2], [2, 2]])
    assert rearranged(found, (3, 2), (2, 3)).equals(given)


def test_expanding_along_the_map_is_refused() -> None:
    text = f"c = Conv(x, W) d = Expand(c, p) y = {bn('d')}"
    model = build(text, "double[N,3,H,W] x", "y", W=quarters([1, 3, 1, 1]), p=np.array([1, 4, 1, 1]), **norm(4))
    assert_fuses(model, [Reason.SHAPE])


def test_each_channel_is_repeated_as_often_as_the_elements_behind_it() -> None:
    given = AffineMap.of([1, 2, 3], [0, 0, 0], 1)
    assert list(rearranged(given, (N, 3, 2), (N, 6)).scale) == [1, 1, 2, 2, 3, 3]
    assert list(rearranged(given, (N, 3, M), (N, 3, M)).scale) == [1, 2, 3]
    assert list(rearranged(given, (2, 3, N), (6, N)).scale) == [1, 2, 3, 1, 2, 3]
    assert rearranged(given, (N, 3, M), (2, 6, N)) is None
    assert rearranged(given, (N, 3, M), (M, 3, N)) is None


def test_a_map_that_repeats_itself_is_gathered() -> None:
    given = AffineMap.of([1, 1, 2, 2], [0, 0, 5, 5], 1)
    found = rearranged(given, (N, 4), (N, 2, 2))
    assert found is not None
    assert (found.axis, list(found.scale), list(found.shift)) == (1, [1, 2], [0, 5])
    split = rearranged(AffineMap.of([1, 2, 3, 4], 0.0, 1), (N, 4), (N, 2, 2))
    assert split is not None
    assert (split.axes, split.scale.tolist()) == ((1, 2), [[1, 2], [3, 4]])
    assert AffineMap.of([2, 2], [1, 1], 1).reduced().is_uniform


def test_a_turn_of_three_axes_is_followed_both_ways_where_all_sizes_agree() -> None:
    text = f"c = {bn('x')} e = Transpose<perm=[0,2,3,1]>(c) y = MatMul(e, B)"
    fused = assert_fuses(build(text, "double[4,4,4,4] x", "y", B=quarters([4, 4]), **norm(4)))
    assert operators(fused) == {"Transpose": 1, "MatMul": 1, "Add": 1}
    text = f"c = MatMul(x, B) e = Transpose<perm=[0,3,1,2]>(c) y = {bn('e')}"
    fused = assert_fuses(build(text, "double[4,4,4,4] x", "y", B=quarters([4, 4]), **norm(4)))
    assert operators(fused) == {"Transpose": 1, "MatMul": 1, "Add": 1}


@pytest.mark.parametrize(
    "fault",
    [lambda self, place: self, lambda self, place: AffineMap(self.scale, self.shift, tuple(map(place, self.axes)))],
)
def test_axes_that_do_not_move_with_the_elements_are_seen(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    monkeypatch.setattr(AffineMap, "moved", fault)
    with pytest.raises(AssertionError):
        backward(SHUFFLE, 6, filters=6, inputs="double[N,3,4,5] x", **SHUFFLED)


def test_without_axes_all_sizes_of_one_are_squeezed() -> None:
    backward("d = Squeeze(c)", 4, inputs="double[2,3,1,5] x")
    text = f"c = {bn('x')} d = Squeeze(c) y = Conv(d, W)"
    model = build(text, "double[2,4,1,5] x", "y", W=quarters([3, 4, 1]), **norm(4))
    assert operators(assert_fuses(model)) == {"Squeeze": 1, "Conv": 1}


def test_a_carrier_that_misses_a_shape_names_who_hides_it() -> None:
    """The rank of what it reads is not known; what is said is the operator before all that are."""
    b = Builder()
    h = b.norm(b.node("Riddle", "x", out="riddle", domain="someone"), 4)
    y = b.node("Gemm", b.node("Flatten", b.node("Identity", h)), b.normal(16, 3))
    model = b.model({"x": ["n", 4]}, [y], opset=20)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(y, 1, ["n", 3]))
    said = fuse(model)[1].kept[0].detail
    assert said.endswith(
        "is not proven to keep the channels together; the shape of someone::Riddle 'riddle_riddle' is unknown"
    )

"""Maps follow their channels through operators that only rearrange elements."""

from __future__ import annotations

import numpy as np
import pytest

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
from renorm_onnx.fusion.carriers.layout import rearranged, uniform
from renorm_onnx.fusion.facts import Dimension
from renorm_onnx.fusion.report import Reason

N, M = Dimension(), Dimension()
SAME = [
    ("d = Reshape(c, p)", {"p": [0, 4, -1]}),
    ("d = Reshape(c, p)", {"p": [0, 0, 0, 0]}),
    ("d = Reshape(c, p)", {"p": [0, 4, 1, -1]}),
    ("e = Unsqueeze(c, p) d = Squeeze(e, p)", {"p": [2]}),
    ("e = Unsqueeze(c, p) d = Squeeze(e, q)", {"p": [-1, -2], "q": [4, -1]}),
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
    backward("d = Reshape(c, p)", 4, [Reason.SHAPE], inputs="double[4,3,4,4] x", p=np.array([2, 4, 8, 4]), filters=4)
    backward("e = Transpose<perm=[0,2,1,3]>(c) d = Reshape(e, p)", 4, [Reason.SHAPE], p=np.array([0, 4, -1, 2]))


def test_equal_names_of_open_sizes_prove_nothing() -> None:
    text = f"c = Conv(x, W) s = Shape(z) d = Reshape(c, s) y = {bn('d')}"
    model = build(text, "double[N,3,H,H] x, double[N,4,H,H] z", "y", W=quarters([4, 3, 1, 1]), **norm(4))
    assert_fuses(model, [Reason.SHAPE])


def test_a_reshape_by_the_sizes_of_its_own_input_is_understood() -> None:
    text = "s = Shape<start=0, end=2>(c) t = Concat<axis=0>(s, p) d = Reshape(c, t)"
    backward(text, 4, p=np.array([-1]))


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
    assert rearranged(AffineMap.of([1, 2, 3, 4], 0.0, 1), (N, 4), (N, 2, 2)) is None
    assert uniform(AffineMap.of([2, 2], [1, 1], 1)).axis is None


def test_a_turn_of_three_axes_is_followed_both_ways_where_all_sizes_agree() -> None:
    text = f"c = {bn('x')} e = Transpose<perm=[0,2,3,1]>(c) y = MatMul(e, B)"
    fused = assert_fuses(build(text, "double[4,4,4,4] x", "y", B=quarters([4, 4]), **norm(4)))
    assert operators(fused) == {"Transpose": 1, "MatMul": 1, "Add": 1}
    text = f"c = MatMul(x, B) e = Transpose<perm=[0,3,1,2]>(c) y = {bn('e')}"
    fused = assert_fuses(build(text, "double[4,4,4,4] x", "y", B=quarters([4, 4]), **norm(4)))
    assert operators(fused) == {"Transpose": 1, "MatMul": 1, "Add": 1}

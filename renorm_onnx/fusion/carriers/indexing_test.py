"""Maps are cut and joined with the channels."""

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

WEIGHTS = {"W": quarters([4, 3, 1, 1]), "V": quarters([2, 3, 1, 1], 1), "U": quarters([4, 3, 1, 1], 2)}
IMAGE = "double[N,3,H,W] x"


@pytest.mark.parametrize("axis", [1, -3])
def test_a_norm_behind_joined_channels_is_cut_up(axis: int) -> None:
    text = f"a = Conv(x, W) b = Conv(x, V) d = Concat<axis={axis}>(a, b, a0) a0 = Conv(x, U) y = {bn('d')}"
    text = f"a0 = Conv(x, U) {text.replace('a0 = Conv(x, U) ', '')}"
    fused = assert_fuses(build(text, IMAGE, "y", **WEIGHTS, **norm(10)))
    assert operators(fused) == {"Conv": 3, "Concat": 1}


def test_a_norm_behind_rows_that_are_joined_goes_into_each() -> None:
    text = f"a = Conv(x, W) b = Conv(x, U) d = Concat<axis=2>(a, b) y = {bn('d')}"
    assert operators(assert_fuses(build(text, IMAGE, "y", **WEIGHTS, **norm(4)))) == {"Conv": 2, "Concat": 1}


def test_a_constant_piece_is_mapped_too() -> None:
    backward("d = Concat<axis=3>(c, k)", 4, k=quarters([2, 4, 4, 1]))
    backward("d = Concat<axis=1>(k, c)", 6, k=quarters([2, 2, 4, 5]))


def test_a_piece_that_is_joined_twice_cannot_have_two_maps() -> None:
    backward("d = Concat<axis=1>(c, c)", 8, [Reason.CONFLICT])
    backward("d = Concat<axis=2>(c, c)", 4)


@pytest.mark.parametrize(
    "lines",
    [
        "a = Slice(c, n0, n2, n1) g = Slice(c, n2, n9, n1) d = Concat<axis=1>(a, g)",
        "a = Slice(c, n0, n2, n1) g = Slice(c, n2, n9, n1) d = Concat<axis=1>(g, a)",
        "a = Gather<axis=1>(c, i) g = Slice(c, n2, n9, n1) d = Concat<axis=1>(g, a)",
        "a = Slice(c, n0, n1, n1) e = Slice(c, n1, n2, n1) g = Slice(c, n2, n9, n1) d = Concat<axis=1>(g, e, a)",
    ],
)
def test_parts_of_one_value_that_are_joined_again_are_mapped_together(lines: str) -> None:
    """As `torch.roll` over channels, or `chunk` and `cat`, are exported."""
    numbers = {f"n{n}": np.array([n]) for n in (0, 1, 2, 9)} | {"i": np.array([1, 0])}
    backward(lines, 4, **numbers)


@pytest.mark.parametrize("first", ["n1", "n0"])
def test_parts_that_overlap_cannot_have_two_maps(first: str) -> None:
    """Not even where one of the maps leaves what both read as it is."""
    lines = f"c = Conv(x, W) a = Slice(c, n0, n2, n1) g = Slice(c, {first}, n9, n1) d = Concat<axis=1>(a, g)"
    parameters = norm(5 if first == "n1" else 6)
    parameters["bn_s"][1], parameters["bn_v"][1], parameters["bn_b"][1], parameters["bn_m"][1] = 1, 1, 0, 0
    numbers = {f"n{n}": np.array([n]) for n in (0, 1, 2, 9)}
    model = build(f"{lines} y = {bn('d')}", IMAGE, "y", W=quarters([4, 3, 1, 1]), **parameters, **numbers)
    assert_fuses(model, [Reason.CONFLICT])


def test_norms_before_joined_channels_go_forward_together() -> None:
    forward("z = Abs(x) d = Concat<axis=1>(c, z, c)", 12)
    forward("d = Concat<axis=2>(c, c)", 4)
    forward("z = Abs(x) d = Concat<axis=2>(c, z)", 4, [Reason.SHAPE])
    forward("z = Abs(x) d = Concat<axis=2>(c, z)", 4, [Reason.AXIS], inputs="double[2,4,4,5] x")


@pytest.mark.parametrize(
    "split",
    ["Split<axis=1>(c, p)", "Split<axis=-3, num_outputs=2>(c)", "Split<axis=2, num_outputs=2>(c)"],
)
def test_a_norm_before_split_goes_into_every_reader(split: str) -> None:
    sizes = {"p": np.array([2, 2])}
    halves = quarters([3, 4 if "axis=2" in split else 2, 1, 1])
    text = f"c = {bn('x')} a, b = {split} y = Conv(a, W) z = Conv(b, W)"
    fused = assert_fuses(build(text, "double[N,4,4,5] x", "y, z", W=halves, **sizes, **norm(4)))
    assert operators(fused) == {"Split": 1, "Conv": 2}


def test_a_norm_behind_one_output_of_split_leaves_the_other_as_it_is() -> None:
    text = f"c = Conv(x, W) a, b = Split<axis=1, num_outputs=2>(c) y = {bn('a')} z = Relu(b)"
    fused = assert_fuses(build(text, IMAGE, "y, z", W=WEIGHTS["W"], **norm(2)))
    assert operators(fused) == {"Conv": 1, "Split": 1, "Relu": 1}
    text = f"c = Conv(x, W) a, b = Split<axis=2, num_outputs=2>(c) y = {bn('a')} z = Relu(b)"
    assert_fuses(build(text, "double[N,3,4,5] x", "y, z", W=WEIGHTS["W"], **norm(4)), [Reason.AXIS])


def test_a_norm_that_nobody_reads_goes_and_what_else_reads_the_pieces_stays() -> None:
    text = f"c = Conv(x, W) a, b = Split<axis=1, num_outputs=2>(c) n = {bn('a')} y = Relu(b)"
    fused = assert_fuses(build(text, IMAGE, "y", W=WEIGHTS["W"], **norm(2)))
    assert operators(fused) == {"Conv": 1, "Split": 1, "Relu": 1}


def test_an_output_of_split_that_nobody_reads_follows_the_others() -> None:
    text = f"c = Conv(x, W) a, b = Split<axis=2, num_outputs=2>(c) y = {bn('a')}"
    assert_fuses(build(text, "double[N,3,4,5] x", "y", W=WEIGHTS["W"], **norm(4)))


@pytest.mark.parametrize(
    ("bounds", "channels"),
    [
        (([1], [3], [1], [1]), 2),
        (([-1], [-9], [1], [-2]), 2),
        (([0], [9], [-3], [1]), 4),
        (([1, 0], [4, 9], [-1, 1], [2, 3]), 2),
        (([-10], [-(2**63)], [1], [-1]), 1),
    ],
)
def test_a_slice_cuts_the_map_like_the_channels(bounds: tuple[list[int], ...], channels: int) -> None:
    constants = {name: np.array(b) for name, b in zip("oeas", bounds, strict=True)}
    backward("d = Slice(c, o, e, a, s)", channels, **constants)
    forward("d = Slice(c, o, e, a, s)", channels, **constants)


def test_a_slice_of_which_the_specification_and_onnxruntime_differ_is_refused() -> None:
    constants = {"o": np.array([-1]), "e": np.array([2**63 - 1]), "a": np.array([1]), "s": np.array([-1])}
    text = f"c = Conv(x, W) d = Slice(c, o, e, a, s) e1 = Concat<axis=1>(c, d) y = {bn('e1')}"
    assert_fuses(build(text, "double[N,3,4,5] x", "y", W=WEIGHTS["W"], **constants, **norm(4)), [Reason.SHAPE])


def test_slices_before_opset_10_have_attributes() -> None:
    backward("d = Slice<starts=[1], ends=[3], axes=[1]>(c)", 2, opset=9)
    forward("d = Slice<starts=[0,1,-2], ends=[9,3,9]>(c)", 2, opset=9)


def test_slices_have_operands_from_opset_10_on() -> None:
    for way in (backward, forward):
        way("d = Slice(c, o, e, a)", 2, opset=10, o=np.array([1]), e=np.array([3]), a=np.array([1]))


def test_a_slice_whose_end_is_a_size_of_the_input_passes_no_map_of_channels() -> None:
    text = f"e = Shape<end=1>(z) c = Conv(x, W) d = Slice(c, o, e, a) y = {bn('d')}"
    constants = {"o": np.array([0]), "a": np.array([1]), "W": WEIGHTS["W"]}
    assert_fuses(build(text, f"{IMAGE}, double[N,H] z", "y", **constants, **norm(2)), [Reason.SHAPE])
    text = f"e = Shape<end=1>(z) c = {bn('x')} d = Slice(c, o, e, a) y = Conv(d, W)"
    constants["W"] = quarters([3, 2, 1, 1])
    assert_fuses(build(text, "double[N,4,H,W] x, double[N,H] z", "y", **constants, **norm(4)), [Reason.SHAPE])


def test_a_norm_behind_one_slice_leaves_the_channels_of_another_as_they_are() -> None:
    text = f"c = Conv(x, W) a = Slice(c, o, e, i) b = Slice(c, e, f, i) y = {bn('a')} z = Relu(b)"
    bounds = {"o": np.array([0]), "e": np.array([2]), "f": np.array([4]), "i": np.array([1])}
    fused = assert_fuses(build(text, IMAGE, "y, z", W=WEIGHTS["W"], **bounds, **norm(2)))
    assert operators(fused) == {"Conv": 1, "Slice": 2, "Relu": 1}
    alone = f"{text[: text.index(' y = ')]} y = Mul(a, k) z = Relu(b)"
    assert operators(assert_fuses(build(alone, IMAGE, "y, z", W=WEIGHTS["W"], **bounds, k=np.array(-1.5))))["Mul"] == 0
    both = f"{text} u = {bn('b', 'bm')} v = Relu(u)"
    fused = assert_fuses(
        build(both, IMAGE, "y, z, v", W=WEIGHTS["W"], **bounds, **norm(2), **norm(2, "bm", 5)), [Reason.CONSUMER]
    )
    assert operators(fused)["BatchNormalization"] == 1
    bounds["o"] = np.array([1])
    assert_fuses(build(text, IMAGE, "y, z", W=WEIGHTS["W"], **bounds, **norm(1)))
    bounds["f"], bounds["e"] = np.array([3]), np.array([0])
    assert_fuses(build(text, IMAGE, "y, z", W=WEIGHTS["W"], **{**bounds, "e": np.array([2])}, **norm(1)))


def test_two_slices_of_one_channel_cannot_have_two_maps() -> None:
    text = f"c = Conv(x, W) a = Slice(c, o, e, i) b = Slice(c, o, f, i) y = {bn('a')} z = Relu(b)"
    bounds = {"o": np.array([1]), "e": np.array([3]), "f": np.array([2]), "i": np.array([1])}
    assert_fuses(build(text, IMAGE, "y, z", W=WEIGHTS["W"], **bounds, **norm(2)), [Reason.CONSUMER])


def test_what_is_taken_by_one_index_is_mapped_and_the_rest_stays() -> None:
    text = (
        "q = MatMul(x, B) r = Reshape(q, p) a = Gather<axis=2>(r, i) b = Gather<axis=2>(r, j) y = Mul(a, k) z = Abs(b)"
    )
    constants = {"p": np.array([0, 0, 3, 4]), "i": np.array(0), "j": np.array(2), "B": quarters([5, 12])}
    for k in (np.array(0.5), quarters([4])):
        fused = assert_fuses(build(text, "double[N,L,5] x", "y, z", k=k, **constants))
        assert operators(fused) == {"MatMul": 1, "Reshape": 1, "Gather": 2, "Abs": 1}


@pytest.mark.parametrize(("indices", "channels"), [([2, 0], 2), ([-1, 1, 0], 3), ([3, 3], None)])
def test_gather_takes_the_numbers_like_the_channels(indices: list[int], channels: int | None) -> None:
    lines = "d = Gather<axis=1>(c, i)"
    forward(lines, len(indices), i=np.array(indices))
    kept = [] if channels else [Reason.CONFLICT]
    backward(lines, len(indices), kept, i=np.array(indices))


def test_gather_along_other_axes_moves_the_map_with_its_axis() -> None:
    forward("e = Gather<axis=0>(c, i) d = Squeeze(e, j)", 4, i=np.array([[1]]), j=np.array([0]))
    backward("d = Gather<axis=3>(c, i)", 4, i=np.array([1, 0]))
    backward("d = Gather<axis=3>(c, i)", 4, i=np.array([[1, 0]]))
    backward("d = Gather<axis=-1>(c, i)", 4, i=np.array(1))


def test_channels_that_become_two_axes_pass_no_map_of_one() -> None:
    """Rows of indices have the right number of channels, and so does each of them."""
    lines, rows = "d = Gather<axis=1>(c, i)", np.array([[1, 0], [3, 2]])
    backward(lines, 2, [Reason.AXIS], i=rows)
    forward(f"e = {lines[4:]} d = Reshape(e, p)", 4, [Reason.AXIS], i=rows, p=np.array([0, 4, 4, 5]))


def test_a_table_of_constants_absorbs_what_follows_its_look_up() -> None:
    text = "i = Shape(x) e = Gather(T, i) m = Mul(e, k) y = Add(m, l)"
    model = build(text, "double[N,H] x", "y", T=quarters([5, 4]), k=quarters([4], 1), l=quarters([4], 2))
    assert operators(assert_fuses(model)) == {"Shape": 1, "Gather": 1}


def test_one_channel_that_is_taken_out_has_a_uniform_map() -> None:
    text = f"c = {bn('x')} d = Gather<axis=1>(c, i) y = MatMul(d, B)"
    model = build(text, "double[N,4,2,3] x", "y", i=np.array(2), B=quarters([3, 5]), **norm(4))
    assert operators(assert_fuses(model)) == {"Gather": 1, "MatMul": 1, "Add": 1}


def test_places_that_are_not_constant_are_refused() -> None:
    text = f"s = Shape(z) i = Gather(s, j) c = Conv(x, W) d = Gather<axis=1>(c, i) y = {bn('d')}"
    model = build(text, f"{IMAGE}, double[N,H] z", "y", j=np.array([0, 0]), W=quarters([8, 3, 1, 1]), **norm(2))
    assert_fuses(model, [Reason.AXIS])


def test_the_axis_of_a_map_moves_with_the_axes_that_indices_add() -> None:
    text = "c = Conv(x, W) d = Gather<axis=0>(c, i) m = Mul(d, k) y = Add(m, l)"
    constants = {"k": quarters([4, 1, 1]), "l": quarters([4, 1, 1], 1), "i": np.array([[1, 0]])}
    fused = assert_fuses(build(text, "double[N,3,4,4] x", "y", W=WEIGHTS["W"], **constants))
    assert operators(fused) == {"Conv": 1, "Gather": 1}


def test_turning_sequences_around_keeps_a_map_of_each_and_not_one_of_their_steps() -> None:
    lengths, sizes = {"n": np.array([1, 2, 2, 1])}, "double[2,{},5] x"
    backward("d = ReverseSequence(c, n)", 4, inputs=sizes.format(3), **lengths)
    forward("d = ReverseSequence(c, n)", 4, inputs=sizes.format(4), **lengths)
    lengths["n"] = np.array([3, 4])
    turned = "d = ReverseSequence<time_axis=1, batch_axis=0>(c, n)"
    backward(turned, 4, [Reason.AXIS], inputs=sizes.format(3), **lengths)
    forward(turned, 4, [Reason.AXIS], inputs=sizes.format(4), **lengths)


def test_one_number_for_all_elements_passes_a_choice_among_them() -> None:
    for line in ("d = Gather<axis=1>(c, i)", "d = Slice(c, o, e, o)"):
        text = f"c = Mul(x, k) {line} y = Conv(d, W)"
        constants = {"k": np.array(-1.5), "i": np.array([2, 0]), "W": quarters([3, 2, 1, 1])}
        constants |= {"o": np.array([1]), "e": np.array([3])}
        used = {k: v for k, v in constants.items() if k in "kW" or f" {k}" in line}
        assert operators(assert_fuses(build(text, "double[N,4,H,W] x", "y", **used)))["Mul"] == 0

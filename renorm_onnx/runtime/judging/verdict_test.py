import math

import numpy as np
import pytest

from renorm_onnx.runtime.comparison import rms
from renorm_onnx.runtime.inputs import Trial
from renorm_onnx.runtime.judging.deviation import errors_of
from renorm_onnx.runtime.judging.verdict import POOLED, PRECISIONS, Judge

RNG = np.random.default_rng(0)
R = RNG.normal(size=(32, 8))


def noisy(scale, seed, shape=R.shape):
    return np.random.default_rng(seed).normal(size=shape) * scale


def judge_of(*pairs, kind="normal", want=R):
    """Pairs of errors of U and F; the outputs are float32 so that types agree."""
    judge = Judge("cpu", PRECISIONS["float32"])
    for number, (unfused, fused) in enumerate(pairs):
        trial = Trial(kind if number == 0 else "normal", {}, f"{kind} {number}")
        judge.add(trial, "y", errors_of(want, want + unfused, want + fused))
    return judge


def failures(judge):
    return [row for row in judge.rows() if row.ok is False]


def test_errors_of_the_same_size_are_accepted_and_larger_ones_are_not():
    u = noisy(1e-6, 1)
    assert failures(judge_of((u, noisy(1e-6, 2)))) == []
    assert failures(judge_of((u, noisy(0, 2)))) == []
    assert [row.inputs for row in failures(judge_of((u, noisy(2e-6, 2))))] == [POOLED]
    assert len(failures(judge_of((u, noisy(1e-5, 2))))) == 2


def test_one_bad_element_among_many_good_ones_is_found():
    fused = noisy(1e-6, 2)
    fused[3, 4] = 2e-5
    (row, *_) = failures(judge_of((noisy(1e-6, 1), fused)))
    assert row.index == (3, 4)
    assert "largest error is" in row.note
    assert row.values[2] - row.values[0] == pytest.approx(2e-5)


def test_an_error_below_the_rounding_of_the_type_is_no_error():
    """U may be exact by luck; F then may still be off by what float32 rounds."""
    assert failures(judge_of((0 * R, noisy(1e-7, 2)))) == []
    assert failures(judge_of((0 * R, noisy(1e-6, 2)))) != []


def test_one_bad_set_is_not_averaged_away_by_many_good_ones():
    good = [(noisy(1e-6, n), noisy(1e-6, 50 + n)) for n in range(40)]
    bad = (noisy(1e-6, 98), noisy(6e-6, 99))
    assert failures(judge_of(*good)) == []
    assert [row.inputs for row in failures(judge_of(*good, bad))] == ["normal 40"]


def test_large_inputs_are_judged_by_their_own_errors():
    big = 1e4 * R
    judge = judge_of((noisy(1e-2, 1), noisy(1e-2, 2)), kind="large", want=big)
    judge.add(Trial("normal", {}, "normal"), "y", errors_of(R, R + noisy(1e-6, 3), R + noisy(1e-6, 4)))
    assert failures(judge) == []
    judge.add(Trial("normal", {}, "again"), "y", errors_of(R, R + noisy(1e-6, 5), R + noisy(1e-4, 6)))
    assert "again" in {row.inputs for row in failures(judge)}


def test_inputs_no_larger_than_ordinary_ones_are_forgiven_ordinary_errors():
    judge = judge_of((noisy(1e-6, 1), noisy(1e-6, 2)))
    quiet = 1e-3 * R
    judge.add(Trial("zeros", {}, "zeros"), "y", errors_of(quiet, quiet + 0 * R, quiet + noisy(1e-6, 3)))
    assert failures(judge) == []
    judge.add(Trial("zeros", {}, "more zeros"), "y", errors_of(quiet, quiet + 0 * R, quiet + noisy(1e-5, 3)))
    assert [row.inputs for row in failures(judge)] == ["more zeros"]


@pytest.mark.parametrize(
    ("kind", "averages", "ok"),
    [
        ("zeros", True, True),
        ("small", True, True),
        ("large", True, False),
        ("normal", True, False),
        ("zeros", False, False),
    ],
)
def test_where_a_model_averages_what_is_alike_the_limits_of_a_set_widen(kind, averages, ok):
    """By the root of 10x10 positions, in the RMS and at the worst element, and no further."""

    def failed(size, side=10):
        judge = Judge("cpu", PRECISIONS["float32"], averages=averages)
        for number in range(20):
            judge.add(Trial("normal", {}, "normal"), "y", errors_of(R, R + noisy(1e-6, 50 + number), R))
        trial = Trial(kind, {"x": np.zeros((2, 3, side, side))}, "set")
        judge.add(trial, "y", errors_of(R, R + noisy(1e-6, 1), R + noisy(size, 2)))
        return [row.inputs for row in failures(judge) if row.inputs != POOLED]

    assert failed(2e-6) == []
    assert (failed(2e-5) == []) is ok
    assert failed(5e-5) == ["set"]
    assert failed(2e-4, side=1000) == ["set"]  # a tenth of what the original itself may be off by


def test_the_gate_refuses_to_judge_by_a_reference_that_u_does_not_reach():
    judge = judge_of((noisy(1e-2, 1), noisy(1e-2, 2)))
    assert "reference unusable" in judge.unusable()
    assert judge_of((noisy(1e-4, 1), noisy(1e-4, 2))).unusable() == ""
    half = Judge("cpu", PRECISIONS["float16"])
    half.add(Trial("normal", {}, "normal"), "y", errors_of(R, R + noisy(1e-2, 1), R + noisy(1e-2, 2)))
    assert half.unusable() == ""


def test_a_set_that_even_u_gets_wrong_is_set_aside_if_it_is_not_ordinary():
    judge = judge_of((noisy(1e-6, 1), noisy(1e-6, 2)))
    judge.add(Trial("large", {}, "large"), "y", errors_of(R, R + noisy(0.1, 1), R + noisy(0.5, 2)))
    (row,) = [row for row in judge.rows() if row.inputs == "large"]
    assert "set aside" in row.note
    assert (row.decides, row.to_dict()["decides"], row.to_dict()["ok"]) == (False, False, None)
    assert judge.unusable() == ""


@pytest.mark.parametrize(
    ("r", "u", "f", "ok"),
    [
        (1.0, 1.0, np.nan, False),
        (1.0, 1.0, np.inf, False),
        (np.inf, np.inf, np.inf, True),
        (np.inf, np.inf, -np.inf, False),
        (np.nan, np.nan, np.nan, True),
        (np.nan, np.nan, 1.0, False),
        (1e6, np.inf, np.inf, True),
        (1e6, np.inf, 1e6, True),
        (1e6, np.inf, np.nan, False),
    ],
)
def test_values_that_are_not_finite_are_where_they_should_be(r, u, f, ok):
    want, unfused, fused = (np.array([value, 1.0, 2.0]) for value in (r, u, f))
    found = errors_of(want, unfused, fused)
    assert (found.problem == "") is ok
    compared = bool(np.isfinite(r) and np.isfinite(f))
    assert (found.elements, found.left_out) == (2 + compared, 1 - compared)
    if not ok:
        assert found.index == (0,)


def test_a_finite_value_is_judged_where_the_unfused_model_overflows():
    """Where U is infinite and R is not, F may be either; if it is a number, then the right one."""
    unfused = R + noisy(1e-6, 1)
    unfused[0] = np.inf
    for wrong, expected in ((0.0, 0), (1e-2, 2)):
        fused = R + noisy(1e-6, 2)
        fused[0] += wrong
        judge = Judge("cpu", PRECISIONS["float32"])
        judge.add(Trial("normal", {}, "normal"), "y", errors_of(R, unfused, fused))
        assert len(failures(judge)) == expected
        assert judge.left_out() == []


def test_what_was_not_compared_is_said():
    want, unfused = R.copy(), R + noisy(1e-6, 1)
    want[0, :3] = np.nan
    judge = Judge("cpu", PRECISIONS["float32"])
    judge.add(Trial("normal", {}, "normal"), "y", errors_of(want, unfused, unfused))
    assert judge.left_out() == ["3 of 256 elements of 'y' on cpu: the reference or both models are not finite"]


def test_the_errors_of_neighbours_widen_the_limits_and_the_gate():
    judge = judge_of((noisy(1e-6, 1), noisy(1e-5, 2)))
    ((trial, _),) = judge.found["y"]
    assert len(failures(judge)) == 2
    judge.take_in(trial, "y", R, R + noisy(8e-6, 3))
    judge.take_in(trial, "y", R, R + noisy(2e-6, 4))
    assert failures(judge) == []
    assert judge.unusable() == ""
    judge.take_in(trial, "y", R, R + noisy(1e-2, 5))
    assert "the unfused model with its weights rounded otherwise is off by" in judge.unusable()


def test_labels_may_flip_where_those_of_a_neighbour_do():
    want = np.arange(100)
    judge = Judge("cpu", PRECISIONS["float32"])
    trial = Trial("normal", {}, "normal")
    fused, neighbour = want.copy(), want.copy()
    fused[3] = neighbour[7] = 0
    judge.add(trial, "label", errors_of(want, want, fused))
    assert "1.00% of the elements equal neither the reference nor the unfused model" in failures(judge)[0].note
    judge.take_in(trial, "label", want, neighbour)
    assert failures(judge) == []


def test_the_spread_of_the_errors_is_reported():
    fused = R.astype(np.float32)
    fused[0] = fused[0, ::-1]
    fused[5, 5] = np.nextafter(fused[5, 5], np.float32(np.inf))
    (row, _) = judge_of((0 * R, 0 * R)).rows()
    assert row.spread.flips == 0
    found = errors_of(R, R.astype(np.float32), fused).spread
    assert (found.flips, found.unfused_flips, found.positions) == (1, 0, 32)
    assert found.p50 < 1e-7 < found.p99
    assert found.ulps > 1e5
    assert 1 - np.vdot(R, fused) / np.linalg.norm(R) / np.linalg.norm(fused) == pytest.approx(found.cosine, rel=1e-3)
    assert "argmax differs at 1 of 32 (unfused: 0)" in str(found)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_one_unit_in_the_last_place_is_one(dtype):
    want = np.array([1.5, 3e-3, -7.0, 0.0], dtype)
    other = np.nextafter(want, np.array(np.inf, dtype))
    found = errors_of(want.astype(np.float64), want, other).spread
    assert (found.ulps, found.positions) == (1, 0)
    assert "argmax" not in str(found)


def test_shapes_and_types_come_before_values():
    assert "shape (2,)" in errors_of(np.zeros(3), np.zeros(3), np.zeros(2)).problem
    assert "type float32" in errors_of(np.zeros(3), np.zeros(3), np.zeros(3, np.float32)).problem


def test_the_root_mean_square_survives_extreme_values():
    assert rms(np.full(4, 1e-200)) == pytest.approx(1e-200)
    assert rms(np.full(4, 1e200)) == pytest.approx(1e200)
    assert rms(np.zeros(0)) == rms(np.zeros(3)) == 0.0


def test_small_sets_of_one_kind_are_judged_together():
    judge = Judge("cpu", PRECISIONS["float32"])
    for n in range(64):
        want = np.array([R.flat[n]])
        judge.add(
            Trial("normal", {}, f"normal {n}"),
            "y",
            errors_of(want, want + noisy(1e-6, n, 1), want + noisy(1e-6, n + 99, 1)),
        )
    rows = judge.rows()
    assert [row.elements for row in rows] == [64, 64]
    assert "and 63 more" in rows[0].inputs
    assert failures(judge) == []
    assert all(math.isfinite(row.typical) for row in rows)


@pytest.mark.parametrize(("changed", "usable"), [(0, True), (1, True), (2, False), (16, False)])
def test_labels_that_neighbours_change_are_no_reference(changed, usable):
    labels = np.arange(32)
    judge, trial = Judge("cpu", PRECISIONS["float32"]), Trial("normal", {}, "normal")
    judge.add(trial, "y", errors_of(labels, labels, np.where(labels < 13, -1, labels)))
    judge.take_in(trial, "y", labels, np.where(labels < changed, -1, labels))
    assert (judge.unusable() == "") is usable, judge.unusable()
    if usable:
        assert failures(judge) != []
    else:
        assert f"the unfused model with its weights rounded otherwise is off by {changed / 32:.1e}" in judge.unusable()


def test_the_label_that_is_named_is_one_that_neither_model_had():
    want = np.zeros((2, 4), np.int64)
    unfused, fused = want.copy(), want.copy()
    unfused[0, 1] = fused[0, 1] = 1
    assert errors_of(want, unfused, fused).index == (0, 1)
    fused[1, 2] = 3
    found = errors_of(want, unfused, fused)
    assert (found.index, found.values) == ((1, 2), (0, 0, 3))


def test_sets_that_bear_one_label_are_one_row_with_the_figures_of_the_worst():
    judge, trial = Judge("cpu", PRECISIONS["float32"]), Trial("large", {}, "large")
    judge.add(Trial("normal", {}, "normal"), "y", errors_of(R, R + noisy(1e-6, 1), R + noisy(1e-6, 2)))
    for seed in range(50):
        judge.add(trial, "y", errors_of(R, R + noisy(1e-6, seed), R + noisy(1e-6, 99 + seed)))
    rows = {row.inputs: row for row in judge.rows()}
    assert [row.sets for row in rows.values()] == [1, 50, 1]
    assert rows["large"].elements == 50 * R.size
    assert (rows["large"].ok, rows["large"].to_dict()["sets"]) == (True, 50)
    judge.add(trial, "y", errors_of(R, R + noisy(1e-6, 3), R + noisy(1e-5, 4)))
    (wrong,) = failures(judge)
    assert (wrong.inputs, wrong.sets) == ("large", 51)
    assert wrong.typical > 3


def test_sets_of_one_label_that_are_set_aside_hide_none_that_are_judged():
    judge, trial = judge_of((noisy(1e-6, 1), noisy(1e-6, 2))), Trial("large", {}, "large")
    for scale in (0.1, 1e-6, 0.1):
        judge.add(trial, "y", errors_of(R, R + noisy(scale, 1), R + noisy(scale, 2)))
    assert [(row.sets, row.ok) for row in judge.rows() if row.inputs == "large"] == [(2, None), (1, True)]


def test_a_shape_that_is_wrong_on_all_inputs_is_a_fault_and_not_nothing_to_compare():
    judge = Judge("cpu", PRECISIONS["float32"])
    judge.add(Trial("normal", {}, "normal"), "y", errors_of(R, R, R[:1]))
    assert judge.empty() == ""
    assert ["shape" in row.note for row in failures(judge)] == [True]


def test_the_parts_of_a_sequence_are_expected_to_be_as_exact_as_it():
    judge = Judge("cpu", PRECISIONS["float16"], precisions={"y": PRECISIONS["float32"]})
    assert [judge.expected_of(name).name for name in ("y", "y[0]", "z")] == ["float32", "float32", "float16"]

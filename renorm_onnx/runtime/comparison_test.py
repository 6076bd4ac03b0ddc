import json

import ml_dtypes
import numpy as np
import pytest

from renorm_onnx.errors import InputError
from renorm_onnx.runtime.comparison import TOLERANCES, Tolerance, compare

RNG = np.random.default_rng(0)
ARRAY = RNG.normal(size=(4, 5)).astype(np.float32)


def test_equal_arrays_compare_equal_whatever_their_container():
    for want in (ARRAY, [ARRAY, ARRAY], (ARRAY,), {"a": ARRAY, "b": ARRAY.astype(np.int64)}):
        found = compare(want, want)
        assert found.ok
        assert bool(found)
        assert found.elements > 0
    assert compare(np.float32(1.5), np.float32(1.5)).ok


def test_the_worst_output_its_index_and_both_values_are_named():
    got = ARRAY.copy()
    got[2, 3] += 0.5
    found = compare({"a": ARRAY, "b": ARRAY}, {"a": ARRAY, "b": got}, TOLERANCES[np.float32])
    assert not found.ok
    assert (found.output, found.index) == ("b", (2, 3))
    assert (found.want, found.got) == (ARRAY[2, 3], got[2, 3])
    for part in ("'b'", "(2, 3)", repr(found.want), repr(found.got), "allowed 2.0e-06, 1.0e-05"):
        assert part in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("want", "got", "problem"),
    [
        ({"a": ARRAY}, {"b": ARRAY}, "missing ['a'], unexpected ['b']"),
        ({"a": ARRAY}, {}, "missing ['a']"),
        ({"a": ARRAY}, {"a": ARRAY, "b": ARRAY}, "unexpected ['b']"),
        (ARRAY, ARRAY[:3], "has shape (3, 5), wanted (4, 5)"),
        (ARRAY, ARRAY.astype(np.float64), "has type float64, wanted float32"),
        (ARRAY[:0], ARRAY[:0], "nothing was compared"),
        ({}, {}, "nothing was compared"),
    ],
)
def test_names_shapes_types_and_emptiness_come_before_values(want, got, problem):
    found = compare(want, got)
    assert not found.ok
    assert problem in str(found)


@pytest.mark.parametrize(
    ("want", "got", "ok"),
    [
        (np.nan, np.nan, True),
        (np.inf, np.inf, True),
        (np.inf, -np.inf, False),
        (np.nan, np.inf, False),
        (1.0, np.nan, False),
        (np.nan, 1.0, False),
        (1.0, np.inf, False),
    ],
)
def test_values_that_are_not_finite_must_be_the_same_ones(want, got, ok):
    pair = [np.float32([value, 1.0]) for value in (want, got)]
    assert compare(*pair).ok is ok


def test_small_elements_are_judged_by_the_size_of_the_whole_tensor():
    want = np.float32([1.0, 1e-9])
    assert compare(want, np.float32([1.0, 2e-9])).ok
    assert not compare(want, np.float32([1.0, 1e-4])).ok


def test_errors_of_values_whose_squares_leave_the_range_are_measured():
    want = np.float64([1e-200, 2e-200])
    assert not compare(want, want * 1.01).ok
    assert not compare(1 / want, 1 / want * 1.01).ok
    assert compare(want, want).ok


def test_a_difference_from_zero_is_a_difference():
    assert not compare(np.zeros(3, np.float32), np.full(3, 1e-30, np.float32)).ok


def test_an_output_with_a_unit_is_measured_against_the_larger_of_both():
    noise, unit = np.float64([1e-17, -2e-17]), {"mean": np.float64([0.5, 2.0])}
    want, tolerance = {"mean": np.zeros(2)}, Tolerance(1e-5, 1e-5)
    assert not compare(want, {"mean": noise}, tolerance)
    assert compare(want, {"mean": noise}, tolerance, units=unit)
    assert compare(want, {"mean": np.float64([0.0, 1e-4])}, tolerance, units=unit).peak == 5e-5
    large = {"mean": np.float64([100.0, 100.0])}
    assert compare(large, {"mean": np.float64([100.0, 101.0])}, tolerance, units=unit).peak == 1e-2
    assert not compare(want, {"mean": np.float64([0.0, np.nan])}, tolerance, units=unit)


def test_tolerances_are_found_by_anything_that_names_a_type():
    assert TOLERANCES[np.float32] == TOLERANCES["float32"] == TOLERANCES[np.dtype("f4")]
    assert TOLERANCES[np.int64] == TOLERANCES[bool] == Tolerance(0.0, 0.0)
    assert TOLERANCES[ml_dtypes.bfloat16].rms > TOLERANCES[np.float16].rms > TOLERANCES[np.float32].rms


def test_integers_booleans_and_text_must_be_equal():
    assert not compare(np.array([1, 2]), np.array([1, 3])).ok
    assert not compare(np.array([True]), np.array([False])).ok
    assert compare(np.array(["a", "b"]), np.array(["a", "b"])).ok
    assert compare(np.array(["a", "b"]), np.array(["a", "c"])).index == (1,)


def test_what_is_no_array_is_an_input_error():
    with pytest.raises(InputError, match="got str, expected an array"):
        compare("text", ARRAY)
    with pytest.raises(InputError, match="no tolerance for type complex64"):
        compare(ARRAY.astype(np.complex64), ARRAY.astype(np.complex64))


def test_what_is_finite_is_a_number_in_json_and_what_is_not_is_a_word():
    found = compare(np.float64([2.0, 1.0]), np.float64([2.0, 1.5])).to_dict()
    assert (found["want"], found["got"], found["peak"], found["index"]) == (1.0, 1.5, 0.25, [1])
    for got in (1e-30, np.inf):
        found = compare(np.zeros(3), np.full(3, got)).to_dict()
        json.dumps(found, allow_nan=False)
        assert (found["rms"], found["peak"], found["got"]) == ("inf", "inf", got if np.isfinite(got) else "inf")

"""An output that is the same for all inputs is called dead, unless it has too few elements for that to be no chance."""

import numpy as np
import pytest

from renorm_onnx.runtime.judging.outputs import Variation, largest_difference
from renorm_onnx.runtime.judging.verdict import ENOUGH


@pytest.mark.parametrize(
    ("arrays", "dead"),
    [
        ([], False),
        ([np.full(ENOUGH, 0.5)], True),
        ([np.full(ENOUGH - 1, 0.5)], False),
        ([np.full(ENOUGH - 1, 0.5), np.full(1, 0.5)], True),
        ([np.arange(float(ENOUGH))], False),
        ([np.arange(3.0), np.arange(3.0)], True),
        ([np.arange(3.0), np.arange(4.0)], False),
        ([np.arange(3.0), np.arange(4.0), np.arange(3.0)], True),
        ([np.arange(3.0), np.arange(3.0), np.arange(3.0) + 1], False),
        ([np.array([np.nan, 1.0]), np.array([np.nan, 1.0])], True),
        ([np.full(ENOUGH, np.inf)], False),
        ([np.zeros(ENOUGH, np.int64), np.zeros(ENOUGH, np.int64)], False),
    ],
)
def test_what_never_changes_is_dead(arrays, dead):
    variation = Variation()
    for array in arrays:
        variation.add(array)
    assert variation.is_dead == dead


@pytest.mark.parametrize(
    ("once", "again", "difference"),
    [
        ([1.0, np.nan, np.inf], [1.0, np.nan, np.inf], 0.0),
        ([1.0, 2.0, -3.0], [1.0, 2.5, -3.25], 0.5),
        ([1, 2], [1, 5], 3.0),
        (["a", "b"], ["a", "b"], 0.0),
        (["a", "b"], ["a", "c"], 1.0),
        ([1.0], [1.0, 1.0], np.inf),
    ],
)
def test_two_runs_differ_by_the_largest_difference_of_an_element(once, again, difference):
    assert largest_difference(np.array(once), np.array(again)) == difference

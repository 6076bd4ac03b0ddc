"""An output that is the same for all inputs is called dead, unless it has too few elements for that to be no chance."""

import numpy as np
import pytest

from renorm_onnx.runtime.judging.outputs import Variation
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

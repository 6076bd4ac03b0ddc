import numpy as np
import pytest

from renorm_onnx.runtime.judging.deviation import errors_of

LARGEST = 65504.0


@pytest.mark.parametrize(
    ("reference", "fused", "problem"),
    [
        (65516.1, np.inf, False),
        (-65000.0, -np.inf, False),
        (65000.0, -np.inf, True),
        (60000.0, np.inf, True),
        (65516.1, np.nan, True),
        (60000.0, LARGEST, False),
    ],
)
def test_at_the_edge_of_a_type_rounding_may_carry_a_number_out_of_its_range(reference, fused, problem):
    want = np.array([1.0, reference])
    unfused, other = (np.array([1.0, v]).astype(np.float16) for v in (np.clip(reference, -LARGEST, LARGEST), fused))
    assert bool(errors_of(want, unfused, other).problem) == problem

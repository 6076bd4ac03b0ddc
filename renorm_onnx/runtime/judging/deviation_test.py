import numpy as np
import pytest

from renorm_onnx.runtime.judging.deviation import errors_of, together

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


def test_several_sets_of_inputs_have_the_errors_of_one_that_holds_them_all():
    rng = np.random.default_rng(0)
    sizes = ((1.0, 1e-6, 2e-6), (100.0, 1e-5, 1e-6), (1e-3, 1e-4, 1e-4))
    parts = [[scale * rng.normal(size=n) for scale in scales] for n, scales in zip((3, 5, 4), sizes, strict=True)]
    sets = [(want, want + unfused, want + fused, want + fused / 2) for want, unfused, fused in parts]
    whole = [np.concatenate(arrays) for arrays in zip(*sets, strict=True)]
    found = together([errors_of(*one[:3]).beside(one[0], one[3]) for one in sets])
    wanted = errors_of(*whole[:3]).beside(whole[0], whole[3])
    names = ("elements", "size_rms", "size_max", "unfused_rms", "unfused_max", "fused_rms", "fused_max")
    for name in (*names, "near_rms", "near_max", "left_out"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-12), name
    assert found.values == wanted.values

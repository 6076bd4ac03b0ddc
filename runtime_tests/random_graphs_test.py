from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from renorm_onnx.fusion.affine import AffineMap
from runtime_tests.random_graphs import SHAPES, STEPS, Step, check

pytestmark = pytest.mark.usefixtures("bugs_raise")


def test_random_graphs_fold_and_compute_the_same_after_that():
    counts: Counter[str] = Counter()

    @settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(STEPS, SHAPES, st.integers(1, 3), st.booleans())
    def search(steps, shape, outputs, open_batch):
        counts.update(check(steps, shape, outputs, open_batch=open_batch))

    search()
    assert counts["folded"] > 200


def test_a_map_that_loses_its_shift_is_seen(monkeypatch):
    monkeypatch.setattr(AffineMap, "has_shift", property(lambda self: False))
    steps = [Step("conv", 0, 0, s) for s in range(3)] + [Step("norm", 0, 0, s) for s in range(1, 4)]
    with pytest.raises(AssertionError, match="is off by"):
        check(steps, (2, 4, 9, 9), 1)

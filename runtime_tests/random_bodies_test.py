from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from renorm_onnx.fusion.carrier import Step as Answer
from renorm_onnx.fusion.carriers.control_flow import Choice
from runtime_tests.random_bodies import STRETCHES, check
from runtime_tests.random_graphs import SHAPES, STEPS, Step

pytestmark = pytest.mark.usefixtures("bugs_raise")


def test_random_graphs_in_bodies_fold_and_compute_the_same_after_that():
    counts: Counter[str] = Counter()

    @settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(STEPS, SHAPES, st.integers(1, 3), STRETCHES, st.booleans())
    def search(steps, shape, outputs, stretches, open_batch):
        counts.update(check(steps, shape, outputs, stretches, open_batch=open_batch))

    search()
    assert counts["folded"] > 80


def test_a_map_that_reaches_one_branch_only_is_seen(monkeypatch):
    right = Choice.backward

    def one_branch(self, node, maps, desk):
        asked = right(self, node, maps, desk)
        return Answer(inside=dict(list(asked.inside.items())[:1]))

    model = [Step("conv", 0, 0, 3), Step("norm", 0, 0, 1)], (2, 4, 9, 9), 1, [(0, 1, "If")]
    assert check(*model)["folded"] == 1
    monkeypatch.setattr(Choice, "backward", one_branch)
    with pytest.raises(AssertionError, match="is off by"):
        check(*model)

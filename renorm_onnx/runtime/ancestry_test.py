"""What each output is computed from, through bodies and functions, and nothing else."""

import onnx.parser
import pytest

from renorm_onnx import model_file
from renorm_onnx.runtime.ancestry import largest_before

MODEL = """
<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
main (float[N] x, bool go, float[N] w) => (float[N] plain, float[N] marked, float[N] behind, float[N] inside,
                                           float[N] called, float[N] captured) {
    plain = Neg(x)
    marked = Sin(x)
    other = Add(marked, w)
    behind = Abs(other)
    inside = If(go) <then_branch = one () => (float[N] t) { t = Sin(x) },
                     else_branch = two () => (float[N] e) { e = Neg(x) }>
    called = my.outer(x)
    captured = If(go) <then_branch = three () => (float[N] f) { f = Neg(other) },
                       else_branch = four () => (float[N] g) { g = Neg(x) }>
}
<domain: "my", opset_import: ["" : 18, "my" : 1]> outer (a) => (b) { b = my.inner(a) }
<domain: "my", opset_import: ["" : 18]> inner (a) => (b) { b = Sin(a) }
"""


@pytest.fixture
def model():
    return model_file.load(onnx.parser.parse_model(MODEL))


def test_a_node_counts_for_what_is_computed_from_it_and_for_what_holds_or_calls_it(model) -> None:
    found = largest_before(model, lambda of: float(getattr(of, "op_type", "") == "Sin"))
    assert found == {"plain": 0, "marked": 1, "behind": 1, "inside": 1, "called": 1, "captured": 1}


def test_a_value_counts_for_itself_and_for_what_reads_it(model) -> None:
    numbers = {"w": 3.0, "marked": 2.0, "plain": 1.0}
    found = largest_before(model, lambda of: numbers.get(of.name, 0.0))
    assert found == {"plain": 1, "marked": 2, "behind": 3, "inside": 0, "called": 0, "captured": 3}

import numpy as np
import onnx
import pytest

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Step
from renorm_onnx.fusion.carriers import load_carriers
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.runtime.session import open_session
from runtime_tests.pattern_models import Pattern, norms_left
from runtime_tests.patterns import compare, feeds_of, table

pytestmark = pytest.mark.usefixtures("bugs_raise")

ROWS = {p.name: p for p in table()}


def check(pattern: Pattern) -> None:
    """Fold the pattern, and raise AssertionError unless it is as expected."""
    model = pattern.build()
    before = model.SerializeToString()
    fused, report = fuse(model, pattern.options)
    assert model.SerializeToString() == before, "the model that was given has changed"
    assert compare(pattern, model, fused) == "", f"{report}\n{onnx.printer.to_text(fused)}"
    assert norms_left(fused) == pattern.left, f"{report}\n{onnx.printer.to_text(fused)}"
    if pattern.reason is not None:
        assert report.kept[0].reason == pattern.reason, str(report)
    if not pattern.left:
        assert not report.kept
    again, second = fuse(fused, pattern.options)
    assert not second.changed
    assert again.SerializeToString() == fused.SerializeToString()
    if pattern.runs:
        _run(fused, pattern)


def _run(fused: onnx.ModelProto, pattern: Pattern) -> None:
    """The fused model loads in onnxruntime, unoptimized, and gives numbers wherever they are not infinite."""
    feeds = {k: v.astype(pattern.dtype) for k, v in feeds_of(fused).items()}
    session = open_session(fused, optimize="off", threads=1)
    assert all(a.size == 0 or np.isfinite(a).any() for a in session.run(feeds).values())


@pytest.mark.parametrize("name", ROWS)
def test_every_pattern_folds_as_expected_and_computes_the_same(name):
    check(ROWS[name])


def test_the_table_is_large_and_its_names_are_unique():
    assert len(ROWS) == len(list(table())) > 950
    assert sum(p.left == 0 for p in ROWS.values()) > 600
    assert sum(p.reason is not None for p in ROWS.values()) > 20


def failures(rows: list[Pattern]) -> int:
    """How many patterns do not turn out as expected."""
    count = 0
    for pattern in rows:
        try:
            check(pattern)
        except AssertionError:
            count += 1
    return count


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (AffineMap, "has_shift", property(lambda self: False)),
        (AffineMap, "has_scale", property(lambda self: False)),
        (AffineMap, "is_monotone", property(lambda self: True)),
        (AffineMap, "is_finite", property(lambda self: True)),
        (AffineMap, "without_shift", lambda self: self),
        (type(load_carriers()["Relu"]), "_pass", lambda self, node, maps: Step((), {0: maps[0]})),
    ],
)
def test_a_fault_in_the_engine_is_seen_by_the_table(monkeypatch, owner, name, fault):
    assert getattr(owner, name) is not fault
    monkeypatch.setattr(owner, name, fault)
    chosen = [p for p in ROWS.values() if not p.runs and "opset" not in p.name]
    assert failures(chosen + [p for p in ROWS.values() if "Relu" in p.name])

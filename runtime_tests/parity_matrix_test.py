"""The quick part of the parity matrix, and models that are wrong on purpose, which it must not let through."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from models import MODELS
from runtime_tests import parity_matrix
from runtime_tests.parity_matrix import (
    DTYPES,
    FORMS,
    OPSETS,
    REFERENCE,
    SHAPES,
    Case,
    Export,
    build,
    cases,
    exports,
    judge,
    main,
)

QUICK = exports(quick=True)
ROWS = [
    pytest.param(case, id=str(case), marks=[pytest.mark.cuda("onnxruntime")] if case.provider == "cuda" else [])
    for export in QUICK
    for case in cases(export, ["cpu", "cuda"])
]
FUSED = [Case(export, "fused", "off", "cpu") for export in QUICK if export.dtype == "float32"]
CARRIERS = ("Conv", "ConvTranspose", "Gemm")


@pytest.fixture(scope="module", autouse=True)
def _exports_are_shared_by_the_rows():
    yield
    build.cache_clear()


@pytest.mark.parametrize("case", ROWS)
def test_every_row_of_the_matrix_holds(case):
    outcome = judge(case, build(case.export))
    if outcome.status == "skip":
        pytest.skip(outcome.note)
    assert outcome.status == "ok", outcome


def changed(model, name, change):
    """A copy of `model` in which `change` was applied to the values of one initializer."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return copy


def biases(model):
    return [node.input[2] for node in model.graph.node if node.op_type in CARRIERS and len(node.input) > 2]


def move_one(values):
    values.flat[0] += 1e-4


AMPLIFYING = Case(Export("mobilenet_v2", dtype="float16"), "fused", "off", "cpu")
"""The CPU computes it in float32: one run of the unfused model says nothing of how its float16 weights were rounded."""


def test_a_network_that_amplifies_rounding_is_judged_by_its_neighbours(monkeypatch):
    built = build(AMPLIFYING.export)
    outcome = judge(AMPLIFYING, built)
    assert outcome.status == "ok", outcome
    with monkeypatch.context() as alone:
        alone.setattr(parity_matrix.Built, "near_on", lambda self, provider: [])
        without = judge(AMPLIFYING, built)
    assert without.status == "FAIL"
    assert without.error > 10 * without.yardstick
    fused = built.protos["fused"]
    for name in biases(fused)[::26]:

        def move(values):
            values.flat[0] += 0.2

        assert judge(AMPLIFYING, built, model=changed(fused, name, move)).status == "FAIL", name


@pytest.mark.parametrize("level", parity_matrix.LEVELS)
@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.export.model)
def test_one_bias_moved_by_a_ten_thousandth_fails(case, level):
    built = build(case.export)
    case = replace(case, level=level)
    for name in {biases(built.protos["fused"])[0], biases(built.protos["fused"])[-1]}:
        outcome = judge(case, built, model=changed(built.protos["fused"], name, move_one))
        assert outcome.status == "FAIL", (name, outcome)
        assert "yardstick" in outcome.note


@pytest.mark.parametrize("form", ["function", "inlined"])
@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.export.model)
def test_a_wrong_export_fails_too(case, form):
    """An exported model is not compared with itself: torch in float64 is the judge."""
    built = build(case.export)
    model = built.protos[form]
    name = next(t.name for t in model.graph.initializer if t.name.endswith("running_mean"))
    outcome = judge(replace(case, form=form), built, model=changed(model, name, lambda v: np.add(v, 1e-2, out=v)))
    assert outcome.status == "FAIL"
    assert "RMS error is" in outcome.note


def test_a_model_with_another_output_fails():
    case = FUSED[-1]
    model = onnx.ModelProto()
    model.CopyFrom(build(case.export).protos["fused"])
    result = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["other" if name == result else name for name in node.output]
    model.graph.output[0].name = "other"
    outcome = judge(case, build(case.export), model=model)
    assert (outcome.status, "outputs are ['other']" in outcome.note) == ("FAIL", True)


def test_a_fused_model_without_a_fold_fails():
    case = FUSED[-1]
    outcome = judge(case, replace(build(case.export), folded=0))
    assert (outcome.status, "nothing was folded" in outcome.note) == ("FAIL", True)


def test_the_matrix_covers_every_network_opset_type_and_kind_of_shapes():
    for files in (QUICK, exports(quick=False)):
        assert {e.model for e in files} == set(MODELS)
        assert {e.opset for e in files} == set(OPSETS)
        assert {e.dtype for e in files} == set(DTYPES)
        assert {e.shapes for e in files} == set(SHAPES)
    rows = [case for export in exports(quick=False) for case in cases(export, ["cpu", "cuda"])]
    assert len(set(map(str, rows))) == len(rows)
    assert {(c.form, c.provider) for c in rows} == {(f, p) for f in FORMS for p in ("cpu", "cuda", REFERENCE)}


def test_the_command_names_what_it_skips_and_refuses_to_when_a_gpu_is_required(capsys, monkeypatch, tmp_path):
    file = tmp_path / "rows.json"
    monkeypatch.setattr(parity_matrix, "unavailable", lambda name: "cuda is away" if name == "cuda" else "")
    monkeypatch.setattr(parity_matrix, "exports", lambda **_: [QUICK[-2]])
    monkeypatch.delenv("RENORM_REQUIRE_CUDA", raising=False)
    assert main(["--quick", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    said = capsys.readouterr()
    assert f"skipped: {len(rows) // 2} rows: cuda is away" in said.out
    assert said.err.startswith(f"1/1 {QUICK[-2]}: 12 ok, 12 skip (")
    assert {row["status"] for row in rows if row["provider"] == "cuda"} == {"skip"}
    monkeypatch.setenv("RENORM_REQUIRE_CUDA", "1")
    assert main(["--quick"]) == 3
    assert "RENORM_REQUIRE_CUDA=1, but cuda is away" in capsys.readouterr().err


def test_the_command_goes_on_after_a_row_that_breaks_and_returns_1(capsys, monkeypatch):
    def broken(case, built):
        raise RuntimeError("kernel crashed")

    monkeypatch.setattr(parity_matrix, "judge", broken)
    monkeypatch.setattr(parity_matrix, "exports", lambda **_: [QUICK[-2]])
    assert main(["--providers", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAIL mlp-") == len(FORMS) * 4
    assert "RuntimeError: kernel crashed" in printed

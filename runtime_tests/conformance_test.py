import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

from renorm_onnx import model_file
from renorm_onnx.errors import RenormError
from renorm_onnx.fusion.carriers import conv
from renorm_onnx.fusion.engine import FuseOptions, fuse
from renorm_onnx.runtime.reference import evaluate
from runtime_tests.conformance import FORMS, in_form, judge, node_cases
from runtime_tests.light_models import NORMS_LEFT, drawn, image, path_of
from runtime_tests.pattern_models import norms_left

pytestmark = pytest.mark.usefixtures("bugs_raise")

# At least this many cases fold in each form; a fall means that the engine lost operators.
FOLDED = dict(zip(FORMS, (10, 100, 250, 350), strict=True))


@functools.cache
def cases():
    return list(node_cases())


@pytest.mark.parametrize("form", FORMS)
def test_every_node_case_still_computes_what_it_did(form):
    outcomes = {}
    for case in cases():
        built = in_form(case, form)
        if built is not None:
            outcomes[case.name] = judge(*built)[0]
    wrong = {n: o for n, o in outcomes.items() if o not in ("same", "folded") and not o.startswith("no reference")}
    assert not wrong
    assert len(outcomes) > 800
    assert sum(o == "folded" for o in outcomes.values()) >= FOLDED[form]


def test_a_wrong_carrier_is_seen(monkeypatch):
    """Negative control: a Conv that forgets the bias it should map."""
    monkeypatch.setattr(conv, "bias_demand", lambda node, index, given, desk: ([], {}))
    outcomes = [judge(*built)[0] for c in cases() if "conv" in c.name and (built := in_form(c, "between maps"))]
    assert any("is off by" in o for o in outcomes)


def stored_models() -> list:
    return [t for kind in ("simple", "pytorch-converted", "pytorch-operator") for t in load_model_tests(kind=kind)]


@pytest.mark.parametrize("test", stored_models(), ids=lambda t: t.name)
def test_every_stored_model_still_gives_its_stored_outputs(test):
    folder = Path(test.model_dir)
    fused, _ = fuse(folder / "model.onnx", FuseOptions(allow_cancellation=True))
    onnx.checker.check_model(fused)
    data = folder / "test_data_set_0"
    feeds, want = ({}, [])
    loaded = model_file.load(fused)
    given = [i.name for i in fused.graph.input if i.name not in {t.name for t in fused.graph.initializer}]
    for index, name in enumerate(given):
        tensor = onnx.TensorProto.FromString((data / f"input_{index}.pb").read_bytes())
        feeds[name] = numpy_helper.to_array(tensor)
    for index, _ in enumerate(fused.graph.output):
        want.append(numpy_helper.to_array(onnx.TensorProto.FromString((data / f"output_{index}.pb").read_bytes())))
    try:
        evaluate(model_file.load(folder / "model.onnx"), feeds)
    except RenormError as error:
        pytest.skip(f"no float64 reference of the model as shipped: {error}")
    got = list(evaluate(loaded, feeds).values())
    for expected, array in zip(want, got, strict=True):
        assert expected.shape == array.shape
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(array, expected, rtol=1e-3, atol=1e-4 * max(1.0, np.abs(expected).max()))
        else:
            assert np.array_equal(expected, array)


@pytest.mark.parametrize("name", NORMS_LEFT)
def test_light_models_fold_their_norms_and_stay_valid(name):
    """Weights from ConstantOfShape, every initializer listed as an input; others fold nothing or break them."""
    model = onnx.load(path_of(name))
    fused, report = fuse(model)
    onnx.checker.check_model(fused)
    assert norms_left(fused) == NORMS_LEFT[name], report
    interface = [
        [i.name for i in m.graph.input if i.name not in {t.name for t in m.graph.initializer}] for m in (model, fused)
    ]
    assert interface[0] == interface[1]


def error_of_fusing(name):
    """Fuse a light network with random weights; the norms left, and its largest error over its largest output."""
    model = drawn(name)
    fused, _ = fuse(model)
    (want,), (got,) = (evaluate(model_file.load(m), image(model)).values() for m in (model, fused))
    assert want.std() > 0.01 * np.abs(want).max() > 0, "outputs that are all alike show no error"
    return norms_left(fused), np.abs(want - got).max() / np.abs(want).max()


@pytest.mark.parametrize("name", NORMS_LEFT)
def test_light_models_compute_the_same_with_random_weights(name):
    left, error = error_of_fusing(name)
    assert left == NORMS_LEFT[name]
    assert error < 1e-5


def test_a_wrong_carrier_is_seen_in_a_light_model(monkeypatch):
    """Negative control: a Conv that forgets the bias it should map."""
    monkeypatch.setattr(conv, "bias_demand", lambda node, index, given, desk: ([], {}))
    assert error_of_fusing("shufflenet")[1] > 1e-3

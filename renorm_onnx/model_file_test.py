"""Reading and writing models."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from renorm_onnx import model_file
from renorm_onnx.errors import ModelFileError


def small_model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.normal(size=(64, 3, 3, 3)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 64, 6, 6])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(small_model(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_a_model_is_saved_as_it_was_loaded(path: Path) -> None:
    out = path.with_name("out.onnx")
    model_file.save(model_file.load(path), out)
    onnx.checker.check_model(out, full_check=True)
    saved = onnx.load(out)
    assert saved.graph.node == small_model().graph.node
    assert saved.graph.initializer == small_model().graph.initializer


def test_an_external_model_is_saved_with_its_own_data_file(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(small_model(), source, save_as_external_data=True, location="in.data")
    model = model_file.load(source)
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    out = tmp_path / "out.onnx"
    model_file.save(model, out)
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith("out."))[1:] == ["out.onnx"]
    saved = onnx.load(out)
    np.testing.assert_array_equal(
        numpy_helper.to_array(saved.graph.initializer[0]), numpy_helper.to_array(small_model().graph.initializer[0])
    )


def test_the_input_is_never_changed(path: Path) -> None:
    proto = small_model()
    for source in (proto, ir.serde.deserialize_model(proto)):
        model = model_file.load(source)
        model.graph.initializers["w"].name = "other"
        model.graph.outputs[0].name = "z"
    assert proto == small_model()


def test_an_existing_output_is_refused(path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"exists; choose another name, or allow it to be replaced \(--force\)"):
        model_file.save(model_file.load(path), path)

"""Nothing is lost between reading a model and writing it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases

from renorm_onnx import model_file


def every_field() -> onnx.ModelProto:
    """A model in which every field is set that a valid one may have."""

    def described(message: Any) -> Any:
        message.doc_string = "said of it"
        message.metadata_props.add(key="key", value="value")
        return message

    info = helper.make_tensor_value_info
    x, y, w = (described(info(name, TensorProto.FLOAT, shape)) for name, shape in [("x", "N"), ("y", "N"), ("w", [1])])
    x.type.denotation, x.type.tensor_type.shape.dim[0].denotation = "IMAGE", "DATA_BATCH"
    weight = described(numpy_helper.from_array(np.ones(1, np.float32), "w"))
    add = described(helper.make_node("Add", ["x", "w"], ["a"], name="add"))
    sharding = add.device_configurations.add(configuration_id="devices").sharding_spec.add(tensor_name="a")
    sharding.device.append(0)
    call = described(helper.make_node("F", ["a"], ["y"], domain="f", overload="o", name="call", alpha=0.5))
    call.attribute[0].doc_string = "said of it"
    leaky = helper.make_node("LeakyRelu", ["a"], ["b"])
    leaky.attribute.add(name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
    function = helper.make_function(
        "f", "F", ["a"], ["b"], [leaky], opsets[:1], ["alpha"], [helper.make_attribute("beta", 2.0)], overload="o"
    )
    function.value_info.append(info("b", TensorProto.FLOAT, ["N"]))
    graph = described(helper.make_graph([add, call], "g", [x], [y], [weight]))
    graph.value_info.extend([info("a", TensorProto.FLOAT, ["N"]), w])
    graph.quantization_annotation.add(tensor_name="w").quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    model = described(
        helper.make_model(graph, functions=[described(function)], opset_imports=opsets, ir_version=11, domain="d")
    )
    model.producer_name, model.producer_version, model.model_version = "p", "1", 3
    model.configuration.add(name="devices", num_devices=1).device.append("cpu")
    return model


def conformance_models() -> Iterator[tuple[str, onnx.ModelProto]]:
    """All models that ship in the onnx package: files, and the node tests that its code builds."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for path in sorted(folder.rglob("*.onnx")):
        yield str(path.relative_to(folder)), onnx.load(path)
    for case in collect_testcases(None):
        if case.model is not None:
            yield case.name, case.model


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two messages differ in meaning: the order of named entries and the encoding of tensors have none."""
    if isinstance(a, TensorProto):
        x, y = numpy_helper.to_array(a), numpy_helper.to_array(b)
        same = x.dtype == y.dtype and x.shape == y.shape and (x.tobytes() == y.tobytes() or x.tolist() == y.tolist())
        same = same and (a.name, a.doc_string, a.metadata_props) == (b.name, b.doc_string, b.metadata_props)
        return [] if same else [where]
    found = []
    for field in a.DESCRIPTOR.fields:
        x, y = getattr(a, field.name), getattr(b, field.name)
        path = f"{where}.{field.name}"
        if hasattr(x, "DESCRIPTOR"):
            if a.HasField(field.name) != b.HasField(field.name):
                found.append(path)
            elif a.HasField(field.name):
                found += differences(x, y, path)
        elif field.message_type is None:
            if str(x) != str(y):
                found.append(path)
        else:
            x, y = list(x), list(y)
            if field.name in ("value_info", "metadata_props", "initializer", "functions"):
                x, y = (sorted(z, key=lambda m: getattr(m, "name", "") or getattr(m, "key", "")) for z in (x, y))
            if field.name == "value_info":
                # onnx-ir states the type of each inner initializer.
                y = [info for info in y if info.name in {known.name for known in x}]
            found += [path] if len(x) != len(y) else []
            for i, (p, q) in enumerate(zip(x, y, strict=False)):
                found += differences(p, q, f"{path}[{i}]")
    return found


def test_nothing_is_lost_from_a_model_in_which_everything_is_said(tmp_path: Path) -> None:
    proto = every_field()
    model = model_file.load(proto)
    assert differences(proto, model_file.to_proto(model)) == []
    assert differences(proto, model_file.to_proto(model_file.load(model))) == []
    model_file.save(model, tmp_path / "out.onnx")
    assert differences(proto, onnx.load(tmp_path / "out.onnx")) == []


@pytest.mark.filterwarnings("ignore")  # onnx's own node tests overflow while they are built
def test_every_conformance_model_is_loaded_and_written_unchanged() -> None:
    count = 0
    for name, proto in conformance_models():
        before = proto.SerializeToString()
        model = model_file.load(proto)
        assert differences(proto, model_file.to_proto(model)) == [], name
        if count % 5 == 0:
            assert differences(proto, model_file.to_proto(model_file.load(model))) == [], name
        assert proto.SerializeToString() == before, name
        count += 1
    assert count > 1900

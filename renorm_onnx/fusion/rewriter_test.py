"""What a file says about a name stays with the name, and what it said of a value that changed goes."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper

from renorm_onnx.fusion.conftest import Builder, assert_same, operators
from renorm_onnx.fusion.engine import fuse


def backward(b: Builder) -> onnx.ModelProto:
    b.norm(b.conv("x", 4, 4, 1), 4, out="y")
    return b.model({"x": ["n", 4, 3, 3]}, ["y"])


def bias_behind(b: Builder) -> onnx.ModelProto:
    b.norm(b.node("MatMul", "x", b.normal(4, 3)), 3, out="y")
    return b.model({"x": ["n", 4]}, ["y"])


def forward(b: Builder) -> onnx.ModelProto:
    h = b.node("Transpose", b.norm(b.node("Tanh", "x"), 4), perm=[0, 2, 3, 1])
    b.node("MatMul", h, b.normal(4, 3), out="y")
    return b.model({"x": ["n", 4, 3, 3]}, ["y"])


def function(b: Builder) -> onnx.ModelProto:
    scales = ["s", "b", "m", "v"]
    body = [helper.make_node("Conv", ["X", "w"], ["t"]), helper.make_node("BatchNormalization", ["t", *scales], ["Y"])]
    b.functions.append(helper.make_function("mine", "Layer", ["X", "w", *scales], ["Y"], body, [_opset("", 17)]))
    b.node("Layer", "x", b.normal(4, 4, 1, 1), *b.statistics(4), out="y", domain="mine")
    return b.model({"x": ["n", 4, 3, 3]}, ["y"])


def branches(b: Builder) -> onnx.ModelProto:
    b.node("Add", b.conv("x", 4, 4, 1), b.conv("x", 4, 4, 3, pads=[1] * 4), out="y")
    return b.model({"x": ["n", 4, 3, 3]}, ["y"])


def _opset(domain: str, version: int) -> onnx.OperatorSetIdProto:
    return helper.make_opsetid(domain, version)


def annotate(model: onnx.ModelProto) -> None:
    """Say something else of each name, in place, in every way that a file has."""
    graph = model.graph
    known = {v.name for v in (*graph.input, *graph.output)}
    inner = [o for n in graph.node for o in n.output if o not in known]
    graph.value_info.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in inner)
    graph.initializer.append(helper.make_tensor("step", onnx.TensorProto.FLOAT, [], [0.5]))
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.doc_string = f"about {value.name}"
        value.metadata_props.add(key="kind", value=f"kind of {value.name}")
        annotation = graph.quantization_annotation.add(tensor_name=value.name)
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="step")


def said_of(model: onnx.ModelProto) -> dict[str, tuple[object, ...]]:
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    notes = {a.tensor_name for a in model.graph.quantization_annotation}
    said = {v.name: (v.doc_string, [(p.key, p.value) for p in v.metadata_props], v.name in notes) for v in values}
    assert notes <= said.keys()
    return said


@pytest.mark.parametrize(
    ("build", "after"),
    [
        (backward, ["Conv"]),
        (bias_behind, ["MatMul", "Add"]),
        (forward, ["Tanh", "Transpose", "MatMul", "Add"]),
        (function, ["Conv"]),
        (branches, ["Conv"]),
    ],
)
def test_what_a_file_says_of_a_name_stays_with_the_name_and_goes_with_the_value(build, after):
    model = build(Builder())
    annotate(model)
    fused, _ = fuse(model)
    assert operators(fused) == after
    before, now = said_of(model), said_of(fused)
    assert now["y"] == ("about y", [("kind", "kind of y")], True)
    assert now["x"] == before["x"]
    for name, said in now.items():
        assert said == before.get(name, ("", [], False)), name
    assert_same(model, fused)

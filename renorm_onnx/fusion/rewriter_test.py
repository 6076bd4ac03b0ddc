"""What a file says about a name stays with the name, and what it said of a value that changed goes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from renorm_onnx.fusion import rewriter
from renorm_onnx.fusion.conftest import Builder, assert_same, operators
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.operands import fingerprint
from renorm_onnx.fusion.parameters import Parameter


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


def towers(count: int, *, equal: bool = True, bias: bool = True, ir_version: int = 8) -> onnx.ModelProto:
    """One convolution and one norm, as stored, for `count` inputs; each its own norm if they are not `equal`."""
    b = Builder()
    operands = [b.normal(6, 4, 3, 3, name="w"), *([b.normal(6, name="wb")] if bias else [])]
    norms = [b.statistics(6)] * count if equal else [b.statistics(6) for _ in range(count)]
    ends = []
    for place, stats in enumerate(norms):
        ends.append(b.node("BatchNormalization", b.node("Conv", f"x{place}", *operands), *stats, out=f"y{place}"))
    model = b.model({f"x{i}": ["n", 4, 5 + i, 5] for i in range(count)}, ends, ir_version=ir_version)
    for place, output in enumerate(model.graph.output):  # of weights that may be overridden, inference learns nothing
        output.CopyFrom(helper.make_tensor_value_info(output.name, 1, ["n", 6, 3 + place, 3]))
    if ir_version < 4:
        for tensor in model.graph.initializer:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ir_version", [3, 8])
def test_operators_that_share_a_weight_share_what_it_becomes(ir_version: int, bias: bool) -> None:
    model = towers(5, bias=bias, ir_version=ir_version)
    fused, report = fuse(model)
    assert len(report.folded) == 5
    stored = [i.name for i in fused.graph.initializer]
    assert sorted(stored) == sorted(["w__fused", "wb__fused" if bias else stored[stored[0] == "w__fused"]])
    assert all(list(n.input[1:]) == list(fused.graph.node[0].input[1:]) for n in fused.graph.node)
    assert len(fused.graph.input) == 5 + (2 if ir_version < 4 else 0)
    assert_same(model, fused)
    again, second = fuse(fused)
    assert not second.changed
    assert again.SerializeToString(deterministic=True) == fused.SerializeToString(deterministic=True)


def test_operators_that_share_a_weight_and_not_the_norm_get_one_each() -> None:
    model = towers(3, equal=False)
    fused, report = fuse(model)
    assert len(report.folded) == 3
    assert len({n.input[1] for n in fused.graph.node}) == len({n.input[2] for n in fused.graph.node}) == 3
    assert_same(model, fused)


def test_equal_factors_of_different_weights_are_kept_apart() -> None:
    """Two towers over one bias, one norm, and weights of one shape that are not the same."""
    b = Builder()
    bias, stats = b.normal(6), b.statistics(6)
    ends = [b.node("BatchNormalization", b.node("Conv", "x", b.normal(6, 4, 1, 1), bias), *stats) for _ in range(2)]
    model = b.model({"x": ["n", 4, 5, 5]}, ends)
    fused, _ = fuse(model)
    assert len({n.input[1] for n in fused.graph.node}) == 2
    assert len({n.input[2] for n in fused.graph.node}) == 1
    assert_same(model, fused)


def test_the_readers_of_a_weight_that_become_something_else_leave_the_others_theirs() -> None:
    b = Builder()
    weight, stats = b.normal(6, 4, 1, 1, name="w"), b.statistics(6)
    ends = [b.node("BatchNormalization", b.node("Conv", "x", weight), *stats) for _ in range(2)]
    model = b.model({"x": ["n", 4, 5, 5]}, [*ends, b.node("Conv", "x", weight)])
    fused, _ = fuse(model)
    assert [n.input[1] for n in fused.graph.node] == ["w__fused", "w__fused", "w"]
    assert_same(model, fused)


def test_a_body_keeps_its_own_copy() -> None:
    """What both branches of an If and the graph around it read becomes one constant for each of the three."""
    b = Builder()
    weight, stats = b.normal(6, 4, 1, 1, name="w"), b.statistics(6)
    bodies = {}
    for name in ("then_branch", "else_branch"):
        inner = Builder()
        ends = [inner.node("BatchNormalization", inner.node("Conv", "x", weight), *stats) for _ in range(2)]
        total = inner.node("Concat", *ends, out=f"{name}_out", axis=1)
        info = helper.make_tensor_value_info(total, onnx.TensorProto.FLOAT, None)
        for node in inner.nodes:
            node.name += name
            for names in (node.input, node.output):
                names[:] = [f"{n}_{name}" if n.startswith("v") else n for n in names]
        bodies[name] = helper.make_graph(inner.nodes, name, [], [info])
    outside = b.node("BatchNormalization", b.node("Conv", "x", weight), *stats)
    chosen = b.node("If", b.node("Greater", b.node("ReduceSum", "x", keepdims=0), b.constant(0.0)), **bodies)
    model = b.model({"x": ["n", 4, 5, 5]}, [outside, chosen])
    fused, report = fuse(model)
    assert len(report.folded) == 5
    assert_same(model, fused)
    [branching] = [n for n in fused.graph.node if n.op_type == "If"]
    for attribute in branching.attribute:
        weights = [n.input[1] for n in attribute.g.node if n.op_type == "Conv"]
        assert len(weights) == 2
        assert set(weights) <= {i.name for i in attribute.g.initializer}
        assert len(set(weights)) == 1


def test_constants_read_once_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(parameter: object) -> tuple[object, ...]:
        raise AssertionError(parameter)

    monkeypatch.setattr(rewriter, "fingerprint", refused)
    b = Builder()
    x = "x"
    for _ in range(5):
        x = b.norm(b.conv(x, 4, 4), 4)
    assert len(fuse(b.model({"x": ["n", 4, 20, 20]}, [x]))[1].folded) == 5
    with pytest.raises(AssertionError):
        fuse(towers(2))


@pytest.mark.parametrize("array", [np.array(2.0), np.zeros((0, 3)), np.ones((2, 3)).T, np.array([[-0.0]])])
def test_a_fingerprint_tells_elements_and_shapes_apart(array: np.ndarray) -> None:
    one = Parameter.new(array, ir.DataType.FLOAT)
    assert fingerprint(one) == fingerprint(Parameter.new(array.copy(), ir.DataType.FLOAT))
    others = [
        Parameter.new(array + 1, one.dtype),
        Parameter.new(array[None], one.dtype),
        one._replace(dtype=ir.DataType.DOUBLE),
    ]
    assert fingerprint(one) not in [fingerprint(o) for o in others if o.base.size or o.shape != one.shape]

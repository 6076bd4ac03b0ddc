"""Calls in the way of a norm are opened; functions that have nothing to do with one stay as they are."""

from __future__ import annotations

import onnx
from onnx import helper

from renorm_onnx.fusion import calls
from renorm_onnx.fusion.conftest import Builder, assert_same, largest_difference, operators
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.report import Reason
from renorm_onnx.inlining import inline

IMAGE = {"x": ["n", 4, 8, 8]}


def add_function(b: Builder, name: str, nodes: list[onnx.NodeProto], *, inputs: tuple[str, ...] = ("X", "w")) -> None:
    domains = sorted({n.domain for n in nodes} | {""})
    imports = [helper.make_opsetid(d, 1 if d else 17) for d in domains]
    b.functions.append(helper.make_function("mine", name, list(inputs), ["Y"], nodes, imports))


def layer(b: Builder, name: str = "Layer") -> None:
    add_function(b, name, [helper.make_node("Conv", ["X", "w"], ["Y"], name=f"in_{name}")])


def norm_without_shift(b: Builder, x: str) -> str:
    """A norm with positive scales that maps zero to zero, so that it passes Relu and MaxPool."""
    zero = b.constant([0.0] * 4)
    positive = [b.constant(b.rng.uniform(0.5, 2, 4)) for _ in range(2)]
    return b.node("BatchNormalization", x, positive[0], zero, zero, positive[1])


def test_a_convolution_in_a_function_absorbs_a_norm_several_operators_away():
    b = Builder()
    layer(b)
    h = b.node("Layer", "x", b.normal(4, 4, 3, 3), domain="mine")
    h = b.node("MaxPool", b.node("Relu", h), kernel_shape=[2, 2])
    model = b.model(IMAGE, [norm_without_shift(b, h)])
    fused, report = fuse(model)
    assert len(report.folded) == 1
    assert operators(fused) == ["Conv", "Relu", "MaxPool"]
    assert not fused.functions
    assert_same(model, fused)
    unscaled = fuse(model)[0]
    weight = next(t for t in unscaled.graph.initializer if t.name == unscaled.graph.node[0].input[1])
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, weight.name))
    assert largest_difference(model, unscaled) > 1e-3


def test_a_function_behind_a_norm_is_opened_and_its_calls_elsewhere_mean_the_same():
    b = Builder()
    layer(b)
    first = b.node("Layer", b.node("Tanh", "x"), b.normal(4, 4, 1, 1), domain="mine")
    h = b.node("Transpose", norm_without_shift(b, b.node("Tanh", first)), perm=[0, 1, 3, 2])
    model = b.model(IMAGE, [b.node("Layer", h, b.normal(5, 4, 3, 3), domain="mine")])
    fused, report = fuse(model)
    assert [n.way for n in report.folded] == ["forward"]
    assert operators(fused) == ["Tanh", "Conv", "Tanh", "Transpose", "Conv"]
    assert_same(model, fused)


def test_functions_without_an_absorber_or_out_of_the_way_stay_functions():
    b = Builder()
    layer(b)
    add_function(b, "Bend", [helper.make_node("Softmax", ["X"], ["Y"], axis=1)], inputs=("X",))
    h = b.node("Bend", b.node("Layer", "x", b.normal(4, 4, 3, 3), domain="mine"), domain="mine")
    model = b.model(IMAGE, [b.node("Tanh", b.norm(h, 4))])
    fused, report = fuse(model)
    assert [n.reason for n in report.kept] == ["no-rule-for-operator"]
    assert fused.SerializeToString(deterministic=True) == fuse(fused)[0].SerializeToString(deterministic=True)
    assert operators(fused) == ["Layer", "Bend", "BatchNormalization", "Tanh"]
    assert {f.name for f in fused.functions} == {"Layer", "Bend"}


def activation(b: Builder) -> None:
    add_function(b, "Act", [helper.make_node("Relu", ["X"], ["Y"])], inputs=("X",))


def test_a_function_that_only_lets_pass_is_opened_where_a_norm_stands_before_it():
    b = Builder()
    pool = [helper.make_node("GlobalAveragePool", ["X"], ["t"]), helper.make_node("Flatten", ["t"], ["Y"])]
    add_function(b, "Pool", pool, inputs=("X",))
    activation(b)
    h = b.node("Pool", b.norm(b.node("Tanh", "x"), 4), domain="mine")
    away = b.node("Sigmoid", b.node("Act", "x", domain="mine"))
    model = b.model(IMAGE, [b.node("Gemm", h, b.normal(4, 2)), away])
    fused, report = fuse(model)
    assert [n.way for n in report.folded] == ["forward"]
    assert operators(fused) == ["Tanh", "GlobalAveragePool", "Flatten", "Act", "Sigmoid", "Gemm"]
    assert_same(model, fused)


def test_a_call_that_hides_the_rank_of_what_absorbs_a_norm_is_opened():
    b = Builder()
    activation(b)
    add_function(b, "Bend", [helper.make_node("Erf", ["X"], ["Y"])], inputs=("X",))
    h = b.norm(b.node("Tanh", b.node("Bend", "x", domain="mine")), 4)
    away = b.node("Sigmoid", b.node("Act", "x", domain="mine"))
    model = b.model({"x": ["n", 4]}, [b.node("MatMul", h, b.normal(4, 3)), away])
    fused, report = fuse(model)
    assert [n.way for n in report.folded] == ["forward"]
    assert operators(fused) == ["Erf", "Tanh", "Act", "Sigmoid", "MatMul", "Add"]
    assert [f.name for f in fused.functions] == ["Act"]
    assert_same(model, fused)


def test_a_function_within_a_function_in_the_way_is_opened_too():
    b = Builder()
    layer(b, "Inner")
    layer(b, "Elsewhere")
    inner = helper.make_node("Inner", ["X", "w"], ["t"], domain="mine", name="call")
    add_function(b, "Outer", [inner, helper.make_node("Relu", ["t"], ["Y"], name="bend")])
    away = b.node("Sigmoid", b.node("Elsewhere", "x", b.normal(4, 4, 3, 3), domain="mine"))
    h = b.node("Identity", b.node("Outer", "x", b.normal(4, 4, 3, 3), domain="mine"))
    model = b.model(IMAGE, [norm_without_shift(b, h), away])
    fused, report = fuse(model)
    assert len(report.folded) == 1
    assert operators(fused) == ["Elsewhere", "Sigmoid", "Conv", "Relu", "Identity"]
    assert {f.name for f in fused.functions} == {"Elsewhere"}
    assert_same(model, fused)


def test_a_norm_that_a_function_spells_out_is_opened_and_other_arithmetic_is_not():
    b = Builder()
    spelled = [
        helper.make_node("Sub", ["X", "w"], ["t"], name="s"),
        helper.make_node("Div", ["t", "w"], ["Y"], name="d"),
    ]
    add_function(b, "Spelled", spelled)
    add_function(b, "Sum", [helper.make_node("Add", ["X", "w"], ["Y"], name="a")])
    add_function(b, "Gate", [*spelled[:1], helper.make_node("Sigmoid", ["t"], ["u"]), *spelled[1:]])
    add_function(b, "Product", [helper.make_node("Mul", ["X", "w"], ["Y"], name="m")])
    h = b.conv("x", 4, 4, 1)
    for call in ("Sum", "Product", "Gate"):
        h = b.node("Tanh", b.node(call, h, b.normal(4, 1, 1), domain="mine"))
    h = b.node("Spelled", b.conv(h, 4, 4, 1), b.normal(4, 1, 1), domain="mine")
    model = b.model(IMAGE, [h])
    fused, report = fuse(model)
    assert report.changed
    assert operators(fused) == ["Conv", "Sum", "Tanh", "Product", "Tanh", "Gate", "Tanh", "Conv"]
    assert_same(model, fused)


def test_an_output_that_a_function_makes_a_scalar_stays_declared_as_one():
    b = Builder()
    total = [helper.make_node("Conv", ["X", "w"], ["t"]), helper.make_node("ReduceSum", ["t"], ["Y"], keepdims=0)]
    add_function(b, "Total", total)
    h = b.node("Total", b.norm(b.node("Tanh", "x"), 4), b.normal(4, 4, 1, 1), domain="mine")
    model = b.model(IMAGE, [h])
    model.graph.output[0].type.tensor_type.shape.SetInParent()
    fused, _ = fuse(model)
    assert operators(fused)[-1] == "ReduceSum"
    assert list(fused.graph.output) == list(model.graph.output)
    assert_same(model, fused)


def norm_function(b: Builder, name: str, opset: int) -> None:
    given = ["X", "s", "b", "m", "v"]
    node = helper.make_node("BatchNormalization", given, ["Y"])
    b.functions.append(helper.make_function("mine", name, given, ["Y"], [node], [helper.make_opsetid("", opset)]))


def test_a_norm_in_a_function_that_cannot_be_opened_is_named_and_the_others_fold():
    b = Builder()
    norm_function(b, "Old", 9)
    norm_function(b, "New", 17)
    h = b.node("Old", b.conv("x", 4, 4, 1), *b.statistics(4), domain="mine", out="old")
    h = b.node("New", b.conv(h, 4, 4, 1), *b.statistics(4), domain="mine")
    model = b.model(IMAGE, [h])
    fused, report = fuse(model)
    assert operators(fused) == ["Conv", "Old", "Conv"]
    assert [(n.name, n.form, n.outcome) for n in report.norms] == [
        ("old", "mine::Old", "kept"),
        (h, "mine::New", "folded"),
    ]
    assert report.kept[0].reason is Reason.OPERATOR
    assert "holds a norm and stays closed: call 'old_old' of mine::Old is written for opset 9" in report.kept[0].detail


def test_many_functions_are_opened_in_one_walk(monkeypatch):
    b = Builder()
    h = "x"
    for i in range(30):
        norm_function(b, f"Norm{i}", 17)
        h = b.node(f"Norm{i}", b.conv(h, 4, 4, 1), *b.statistics(4), domain="mine")
    asked = []
    monkeypatch.setattr(calls, "inline", lambda *given, **named: asked.append(1) or inline(*given, **named))
    assert len(fuse(b.model(IMAGE, [h]))[1].folded) == 30
    assert len(asked) == 1


def test_operators_that_nobody_reads_do_not_keep_a_norm_and_unknown_ones_do():
    """They stand in the file, or come out of a function of which not every output is read."""
    for domain, kept in (("", 0), ("other", 1)):
        b = Builder()
        h = b.conv("x", 4, 4, 1)
        b.node("Sigmoid", b.node("Neg", h, domain=domain), domain=domain)
        model = b.model(IMAGE, [b.norm(h, 4)])
        fused, report = fuse(model)
        assert len(report.kept) == kept
        assert operators(fused) == (["Conv", "Neg", "Sigmoid", "BatchNormalization"] if kept else ["Conv"])
    b = Builder()
    given = ["X", "s", "b", "m", "v"]
    body = [helper.make_node("BatchNormalization", given, ["Y"]), helper.make_node("Relu", ["X"], ["Z"])]
    b.functions.append(helper.make_function("mine", "Two", given, ["Y", "Z"], body, [helper.make_opsetid("", 17)]))
    inputs = [b.conv("x", 4, 4, 1), *b.statistics(4)]
    b.nodes.append(helper.make_node("Two", inputs, ["y", "unused"], domain="mine"))
    model = b.model(IMAGE, ["y"])
    fused, report = fuse(model)
    assert operators(fused) == ["Conv"]
    assert_same(model, fused)

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from renorm_onnx.fusion.conftest import Builder, assert_same, largest_difference, operators
from renorm_onnx.fusion.engine import FuseOptions, fuse
from renorm_onnx.fusion.report import Reason

IMAGE = {"x": ["n", 4, "h", "w"]}


def conv_norm(dtype: str = "float32", **attributes) -> onnx.ModelProto:
    b = Builder(dtype=dtype)
    b.norm(b.conv("x", 4, 6, **attributes), 6, out="y")
    return b.model(IMAGE, ["y"])


def test_a_norm_behind_a_convolution_folds():
    model = conv_norm(pads=[1, 1, 1, 1])
    fused, report = fuse(model)
    assert operators(fused) == ["Conv"]
    assert len(report.folded) == 1
    assert_same(model, fused)


def test_the_comparison_of_these_tests_sees_a_wrong_fold():
    model = conv_norm()
    fused, _ = fuse(model)
    for index, tensor in enumerate(fused.graph.initializer):
        wrong = onnx.ModelProto()
        wrong.CopyFrom(fused)
        array = numpy_helper.to_array(tensor).copy()
        array.flat[0] += 1e-3
        wrong.graph.initializer[index].CopyFrom(numpy_helper.from_array(array, tensor.name))
        assert largest_difference(model, wrong) > 1e-5, tensor.name


def test_the_input_model_is_untouched():
    model = conv_norm()
    before = model.SerializeToString(deterministic=True)
    fuse(model)
    assert model.SerializeToString(deterministic=True) == before


def test_the_kind_of_model_that_comes_in_goes_out(tmp_path):
    model = conv_norm()
    onnx.save(model, tmp_path / "m.onnx")
    assert isinstance(fuse(tmp_path / "m.onnx")[0], onnx.ModelProto)
    given = ir.from_proto(model)
    fused, _ = fuse(given)
    assert isinstance(fused, ir.Model)
    assert [n.op_type for n in given.graph] == ["Conv", "BatchNormalization"]
    assert [n.op_type for n in fused.graph] == ["Conv"]


def test_fusing_twice_changes_nothing():
    once, _ = fuse(conv_norm())
    twice, report = fuse(once)
    assert not report.changed
    assert twice.SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)


def test_the_result_is_deterministic():
    a, b = (fuse(conv_norm())[0].SerializeToString(deterministic=True) for _ in range(2))
    assert a == b


def test_interface_metadata_and_doc_strings_are_kept():
    model = conv_norm()
    model.doc_string, model.graph.doc_string, model.producer_name = "about", "graph", "someone"
    model.metadata_props.add(key="author", value="me")
    fused, _ = fuse(model)
    assert fused.graph.input[0] == model.graph.input[0]
    assert fused.graph.output[0].name == "y"
    assert (fused.doc_string, fused.graph.doc_string, fused.producer_name) == ("about", "graph", "someone")
    assert [(p.key, p.value) for p in fused.metadata_props] == [("author", "me")]


def test_a_name_means_the_same_value_in_both_files():
    b = Builder()
    h = b.node("Relu", b.norm(b.conv("x", 4, 4), 4, out="after_norm"))
    b.conv(b.norm(h, 4, out="before_conv"), 4, 6)
    model = b.model(IMAGE, [b.nodes[-1].output[0]])
    fused, report = fuse(model)
    assert len(report.folded) == 2
    shared = {o for n in model.graph.node for o in n.output} & {o for n in fused.graph.node for o in n.output}
    assert "after_norm" in shared
    for m in (model, fused):
        del m.graph.output[:]
        m.graph.output.extend(helper.make_tensor_value_info(n, 1, None) for n in sorted(shared))
    assert largest_difference(model, fused) < 3e-6
    names = {t.name for t in model.graph.initializer} & {t.name for t in fused.graph.initializer}
    before, after = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (model, fused))
    assert all(np.array_equal(before[n], after[n]) for n in names)


def test_new_names_do_not_collide_with_old_ones():
    b = Builder()
    w = b.normal(6, 4, 3, 3, name="w")
    b.normal(6, name="w__fused")
    b.norm(b.node("Conv", "x", w, "w__fused", out="y_operand__fused"), 6, out="y")
    model = b.model(IMAGE, ["y"])
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv"]
    assert_same(model, fused)


def test_shared_weights_and_shared_statistics_get_their_own_copies():
    b = Builder()
    w, stats = b.normal(4, 4, 3, 3), b.statistics(4)
    first = b.node("BatchNormalization", b.node("Conv", "x", w), *stats)
    second = b.node("BatchNormalization", b.node("Conv", first, w), *stats)
    third = b.node("BatchNormalization", b.node("Relu", second), *stats)
    model = b.model(IMAGE, [b.node("Conv", third, w)])
    fused, report = fuse(model)
    assert len(report.folded) == 3
    assert_same(model, fused, h=9, w=8)


def test_weights_read_by_something_else_keep_their_value():
    b = Builder()
    w = b.normal(4, 4, 1, 1)
    y = b.norm(b.node("Conv", "x", w), 4)
    model = b.model(IMAGE, [y, b.node("Relu", w)])
    fused, _ = fuse(model)
    assert "BatchNormalization" not in operators(fused)
    assert_same(model, fused)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_every_float_type_folds_and_is_rounded_once(dtype):
    model = conv_norm(dtype)
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv"]
    assert (
        largest_difference(model, fused) < {"float32": 3e-6, "float16": 5e-3, "bfloat16": 4e-2, "float64": 1e-14}[dtype]
    )
    w, s, _, _, var = (numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer)
    exact = w * (s / np.sqrt(var + np.float64(np.float32(1e-5)))).reshape(-1, 1, 1, 1)
    got = {t.name: numpy_helper.to_array(t) for t in fused.graph.initializer}
    weight = next(a for a in got.values() if a.ndim == 4)
    assert np.array_equal(weight, exact.astype(weight.dtype))


def overridable(ir_version: int) -> onnx.ModelProto:
    model = conv_norm()
    tensor = model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, 1, list(tensor.dims)))
    model.ir_version = ir_version
    return model


def test_weights_that_a_caller_may_override_are_kept_unless_told_otherwise():
    model = overridable(8)
    fused, report = fuse(model)
    assert operators(fused) == ["Conv", "BatchNormalization"]
    assert report.kept[0].refusals[0].reason in (Reason.OVERRIDABLE, Reason.WEIGHT)
    fused, report = fuse(model, FuseOptions(assume_constant_initializers=True))
    assert operators(fused) == ["Conv"]
    assert [i.name for i in fused.graph.input] == [i.name for i in model.graph.input]
    assert largest_difference(model, fused) < 3e-6


def test_before_ir_4_initializers_are_constants_and_listed_as_inputs():
    model = overridable(3)
    for tensor in model.graph.initializer[1:]:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, 1, list(tensor.dims)))
    onnx.checker.check_model(model)
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv"]
    assert_same(model, fused)
    assert {t.name for t in fused.graph.initializer} < {i.name for i in fused.graph.input}
    assert [i.name for i in fused.graph.input if i.name == "x"]


def if_model(*, weight_outside: bool) -> onnx.ModelProto:
    b, inner = Builder(), Builder(1)
    w = b.normal(4, 4, 3, 3, name="w")
    inner.norm(inner.node("Conv", "x", w if weight_outside else inner.normal(4, 4, 3, 3, name="iw")), 4, out="t")
    then = helper.make_graph(
        inner.nodes,
        "then",
        [],
        [helper.make_tensor_value_info("t", 1, None)],
        [] if weight_outside else inner.initializers,
    )
    if weight_outside:
        b.initializers += inner.initializers
    other = helper.make_graph(
        [helper.make_node("Conv", ["x", w], ["e"])], "else", [], [helper.make_tensor_value_info("e", 1, None)]
    )
    condition = b.constant(np.array(True))
    b.nodes.append(helper.make_node("If", [condition], ["y"], then_branch=then, else_branch=other))
    return b.model(IMAGE, ["y"])


@pytest.mark.parametrize("weight_outside", [False, True])
def test_norms_in_subgraphs_fold_whether_their_weights_lie_inside_or_outside(weight_outside):
    model = if_model(weight_outside=weight_outside)
    fused, report = fuse(model)
    assert len(report.folded) == 1
    then, other = (
        helper.get_attribute_value(a) for a in sorted(fused.graph.node[0].attribute, key=lambda a: a.name)[::-1]
    )
    assert [n.op_type for n in then.node] == ["Conv"]
    assert [n.op_type for n in other.node] == ["Conv"]
    assert_same(model, fused)


def test_a_value_that_a_subgraph_reads_may_not_change():
    b = Builder()
    c = b.conv("x", 4, 4, 1)
    b.norm(c, 4, out="y")
    body = helper.make_graph(
        [helper.make_node("Relu", [c], ["t"])], "b", [], [helper.make_tensor_value_info("t", 1, None)]
    )
    condition = b.node("Greater", b.node("ReduceMax", "x", keepdims=0), b.constant(np.array(0.5)))
    b.nodes.append(helper.make_node("If", [condition], ["z"], then_branch=body, else_branch=body))
    model = b.model(IMAGE, ["y", "z"])
    fused, report = fuse(model)
    assert report.kept[0].reason == Reason.SUBGRAPH
    assert_same(model, fused)


def test_an_intermediate_graph_output_keeps_its_value():
    b = Builder()
    c = b.conv("x", 4, 4)
    y = b.norm(c, 4)
    model = b.model(IMAGE, [c, y])
    fused, report = fuse(model)
    assert report.kept[0].reason == Reason.GRAPH_OUTPUT
    assert_same(model, fused)


@pytest.mark.parametrize("way", ["readers", "none"])
def test_another_reader_of_the_convolution_is_named(way):
    b = Builder()
    c = b.conv("x", 4, 4)
    y = b.norm(c, 4)
    outputs = [y, b.node("Sigmoid", c)] if way == "readers" else [y]
    fused, report = fuse(b.model(IMAGE, outputs))
    assert ("BatchNormalization" in operators(fused)) == (way == "readers")
    if way == "readers":
        assert report.kept[0].reason == Reason.CONSUMER
        assert "Sigmoid" in report.kept[0].detail


def raw_exporter_model() -> onnx.ModelProto:
    """A convolution whose bias is computed from shapes and the type of x, as exporters write it unoptimized."""
    b = Builder()
    w = b.normal(6, 4, 3, 3)
    shape = b.node("Gather", b.node("Shape", w), b.constant(np.array([0])))
    zero = b.node("CastLike", b.node("Constant", value=helper.make_tensor("c", TensorProto.FLOAT, [], [0.0])), "x")
    bias = b.node("Expand", zero, shape)
    b.norm(b.node("Conv", "x", w, bias), 6, out="y")
    return b.model(IMAGE, ["y"])


def test_constants_computed_from_shapes_and_types_are_constants():
    model = raw_exporter_model()
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv"]
    assert_same(model, fused)


def test_a_gigantic_computed_constant_is_not_built():
    b = Builder()
    fill = helper.make_tensor("c", TensorProto.FLOAT, [1], [0.5])
    w = b.node("ConstantOfShape", b.constant(np.array([1 << 20, 1 << 20, 1, 1])), value=fill)
    b.norm(b.node("Conv", "x", w), 6, out="y")
    fused, report = fuse(b.model(IMAGE, ["y"]))
    assert report.kept[0].reason in (Reason.WEIGHT, Reason.GRAPH_INPUT, Reason.OPERATOR, Reason.AXIS)
    assert "BatchNormalization" in operators(fused)


def test_training_mode_is_refused():
    b = Builder()
    c = b.conv("x", 4, 6)
    b.nodes.append(helper.make_node("BatchNormalization", [c, *b.statistics(6)], ["y", "m", "v"], training_mode=1))
    fused, report = fuse(b.model(IMAGE, ["y"]))
    assert report.kept[0].reason == Reason.TRAINING
    assert "BatchNormalization" in operators(fused)


def test_forward_folding_refuses_padding_that_would_see_the_shift():
    b = Builder()
    model = b.model(IMAGE, [b.conv(b.norm("x", 4), 4, 6, pads=[1, 1, 1, 1])])
    fused, report = fuse(model)
    assert report.kept[0].refusals[-1].reason == Reason.PADDING
    assert operators(fused) == ["BatchNormalization", "Conv"]


@pytest.mark.parametrize("group", [1, 2, 4])
def test_forward_folding_into_grouped_convolutions(group):
    b = Builder()
    model = b.model(IMAGE, [b.conv(b.norm("x", 4), 4, 8, group=group)])
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv"]
    assert_same(model, fused)


def test_several_readers_take_a_forward_fold_together_or_not_at_all():
    b = Builder()
    n = b.norm("x", 4)
    model = b.model(IMAGE, [b.conv(n, 4, 6), b.conv(n, 4, 3, 1)])
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv", "Conv"]
    assert_same(model, fused)
    b = Builder()
    n = b.norm("x", 4)
    model = b.model(IMAGE, [b.conv(n, 4, 6), b.node("Sigmoid", n)])
    fused, report = fuse(model)
    assert "BatchNormalization" in operators(fused)
    assert report.kept[0].refusals[-1].reason == Reason.OPERATOR


def function_model(opset: int = 17) -> onnx.ModelProto:
    b = Builder()
    node = helper.make_node("BatchNormalization", ["X", "s", "b", "m", "v"], ["Y"])
    attribute = node.attribute.add()
    attribute.name, attribute.ref_attr_name, attribute.type = "epsilon", "eps", onnx.AttributeProto.FLOAT
    imports = [helper.make_opsetid("", opset)]
    b.functions.append(
        helper.make_function("other", "Norm", ["X", "s", "b", "m", "v"], ["Y"], [node], imports, attributes=["eps"])
    )
    b.functions.append(
        helper.make_function("other", "Double", ["X"], ["Y"], [helper.make_node("Add", ["X", "X"], ["Y"])], imports)
    )
    h = b.node("Norm", b.conv("x", 4, 4), *b.statistics(4), domain="other", eps=1e-3)
    h = b.node("Double", h, domain="other")
    h = b.node("Norm", b.node("Conv", h, b.normal(6, 4, 1, 1)), *b.statistics(6), domain="other", eps=0.5)
    return b.model(IMAGE, [h])


def test_functions_that_hold_a_norm_are_opened_per_call_and_others_left_alone():
    model = function_model()
    fused, report = fuse(model)
    assert len(report.folded) == 2
    assert operators(fused) == ["Conv", "Double", "Conv"]
    assert [f.name for f in fused.functions] == ["Double"]
    assert_same(model, fused)
    ignored_epsilon = function_model()
    for node in ignored_epsilon.graph.node:
        for a in node.attribute:
            a.f = 1e-5 if a.name == "eps" else a.f
    assert largest_difference(ignored_epsilon, fused) > 1e-3


def test_three_thousand_operators_between_do_not_overflow_the_stack():
    b = Builder()
    h = "x"
    for _ in range(3000):
        h = b.node("Identity", h)
    model = b.model(IMAGE, [b.norm(h, 4)])
    _, report = fuse(model)
    assert len(report.kept) == 1


def test_a_norm_that_took_up_another_one_is_planned_with_what_it_is_now():
    b = Builder()
    h = b.norm(b.norm(b.node("Sigmoid", "x"), 4), 4)
    h = b.norm(b.node("Relu", b.node("Identity", b.norm(b.norm(h, 4), 4))), 4)
    model = b.model(IMAGE, [b.node("Sigmoid", h), b.conv(b.norm("x", 4), 4, 2)])
    fused, report = fuse(model, FuseOptions(allow_cancellation=True))
    assert operators(fused).count("BatchNormalization") == 2
    assert len(report.kept) == 2
    assert_same(model, fused)


def test_order_of_norms_in_a_deep_chain_does_not_matter():
    b = Builder()
    h = "x"
    for _ in range(30):
        h = b.norm(h, 4)
    h = b.conv(h, 4, 5)
    for _ in range(30):
        h = b.norm(h, 5)
    model = b.model(IMAGE, [h])
    fused, report = fuse(model, FuseOptions(allow_cancellation=True))
    assert operators(fused) == ["Conv"]
    assert len(report.folded) == 60

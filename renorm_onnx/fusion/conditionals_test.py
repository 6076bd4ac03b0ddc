"""An If that always goes one way is opened where norms stay otherwise; every other If stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from renorm_onnx.fusion.conftest import Builder, assert_same, largest_difference, operators
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.report import Reason

IMAGE = {"x": ["n", 4, 8, 8]}


def branch(b: Builder, name: str, write: Callable[[], Sequence[str]]) -> onnx.GraphProto:
    """A subgraph of the nodes that `write` adds; its constants stay outside."""
    outer, b.nodes = b.nodes, []
    infos = [helper.make_tensor_value_info(r, TensorProto.FLOAT, None) for r in write()]
    nodes, b.nodes = b.nodes, outer
    return helper.make_graph(nodes, name, [], infos)


def choose(b: Builder, condition: str, yes: Callable[[], Sequence[str]], no: Callable[[], Sequence[str]]) -> str:
    return b.node("If", condition, then_branch=branch(b, "yes", yes), else_branch=branch(b, "no", no))


def has_channels(b: Builder, channels: int, x: str = "x") -> str:
    """Whether axis 1 of `x` is so long, as exporters ask: by Shape, Gather and Equal."""
    size = b.node("Gather", b.node("Shape", x), b.constant(np.array(1)), axis=0)
    return b.node("Equal", size, b.constant(np.array(channels)))


@pytest.mark.parametrize("channels", [4, 5])
def test_a_norm_behind_an_if_that_asks_for_a_fixed_size_folds(channels):
    b = Builder()
    h = b.conv("x", 4, 6)
    taken = choose(b, has_channels(b, channels), lambda: [b.node("Neg", h)], lambda: [b.node("Identity", h)])
    b.norm(taken, 6, out="y")
    model = b.model(IMAGE, ["y"])
    fused, report = fuse(model)
    assert operators(fused) == (["Conv"] if channels == 4 else ["Conv", "Identity"])
    assert [n.way for n in report.folded] == ["backward"]
    assert_same(model, fused)
    assert not fuse(fused)[1].changed


def test_the_comparison_of_these_tests_sees_the_wrong_branch():
    models = []
    for flag in (True, False):
        b = Builder()
        no = lambda b=b: [b.node("Neg", "x")]  # noqa: E731
        taken = choose(b, b.constant(np.array(flag)), lambda b=b: [b.node("Identity", "x")], no)
        models.append(b.model(IMAGE, [b.node("Tanh", taken)]))
    assert largest_difference(*models) > 0.1


def test_norms_in_the_branch_fold_into_what_stands_outside_and_those_of_the_other_are_gone():
    b = Builder()
    h = b.conv("x", 4, 6)
    taken = choose(b, b.constant(np.array(True)), lambda: [b.norm(h, 6)], lambda: [b.norm(b.node("Tanh", h), 6)])
    model = b.model(IMAGE, [b.node("Relu", taken)])
    fused, report = fuse(model)
    assert operators(fused) == ["Conv", "Relu"]
    assert [n.detail for n in report.unreachable] == ["stands in a branch of an If that is never taken"]
    assert sorted(n.way for n in report.folded) == ["backward", "unreachable"]
    assert str(report) == "1 of 2 norms folded, 0 kept, 1 gone with a branch that is never taken"
    assert len(fused.graph.initializer) == 2
    assert_same(model, fused)


def test_arithmetic_in_the_branch_that_is_never_taken_is_not_counted_as_folded():
    b = Builder()
    unused = lambda: [b.node("Mul", b.node("Tanh", "x"), b.constant(np.array(0.5)))]  # noqa: E731
    taken = choose(b, b.constant(np.array(True)), lambda: [b.node("Relu", "x")], unused)
    _, report = fuse(b.model(IMAGE, [b.norm(taken, 4)]))
    assert (len(report.kept), report.affines_folded, report.changed) == (1, 0, False)
    assert report.to_dict()["affines"][0]["way"] == "unreachable"


def test_an_if_that_may_go_either_way_stays_and_its_norms_with_it():
    b = Builder()
    h = b.conv("x", 4, 6)
    condition = b.node("Greater", b.node("ReduceSum", "x", keepdims=0), b.constant(np.array(0.5)))
    taken = choose(b, condition, lambda: [b.norm(h, 6)], lambda: [b.node("Neg", h)])
    model = b.model(IMAGE, [b.norm(taken, 6)])
    fused, report = fuse(model)
    assert [n.reason for n in report.kept] == [Reason.SUBGRAPH, Reason.SUBGRAPH]
    assert "If" in operators(fused)
    assert_same(model, fused)


def test_a_condition_that_compares_floats_is_not_taken_for_proven():
    b = Builder()
    third = b.node("Div", b.constant(np.array(1.0)), b.constant(np.array(3.0)))
    condition = b.node("Equal", b.node("Mul", third, b.constant(np.array(3.0))), b.constant(np.array(1.0)))
    taken = choose(b, condition, lambda: [b.conv("x", 4, 6)], lambda: [b.conv("x", 4, 6)])
    fused, report = fuse(b.model(IMAGE, [b.norm(taken, 6)]))
    assert not report.kept, "both branches absorb the norm"
    assert "If" in operators(fused)


def test_an_if_out_of_the_way_of_norms_that_fold_stays():
    b = Builder()
    taken = choose(b, b.constant(np.array(True)), lambda: [b.node("Tanh", "x")], lambda: [b.node("Relu", "x")])
    fused, _ = fuse(b.model(IMAGE, [b.norm(b.conv(taken, 4, 6), 6)]))
    assert operators(fused) == ["If", "Conv"]


def nested(b: Builder) -> str:
    inner = lambda: [choose(b, has_channels(b, 4), lambda: [b.conv("x", 4, 6)], lambda: [b.conv("x", 4, 6)])]  # noqa: E731
    return choose(b, has_channels(b, 7), lambda: [b.node("Relu", b.conv("x", 4, 6))], inner)


def test_an_if_in_the_branch_of_another_is_opened_too():
    b = Builder()
    model = b.model(IMAGE, [b.norm(nested(b), 6)])
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv"]
    assert_same(model, fused)


def with_names(model: onnx.ModelProto, **names: str) -> onnx.ModelProto:
    """The model with values renamed everywhere, those of subgraphs too."""

    def rename(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            node.input[:] = [names.get(n, n) for n in node.input]
            node.output[:] = [names.get(n, n) for n in node.output]
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    rename(attribute.g)
        for output in graph.output:
            output.name = names.get(output.name, output.name)

    rename(model.graph)
    return model


def test_names_of_the_branch_stay_where_they_are_unique():
    b = Builder()
    h = b.conv("x", 4, 6)
    taken = choose(
        b,
        b.constant(np.array(True)),
        lambda: [b.node("Abs", b.node("Relu", h, out="first"), out="second")],
        lambda: [b.node("Abs", b.node("Neg", h, out="third"), out="fourth")],
    )
    y = b.norm(taken, 6, out="y")
    # Both branches may use one name, and so may what is computed later on outside.
    model = with_names(b.model(IMAGE, [y, b.node("Tanh", y, out="z")]), third="first", fourth="second")
    fused, report = fuse(model)
    assert report.kept
    assert [o for n in fused.graph.node for o in n.output] == [h, "first", taken, "y", "z"]
    assert_same(model, fused)
    model = with_names(model, z="first")
    model.graph.output[1].name = "first"
    fused, _ = fuse(model)
    assert [o for n in fused.graph.node for o in n.output] == [h, "first_1", taken, "y", "first"]
    assert_same(model, fused)


def test_what_a_branch_hands_out_without_computing_it_is_copied():
    b = Builder()
    weight = helper.make_tensor("stored", TensorProto.FLOAT, [6], np.linspace(1, 2, 6))
    stored = helper.make_graph([], "yes", [], [helper.make_tensor_value_info("stored", 1, [6])], [weight])
    other = branch(b, "no", lambda: [b.node("Identity", b.normal(6))])
    scale = b.node("If", b.constant(np.array(True)), then_branch=stored, else_branch=other)
    rest: list[Any] = b.statistics(6)[1:]
    model = b.model(IMAGE, [b.node("BatchNormalization", b.conv("x", 4, 6), scale, *rest)])
    fused, report = fuse(model)
    assert not report.kept
    assert operators(fused) == ["Conv"]
    assert_same(model, fused)


def test_what_becomes_constant_only_then_is_worked_out_from_what_was_folded_before():
    b = Builder()
    stored = branch(b, "no", lambda: [b.node("Identity", b.normal(6, 1, 1))])
    scale = b.node("If", b.constant(np.array(False)), then_branch=stored, else_branch=stored)
    scale = b.node("Add", b.node("Identity", b.node("Add", scale, b.normal())), b.normal())
    h = b.node("Mul", b.conv("x", 4, 6), scale)
    model = b.model(IMAGE, [b.node("Relu", h), b.norm(b.node("Tanh", "x"), 4)])
    fused, report = fuse(model)
    assert next(e.way for e in report.entries if e.outcome == "folded") == "forward"
    assert_same(model, fused)


def test_nodes_of_two_branches_that_bear_one_name_are_told_apart():
    b = Builder()
    taken = [
        choose(b, b.constant(np.array(True)), lambda: [b.conv("x", 4, 6)], lambda: [b.conv("x", 4, 6)]) for _ in "ab"
    ]
    model = b.model(IMAGE, [b.norm(t, 6) for t in taken])
    for chooser in (n for n in model.graph.node if n.op_type == "If"):
        for attribute in chooser.attribute:
            attribute.g.node[0].name = "conv"
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv", "Conv"]
    assert sorted(n.name for n in fused.graph.node) == ["conv", "conv_1"]  # onnxruntime refuses two of one name
    assert_same(model, fused)


def test_nodes_of_two_branches_that_are_both_taken_are_told_apart_where_no_third_bears_their_name():
    b = Builder()
    taken = [
        choose(b, b.constant(np.array(True)), lambda: [b.conv("x", 4, 6)], lambda: [b.node("Relu", "x")]) for _ in "ab"
    ]
    model = b.model(IMAGE, [b.norm(t, 6) for t in taken])
    for chooser in (n for n in model.graph.node if n.op_type == "If"):
        next(a.g for a in chooser.attribute if a.name == "then_branch").node[0].name = "conv"
    fused, _ = fuse(model)
    assert sorted(n.name for n in fused.graph.node) == ["conv", "conv_1"]
    assert_same(model, fused)


def test_names_inside_a_branch_make_way_for_those_of_the_opened_if():
    b = Builder()
    h = b.conv("x", 4, 6)
    asks = b.node("Greater", b.node("ReduceSum", "x", keepdims=0), b.constant(np.array(0.5)))
    inner = lambda: choose(b, asks, lambda: [b.node("Neg", h, out="inside")], lambda: [b.node("Relu", h)])  # noqa: E731
    taken = choose(b, b.constant(np.array(True)), lambda: [b.conv(inner(), 6, 6)], lambda: [b.conv(h, 6, 6)])
    model = with_names(b.model(IMAGE, [b.norm(taken, 6)]), **{taken: "inside"})
    fused, report = fuse(model)
    assert not report.kept
    [still] = [n for n in fused.graph.node if n.op_type == "If"]
    names = [o for a in still.attribute for n in a.g.node for o in n.output]
    assert "inside" not in names, "onnxruntime refuses a name that stands inside and behind"
    assert_same(model, fused)


def test_what_only_an_if_without_readers_reads_goes_with_it():
    b = Builder()

    def taken() -> list[str]:
        inside = b.node("Tanh", "x")
        # Nobody reads the norm, and once it is gone, nobody reads the If, whose branches read the Tanh.
        b.norm(choose(b, asks, lambda: [b.node("Neg", inside)], lambda: [b.node("Abs", inside)]), 4)
        return [b.node("Relu", "x")]

    for flag in (True, False):
        b.nodes.clear()
        asks = b.node("Greater", b.node("ReduceSum", "x", keepdims=0), b.constant(np.array(0.5)))
        chosen = choose(b, b.constant(np.array(flag)), taken, lambda: [b.node("Neg", "x")])
        model = b.model(IMAGE, [b.norm(b.node("Sigmoid", chosen), 4)])
        fused, report = fuse(model)
        assert [n.outcome for n in report.norms] == ["kept", "folded"]
        assert operators(fused) == ["Relu" if flag else "Neg", "Sigmoid", "BatchNormalization"]
        assert_same(model, fused)


def test_a_norm_that_only_the_branch_never_taken_read_is_reported_as_gone():
    b = Builder()
    seen = b.norm("x", 4)
    yes = lambda: [b.node("Relu", "x")]  # noqa: E731
    taken = choose(b, b.constant(np.array(True)), yes, lambda: [b.node("Softmax", seen)])
    fused, report = fuse(b.model(IMAGE, [b.norm(b.node("Tanh", taken), 4)]))
    assert operators(fused) == ["Relu", "Tanh", "BatchNormalization"]
    assert [n.outcome for n in report.norms] == ["folded", "kept"]
    assert report.kept[0].refusals


def test_an_output_of_the_model_that_declares_no_shape_gets_none_from_the_branch():
    b = Builder()
    taken = choose(b, b.constant(np.array(True)), lambda: [b.node("Relu", "x")], lambda: [b.node("Neg", "x")])
    model = b.model(IMAGE, [taken, b.norm(b.node("Tanh", "x"), 4)])
    for attribute in model.graph.node[0].attribute:
        attribute.g.output[0].type.CopyFrom(model.graph.input[0].type)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    fused, _ = fuse(model)
    assert operators(fused) == ["Relu", "Tanh", "BatchNormalization"]
    assert list(fused.graph.output) == list(model.graph.output)


def test_an_output_of_the_model_that_is_declared_a_scalar_stays_one():
    b = Builder()
    total = lambda: [b.node("ReduceSum", "x", keepdims=0)]  # noqa: E731
    taken = choose(b, b.constant(np.array(True)), total, total)
    model = b.model(IMAGE, [taken, b.norm(b.node("Tanh", "x"), 4)])
    model.graph.output[0].type.tensor_type.shape.SetInParent()
    fused, _ = fuse(model)
    assert "If" not in operators(fused)
    assert list(fused.graph.output) == list(model.graph.output)
    assert_same(model, fused)


def stored_in_branches(b: Builder, condition: str, constants: Sequence[onnx.TensorProto]) -> str:
    """An If, both branches of which store the same constants, under the same names, and add them to x."""
    branches = {}
    for name in ("then_branch", "else_branch"):
        branches[name] = branch(b, name, lambda: [b.node("Sum", "x", *(c.name for c in constants))])
        branches[name].initializer.extend(constants)
    return b.node("If", condition, **branches)


def numbered(count: int) -> list[onnx.TensorProto]:
    return [helper.make_tensor(f"c{i}", TensorProto.FLOAT, [], [i + 1.0]) for i in range(count)]


def test_what_inner_branches_store_keeps_its_order_whatever_names_it_gets():
    b = Builder()
    asks = b.node("Greater", b.node("ReduceSum", "x", keepdims=0), b.constant(np.array(0.5)))
    constants = numbered(60)  # in memory, a few may happen to lie in their order
    inner = lambda: [stored_in_branches(b, asks, constants)]  # noqa: E731
    taken = choose(b, b.constant(np.array(True)), inner, lambda: [b.node("Relu", "x")])
    model = b.model(IMAGE, [b.norm(b.node("Tanh", taken), 4)])
    fused, _ = fuse(model)
    [still] = [n for n in fused.graph.node if n.op_type == "If"]
    for attribute in still.attribute:
        assert [float(numpy_helper.to_array(t)) for t in attribute.g.initializer] == [i + 1.0 for i in range(60)]
    assert_same(model, fused)


def test_what_a_branch_stored_inside_a_loop_becomes_no_input_of_the_body_before_ir_4():
    b = Builder()
    inputs = [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("s", TensorProto.FLOAT, IMAGE["x"])]
    outer, b.nodes = b.nodes, []
    on = b.node("Identity", "go")
    taken = stored_in_branches(b, b.constant(np.array(True)), numbered(2))
    state = b.norm(b.node("Tanh", b.node("Add", "s", taken)), 4)
    outputs = [(on, TensorProto.BOOL, []), (state, TensorProto.FLOAT, IMAGE["x"])]
    infos = [[helper.make_tensor_value_info(*v) for v in values] for values in (inputs, outputs)]
    body = helper.make_graph(b.nodes, "body", *infos)
    b.nodes = outer
    b.node("Loop", b.constant(np.array(2)), "", "x", body=body, out="y")
    model = b.model(IMAGE, ["y"], ir_version=3)
    model.graph.output[0].type.CopyFrom(model.graph.input[0].type)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    fused, _ = fuse(model)
    [loop] = fused.graph.node
    assert "If" not in [n.op_type for n in loop.attribute[0].g.node]
    assert len(loop.attribute[0].g.input) == 3
    assert_same(model, fused)

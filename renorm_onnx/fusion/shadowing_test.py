"""Names that stand inside and around a body: what is written is always accepted, and what they mean stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from renorm_onnx import model_file
from renorm_onnx.delivery import fuse_file
from renorm_onnx.errors import ModelFileError
from renorm_onnx.fusion.conftest import Builder
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.shadowing import rename_shadowing
from renorm_onnx.model_walk import nodes_of
from renorm_onnx.runtime.reference import evaluate
from renorm_onnx.runtime.session import open_session

WHERE = ("before", "behind", "stored", "given")


def shadowed(where: str, *, stored: bool, foldable: bool = True) -> onnx.ModelProto:
    """A branch defines an `h`, computed or stored, and so does the graph around it: `where` says at which place."""
    b = Builder()
    b.nodes.clear()
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("yes", "no")]
    if stored:
        inits = [numpy_helper.from_array(np.full((4, 1, 1), 2.0, np.float32), "h")]
        yes = helper.make_graph([helper.make_node("Mul", ["c", "h"], ["yes"])], "yes", [], info[:1], inits)
    else:
        inner = [helper.make_node("Tanh", ["c"], ["h"]), helper.make_node("Neg", ["h"], ["yes"])]
        yes = helper.make_graph(inner, "yes", [], info[:1])
    no = helper.make_graph([helper.make_node("Abs", ["c"], ["no"])], "no", [], info[1:])
    inputs = {"x": ["n", 4, 6, 6]} | ({"h": ["n", 4, 6, 6]} if where == "given" else {})
    b.node("Sin", "x", out="c")
    if where == "before":
        b.node("Cos", "x", out="h")
    if where == "stored":
        b.constant(np.full((4, 1, 1), 3.0), name="h")
    asks = b.node("Greater", b.node("ReduceSum", "x", keepdims=0), b.constant(np.array(0.5)))
    taken = b.node("If", asks, then_branch=yes, else_branch=no)
    other = b.node("Cos", taken, out="h") if where == "behind" else b.node("Add", "c", "h")
    last = b.conv(taken, 4, 5) if foldable else b.node("Relu", taken)
    model = b.model(inputs, [b.norm(last, 5 if foldable else 4, out="y"), other])
    for value in model.graph.output:  # onnx infers none where a name stands for two values
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [None] * 4))
    return model


def feeds_of(model: onnx.ModelProto, sign: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {v.name: (sign + rng.normal(size=(2, 4, 6, 6))).astype(np.float32) for v in model.graph.input}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("where", WHERE)
def test_what_is_written_is_accepted_and_computes_what_the_names_meant(where, stored):
    model = shadowed(where, stored=stored)
    fused, report = fuse(model)
    assert len(report.folded) == 1
    onnx.checker.check_model(fused, full_check=True)
    session = open_session(fused, "cpu", optimize="off")
    for sign in (-1.0, 1.0):
        feeds = feeds_of(model, sign)
        want, got = evaluate(model_file.load(model), feeds), session.run(feeds)
        assert list(want) == list(got)
        for name, array in want.items():
            np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-5)
    around = {name for node in fused.graph.node for name in (*node.output, *node.input) if name}
    branches = [a.g for node in fused.graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    inside = {name for g in branches for node in g.node for name in node.output} | {
        t.name for g in branches for t in g.initializer
    }
    assert "h" in around | {v.name for v in (*fused.graph.input, *fused.graph.initializer)}
    assert not inside & around


def test_onnxruntime_refuses_some_of_these_models_as_they_are():
    for where in ("stored", "given"):
        with pytest.raises(ModelFileError, match="refuses the model"):
            open_session(shadowed(where, stored=False), "cpu", optimize="off")


@pytest.mark.parametrize("where", WHERE)
def test_a_file_in_which_nothing_folds_is_copied_with_its_names(tmp_path, where):
    source = tmp_path / "m.onnx"
    onnx.save(shadowed(where, stored=True, foldable=False), source)
    done = fuse_file(source)
    assert not done.rewritten
    assert Path(done.target).read_bytes() == source.read_bytes()


TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N] x, bool[K] flags) => (float[N] y) {
  h = Neg(x)
  n = Size(flags)
  go = Constant<value = bool {1}>()
  y = Loop(n, go, h) <body = b (int64 n, bool go, float[N] h) => (bool on, float[N] next) {
    on = Identity(go)
    next = If(on) <then_branch = t () => (float[N] k) { z = Add(h, x) k = Neg(z) },
                   else_branch = e () => (float[N] k) { z = Add(h, h) next = Abs(z) k = Neg(next) }>
  }>
}"""


def test_formal_inputs_and_deeper_bodies_are_told_apart_and_branches_side_by_side_are_left():
    model = ir.from_proto(parser.parse_model(TEXT))
    assert rename_shadowing(model) == 4
    assert rename_shadowing(model) == 0
    [loop] = [node for node in model.graph if node.op_type == "Loop"]
    body = loop.attributes["body"].as_graph()
    assert [v.name for v in body.inputs] == ["n_1", "go_1", "h_1"]
    names = [v.name for node in nodes_of(model.graph) for v in node.outputs]
    assert names == ["h", "n", "go", "y", "on", "next", "z", "k", "z", "next_1", "k"]
    feeds = {"x": np.array([1.0, -2.0], np.float32), "flags": np.ones(2, bool)}
    want = evaluate(ir.from_proto(parser.parse_model(TEXT)), feeds)["y"]
    np.testing.assert_array_equal(evaluate(model, feeds)["y"], want)
    np.testing.assert_allclose(want, [-1.0, 2.0])

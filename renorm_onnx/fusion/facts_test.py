"""What a body hands to its next run is known by induction, and only then."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from renorm_onnx import model_file
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.fact import Dimension, Fact
from renorm_onnx.fusion.fact_dims import CONSTANT_OPERATORS, RULES
from renorm_onnx.fusion.facts import Facts
from renorm_onnx.runtime.reference import evaluate


def looped(
    carried: str, initial: str, body: str, handed_on: str, inputs: str, **constants: np.ndarray
) -> onnx.ModelProto:
    """A model of one Loop of three runs over the values `carried`, whose body begins with the line ``go = ...``."""
    names = ", ".join(f"float {v}" for v in carried.split(", "))
    outs = ", ".join(f"float {v}" for v in handed_on.split(", "))
    results = ", ".join(f"y{i}" for i in range(len(carried.split(", "))))
    text = f"""<ir_version: 10, opset_import: ["" : 17]> g ({inputs}) => (float y0) {{
        {results} = Loop<body = b (int64 i, bool before, {names}) => (bool go, {outs})
        {{ go = Identity(before) {body} }}>(count, yes, {initial}) }}"""
    model = onnx.parser.parse_model(text)
    for name, value in {"count": np.array(3), "yes": np.array(True), **constants}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return model


def sizes(model: onnx.ModelProto, name: str) -> tuple[int | None, ...] | None:
    """The proven sizes of a value, None for an open one."""
    loaded = ir.from_proto(model)
    facts = Facts(loaded, RULES, CONSTANT_OPERATORS)
    graphs = [loaded.graph, *(a.as_graph() for n in loaded.graph for a in n.attributes.values() if a.name == "body")]
    values = [v for g in graphs for v in (*g.inputs, *(o for n in g for o in n.outputs))]
    dims = facts[next(v for v in values if v.name == name)].dims
    return None if dims is None else tuple(d if isinstance(d, int) else None for d in dims)


SQUARE = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)


def test_a_value_that_keeps_its_sizes_has_them_in_every_run() -> None:
    model = looped("h", "x", "a = MatMul(h, w) n = Tanh(a)", "n", "float[N,4] x", w=SQUARE)
    assert sizes(model, "h") == (None, 4)
    assert sizes(model, "a") == (None, 4)


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("n = Concat<axis=0>(h, h)", (None, 4)),
        ("n = Concat<axis=1>(h, h)", (2, None)),
        ("n = Transpose(h)", (None, None)),
        ("n = Unsqueeze(h, o)", None),
        ("n = Unknown(h)", None),
        ("n = Identity(h)", (2, 4)),
    ],
)
def test_what_a_run_changes_is_open(body: str, want: tuple[int | None, ...] | None) -> None:
    model = looped("h", "x", body, "n", "float[2,4] x", o=np.array([0]))
    assert sizes(model, "h") == want


def test_values_that_change_places_keep_what_they_share() -> None:
    model = looped("h, k", "x, z", "a = Identity(h) b = Identity(k)", "b, a", "float[2,3] x, float[4,3] z")
    assert sizes(model, "h") == sizes(model, "k") == (None, 3)
    model = looped("h, k", "x, z", "a = Identity(h) b = Identity(k)", "b, a", "float[2,3] x, float[2,3,1] z")
    assert sizes(model, "h") is None


def test_two_open_sizes_of_one_value_are_not_the_same() -> None:
    model = looped("h", "x", "n = Transpose(h)", "n", "float[2,4] x")
    loaded = ir.from_proto(model)
    [body] = [a.as_graph() for n in loaded.graph for a in n.attributes.values() if a.name == "body"]
    dims = Facts(loaded, RULES, CONSTANT_OPERATORS)[body.inputs[2]].dims
    assert dims is not None
    assert isinstance(dims[0], Dimension)
    assert dims[0] is not dims[1]


def test_a_chain_behind_a_product_of_a_carried_value_folds() -> None:
    body = "a = MatMul(h, w) b = Mul(a, k) c = Add(b, l) n = Tanh(c)"
    rng = np.random.default_rng(1)
    constants = {
        "w": SQUARE * 0.3,
        "k": rng.normal(size=4).astype(np.float32),
        "l": rng.normal(size=4).astype(np.float32),
    }
    model = looped("h", "x", body, "n", "float[3,4] x", **constants)
    fused, report = fuse(model)
    assert [n.op_type for n in fused.graph.node[0].attribute[0].g.node] == ["Identity", "MatMul", "Add", "Tanh"]
    assert [e.outcome for e in report.entries] == ["folded"]
    feeds = {"x": rng.normal(size=(3, 4))}
    want, got = (evaluate(model_file.load(m), feeds)["y0"] for m in (model, fused))
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6)
    grows = looped("h", "x", f"{body} m = Unsqueeze(n, o)", "m", "float[3,4] x", o=np.array([0]), **constants)
    assert [e.outcome for e in fuse(grows)[1].entries] == []


def test_a_state_of_scan_is_known_by_induction_too() -> None:
    text = """<ir_version: 10, opset_import: ["" : 17]> g (float[2,4] s, float[N,2,4] x) => (float y0, float y1) {
        y0, y1 = Scan<num_scan_inputs=1, body = b (float h, float r) => (float n, float o)
        { a = MatMul(h, w) n = Add(a, r) o = Tanh(n) }>(s, x) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(SQUARE, "w"))
    assert sizes(model, "h") == (2, 4)
    assert sizes(model, "r") == (2, 4)
    assert sizes(model, "n") == (2, 4)


def test_a_value_that_depends_on_the_number_of_the_run_ends_the_proof_and_nothing_else() -> None:
    """The induction asks what the run hands on, which asks for the run's number: it must not begin again for that."""
    model = looped("h", "x", "f = Cast<to=1>(i) n = Add(h, f)", "n", "float[2,4] x")
    assert sizes(model, "h") is None
    assert sizes(model, "i") is None


@pytest.mark.parametrize(("reads_outside", "asked", "size"), [(True, "h19", 3), (False, "o0", None)])
def test_bodies_in_bodies_are_proven_once_each(reads_outside: bool, asked: str, size: int | None) -> None:
    """Each body reads a value of the one around it, or of the one inside; and takes a second round: 2^20 in all."""
    body = ""
    for i in reversed(range(20)):
        around = (f"r{i - 1}" if i else f"s{i}") if reads_outside else (f"o{i + 1}" if i < 19 else f"s{i}")
        values = f"g{i} = Identity(c{i}) r{i} = Relu(s{i}) "
        initial = "start" if reads_outside or not i else f"s{i - 1}"
        joined = f"h{i} = Concat<axis=0>(s{i}, {around})"
        heading = f"b{i} (int64 i{i}, bool c{i}, float s{i}) => (bool g{i}, float h{i})"
        body = f"o{i} = Loop<body = {heading} {{ {values} {body} {joined} }}>(count, yes, {initial})"
    text = f'<ir_version: 10, opset_import: ["" : 17]> g (float[1] x) => (float o0) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    for name, value in {"count": np.array(1), "yes": np.array(True), "start": np.ones((2, 3), np.float32)}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    derived: list[str] = []

    def counted(node: ir.Node, inputs: Sequence[Fact], opset: int) -> Sequence[Fact]:
        derived.append(node.outputs[0].name or "")
        return RULES["Concat"](node, inputs, opset)

    loaded = ir.from_proto(model)
    facts = Facts(loaded, {**RULES, "Concat": counted}, CONSTANT_OPERATORS)
    found = facts[next(o for n in loaded.graph.all_nodes() for o in n.outputs if o.name == asked)].dims
    assert size is None or (found is not None and isinstance(found[0], Dimension) and found[1] == size)
    assert len(derived) <= 3 * 20


@pytest.mark.parametrize(
    ("then", "other", "want"),
    [
        ("t = Relu(x)", "e = Neg(x)", (None, 4)),
        ("t = Concat<axis=0>(x, x)", "e = Neg(x)", (None, 4)),
        ("t = Concat<axis=1>(x, x)", "e = Neg(x)", (None, None)),
        ("t = Reshape(x, r)", "e = Neg(x)", None),
    ],
)
def test_an_output_of_an_if_has_the_sizes_in_which_both_branches_agree(
    then: str, other: str, want: tuple[int | None, ...] | None
) -> None:
    branches = f"then_branch = g () => (float t) {{ {then} }}, else_branch = h () => (float e) {{ {other} }}"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 17]> g (float[N,4] x, bool c) => (float y) {{ y = If(c) <{branches}> }}'
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "r"))
    assert sizes(model, "y") == want


def test_what_a_loop_hands_on_and_stacks_has_the_sizes_of_each_run() -> None:
    model = looped("h, k", "x, x", "n = MatMul(h, w) m = Concat<axis=0>(k, k)", "n, m", "float[2,4] x", w=SQUARE)
    assert sizes(model, "y0") == (2, 4)
    assert sizes(model, "y1") == (None, 4)
    stacked = looped("h", "x", "n = MatMul(h, w)", "n", "float[2,4] x", w=SQUARE)
    stacked.graph.node[0].output.append("rows")
    stacked.graph.node[0].attribute[0].g.output.append(stacked.graph.node[0].attribute[0].g.output[1])
    assert sizes(stacked, "rows") == (None, 2, 4)


def test_nothing_inside_a_body_in_a_body_rests_on_what_was_assumed_of_the_first_run() -> None:
    branch = (
        "then_branch = g () => (float t) { t = Concat<axis=1>(h, h) }, else_branch = h () => (float e) { e = Neg(h) }"
    )
    model = looped("h", "x", f"n = If(before) <{branch}>", "n", "float[2,4] x")
    loaded = ir.from_proto(model)
    facts = Facts(loaded, RULES, CONSTANT_OPERATORS)
    [loop] = loaded.graph
    body = loop.attributes["body"].as_graph()
    inner = body[1].attributes["then_branch"].as_graph().outputs[0]
    assert [isinstance(d, int) for d in facts[body.outputs[1]].dims or ()] == [True, False]
    assert [isinstance(d, int) for d in facts[inner].dims or ()] == [True, False]


def test_a_chain_of_a_thousand_loops_has_the_sizes_of_its_first_value_wherever_one_asks_first() -> None:
    heading = "(int64 i, bool c, float s) => (bool g, float r)"
    lines = [
        f"v{i + 1} = Loop<body = b {heading} {{ g = Identity(c) r = Relu(s) }}>(count, , v{i})" for i in range(1000)
    ]
    inputs = "float[2,3] v0, int64 count"
    text = f'<ir_version: 10, opset_import: ["" : 17]> g ({inputs}) => (float v1000) {{ {" ".join(lines)} }}'
    loaded = ir.from_proto(onnx.parser.parse_model(text))
    inside = [node.attributes["body"].as_graph().inputs[2] for node in loaded.graph]
    for asked in (*inside[-1:], loaded.graph.outputs[0], inside[500]):
        facts = Facts(loaded, RULES, CONSTANT_OPERATORS)
        assert facts[asked].dims == (2, 3)
        assert facts[inside[999]].dims == (2, 3)

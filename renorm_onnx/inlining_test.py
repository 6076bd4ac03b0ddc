"""Inlining keeps the values, the names and every function that was not asked for."""

import time

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from renorm_onnx import inlining
from renorm_onnx.errors import InputError
from renorm_onnx.inlining import inline

X = np.random.default_rng(0).normal(2.0, 3.0, (2, 3)).astype(np.float32)


def model_of(text: str) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(text)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def evaluate(proto: onnx.ModelProto, x: np.ndarray = X) -> list[np.ndarray]:
    return ReferenceEvaluator(proto).run(None, {"x": x})


def inlined(proto: onnx.ModelProto, **options: object) -> tuple[onnx.ModelProto, int]:
    model = ir.from_proto(proto)
    count = inline(model, **options)
    result = ir.to_proto(model)
    onnx.checker.check_model(result, full_check=True)
    return result, count


NESTED = """
<ir_version: 10, opset_import: ["" : 20, "a" : 1, "b" : 1]>
main (float[2, 3] x) => (float[2, 3] y, float[2, 3] z)
{
    y = a.Outer <gain: float = 3.0> (x)
    t = a.Outer (y)
    z = b.Shift (t)
}
<domain: "a", opset_import: ["" : 20, "b" : 1]>
Outer <gain: float = 2.0> (v) => (out)
{
    t = b.Scale <factor: float = @gain> (v)
    out = b.Shift (t)
}
<domain: "b", opset_import: ["" : 20]>
Scale <factor: float = 1.0> (v) => (out)
{
    c = Constant <value_float: float = @factor> ()
    out = Mul (v, c)
}
<domain: "b", opset_import: ["" : 20]>
Shift (v) => (out)
{
    c = Constant <value_float = 0.5> ()
    out = Add (v, c)
}
"""


def test_nested_calls_become_their_nodes_with_the_attributes_of_the_call() -> None:
    want = [X.astype(np.float64) * 3 + 0.5, (X.astype(np.float64) * 3 + 0.5) * 2 + 1.0]
    proto = model_of(NESTED.replace("a.Outer (y)", "a.Outer <gain: float = 2.0> (y)"))
    result, count = inlined(proto)
    assert count == 5
    assert not result.functions
    assert [i.domain for i in result.opset_import] == [""]
    assert [o.name for o in result.graph.output] == ["y", "z"]
    for got, expected in zip(evaluate(result), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_default_is_used_where_the_call_says_nothing() -> None:
    result, _ = inlined(model_of(NESTED))
    y = X.astype(np.float64) * 3 + 0.5
    np.testing.assert_allclose(evaluate(result)[1], y * 2 + 1.0, rtol=1e-6)


def test_functions_of_other_domains_stay_and_keep_their_import() -> None:
    result, _ = inlined(model_of(NESTED), domain="a")
    assert {(f.domain, f.name) for f in result.functions} == {("b", "Scale"), ("b", "Shift")}
    assert {i.domain for i in result.opset_import} == {"", "b"}


def test_a_call_inside_a_function_that_stays_passes_its_reference_on() -> None:
    result, count = inlined(model_of(NESTED), domain=lambda f: f.name == "Scale")
    assert count == 1
    assert {f.name for f in result.functions} == {"Outer", "Shift"}
    proto = onnx.ModelProto.FromString(result.SerializeToString())
    y = X.astype(np.float64) * 3 + 0.5
    want, _ = inlined(proto)
    np.testing.assert_allclose(evaluate(want)[0], y, rtol=1e-6)


def test_calls_in_branches_are_replaced_and_inner_names_stay_unique() -> None:
    proto = model_of("""
        <ir_version: 10, opset_import: ["" : 20, "b" : 1]>
        main (float[2, 3] x) => (float[2, 3] y)
        {
            zero = Constant <value_float = 0.0> ()
            total = ReduceSum <keepdims = 0> (x)
            p = Greater (total, zero)
            y = If (p) <
                then_branch = then () => (float[2, 3] a) { a = b.Cond (x) },
                else_branch = other () => (float[2, 3] c) { c = b.Cond (x) }
            >
        }
        <domain: "b", opset_import: ["" : 20]>
        Cond (v) => (out)
        {
            two = Constant <value_float = 2.0> ()
            w = Mul (v, two)
            largest = ReduceMax <keepdims = 0> (w)
            q = Greater (largest, two)
            out = If (q) <
                then_branch = inner () => (u) { u = Sub (w, two) },
                else_branch = inner2 () => (s) { s = Add (w, two) }
            >
        }
    """)
    result, count = inlined(proto)
    assert count == 2
    for x in (X, -X, X * 0 + 0.1):
        doubled = 2.0 * x.astype(np.float64)
        want = doubled - 2 if doubled.max() > 2 else doubled + 2
        np.testing.assert_allclose(evaluate(result, x)[0], want, rtol=1e-6)


def test_an_input_handed_through_keeps_the_name_of_the_output() -> None:
    proto = model_of("""
        <ir_version: 10, opset_import: ["" : 20, "b" : 1]>
        main (float[2, 3] x) => (float[2, 3] y, float[2, 3] z)
        {
            y, z = b.Twice (x)
        }
        <domain: "b", opset_import: ["" : 20]>
        Twice (v) => (v, out)
        {
            out = Add (v, v)
        }
    """)
    result, _ = inlined(proto)
    y, z = evaluate(result)
    np.testing.assert_array_equal(y, X)
    np.testing.assert_array_equal(z, X + X)


def test_an_output_that_the_call_leaves_out_can_still_be_used_by_the_body() -> None:
    proto = model_of("""
        <ir_version: 10, opset_import: ["" : 20, "b" : 1]>
        main (float[2, 3] x) => (float[2, 3] z)
        {
            , z = b.Two (x)
        }
        <domain: "b", opset_import: ["" : 20]>
        Two (v) => (first, second)
        {
            first = Add (v, v)
            second = Mul (first, first)
        }
    """)
    result, _ = inlined(proto)
    np.testing.assert_allclose(evaluate(result)[0], (2.0 * X.astype(np.float64)) ** 2, rtol=1e-6)


def opsets(body: str, operator: str) -> ir.Model:
    return ir.from_proto(
        onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20, "b" : 1]>
        main (float[2, 3] x) => (float[2, 3] y) {{ y = b.F (x) }}
        <domain: "b", opset_import: ["" : {body}]>
        F (v) => (out) {{ out = {operator} (v) }}
        """)
    )


def test_a_body_of_another_opset_is_inlined_where_it_means_the_same() -> None:
    assert inline(opsets("17", "Relu")) == 1  # Relu-14
    assert inline(opsets("9", "Relu")) == 1  # Relu-6, of fewer types
    with pytest.raises(InputError, match=r"call .* of b::F is written for opset 10 .* and Clip differs between them"):
        inline(opsets("10", "Clip"))
    with pytest.raises(InputError, match=r"and Softmax differs"):  # another default of its axis alone
        inline(opsets("12", "Softmax"))
    with pytest.raises(InputError, match=r"and PRelu differs"):  # whose slope broadcasts another way from opset 7 on
        inline(opsets("6", "PRelu"))
    with pytest.raises(InputError, match=r"and Unheard differs"):  # of which nothing is known
        inline(opsets("17", "Unheard"))
    assert inline(opsets("20", "Unheard")) == 1
    older = opsets("22", "Relu")
    older.opset_imports[""] = 9
    with pytest.raises(InputError, match=r"and Relu differs"):  # which has bfloat16 in opset 22, and had not in 9
        inline(older)


def test_functions_in_a_circle_are_refused() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20, "b" : 1]>
        main (float[2, 3] x) => (float[2, 3] y) { y = b.F (x) }
        <domain: "b", opset_import: ["" : 20, "b" : 1]> F (v) => (out) { out = b.G (v) }
        <domain: "b", opset_import: ["" : 20, "b" : 1]> G (v) => (out) { out = b.F (v) }
        """)
    )
    with pytest.raises(InputError, match=r"in a circle: b::F -> b::G -> b::F"):
        inline(model)


def test_functions_that_double_at_each_level_are_refused_before_anything_changes() -> None:
    levels = "\n".join(
        f'<domain: "b", opset_import: ["" : 20, "b" : 1]> F{i} (v) => (w) {{ t = b.F{i + 1} (v) w = b.F{i + 1} (t) }}'
        for i in range(40)
    )
    model = ir.from_proto(
        onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20, "b" : 1]>
        main (float[2, 3] x) => (float[2, 3] y) {{ y = b.F0 (x) }}
        {levels}
        <domain: "b", opset_import: ["" : 20]> F40 (v) => (out) {{ out = Relu (v) }}
        """)
    )
    with pytest.raises(InputError, match=rf"would grow to {2**40} nodes; the limit is {inlining.MAX_NODES}"):
        inline(model)
    assert [n.op_type for n in model.graph] == ["F0"]


def test_wrong_calls_are_refused_and_named() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20, "b" : 1]>
        main (float[2, 3] x) => (float[2, 3] y) { y = b.F (x, x) }
        <domain: "b", opset_import: ["" : 20]> F (v) => (out) { out = Relu (v) }
        """)
    )
    with pytest.raises(InputError, match="of b::F has 2 inputs; the function has 1"):
        inline(model)


@pytest.mark.parametrize("kind", [ir.AttrGraph, ir.AttrGraphs])
def test_a_call_that_passes_a_graph_is_refused(kind) -> None:
    model = opsets("20", "Relu")
    graph = ir.Graph([], [], nodes=[], name="body")
    model.graph.node(0).attributes["body"] = kind("body", graph if kind is ir.AttrGraph else [graph])
    with pytest.raises(InputError, match=r"of b::F passes a graph as attribute 'body'; this is not supported"):
        inline(model)


def test_a_call_without_an_input_that_its_function_returns_is_refused() -> None:
    model = opsets("20", "Relu")
    (function,) = model.functions.values()
    function.outputs.append(function.inputs[0])
    model.graph.node(0).resize_outputs(2)
    assert inline(model.clone()) == 1
    model.graph.node(0).replace_input_with(0, None)
    with pytest.raises(InputError, match=r"of b::F leaves out input 'v', which the function returns"):
        inline(model)


def chain_of_calls(length: int) -> ir.Model:
    body_in = ir.val("v")
    body = ir.node("Relu", [body_in], name="relu")
    body.outputs[0].name = "out"
    function = ir.Function(
        "b", "F", graph=ir.Graph([body_in], body.outputs, nodes=[body], opset_imports={"": 20}), attributes=[]
    )
    value = x = ir.val("x", ir.DataType.FLOAT, [2, 3])
    nodes, outputs = [], []
    for i in range(length):
        nodes.append(ir.node("F", [value], domain="b"))
        value = nodes[-1].outputs[0]
        value.name = f"v{i}"
        outputs.append(value)
    graph = ir.Graph([x], outputs, nodes=nodes, opset_imports={"": 20, "b": 1}, name="chain")
    return ir.Model(graph, ir_version=10, functions=[function])


def test_time_grows_linearly_with_the_number_of_calls() -> None:
    seconds = {}
    for length in (1_000, 8_000):
        model = chain_of_calls(length)
        start = time.process_time()
        assert inline(model) == length
        seconds[length] = time.process_time() - start
        assert [v.name for v in model.graph.outputs] == [f"v{i}" for i in range(length)]
        assert model.graph.num_nodes() == length
    assert seconds[8_000] < max(3.0, 24 * seconds[1_000]), seconds  # quadratic would be 64 times

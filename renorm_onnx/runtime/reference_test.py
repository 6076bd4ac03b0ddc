import numpy as np
import onnx
import onnx_ir as ir
import pytest

from renorm_onnx.errors import InputError
from renorm_onnx.runtime.reference import evaluate


def parse(text: str) -> ir.Model:
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


GENERATOR = np.random.default_rng(0)


def test_float32_arithmetic_is_done_in_float64():
    model = parse('<ir_version: 8, opset_import: ["": 17]> g (float[3] x) => (float[3] y) { y = Mul(x, x) }')
    x = GENERATOR.standard_normal(3).astype(np.float32)
    got = evaluate(model, {"x": x})
    assert got["y"].dtype == np.float64
    assert np.array_equal(got["y"], x.astype(np.float64) ** 2)


def test_a_cast_to_a_narrower_float_does_not_round():
    model = parse(
        '<ir_version: 8, opset_import: ["": 17]> g (float[3] x) => (float16[3] y) { y = Cast<to: int = 10>(x) }'
    )
    x = GENERATOR.standard_normal(3).astype(np.float32)
    assert np.array_equal(evaluate(model, {"x": x})["y"], x.astype(np.float64))


def test_integers_keep_their_type_and_wrap_around():
    model = parse('<ir_version: 8, opset_import: ["": 17]> g (int8[2] x) => (int8[2] y) { y = Add(x, x) }')
    got = evaluate(model, {"x": np.array([100, -7], np.int8)})["y"]
    assert got.dtype == np.int8
    assert got.tolist() == [-56, -14]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_weights_are_the_exact_values_the_file_stores(name):
    weight = np.array([0.1, -0.2]).astype(np.dtype(name) if name != "bfloat16" else ir.DataType.BFLOAT16.numpy())
    model = parse('<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { w = Neg(x) y = Mul(x, w) }')
    node = model.graph[1]
    value = ir.Value(name="weight", const_value=ir.tensor(weight))
    model.graph.register_initializer(value)
    node.replace_input_with(1, value)
    assert np.array_equal(evaluate(model, {"x": np.ones(2, np.float32)})["y"], weight.astype(np.float64))


def test_functions_take_attributes_with_defaults_and_may_be_nested():
    text = """<ir_version: 10, opset_import: ["": 18, "f": 1]> 
        g (float[2] x) => (float[2] y) { y = f.outer<a = 0.5>(x) }
        <domain: "f", opset_import: ["": 18, "f": 1]> outer<a, b: float = 3.0>(x) => (y) {
            p = LeakyRelu<alpha: float = @a>(x)  q = f.inner<c: float = @b>(p)  y = f.inner<c = 2.0>(q) }
        <domain: "f", opset_import: ["": 18]> inner<c>(x) => (y) {
            k = Constant<value_float: float = @c>()  y = Mul(x, k) }"""
    got = evaluate(parse(text), {"x": np.array([-1.0, 2.0], np.float32)})["y"]
    assert got.tolist() == [-3.0, 12.0]


def test_functions_use_their_own_opset():
    text = """<ir_version: 10, opset_import: ["": 18, "f": 1]> g (float[2,2,2] x) => (float[2,2,2] y) { y = f.s(x) }
        <domain: "f", opset_import: ["": 11]> s(x) => (y) { y = Softmax(x) }"""
    got = evaluate(parse(text), {"x": np.zeros((2, 2, 2), np.float32)})["y"]
    assert np.array_equal(got, np.full((2, 2, 2), 0.25))  # axis 1 and all after it, as below opset 13


def test_intermediate_values_are_returned_on_request():
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { t = Neg(x) u = Exp(t) y = Abs(u) }'
    got = evaluate(parse(text), {"x": np.array([2.0], np.float32)}, keep=["t", "x"])
    assert set(got) == {"y", "t", "x"}
    assert got["t"][0] == -2.0


def test_a_value_is_forgotten_after_its_last_reader():
    steps = "\n".join(f"v{i + 1} = Add(v{i}, v{i})" for i in range(60))
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[n] v0) => (float[n] v60) {{ {steps} }}'
    import tracemalloc

    x = np.zeros(10**6, np.float32)
    tracemalloc.start()
    evaluate(parse(text), {"v0": x})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 8 * 10**6  # 60 values of 8 MB each


def test_an_unknown_operator_is_refused_by_name_domain_and_opset():
    model = parse(
        '<ir_version: 8, opset_import: ["": 17, "com.x": 3]> g (float[1] x) => (float[1] y) { y = com.x.Foo(x) }'
    )
    with pytest.raises(
        InputError, match=r"operator 'Foo' of domain 'com.x' at opset 3: not covered .*reference unusable"
    ):
        evaluate(model, {"x": np.ones(1, np.float32)})


def test_a_file_for_one_kind_of_processor_is_refused_with_advice():
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], domain="com.microsoft.nchwc")
    values = [onnx.helper.make_tensor_value_info(name, 1, [1, 1, 3, 3]) for name in ("x", "w", "y")]
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft.nchwc", 1)]
    graph = onnx.helper.make_graph([node], "g", values[:2], values[2:])
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8))
    with pytest.raises(InputError, match=r"save at its level 'extended' instead \(reference unusable\)"):
        evaluate(model, {"x": np.ones((1, 1, 3, 3), np.float32), "w": np.ones((1, 1, 3, 3), np.float32)})


def test_opsets_before_six_are_refused():
    model = parse('<ir_version: 3, opset_import: ["": 5]> g (float[1] x) => (float[1] y) { y = Relu(x) }')
    with pytest.raises(InputError, match=r"node .* is of ONNX opset 5, expected 6 or later"):
        evaluate(model, {"x": np.ones(1, np.float32)})


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "graph input 'x' has no value"),
        ({"x": np.ones((2, 3), np.float32), "z": np.ones(1)}, "no graph input is named 'z'"),
        ({"x": np.ones((2, 4), np.float32)}, r"input 'x' has shape \(2, 4\), expected \('n', '3'\)"),
        ({"x": np.ones((3,), np.float32)}, r"input 'x' has shape \(3,\)"),
        ({"x": np.ones((2, 3), np.int64)}, "input 'x' has type int64, expected FLOAT"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(feeds, message):
    model = parse('<ir_version: 8, opset_import: ["": 17]> g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }')
    with pytest.raises(InputError, match=message):
        evaluate(model, feeds)


def test_keep_names_must_exist():
    model = parse('<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }')
    with pytest.raises(InputError, match="holds no value named 'q'"):
        evaluate(model, {"x": np.ones(1, np.float32)}, keep=["q"])


def test_an_operator_that_fails_on_its_inputs_names_itself_and_their_shapes():
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[n] x, float[m] z) => (float[k] y) { y = Add(x, z) }'
    with pytest.raises(
        InputError, match=r"'Add' of domain '' at opset 17 failed on inputs of shapes \[\(2,\), \(3,\)\]"
    ):
        evaluate(parse(text), {"x": np.ones(2, np.float32), "z": np.ones(3, np.float32)})


def test_parts_that_are_not_the_whole_are_refused():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[5] x) => (float[1] y, float[k] z)
        <int64[2] sizes = {1, 3}> { y, z = Split(x, sizes) }"""
    with pytest.raises(InputError, match=r"parts \[1, 3\] of an axis of length 5"):
        evaluate(parse(text), {"x": np.ones(5, np.float32)})


def test_an_initializer_that_is_also_an_input_may_be_overridden():
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[1] x, float[1] w) => (float[1] y) <float[1] w = {3.0}> { y = Mul(x, w) }"""
    x = np.array([2.0], np.float32)
    assert evaluate(parse(text), {"x": x})["y"][0] == 6.0
    assert evaluate(parse(text), {"x": x, "w": x})["y"][0] == 4.0


def test_results_that_share_memory_with_the_feeds_cannot_be_written():
    model = parse('<ir_version: 8, opset_import: ["": 17]> g (double[2] x) => (double[2] y) { y = Identity(x) }')
    got = evaluate(model, {"x": np.ones(2)})["y"]
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 5.0


def test_a_function_must_import_the_domains_it_uses():
    text = """<ir_version: 10, opset_import: ["": 18, "f": 1]> g (float[2] x) => (float[2] y) { y = f.h(x) }
        <domain: "f", opset_import: ["f": 1]> h(x) => (y) { y = Relu(x) }"""
    with pytest.raises(InputError, match="of domain '', of which no version is imported there"):
        evaluate(parse(text), {"x": np.ones(2, np.float32)})


def test_nodes_out_of_order_are_refused():
    model = parse('<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { t = Neg(x) y = Abs(t) }')
    nodes = list(model.graph)
    model.graph.remove(nodes[0])
    model.graph.append(nodes[0])
    with pytest.raises(InputError, match="value 't' is read before it is computed"):
        evaluate(model, {"x": np.ones(1, np.float32)})


def test_a_norm_of_mixed_types_is_computed_from_the_values_each_type_stores():
    text = """<ir_version: 8, opset_import: ["": 15]>
        g (float16[2, 3, 4] x, float16[3] s, float16[3] b, float[3] m, float[3] v) => (float16[2, 3, 4] y)
        { y = BatchNormalization<epsilon = 0.001>(x, s, b, m, v) }"""
    x, scale, bias = (GENERATOR.standard_normal(shape).astype(np.float16) for shape in ((2, 3, 4), 3, 3))
    mean, var = (GENERATOR.uniform(0.5, 2, 3).astype(np.float32) for _ in range(2))
    s, b, m, v = (value.astype(np.float64)[:, None] for value in (scale, bias, mean, var))
    want = (x.astype(np.float64) - m) / np.sqrt(v + np.float64(np.float32(0.001))) * s + b
    got = evaluate(parse(text), {"x": x, "s": scale, "b": bias, "m": mean, "v": var})["y"]
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_an_axis_outside_of_the_tensor_is_refused():
    text = '<ir_version: 10, opset_import: ["": 18]> g (float[2,3] x) => (float[2,3] y) {{ y = Softmax<axis = {}>(x) }}'
    x = np.zeros((2, 3), np.float32)
    for axis in (-2, 1):
        assert evaluate(parse(text.format(axis)), {"x": x})["y"].shape == (2, 3)
    for axis in (-3, 2):
        with pytest.raises(InputError, match=f"axis {axis} of a tensor of rank 2"):
            evaluate(parse(text.format(axis)), {"x": x})

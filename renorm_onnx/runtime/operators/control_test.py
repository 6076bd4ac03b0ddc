import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from renorm_onnx.errors import InputError
from renorm_onnx.runtime.reference import evaluate

HEAD = '<ir_version: 8, opset_import: ["": {opset}]>'


def compared(text: str, opset: int, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The reference's outputs, after onnxruntime's have been found the same to float32 rounding."""
    proto = onnx.parser.parse_model(HEAD.format(opset=opset) + text)
    got = evaluate(ir.serde.deserialize_model(proto), feeds)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for output, want in zip(session.get_outputs(), session.run(None, feeds), strict=True):
        np.testing.assert_allclose(got[output.name], want, rtol=1e-6, atol=1e-6)
    return got


@pytest.mark.parametrize("opset", [7, 11, 13, 16, 21, 24, 26])
@pytest.mark.parametrize("taken", [True, False])
def test_if_runs_the_branch_its_condition_chooses_with_captured_values(opset, taken):
    text = """g (bool c, float[2] x) => (float[2] y) {
        t = Neg(x)
        y = If (c) <then_branch = a () => (float[2] p) { p = Mul(t, x) },
                    else_branch = b () => (float[2] q) { q = Exp(t) }>
    }"""
    x = np.array([0.5, -1.5], np.float32)
    got = compared(text, opset, {"c": np.array(taken), "x": x})["y"]
    np.testing.assert_allclose(got, -(x.astype(float) ** 2) if taken else np.exp(-x.astype(float)), rtol=1e-14)


LOOP = """g (int64 m, bool c, float[2] x) => (float[2] y, float[k, 2] s) {
    one = Constant<value_floats: floats = [1.0, 1.0]>()
    y, s = Loop (m, c, x) <body = b (int64 i, bool go, float[2] v) => (bool stay, float[2] w, float[2] r) {
        f = Cast<to: int = 1>(i)  p = Mul(v, f)  w = Add(p, one)  r = Neg(w)
        total = ReduceSum<keepdims: int = 0>(w)
        limit = Constant<value_float: float = 20.0>()  stay = Less(total, limit)
    }>
}"""


@pytest.mark.parametrize("opset", [12, 13, 16, 19, 23, 26])
@pytest.mark.parametrize("limit", [2, 99])
def test_loop_carries_values_and_stacks_scan_outputs(opset, limit):
    feeds = {"m": np.array(limit), "c": np.array(True), "x": np.array([0.5, -1.5], np.float32)}
    got = compared(LOOP, opset, feeds)
    assert got["s"].shape == (2 if limit == 2 else 4, 2)
    assert np.array_equal(got["s"][-1], -got["y"])


@pytest.mark.parametrize(("given", "count"), [("m, ", 3), (", c", 4), ("m, c", 3)])
def test_the_limit_and_the_condition_of_a_loop_may_be_left_out(given, count):
    feeds = {"m": np.array(3), "c": np.array(True), "x": np.array([0.5, -1.5], np.float32)}
    assert compared(LOOP.replace("m, c, x)", f"{given}, x)"), 16, feeds)["s"].shape == (count, 2)


def test_loop_without_iterations_returns_what_it_was_given_and_empty_scans():
    feeds = {"m": np.array(5), "c": np.array(False), "x": np.array([0.5, -1.5], np.float32)}
    got = compared(LOOP, 16, feeds)
    assert got["y"].tolist() == [0.5, -1.5]
    assert got["s"].shape == (0, 2)


@pytest.mark.parametrize("opset", [9, 11, 16, 21, 26])
def test_scan_runs_over_any_axis_in_either_direction(opset):
    text = """g (float[2] x, float[2, 3] a, float[3, 2] b) => (float[2] y, float[2, 3] s) {
        y, s = Scan <num_scan_inputs = 2, scan_input_axes = [1, 0], scan_input_directions = [1, 0],
                     scan_output_axes = [1], scan_output_directions = [1],
                     body = f (float[2] v, float[2] p, float[2] q) => (float[2] w, float[2] r) {
            t = Mul(v, p)  w = Add(t, q)  r = Sub(w, p) }> (x, a, b)
    }"""
    generator = np.random.default_rng(0)
    shapes = {"x": 2, "a": (2, 3), "b": (3, 2)}
    feeds = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    compared(text, opset, feeds)


def test_scan_at_opset_8_runs_over_a_batch():
    text = """g (float[2, 1] x, float[2, 3, 1] a) => (float[2, 1] y, float[2, 3, 1] s) {
        y, s = Scan <num_scan_inputs = 1, body = f (float[1] v, float[1] p) => (float[1] w, float[1] r) {
            w = Add(v, p)  r = Neg(w) }> (, x, a)
    }"""
    generator = np.random.default_rng(0)
    feeds = {"x": generator.standard_normal((2, 1)).astype(np.float32)}
    feeds["a"] = generator.standard_normal((2, 3, 1)).astype(np.float32)
    proto = onnx.parser.parse_model(HEAD.format(opset=8) + text)
    got = evaluate(ir.serde.deserialize_model(proto), feeds)
    running = feeds["x"][:, None].astype(float) + np.cumsum(feeds["a"].astype(float), axis=1)
    np.testing.assert_allclose(got["s"], -running, rtol=1e-14)
    np.testing.assert_allclose(got["y"], running[:, -1], rtol=1e-14)


def test_bodies_may_be_nested_and_hold_weights_of_their_own():
    text = """g (bool c, int64 m, float[2] x) => (float[2] y) {
        y = If (c) <
            then_branch = a () => (float[2] p) {
                go = Identity(c)
                p = Loop (m, go, x) <body = b (int64 i, bool go_on, float[2] v) => (bool stay, float[2] w)
                    <float[2] k = {2.0, -3.0}> { stay = Identity(go_on)  u = Mul(v, k)  w = Add(u, x) }> },
            else_branch = e () => (float[2] q) { q = Identity(x) }>
    }"""
    feeds = {"c": np.array(True), "m": np.array(3), "x": np.array([0.5, -1.5], np.float32)}
    assert compared(text, 17, feeds)["y"].tolist() == [0.5 * 15, -1.5 * -20]


@pytest.mark.parametrize("opset", [11, 17, 26])
def test_sequences_grow_shrink_and_join(opset):
    text = """g (float[2] x, float[2] z) => (float[k] y, int64 n, float[2, j] s, float[2] first) {
        one = Constant<value = int64 {1}>()
        a = SequenceConstruct(x, z, x)  b = SequenceErase(a, one)
        c = SequenceInsert(b, z, one)  l = SequenceInsert(c, x)  m = SequenceInsert(l, z)  d = SequenceErase(m)
        y = ConcatFromSequence<axis: int = 0>(d)  n = SequenceLength(d)
        s = ConcatFromSequence<axis: int = 1, new_axis: int = 1>(c)
        parts = SplitToSequence<axis: int = 0>(y)  joined = ConcatFromSequence<axis: int = 0>(parts)
        pair = SequenceAt(d, one)  first = Identity(pair)
    }"""
    feeds = {"x": np.array([1.0, 2.0], np.float32), "z": np.array([3.0, 4.0], np.float32)}
    got = compared(text, opset, feeds)
    assert got["y"].tolist() == [1, 2, 3, 4, 1, 2, 1, 2]
    assert int(got["n"]) == 4


def test_functions_nested_too_deep_are_refused():
    functions = "\n".join(
        f'<domain: "f", opset_import: ["": 17, "f": 1]> h{i}(x) => (y) {{ y = f.h{i + 1}(x) }}' for i in range(200)
    )
    last = '<domain: "f", opset_import: ["": 17]> h200(x) => (y) { y = Relu(x) }'
    head = '<ir_version: 8, opset_import: ["": 17, "f": 1]> g (float[1] x) => (float[1] y) { y = f.h0(x) }'
    model = ir.serde.deserialize_model(onnx.parser.parse_model(f"{head}\n{functions}\n{last}"))
    with pytest.raises(InputError, match="nested more than 120 deep"):
        evaluate(model, {"x": np.ones(1, np.float32)})


def test_functions_nested_a_hundred_deep_are_evaluated():
    functions = "\n".join(
        f'<domain: "f", opset_import: ["": 17, "f": 1]> h{i}(x) => (y) {{ y = f.h{i + 1}(x) }}' for i in range(100)
    )
    last = '<domain: "f", opset_import: ["": 17]> h100(x) => (y) { y = Neg(x) }'
    head = '<ir_version: 8, opset_import: ["": 17, "f": 1]> g (float[1] x) => (float[1] y) { y = f.h0(x) }'
    model = ir.serde.deserialize_model(onnx.parser.parse_model(f"{head}\n{functions}\n{last}"))
    assert evaluate(model, {"x": np.ones(1, np.float32)})["y"].tolist() == [-1.0]

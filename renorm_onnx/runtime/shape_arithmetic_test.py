import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from renorm_onnx.runtime.reference import evaluate

SCALED = """<ir_version: 8, opset_import: ["": 17]> g (float[n, c, h, w] x) => (float[a, b, i, j] y) {
    shape = Shape<start: int = 2>(x)  real = Cast<to: int = 1>(shape)
    factor = Constant<value_float: float = FACTOR>()  product = Mul(real, factor)
    floor = Floor(product)  size = Cast<to: int = 7>(floor)
    front = Shape<start: int = 0, end: int = 2>(x)  sizes = Concat<axis: int = 0>(front, size)
    y = Resize<mode = "linear">(x, , , sizes)
}"""


def run_both(text: str, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    proto = onnx.parser.parse_model(text)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return evaluate(ir.serde.deserialize_model(proto), feeds)["y"], session.run(None, feeds)[0]


@pytest.mark.parametrize("factor", [0.7, 0.6, 1.1, 2.0, 1.4285714, 0.3333333])
@pytest.mark.parametrize("length", [10, 15, 30, 33, 70, 110])
def test_sizes_are_those_of_onnxruntime(factor, length):
    x = np.random.default_rng(0).standard_normal((1, 1, length, length + 10)).astype(np.float32)
    got, want = run_both(SCALED.replace("FACTOR", str(factor)), {"x": x})
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=2e-4)  # onnxruntime computes where to read in float32


def test_sizes_are_followed_through_functions():
    text = """<ir_version: 8, opset_import: ["": 17, "f": 1]> g (float[h] x) => (float[k] y) {
            shape = Shape(x)  size = f.scaled<by = 0.7>(shape)  y = ConstantOfShape(size) }
        <domain: "f", opset_import: ["": 17]> scaled<by>(shape) => (size) {
            real = Cast<to: int = 1>(shape)  factor = Constant<value_float: float = @by>()
            product = Mul(real, factor)  floor = Floor(product)  size = Cast<to: int = 7>(floor) }"""
    got, want = run_both(text, {"x": np.ones(10, np.float32)})
    assert got.shape == want.shape == (7,)


def test_sizes_are_followed_through_arithmetic_of_any_length():
    steps = ["real = Cast<to: int = 1>(shape)", "same = Mul(real, one)", "again = Mul(same, one)"]
    for count in (1, 2, 3):
        last = steps[count - 1].split(" ")[0]
        text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[h] x) => (float[k] y)
            <float[1] factor = {{0.7}}, float[1] one = {{1.0}}> {{
                shape = Shape(x)  {"  ".join(steps[:count])}  product = Mul({last}, factor)
                floor = Floor(product)  size = Cast<to: int = 7>(floor)  y = ConstantOfShape(size) }}"""
        got, want = run_both(text, {"x": np.ones(10, np.float32)})
        assert got.shape == want.shape == (7,)


@pytest.mark.parametrize("step", ["q = Floor(p)", "q = Cast<to: int = 7>(p)"])
@pytest.mark.parametrize(("kind", "factor"), [("float", 0.7), ("double", 0.699999999)])
@pytest.mark.parametrize("form", ["initializers", "nodes"])
def test_sizes_computed_from_constants_alone_are_those_of_onnxruntime(form, kind, factor, step):
    for length in (10.0, 30.0, 70.0):
        given = {"n": f"{kind}[1] {{{length}}}", "f": f"{kind}[1] {{{factor}}}"}
        nodes = "  ".join(f"{name} = Constant<value = {value}>()" for name, value in given.items())
        initializers = ", ".join(value.replace(" ", f" {name} = ") for name, value in given.items())
        text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[h] x) => (float[k] y)
            {"<" + initializers + ">" if form == "initializers" else ""} {{
                {nodes if form == "nodes" else ""}  p = Mul(n, f)  {step}
                size = Cast<to: int = 7>(q)  y = ConstantOfShape(size) }}"""
        got, want = run_both(text, {"x": np.ones(3, np.float32)})
        assert got.shape == want.shape


def test_data_that_a_function_casts_are_not_rounded():
    text = """<ir_version: 8, opset_import: ["": 17, "f": 1]> g (float[2] x) => (float[2] y) { y = f.there(x) }
        <domain: "f", opset_import: ["": 17]> there(v) => (w) { n = Cast<to: int = 10>(v)  w = Cast<to: int = 1>(n) }"""
    x = np.array([0.1, 1000.7], np.float32)
    got, _ = run_both(text, {"x": x})
    assert np.array_equal(got, x.astype(np.float64))


def test_constants_alone_and_data_stay_in_float64():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y)
        <float[2] a = {0.7, 0.3}, float[2] b = {10.0, 3.0}> { w = Mul(a, b)  y = Mul(w, x) }"""
    got, _ = run_both(text, {"x": np.ones(2, np.float32)})
    assert np.array_equal(got, np.array([0.7, 0.3], np.float32).astype(float) * [10.0, 3.0])


def test_what_is_cast_to_double_stays_double():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[h] x) => (double[k] y) {
        shape = Shape(x)  real = Cast<to: int = 11>(shape)  tenth = Constant<value = double[1] {0.1}>()
        y = Mul(real, tenth) }"""
    got, want = run_both(text, {"x": np.ones(7, np.float32)})
    assert np.array_equal(got, want)
    assert got.tolist() == [7 * 0.1]


def test_scales_computed_from_shapes_stay_in_float64():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[h] x) => (float[h] y) {
        n = Size(x)  real = Cast<to: int = 1>(n)  root = Sqrt(real)  scale = Reciprocal(root)  y = Mul(x, scale) }"""
    got, _ = run_both(text, {"x": np.ones(3, np.float32)})
    np.testing.assert_allclose(got, 1 / np.sqrt(3.0), rtol=1e-15)


def test_a_mean_over_positions_divides_by_the_exact_count():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[h] x) => (float y) {
        n = Size(x)  real = Cast<to: int = 1>(n)  total = ReduceSum<keepdims: int = 0>(x)  y = Div(total, real) }"""
    x = np.random.default_rng(0).standard_normal(7).astype(np.float32)
    got, _ = run_both(text, {"x": x})
    assert got == x.astype(float).sum() / 7


CAST = """<ir_version: 8, opset_import: ["": 17]> g (float[3] x) => (float[3] y)
    <float[3] w = {0.1, -3.3333333, 1000.7}> {
        n = Cast<to: int = TYPE>(w)  wide = Cast<to: int = 1>(n)  z = Mul(wide, x)
        m = Cast<to: int = TYPE>(z)  y = Cast<to: int = 1>(m) }"""


@pytest.mark.parametrize("kind", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_constants_are_rounded_where_the_file_casts_them_and_data_is_not(kind):
    text = CAST.replace("TYPE", str(kind.value))
    got, want = run_both(text.replace("(z)  y", "(wide)  y"), {"x": np.ones(3, np.float32)})
    assert np.array_equal(got, want)
    stored = np.array([0.1, -3.3333333, 1000.7], np.float32).astype(kind.numpy()).astype(np.float64)
    x = np.array([0.3, 0.7, 1.1], np.float32)
    got, _ = run_both(text, {"x": x})
    assert np.array_equal(got, stored * x.astype(np.float64))

"""Facts are proven from the graph alone: dimensions, contents and types that operators hand on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from renorm_onnx.fusion.fact import Dimension, Fact, product
from renorm_onnx.fusion.fact_dims import CONSTANT_OPERATORS, RULES
from renorm_onnx.fusion.facts import Facts


def facts_of(body: str, inputs: str, *, opset: int = 20, **constants: np.ndarray) -> dict[str, Fact]:
    """The fact about every value of a model."""
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => (float y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, value in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    model = ir.from_proto(proto)
    facts = Facts(model, RULES, CONSTANT_OPERATORS)
    return {o.name or "": facts[o] for node in model.graph for o in node.outputs}


SIZES = [
    ("y = Conv<pads=[1,0,1,0], strides=[2,1]>(x, w)", (8, 4, 5)),
    ('y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w)', (8, 4, 3)),
    ("y = ConvTranspose<strides=[2,1], pads=[1,0,0,1], output_padding=[1,0], dilations=[1,2]>(x, u)", (8, 15, 6)),
    ('y = ConvTranspose<auto_pad="SAME_UPPER", strides=[2,2]>(x, u)', (8, None, None)),
    ("y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)", (4, 3, 2)),
    ("y = MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(x)", (4, None, None)),
    ('y = MaxPool<kernel_shape=[2,2], auto_pad="SAME_LOWER", strides=[2,1]>(x)', (4, 4, 5)),
    ('y = MaxPool<kernel_shape=[2,2], auto_pad="SAME_UPPER", dilations=[2,1]>(x)', (4, None, None)),
    ('y = Conv<auto_pad="SAME_UPPER", dilations=[2,1]>(x, w)', (8, 7, 5)),
    ("y = MaxPool<kernel_shape=[2,6], strides=[1,3]>(x)", (4, 6, None)),
    ("y = GlobalAveragePool(x)", (4, 1, 1)),
    ("y = Pad(x, p)", (4, 10, 5)),
    ("y = Resize(x, , r)", (4, None, 5)),
    ("y = DepthToSpace<blocksize=2>(x)", (1, 14, 10)),
    ("y = Slice(x, o, e, a)", (2, 7, 5)),
    ("y = ReduceMean<keepdims=0>(x, k)", (4, 5)),
    ("y = ReduceMean(x, k)", (4, 1, 5)),
    ("y = Unsqueeze(x, a)", (1, 4, 7, 5)),
]


@pytest.mark.parametrize(("body", "sizes"), SIZES)
def test_sizes_follow_the_specification_and_open_ones_stay_open(body: str, sizes: tuple[int | None, ...]) -> None:
    constants = {
        "w": np.zeros((8, 4, 3, 1), np.float32),
        "u": np.zeros((4, 8, 3, 2), np.float32),
        "p": np.array([0, 0, 1, 0, 0, 0, 2, 0]),
        "r": np.array([1, 1, 2, 1], np.float32),
        "o": np.array([1]),
        "e": np.array([3]),
        "a": np.array([1]),
        "k": np.array([2]),
    }
    fact = facts_of(body, "float[N,4,7,5] x", **constants)["y"]
    dims = fact.dims
    assert dims is not None
    assert isinstance(dims[0], Dimension)
    assert tuple(d if isinstance(d, int) else None for d in dims[1:]) == sizes
    assert fact.dtype == ir.DataType.FLOAT


def test_only_a_size_that_is_proven_equal_is_the_same_size() -> None:
    body = "i = Identity(x) a = Reshape(i, p) b = Reshape(i, q) k = Identity(z) y = Reshape(k, p)"
    constants = {"p": np.array([-1, 3]), "q": np.array([-1, 3, 2])}
    facts = facts_of(body, "float[N,6] x, float[N,M,3] z", **constants)
    twice, same, joined = (facts[n].dims or () for n in "aby")
    batches = [(facts[n].dims or ())[0] for n in "ik"]
    assert (twice[1:], same[1:], joined[1:]) == ((3,), (3, 2), (3,))
    assert same[0] is batches[0]
    assert twice[0] is not batches[0]
    assert joined[0] is not batches[1]
    assert [facts[n].dtype for n in "aby"] == [ir.DataType.FLOAT] * 3


def test_a_layer_that_reads_values_of_unknown_rank_makes_its_own_number_of_channels() -> None:
    weights = {"w": np.zeros((8, 4, 3, 3), np.float32), "u": np.zeros((4, 6, 3, 3), np.float32)}
    facts = facts_of("s = Squeeze(x) a = Conv(s, w) y = ConvTranspose<group=2>(s, u)", "float[1,N,4,7,5] x", **weights)
    for name, channels in (("a", 8), ("y", 12)):
        dims = facts[name].dims
        assert dims is not None
        assert [d if isinstance(d, int) else None for d in dims] == [None, channels, None, None]


def test_sizes_of_one_are_squeezed_and_no_others() -> None:
    assert facts_of("y = Squeeze(x)", "float[1,4,1,5] x")["y"].dims == (4, 5)
    assert facts_of("y = Squeeze(x)", "float[1,4,N,5] x")["y"].dims is None


def test_layers_of_one_dimension_have_sizes_too() -> None:
    weights = {"w": np.zeros((8, 4, 3), np.float32), "u": np.zeros((4, 8, 3), np.float32)}
    facts = facts_of("a = Conv(x, w) y = ConvTranspose(x, u)", "float[2,4,7] x", **weights)
    assert [facts[n].dims for n in "ay"] == [(2, 8, 5), (2, 8, 9)]


@pytest.mark.parametrize("axes", ["", ", none"])
def test_a_reduction_over_no_axes_may_be_none(axes: str) -> None:
    constants = {"k": np.float32([[1, 2]]), "none": np.zeros(0, np.int64)}
    kept = facts_of(f"y = ReduceSum<noop_with_empty_axes=1>(k{axes})", "float[N] x", **constants)["y"]
    assert (kept.dims, kept.content) == ((1, 2), None)
    summed = facts_of(f"y = ReduceSum(k{axes})", "float[N] x", **constants)["y"]
    assert summed.content is not None
    assert summed.content.tolist() == [[3]]


def test_equal_names_are_not_equal_sizes() -> None:
    facts = facts_of("a = Relu(x) b = Relu(z) y = Add(a, b)", "float[N,4] x, float[N,4] z")
    first, second = facts["a"].dims, facts["b"].dims
    assert first is not None
    assert second is not None
    assert first[0] is not second[0]
    assert product(first) != product(second)


def test_shapes_made_of_shapes_are_understood() -> None:
    body = "s = Shape(x) b = Gather(s, z) c = Concat<axis=0>(b, k) y = Reshape(x, c)"
    facts = facts_of(body, "float[N,4,7,5] x", z=np.array([0]), k=np.array([4, -1]))
    dims, source = facts["y"].dims, facts["s"].integers()
    assert dims is not None
    assert source is not None
    assert dims[0] is source[0]
    assert dims[1:] == (4, 35)


def test_constants_are_computed_in_float64() -> None:
    body = "a = Mul(k, k) b = Cast<to=1>(i) c = Add(a, b) y = Expand(c, s)"
    fact = facts_of(body, "float[N] x", k=np.float32([0.1]), i=np.array([1]), s=np.array([3]))["y"]
    assert fact.content is not None
    assert fact.dtype == ir.DataType.FLOAT
    np.testing.assert_array_equal(fact.content, np.full(3, np.float64(np.float32(0.1)) ** 2 + 1))


def test_a_constant_of_absurd_size_is_not_computed() -> None:
    fact = facts_of("y = ConstantOfShape(s)", "float[N] x", s=np.array([1 << 40]))["y"]
    assert (fact.dims, fact.content) == ((1 << 40,), None)


def test_quantization_changes_the_type() -> None:
    facts = facts_of(
        "a = QuantizeLinear(x, s, z) b = QuantizeLinear(x, s) y = DequantizeLinear(a, s, z)",
        "float[N,4] x",
        s=np.float32(0.5),
        z=np.int8(1),
    )
    assert [facts[n].dtype for n in "aby"] == [ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT]


def test_dropout_hands_on_a_constant_only_at_inference() -> None:
    constant = {"k": np.float32([1, 2])}
    assert facts_of("y = Dropout(k)", "float[N] x", opset=13, **constant)["y"].is_constant
    assert facts_of("y = Dropout<is_test=1>(k)", "float[N] x", opset=6, **constant)["y"].is_constant
    assert not facts_of("y = Dropout(k)", "float[N] x", opset=6, **constant)["y"].is_constant
    trained = {"r": np.float32(0.5), "t": np.array(True), **constant}
    assert not facts_of("y = Dropout(k, r, t)", "float[N] x", opset=13, **trained)["y"].is_constant


CONTENTS = [
    ("a = Greater(k, z) y = Where(a, k, z)", lambda k: np.where(k > 0.25, k, 0.25)),
    ("a = LessOrEqual(k, z) b = Not(a) y = Where(b, k, z)", lambda k: np.where(k > 0.25, k, 0.25)),
    ("a = Tanh(k) b = Sigmoid(a) y = Softplus(b)", lambda k: np.log1p(np.exp(1 / (1 + np.exp(-np.tanh(k)))))),
    (
        "a = Sin(k) b = Cos(k) c = Sign(k) d = Ceil(k) y = Sum(a, b, c, d)",
        lambda k: np.sin(k) + np.cos(k) + np.sign(k) + np.ceil(k),
    ),
    ("y = ReduceMean(k, o)", lambda k: k.mean(0, keepdims=True)),
    ("y = ReduceL2<keepdims=0>(k, o)", lambda k: np.sqrt((k * k).sum(0))),
    ("y = ReduceMax<keepdims=0>(k)", lambda k: k.max()),
    (
        "a = ReduceL1(k, o) b = ReduceSumSquare(k, o) c = ReduceProd(k, o) y = Sum(a, b, c)",
        lambda k: abs(k).sum(0, keepdims=True) + (k * k).sum(0, keepdims=True) + k.prod(0, keepdims=True),
    ),
    ("t = Transpose(k) y = MatMul(k, t)", lambda k: k @ k.T),
    ("a, b = Split<axis=1, num_outputs=2>(k) y = Sub(a, b)", lambda k: k[:, :2] - k[:, 2:]),
    ("a = EyeLike<k=1>(k) y = Mul(a, k)", lambda k: np.eye(3, 4, 1) * k),
    ("a = EyeLike(k) y = Mul(a, k)", lambda k: np.eye(3, 4) * k),
    ("a = Cast<to=1>(r) y = Mul(a, k)", lambda k: np.array([1.0, 3, 5, 7]) * k),
    ("y = Tile(k, p)", lambda k: np.tile(k, (2, 1))),
    ("a = Mul(k, u) b = Cast<to=7>(a) c = Cast<to=1>(b) y = Mul(c, k)", lambda k: np.trunc(4 * k) * k),
]


@pytest.mark.parametrize(("body", "formula"), CONTENTS)
def test_constants_are_worked_out_in_double_precision(body: str, formula: Callable[[np.ndarray], np.ndarray]) -> None:
    k = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    constants = {"k": k, "z": np.float32(0.25), "o": np.array([0]), "p": np.array([2, 1]), "u": np.float32(4)}
    if "(r)" in body:
        body = f"r = Range(i, j, d) {body}"
        constants |= {"i": np.array(1), "j": np.array(8), "d": np.array(2)}
    content = facts_of(body, "float[N] x", **constants)["y"].content
    assert content is not None
    np.testing.assert_allclose(content, formula(k.astype(np.float64)), rtol=1e-14)


def test_what_depends_on_the_input_is_no_constant() -> None:
    for line in (
        "y = Tanh(x)",
        "y = MatMul(x, k)",
        "y, z = Split<num_outputs=2>(x)",
        "y = ReduceSum<keepdims=0>(x, o)",
    ):
        fact = facts_of(line, "float[4,3] x", k=np.ones((3, 2), np.float32), o=np.array([0]))["y"]
        assert fact.dims is not None
        assert not fact.is_constant


def test_tables_of_bytes_do_not_make_tables_of_gigabytes() -> None:
    for line in ("y = Range(i, j, d)", "t = Tile(k, p) y = Identity(t)"):
        constants = {"i": np.array(0), "j": np.array(2**40), "d": np.array(1), "k": np.ones(1, np.float32)}
        assert not facts_of(line, "float[4] x", p=np.array([2**40]), **constants)["y"].is_constant


def test_an_open_size_is_not_proven_to_differ_from_a_number() -> None:
    facts = facts_of("s = Shape(x) e = Equal(s, k) y = Mod(s, k)", "float[N,4] x", k=np.array([4, 4]))
    assert (facts["e"].dims, facts["e"].content) == ((2,), None)
    assert facts["y"].content is None


@pytest.mark.parametrize("to", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_a_stored_number_is_rounded_by_a_cast_as_by_onnxruntime(to: int, kind: type) -> None:
    """Of float64 to 16 bits, too: 1 + 2**-11 + 2**-40 lies above a tie, and beside it in float32."""
    ort = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    k = (rng.normal(size=4096) * 10.0 ** rng.integers(-9, 9, 4096)).astype(kind)
    k[:3] = np.array([1 + 2**-11 + 2**-40, 1 + 2**-8 + 2**-40, 1e30]).astype(kind) if kind != np.int64 else k[:3]
    named = np.dtype(kind).name.removesuffix("32" if kind == np.float32 else "").replace("float64", "double")
    text = f"<ir_version: 10, opset_import: ['' : 20]> g ({named}[N] k) => (double[N] y)".replace("'", '"')
    model = onnx.parser.parse_model(f"{text} {{ c = Cast<to={to}>(k) y = Cast<to=11>(c) }}")
    want = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"k": k})[0]
    fact = facts_of(f"y = Cast<to={to}>(k)", "float[N] x", k=k)["y"]
    assert fact.content is not None
    assert fact.dtype == to
    np.testing.assert_array_equal(fact.content, want)


def test_a_cast_to_a_type_of_eight_bits_gives_no_content() -> None:
    fact = facts_of("y = Cast<to=17>(k)", "float[N] x", k=np.float32([0.3]))["y"]
    assert (fact.dims, fact.content, fact.dtype) == ((1,), None, ir.DataType.FLOAT8E4M3FN)


TENTHS = {"ten": np.float32([10]), "part": np.float32([0.7]), "two": np.float32([2]), "half": np.float32([0.5])}
TENTHS |= {"seven": np.float32([7]), "thirteen": np.float32([13])}
TO_WHOLE = ["Cast<to=7>(f)", "Floor(f)", "Ceil(f)"]
SIGNS = ["Sign(f)", "Less(f, f0)"]


@pytest.mark.parametrize("jump", TO_WHOLE)
def test_nothing_is_known_behind_a_jump_beside_which_a_runtime_may_stand(jump: str) -> None:
    """10 * 0.7 is 7 in float32, and less in float64; 13 * 0.7 is far from any jump."""
    for line in ("f = Mul(ten, part)", "e = Tanh(ten) f = Neg(e)", "e = Mul(ten, part) f = Sub(e, ten)"):
        fact = facts_of(f"{line} y = {jump}", "float[N] x", **TENTHS)["y"]
        assert (fact.dims, fact.content) == ((1,), None)
    for line in ("f = Identity(part)", "f = Mul(ten, half)", "e = Div(ten, two) f = Neg(e)", "f = Mul(thirteen, part)"):
        assert facts_of(f"{line} y = {jump}", "float[N] x", **TENTHS)["y"].is_constant
    whole = facts_of(f"f = Mul(thirteen, part) g = {jump} y = Cast<to=7>(g)", "float[N] x", **TENTHS)["y"]
    assert whole.integers() == [10 if "Ceil" in jump else 9]


@pytest.mark.parametrize("jump", SIGNS)
def test_a_sign_is_known_unless_a_runtime_may_have_another(jump: str) -> None:
    near, far = "e = Mul(ten, part) f = Sub(e, seven)", "e = Mul(ten, part) f = Sub(e, ten)"
    for line, known in ((near, False), (far, True)):
        fact = facts_of(f"f0 = Sub(ten, ten) {line} y = {jump}", "float[N] x", **TENTHS)["y"]
        assert fact.is_constant == known
    for jump in ("Cast<to=9>(f)", "Equal(f, f0)"):
        assert not facts_of(f"f0 = Sub(ten, ten) {near} y = {jump}", "float[N] x", **TENTHS)["y"].is_constant


def test_a_narrower_type_keeps_what_is_computed_but_not_as_exact() -> None:
    facts = facts_of("f = Mul(ten, part) y = Cast<to=10>(f) z = Cast<to=7>(y)", "float[N] x", **TENTHS)
    assert facts["y"].content is not None
    assert not facts["y"].exact
    assert facts["z"].content is None


def test_what_a_runtime_rounds_stays_known_where_nothing_jumps() -> None:
    body = "a = Mul(ten, part) b = Cast<to=11>(a) c = Unsqueeze(b, zero) y = Max(c, c)"
    fact = facts_of(body, "float[N] x", zero=np.array([0]), **TENTHS)["y"]
    assert fact.content is not None
    assert fact.content.tolist() == [[10 * float(np.float32(0.7))]]


def test_a_size_that_is_scaled_by_a_whole_number_is_known_and_one_that_is_rounded_is_not() -> None:
    body = "s = Shape<start=1>(x) g = Cast<to=1>(s) h = Mul(g, {}) e = Floor(h) n = Cast<to=7>(e) y = Expand(ten, n)"
    assert facts_of(body.format("two"), "float[N,10] x", **TENTHS)["y"].dims == (20,)
    assert facts_of(body.format("part"), "float[N,10] x", **TENTHS)["y"].dims is None


def test_a_range_of_floats_is_known_if_they_are_whole() -> None:
    constants = {"z": np.float32(0), "w": np.float32(3), "d": np.float32(1), "p": np.float32(0.3)}
    whole = facts_of("y = Range(z, w, d)", "float[N] x", **constants)["y"]
    assert whole.content is not None
    assert (whole.content.tolist(), whole.exact) == ([0, 1, 2], True)
    (size,) = facts_of("y = Range(z, w, p)", "float[N] x", **constants)["y"].dims or ()
    assert isinstance(size, Dimension)


def test_a_scale_of_one_that_a_runtime_rounds_does_not_leave_a_size_as_it_is() -> None:
    """1 / 41 * 41 is 1 in float64, and less in float32."""
    body = "q = Div(one, n) o = Mul(q, n) r = Concat<axis=0>(one, one, one, o) y = Resize(x, , r)"
    for n, kept in ((41, False), (4, True)):
        dims = facts_of(body, "float[2,3,4,5] x", one=np.float32([1]), n=np.float32([n]))["y"].dims or ()
        assert (dims[3] == 5) == kept

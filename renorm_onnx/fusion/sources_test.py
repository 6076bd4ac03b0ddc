import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from renorm_onnx import model_file
from renorm_onnx.fusion.carrier import Desk
from renorm_onnx.fusion.conftest import Builder, assert_same, largest_difference, operators
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.fact_dims import CONSTANT_OPERATORS, RULES
from renorm_onnx.fusion.facts import Facts
from renorm_onnx.fusion.report import Reason, Refusal
from renorm_onnx.fusion.sources import Norm, find_norms

C = 6


def norms_of(model) -> list[Norm]:
    loaded = model_file.load(model)
    return list(find_norms(list(loaded.graph), Desk(Facts(loaded, RULES, CONSTANT_OPERATORS))))


def chain(shape: list[int], *, constant_first: bool = False) -> Builder:
    """Conv, then Sub mean, Div sigma, Mul gamma, Add beta, with constants of one shape."""
    b = Builder()
    h = b.conv("x", 4, C)
    for operator in ("Sub", "Div", "Mul", "Add"):
        c = b.constant(b.rng.uniform(0.5, 2, shape) * b.rng.choice([-1, 1], shape))
        swap = constant_first and operator != "Div"
        h = b.node(operator, *((c, h) if swap else (h, c)), out="y" if operator == "Add" else None)
    return b


@pytest.mark.parametrize("constant_first", [False, True])
@pytest.mark.parametrize("shape", [[C, 1, 1], [1, C, 1, 1], [], [1], [1, 1, 1], [1, 1, 1, 1]])
def test_chains_of_constants_fold_in_every_shape_that_is_a_channel_map(shape, constant_first):
    model = chain(shape, constant_first=constant_first).model({"x": ["n", 4, 7, 7]}, ["y"])
    fused, report = fuse(model)
    assert operators(fused) == ["Conv"]
    assert_same(model, fused)
    assert len(report.entries) == 1
    assert report.entries[0].kind == ("norm" if C in shape else "affine")


@pytest.mark.parametrize("shape", [[C], [1, 1, C], [C, 1], [1, C, 1, 1, 1], [C, C, 1], [C, 1, C]])
def test_constants_over_width_or_of_higher_rank_are_no_channel_maps(shape):
    """The output is square with as many columns as channels, where folders that compare lengths go wrong."""
    model = chain(shape).model({"x": ["n", 4, C + 2, C + 2]}, ["y"])
    fused, _ = fuse(model)
    assert "Conv" in operators(fused)
    assert len(operators(fused)) > 1
    assert_same(model, fused, n=C)


def test_a_constant_that_raises_the_rank_of_what_it_meets_is_no_map():
    b = Builder()
    h = b.node("Gemm", "x", b.normal(4, C))
    model = b.model({"x": ["n", 4]}, [b.node("Mul", h, b.normal(1, 1, C))])
    fused, _ = fuse(model)
    assert operators(fused) == ["Gemm", "Mul"]
    assert_same(model, fused)


def test_a_constant_that_broadcasts_its_operand_is_no_map():
    b = Builder()
    h = b.conv("x", 4, 1)
    b.node("Mul", h, b.normal(1, 5, 1, 1), out="y")
    model = b.model({"x": ["n", 4, 7, 7]}, ["y"])
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv", "Mul"]
    assert_same(model, fused)


def test_a_channel_size_that_is_not_proven_is_not_taken_from_value_info():
    b = Builder()
    b.node("Mul", "x", b.normal(1, C, 1, 1), out="y")
    assert norms_of(b.model({"x": ["n", "c", 7, 7]}, ["y"])) == []
    b = Builder()
    b.node("Mul", "x", b.normal(1, C, 1, 1), out="y")
    assert len(norms_of(b.model({"x": ["n", C, 7, 7]}, ["y"]))) == 1


def test_a_chain_is_one_norm_and_is_cut_where_others_read_it():
    assert [len(n.nodes) for n in norms_of(chain([C, 1, 1]).model({"x": ["n", 4, 7, 7]}, ["y"]))] == [4]
    b = chain([C, 1, 1])
    middle = b.nodes[2].output[0]
    cut = norms_of(b.model({"x": ["n", 4, 7, 7]}, ["y", b.node("Relu", middle)]))
    assert [len(n.nodes) for n in cut] == [2, 2]


def test_a_constant_divided_by_x_is_no_map():
    b = Builder()
    b.node("Div", b.constant(np.array(2.0)), b.conv("x", 4, C), out="y")
    assert norms_of(b.model({"x": ["n", 4, 7, 7]}, ["y"])) == []


def test_the_bias_that_completes_a_matmul_is_nothing_to_fold():
    b = Builder()
    b.node("Add", b.node("MatMul", "x", b.normal(4, C)), b.normal(C), out="y")
    model = b.model({"x": ["n", 4]}, ["y"])
    assert norms_of(model) == []
    assert not fuse(model)[1].changed


def test_a_norm_that_stays_stays_as_it_was():
    b = Builder()
    h = b.node("Relu", "x")
    for operator in ("Sub", "Div", "Mul", "Add"):
        h = b.node(operator, h, b.constant(b.rng.uniform(0.5, 2, (C, 1, 1))))
    b.node("Relu", h, out="y")
    model = b.model({"x": ["n", C, 7, 7]}, ["y"])
    fused, report = fuse(model)
    assert operators(fused) == ["Relu", "Sub", "Div", "Mul", "Add", "Relu"]
    assert report.kept[0].form == "chain"
    assert [(n.name, list(n.input)) for n in fused.graph.node] == [(n.name, list(n.input)) for n in model.graph.node]


@pytest.mark.parametrize(
    ("order", "kappa"),
    [
        (("Sub", "Div", "Mul", "Add"), 6.0),
        (("Sub", "Mul", "Add"), 0.3),
        (("Mul", "Add"), 0.0),
        (("Add",), 0.0),
        (("Neg", "Sub", "Div"), 6.0),
    ],
)
def test_kappa_of_a_chain_that_subtracts_first_is_the_mean_times_its_first_scale(order, kappa):
    b, h = Builder(), "x"
    values = {"Sub": 3.0, "Div": 0.5, "Mul": 0.1, "Add": 40.0}
    for operator in order:
        h = b.node(operator, *([h] if operator == "Neg" else [h, b.constant(np.full((C, 1, 1), values[operator]))]))
    (norm,) = norms_of(b.model({"x": ["n", C, 7, 7]}, [h]))
    assert norm.kappa == pytest.approx(kappa)


def batch_norm(opset: int, outputs: int = 1, dims: tuple[int, ...] = (C,), **attributes) -> ir.Model:
    """One BatchNormalization of any opset; onnxruntime and the checker have no say in what we recognize."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", C, 5, 5]))
    parameters = []
    for name in "sbmv":
        array = rng.uniform(0.5, 2, dims).astype(np.float32)
        parameters.append(ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(array)))
    node = ir.node("BatchNormalization", [x, *parameters], attributes, num_outputs=outputs)
    for i, value in enumerate(node.outputs):
        value.name = f"y{i}"
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=parameters, opset_imports={"": opset})
    return ir.Model(graph, ir_version=8)


@pytest.mark.parametrize(
    ("opset", "more", "reason"),
    [
        (5, {"is_test": 1}, Reason.OPSET),
        (6, {}, Reason.TRAINING),
        (6, {"is_test": 1}, None),
        (7, {}, None),
        (8, {"spatial": 1}, None),
        (8, {"outputs": 5}, Reason.TRAINING),
        (9, {}, None),
        (9, {"outputs": 5}, Reason.TRAINING),
        (13, {}, None),
        (14, {"training_mode": 1, "outputs": 3}, Reason.TRAINING),
        (14, {"training_mode": 0}, None),
        (15, {}, None),
        (24, {}, None),
        (8, {"spatial": 0, "dims": (C, 5, 5)}, Reason.AXIS),
    ],
)
def test_every_form_of_batch_normalization_is_read_or_refused(opset, more, reason):
    model = batch_norm(opset, **more)
    (norm,) = find_norms(list(model.graph), Desk(Facts(model, RULES, CONSTANT_OPERATORS)))
    if reason is None:
        s, b, m, v = (p.const_value.numpy().astype(np.float64) for p in model.graph.initializers.values())
        gain = s / np.sqrt(v + float(np.float32(1e-5)))
        assert np.array_equal(norm.map.scale, gain)
        assert np.allclose(norm.map.shift, b - m * gain, rtol=1e-15)
        assert norm.kappa == pytest.approx(np.sqrt(((m / np.sqrt(v) * s) ** 2).sum() / (s**2).sum()), rel=1e-4)
    else:
        assert isinstance(norm.map, Refusal)
        assert norm.map.reason == reason


def test_statistics_that_are_model_inputs_are_not_constant():
    b = Builder()
    b.node("BatchNormalization", b.conv("x", 4, C), *b.statistics(C)[:3], "var", out="y")
    _, report = fuse(b.model({"x": ["n", 4, 7, 7], "var": [C]}, ["y"]))
    assert report.kept[0].reason == Reason.NOT_CONSTANT
    assert "var" in report.kept[0].detail


def expanded(dims: list[str | int], sizes: str) -> Builder:
    """``x - mean.expand(...)`` behind a convolution, as exporters write it; the sizes come from x or are fixed."""
    b = Builder()
    h = b.conv("x", 4, C)
    shape = b.node("Shape", h) if sizes == "of x" else b.constant(np.array(dims))
    mean = b.node("Expand", b.normal(C, 1, 1), shape)
    b.node("Div", b.node("Sub", h, mean), b.constant(np.full((C, 1, 1), 1.5)), out="y")
    return b


def test_a_constant_that_is_expanded_to_the_size_of_x_is_a_constant():
    model = expanded([], "of x").model({"x": ["n", 4, 7, 7]}, ["y"])
    fused, report = fuse(model)
    assert operators(fused) == ["Conv"]
    assert report.norms[0].outcome == "folded"
    assert_same(model, fused)
    fixed = expanded([2, C, 5, 5], "fixed").model({"x": [2, 4, 7, 7]}, ["y"])
    assert operators(fuse(fixed)[0]) == ["Conv"]


def test_an_expand_that_makes_x_larger_is_no_constant():
    model = expanded([3, C, 5, 5], "fixed").model({"x": [1, 4, 7, 7]}, ["y"])
    fused, _ = fuse(model)
    assert "Sub" in operators(fused)
    assert_same(model, fused)
    open_batch = expanded([3, C, 5, 5], "fixed").model({"x": ["n", 4, 7, 7]}, ["y"])
    assert "Sub" in operators(fuse(open_batch)[0])


def test_statistics_reshaped_to_sizes_taken_one_by_one_are_constants():
    b = Builder()
    h = b.conv("x", 4, C)
    size = b.node("Gather", b.node("Shape", h), b.constant(np.array(1)))
    shape = b.node("Concat", b.constant(np.array([1])), *[b.node("Unsqueeze", size, b.constant(np.array([0])))], axis=0)
    shape = b.node("Concat", shape, b.constant(np.array([1, 1])), axis=0)
    b.node("Mul", h, b.node("Reshape", b.normal(C), shape), out="y")
    model = b.model({"x": ["n", 4, 7, 7]}, ["y"])
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv"]
    assert_same(model, fused)


def test_clipped_constants_are_constants():
    b = Builder()
    r = b.node("Clip", b.constant(b.rng.uniform(0.2, 4, (C, 1, 1))), b.constant(0.5), b.constant(2.0))
    d = b.node("Min", b.node("Max", b.normal(C, 1, 1), b.constant(-0.3)), b.constant(0.3))
    b.node("Add", b.node("Mul", b.conv("x", 4, C), r), d, out="y")
    model = b.model({"x": ["n", 4, 7, 7]}, ["y"])
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv"]
    assert_same(model, fused)


@pytest.mark.parametrize("shape", [[2, C, 5, 5], [1, C, 5, 5], [C, 5, 5], [C, 5, 1]])
def test_a_constant_as_large_as_the_data_is_a_channel_map_if_it_varies_along_them_only(shape):
    for varies, left in ((True, 0), (False, 4)):
        b = Builder()
        h = b.conv("x", 4, C)
        for operator in ("Sub", "Div", "Mul", "Add"):
            numbers = b.rng.uniform(0.5, 2, (C, 1, 1)) * np.ones(shape)
            numbers[..., 0, -1 if shape[-1] > 1 else 0] *= 1 if varies else 1.5
            h = b.node(operator, h, b.constant(numbers), out="y" if operator == "Add" else None)
        model = b.model({"x": [2, 4, 7, 7]}, ["y"])
        fused, _ = fuse(model)
        assert len(operators(fused)) == 1 + left
        assert_same(model, fused)


def test_a_large_constant_whose_data_may_be_smaller_is_no_map():
    b = Builder()
    b.node("Mul", b.conv("x", 4, C), b.constant(np.ones((C, 5, 5)) * b.rng.uniform(0.5, 2, (C, 1, 1))), out="y")
    model = b.model({"x": ["n", 4, "h", 7]}, ["y"])
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv", "Mul"]
    assert_same(model, fused, n=2, h=3)


@pytest.mark.parametrize("axis", [1, None])
def test_arithmetic_before_opset_7_begins_at_its_axis(axis):
    """With an axis the constant runs along the channels, without one along the columns, of which there are as many."""
    b = Builder()
    h = b.conv("x", 4, C)
    for operator in ("Sub", "Div", "Mul", "Add"):
        more = {} if axis is None else {"axis": axis}
        constant = b.constant(b.rng.uniform(0.5, 2, C))
        h = b.node(operator, h, constant, out="y" if operator == "Add" else None, broadcast=1, **more)
    model = b.model({"x": [2, 4, C + 2, C + 2]}, ["y"], opset=6)
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv"] if axis else ["Conv", "Sub", "Div", "Mul", "Add"]
    assert largest_difference(model, fused) < 3e-6


def test_a_chain_with_numbers_that_are_not_finite_stays_with_the_reason():
    b = Builder()
    scale = b.constant(np.where(np.arange(C) == 1, np.inf, 2.0).reshape(C, 1, 1))
    b.node("Mul", b.conv("x", 4, C), scale, out="y")
    _, report = fuse(b.model({"x": ["n", 4, 7, 7]}, ["y"]))
    assert [r.reason for e in report.entries for r in e.refusals] == [Reason.NON_FINITE]


def test_arithmetic_of_integers_is_no_chain():
    body = "b = Neg(a) c = Mul(b, k) y = Cast<to=1>(c)"
    text = (
        f'<ir_version: 10, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y) {{ a = Cast<to=6>(x) {body} }}'
    )
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(np.array(3, np.int32), "k"))
    _, report = fuse(model)
    assert report.entries == []

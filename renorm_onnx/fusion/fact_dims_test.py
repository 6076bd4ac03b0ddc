"""Sizes that are known only at run time are followed through arithmetic, and layers hand on what is proven."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper
from onnx_ir import DataType

from renorm_onnx.fusion.carriers.exact_folding_test import assert_fuses, bn, build, norm, operators, quarters
from renorm_onnx.fusion.conftest import Builder
from renorm_onnx.fusion.conftest import assert_same as assert_close
from renorm_onnx.fusion.conftest import operators as counted
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.fact import Dimension
from renorm_onnx.fusion.fact_rules_test import facts_of
from renorm_onnx.fusion.report import Reason

ARITHMETIC = [
    ("Mul(n, five)", None),
    ("Mul(one, n)", "n"),
    ("Mul(n, one)", "n"),
    ("Add(n, zero)", "n"),
    ("Sub(n, zero)", "n"),
    ("Div(n, one)", "n"),
    ("Add(n, five)", None),
]
REFUSED = [
    "Sub(n, one)",
    "Sub(five, n)",
    "Div(n, five)",
    "Mul(n, minus)",
    "Mul(zero, n)",
    "Add(minus, n)",
    "Pow(n, five)",
]
NUMBERS = {k: np.array([v]) for k, v in {"zero": 0, "one": 1, "five": 5, "minus": -1}.items()}


@pytest.mark.parametrize(("term", "same_as"), ARITHMETIC)
def test_sums_and_products_of_open_sizes_are_sizes(term: str, same_as: str | None) -> None:
    facts = facts_of(f"n = Shape<end=1>(x) m = {term} y = ConstantOfShape(m)", "float[N,4] x", **NUMBERS)
    size, made = facts["n"].integers(), facts["y"].dims
    assert size is not None
    assert made is not None
    assert isinstance(made[0], Dimension)
    assert (made[0] is size[0]) == (same_as == "n")


@pytest.mark.parametrize("term", REFUSED)
def test_what_may_be_negative_or_zero_is_no_size(term: str) -> None:
    facts = facts_of(f"n = Shape<end=1>(x) m = {term} y = ConstantOfShape(m)", "float[N,4] x", **NUMBERS)
    assert facts["m"].content is None
    assert facts["m"].dims == (1,)


def test_fixed_entries_of_an_open_shape_are_numbers() -> None:
    body = "s = Shape(x) h = Slice(s, one, three) m = Mul(h, five) y = ConstantOfShape(m)"
    facts = facts_of(body, "float[N,4,7] x", three=np.array([3]), **NUMBERS)
    assert facts["y"].dims == (20, 35)
    facts = facts_of("s = Shape(x) m = Mul(s, five) y = ConstantOfShape(m)", "float[N,4,7] x", **NUMBERS)
    dims = facts["y"].dims
    assert dims is not None
    assert dims[1:] == (20, 35)
    assert isinstance(dims[0], Dimension)


def test_a_norm_behind_a_flattened_batch_of_open_size_folds() -> None:
    """As the exporter of torch writes ``norm(x.flatten(0, 1))`` with a batch of open size, unoptimized."""
    shapes = "n = Shape<end=1>(x) m = Mul(n, five) s = Concat<axis=0>(m, four)"
    body = f"a = MatMul(x, W) {shapes} f = Reshape(a, s) y = {bn('f')}"
    constants = {"W": quarters([3, 4]), "four": np.array([4]), **NUMBERS}
    fused = assert_fuses(build(body, "double[N,5,3] x", "y", **constants, **norm(4)))
    assert operators(fused)["BatchNormalization"] == 0
    mixed = body.replace("four)", "five)").replace("Mul(n, five)", "Mul(n, four)")
    assert_fuses(build(mixed, "double[N,5,3] x", "y", **constants, **norm(5)), [Reason.SHAPE])


def recurrent(operator: str, outputs: str, *, layout: int = 0) -> str:
    return f'{outputs} = {operator}<hidden_size=6, direction="bidirectional", layout={layout}>(x, w, r)'


@pytest.mark.parametrize(
    ("layout", "each", "last"), [(0, (9, 2, None, 6), (2, None, 6)), (1, (None, 9, 2, 6), (None, 2, 6))]
)
def test_recurrent_layers_hand_on_their_steps_and_hidden_size(layout: int, each: tuple, last: tuple) -> None:
    weights = {"w": np.zeros((2, 24, 3), np.float32), "r": np.zeros((2, 24, 6), np.float32)}
    inputs = "float[N,9,3] x" if layout else "float[9,N,3] x"
    facts = facts_of(recurrent("LSTM", "y, h, c", layout=layout), inputs, **weights)
    for name, sizes in (("y", each), ("h", last), ("c", last)):
        dims = facts[name].dims
        assert dims is not None
        assert tuple(d if isinstance(d, int) else None for d in dims) == sizes


def test_einsum_hands_on_the_sizes_of_its_letters() -> None:
    weights = {"w": np.zeros((5, 4), np.float32)}
    facts = facts_of('y = Einsum<equation="bchw, oc -> bohw">(x, w)', "float[N,4,7,H] x", **weights)
    source, dims = facts_of("y = Relu(x)", "float[N,4,7,H] x")["y"].dims, facts["y"].dims
    assert source is not None
    assert dims is not None
    assert dims[1:3] == (5, 7)
    assert isinstance(dims[0], Dimension)
    for equation in ("...c,oc->...o", "bchw,oc", "bcch,oc->bo", "bch,oc->bo"):
        assert facts_of(f'y = Einsum<equation="{equation}">(x, w)', "float[N,4,7,H] x", **weights)["y"].dims is None


def test_an_open_size_stays_the_same_where_only_sizes_of_one_meet_it() -> None:
    facts = facts_of("i = Identity(x) y = Add(i, k)", "float[N,4] x", k=np.zeros((1, 4), np.float32))
    assert facts["y"].dims == facts["i"].dims


def test_a_letter_of_size_one_is_broadcast() -> None:
    for weight, sizes in (((1, 5), (3, 5)), ((3, 1), (3, 5)), ((3, 5), (3, 5))):
        facts = facts_of('y = Einsum<equation="bij,ij->bij">(x, w)', "float[2,3,5] x", w=np.zeros(weight, np.float32))
        assert facts["y"].dims == (2, *sizes), weight
    unknown = facts_of('y = Einsum<equation="bi,i->bi">(x, w)', "float[2,1] x, float[N] w")
    dims = unknown["y"].dims
    assert dims is not None
    assert isinstance(dims[1], Dimension)


def test_a_grid_decides_the_size_of_what_is_sampled() -> None:
    dims = facts_of("y = GridSample(x, g)", "float[N,4,7,5] x, float[N,3,2,2] g")["y"].dims
    assert dims is not None
    assert dims[1:] == (4, 3, 2)


def test_integer_sums_have_the_sizes_of_float_ones_and_a_type_of_their_own() -> None:
    weights = {"w": np.zeros((5, 4, 3, 3), np.int8), "v": np.zeros((5, 6), np.int8)}
    facts = facts_of("c = ConvInteger(x, w) y = MatMulInteger(x, v)", "uint8[2,4,7,5] x", **weights)
    assert (facts["c"].dims, facts["y"].dims) == ((2, 5, 5, 3), (2, 4, 7, 6))
    assert facts["c"].dtype == facts["y"].dtype == DataType.INT32


def test_a_norm_behind_a_dynamically_quantized_layer_folds_into_its_scale_and_bias() -> None:
    b = Builder()
    q, scale, zero = (b.fresh() for _ in range(3))
    b.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], [q, scale, zero]))
    weight = b.constant(b.rng.integers(-90, 90, (6, 4, 1, 1)).astype(np.int8))
    h = b.node("Cast", b.node("ConvInteger", q, weight, zero), to=1)
    h = b.node("Add", b.node("Mul", h, b.node("Mul", scale, b.normal(1, 6, 1, 1))), b.normal(6, 1, 1))
    model = b.model({"x": [2, 4, 5, 6]}, [b.node("Relu", b.norm(h, 6))])
    fused, report = fuse(model)
    assert not report.kept
    assert "BatchNormalization" not in counted(fused)
    assert_close(model, fused)


def test_pieces_are_cut_along_the_first_axis_where_none_is_named() -> None:
    facts = facts_of("y, z = Split<num_outputs=2>(x)", "float[6,N] x")
    assert [facts[name].dims[0] for name in "yz"] == [3, 3]


def test_quantized_values_have_the_sizes_of_what_they_stand_for() -> None:
    body = "a = QuantizeLinear(x, s) b = QuantizeLinear<output_dtype=3>(x, s) y = DequantizeLinear(a, s)"
    facts = facts_of(body, "float[4,7] x", opset=21, s=np.float32(0.5))
    assert [facts[name].dims for name in "aby"] == [(4, 7)] * 3
    assert [facts[name].dtype for name in "aby"] == [DataType.UINT8, DataType.INT8, DataType.FLOAT]

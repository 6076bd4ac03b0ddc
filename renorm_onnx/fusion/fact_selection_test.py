"""What picks, crops, unpools or computes with codes has the sizes that onnxruntime gives it, and lets norms fold."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from renorm_onnx.fusion import engine
from renorm_onnx.fusion.conftest import Builder, assert_same, operators
from renorm_onnx.fusion.fact import Dimension, Fact
from renorm_onnx.fusion.fact_dims import CONSTANT_OPERATORS, RULES
from renorm_onnx.fusion.facts import Facts
from renorm_onnx.fusion.report import Reason

CODES = "s, z, w, s, z, s, z"
CASES = [
    ("RoiAlign<output_height=2, output_width=3>(x, regions, which)", (3, 4, 2, 3)),
    ("RoiAlign(x, regions, which)", (3, 4, 1, 1)),
    ("MaxRoiPool<pooled_shape=[2,3]>(x, numbered)", (3, 4, 2, 3)),
    ("GatherElements<axis=2>(x, places)", (2, 4, 2, 5)),
    ("GatherND<batch_dims=1>(x, pairs)", (2, 3, 5)),
    ("MaxUnpool<kernel_shape=[2,2]>(p, i)", (None, 4, None, None)),
    ("MaxUnpool<kernel_shape=[2,2]>(p, i, larger)", (2, 4, 7, 5)),
    ("CenterCropPad<axes=[-2]>(x, four)", (None, 4, 4, 5)),
    ("CenterCropPad(x, larger)", (2, 4, 7, 5)),
    ("OneHot<axis=1>(k, four, onoff)", (None, 4, 3)),
    ("OneHot(k, four, onoff)", (None, 3, 4)),
    ("Compress<axis=-1>(x, keep)", (None, 4, 6, None)),
    ("Compress(x, keep)", (None,)),
    ("TopK<axis=2>(x, four)", (None, 4, 4, 5)),
    ("Col2Im(columns, image, block)", (None, 4, 3, 3)),
    ("Shrink<lambd=0.5>(x)", (None, 4, 6, 5)),
    ("Round(x)", (None, 4, 6, 5)),
    ("Atan(x)", (None, 4, 6, 5)),
    ("RandomNormalLike(x)", (None, 4, 6, 5)),
    ("IsNaN(x)", (None, 4, 6, 5)),
    (f"QLinearConv<pads=[1,1,1,1], strides=[2,1]>(q, {CODES})", (None, 7, 3, 5)),
    ("QLinearMatMul(q, s, z, m, s, z, s, z)", (None, 4, 6, 9)),
    ('com.microsoft.FusedConv<activation = "Relu">(x, filters)', (None, 7, 4, 3)),
    ('com.microsoft.FusedGemm<activation = "Relu", transB = 1>(flat, wide)', (None, 9)),
    ("com.microsoft.FusedMatMul<transA = 1, transB = 1>(x, wide)", (None, 4, 5, 9)),
    ("com.microsoft.FastGelu(x)", (None, 4, 6, 5)),
]
# What is known of the output where nothing is of the data.
OF_CONSTANTS = {
    "RoiAlign<output_height=2": (3, None, 2, 3),
    "RoiAlign(x": (3, None, 1, 1),
    "MaxRoiPool": (3, None, 2, 3),
    "MaxUnpool<kernel_shape=[2,2]>(p, i, larger": (2, 4, 7, 5),
    "Compress(x": (None,),
    "Col2Im": (None, None, 3, 3),
    "GatherElements": (2, 4, 2, 5),
    "QLinearConv": (None, 7, None, None),
    "com.microsoft.FusedConv": (None, 7, None, None),
    "com.microsoft.FusedGemm": (None, 9),
}
SIZES = {"x": (2, 4, 6, 5), "flat": (2, 5), "columns": (2, 16, 4), "k": (2, 3), "p": (2, 4, 3, 2), "i": (2, 4, 3, 2)}
SIZES |= {"q": (2, 4, 6, 5)}
KINDS = {"k": np.int64, "i": np.int64, "q": np.uint8}
CONSTANTS: dict[str, Any] = {
    "regions": np.array([[0, 0, 3, 3]] * 3, np.float32),
    "which": np.array([0, 1, 1]),
    "numbered": np.array([[0, 0, 0, 3, 3]] * 3, np.float32),
    "places": np.zeros((2, 4, 2, 5), np.int64),
    "pairs": np.zeros((2, 3, 2), np.int64),
    "larger": np.array([2, 4, 7, 5]),
    "four": np.array([4]),
    "onoff": np.array([0, 1], np.float32),
    "keep": np.array([True, False, True]),
    "image": np.array([3, 3]),
    "block": np.array([2, 2]),
    "s": np.array(0.1, np.float32),
    "z": np.array(3, np.uint8),
    "w": np.ones((7, 4, 3, 3), np.uint8),
    "m": np.ones((5, 9), np.uint8),
    "filters": np.ones((7, 4, 3, 3), np.float32),
    "wide": np.ones((9, 6), np.float32),
}


def model_of(call: str) -> tuple[onnx.ModelProto, list[str]]:
    """A model of one operator, with a batch of open size; and which inputs it has."""
    names = call[call.index("(") + 1 : -1].replace(",", " ").split()
    given = [n for n in names if n in SIZES]
    types = {np.int64: "int64", np.uint8: "uint8"}
    declared = (f"{types.get(KINDS.get(n), 'float')}[{','.join(['N', *map(str, SIZES[n][1:])])}] {n}" for n in given)
    imports = '"" : 20, "com.microsoft" : 1'
    outputs = "y, at" if call.startswith("TopK") else "y"
    text = f"<ir_version: 9, opset_import: [{imports}]> g ({', '.join(declared)}) => (float y) {{ {outputs} = {call} }}"
    model = onnx.parser.parse_model(text)
    constants = CONSTANTS | {"wide": CONSTANTS["wide"][:, :5]} if "FusedGemm" in call else CONSTANTS
    constants = constants | ({"pairs": CONSTANTS["pairs"]} if "GatherND" in call else {})
    model.graph.initializer.extend(
        numpy_helper.from_array(constants[n], n) for n in dict.fromkeys(names) if n not in SIZES
    )
    model.graph.output[0].type.Clear()
    return model, given


def fact_of(model: onnx.ModelProto) -> Fact:
    loaded = ir.from_proto(model)
    return Facts(loaded, RULES, CONSTANT_OPERATORS)[loaded.graph.outputs[0]]


@pytest.mark.parametrize(("call", "sizes"), CASES)
def test_sizes_are_those_of_onnxruntime(call: str, sizes: tuple[int | None, ...]) -> None:
    ort = pytest.importorskip("onnxruntime")
    model, given = model_of(call)
    fact = fact_of(model)
    assert fact.dims is not None
    assert tuple(d if isinstance(d, int) else None for d in fact.dims) == sizes
    assert all(d is not e for d in fact.dims if isinstance(d, Dimension) for e in fact.dims if e is not d)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    model.graph.output[0].type.tensor_type.elem_type = (fact.dtype or ir.DataType.FLOAT).value
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    got = session.run(None, {n: np.ones(SIZES[n], KINDS.get(n, np.float32)) for n in given})[0]
    assert got.ndim == len(sizes)
    assert all(known in (None, real) for known, real in zip(sizes, got.shape, strict=True))
    assert fact.dtype is not None
    assert got.dtype == fact.dtype.numpy()


@pytest.mark.parametrize("call", [call for call, _ in CASES])
def test_of_data_of_unknown_shape_only_the_constants_prove_sizes(call: str) -> None:
    model, _ = model_of(call)
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    dims = fact_of(model).dims
    found = None if dims is None else tuple(d if isinstance(d, int) else None for d in dims)
    assert found == next((sizes for start, sizes in OF_CONSTANTS.items() if call.startswith(start)), None)


def test_a_function_of_the_model_is_no_operator_of_onnxruntime() -> None:
    model, _ = model_of('com.microsoft.FusedConv<activation = "Relu">(x, filters)')
    body = [helper.make_node("Flatten", ["X"], ["Y"])]
    function = helper.make_function(
        "com.microsoft", "FusedConv", ["X", "W"], ["Y"], body, [helper.make_opsetid("", 20)], attributes=["activation"]
    )
    model.functions.append(function)
    assert fact_of(model).dims is None


def box_head(operator: str, **attributes: Any) -> onnx.ModelProto:
    """Regions of a map of features, a norm of them, and a layer over each region."""
    b = Builder()
    regions = b.constant(np.array([[0.0, 0, 0, 3, 3]] * 3)[:, 1 if operator == "RoiAlign" else 0 :])
    operands = [regions, *([b.constant(np.array([0, 1, 1]))] if operator == "RoiAlign" else [])]
    h = b.norm(b.node(operator, "x", *operands, **attributes), 4)
    return b.model({"x": [2, 4, 6, 5]}, [b.node("Gemm", b.node("Flatten", h), b.normal(24, 3))])


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [("RoiAlign", {"output_height": 2, "output_width": 3}), ("MaxRoiPool", {"pooled_shape": [2, 3]})],
)
def test_a_norm_between_regions_and_the_layer_over_them_folds(
    operator: str, attributes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = box_head(operator, **attributes)
    fused, report = engine.fuse(model)
    assert [n.way for n in report.norms] == ["forward"]
    assert operators(fused) == [operator, "Flatten", "Gemm"]
    if operator == "RoiAlign":
        assert_same(model, fused)
    monkeypatch.setattr(engine, "RULES", {k: v for k, v in RULES.items() if k != operator})
    kept = engine.fuse(model)[1].kept
    assert [n.refusals[-1].reason for n in kept] == [Reason.SHAPE]


@pytest.mark.parametrize("operator", ["QLinearConv", "QLinearMatMul"])
def test_a_norm_behind_a_quantized_layer_folds_into_what_follows(operator: str) -> None:
    b = Builder()
    step, zero = b.constant(0.05), b.constant(np.array(128, np.uint8))
    weights = b.constant(b.rng.integers(0, 255, (4, 3, 1, 1) if operator == "QLinearConv" else (8, 8)).astype(np.uint8))
    codes = b.node("QuantizeLinear", "x", step, zero)
    codes = b.node(operator, codes, step, zero, weights, step, zero, step, zero)
    h = b.norm(b.node("DequantizeLinear", codes, step, zero), 4 if operator == "QLinearConv" else 3)
    pooled = b.node("Flatten", b.node("GlobalAveragePool", h))
    model = b.model({"x": ["n", 3, 8, 8]}, [b.node("Gemm", pooled, b.normal(4 if operator == "QLinearConv" else 3, 5))])
    fused, report = engine.fuse(model)
    assert [n.way for n in report.norms] == ["forward"]
    assert "BatchNormalization" not in operators(fused)
    assert_same(model, fused)


def test_a_chain_behind_what_onnxruntime_fused_folds_into_what_follows() -> None:
    b = Builder()
    a = b.node("FusedGemm", "x", b.normal(4, 5), domain="com.microsoft", activation="Relu")
    h = b.node("Add", b.node("Mul", a, b.normal(5)), b.normal(5))
    y = b.node("Gemm", h, b.normal(5, 3))
    model = b.model({"x": ["n", 4]}, [y])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(y, 1, ["n", 3]))
    fused, report = engine.fuse(model)
    assert [n.way for n in report.norms] == ["forward"]
    assert operators(fused) == ["FusedGemm", "Gemm"]
    reference = onnx.ModelProto()
    reference.CopyFrom(model)
    for each in (reference, fused):
        each.graph.node[0].CopyFrom(helper.make_node("Gemm", list(each.graph.node[0].input), ["gemm"]))
        each.graph.node.insert(1, helper.make_node("Relu", ["gemm"], [a]))
    assert_same(reference, fused)

"""The float64 reference against onnxruntime: every operator, at every opset that changed it."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from renorm_onnx.errors import InputError
from renorm_onnx.runtime.operators import contrib, registry
from renorm_onnx.runtime.reference import evaluate
from runtime_tests import reference_cases, reference_cases_shapes
from runtime_tests.reference_cases import Case

CASES = [case for family in (*reference_cases.FAMILIES, *reference_cases_shapes.FAMILIES) for case in family()]

# onnxruntime has no kernel for these; each is checked elsewhere: by formula below, or in reference_conformance_test.
NOT_IN_ONNXRUNTIME = {("GlobalLpPool", 22), ("RoiAlign", 22), ("Swish", 25)}

# Those with subgraphs, sequences or no inputs are compared in operators/control_test.py and by the conformance cases.
CHECKED_ELSEWHERE = {
    "Constant", "If", "Loop", "Scan", "Optional", "OptionalGetElement", "OptionalHasElement", "SequenceConstruct",
    "SequenceEmpty", "SequenceAt", "SequenceErase", "SequenceInsert", "SequenceLength", "ConcatFromSequence",
    "SplitToSequence",
}  # fmt: skip


def one_node_model(case: Case, opset: int) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A model of one node, all of whose inputs are graph inputs, and its feeds."""
    names = [f"in{i}" if value is not None else "" for i, value in enumerate(case.inputs)]
    outputs = [f"out{i}" for i in range(case.outputs)]
    feeds = {name: np.asarray(value) for name, value in zip(names, case.inputs, strict=True) if name}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(case.op, names, outputs, domain=case.domain, **case.attributes)],
        "one_node",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in feeds.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    # Before IR 4 the old operators, from 10 on the new types.
    version = 10 if opset >= 18 else 8 if opset >= 13 else 4
    opsets = [onnx.helper.make_opsetid(case.domain, opset)]
    opsets += [onnx.helper.make_opsetid("", 17)] if case.domain else []
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=version), feeds


def run_onnxruntime(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    """The model's outputs in its own types, nothing optimized."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    return list(session.run(None, feeds))


def run_reference(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    """The model's outputs in float64."""
    return list(evaluate(ir.serde.deserialize_model(model), feeds).values())


def difference(case: Case, want: Any, got: Any) -> str:
    """What is wrong with `got`, a float64 value of the reference, if `want` is onnxruntime's; "" if nothing is.

    Floats may differ by `case.units` times 2**-24 (float32's half unit in the last place) of the largest value.
    """
    if got.dtype.name.startswith("float8"):
        got = got.view(np.uint8)
    if want.shape != got.shape:
        return f"shape {want.shape} from onnxruntime, {got.shape} from the reference"
    if want.dtype.kind != "f":
        if want.dtype != got.dtype:
            return f"type {want.dtype} from onnxruntime, {got.dtype} from the reference"
        apart = np.abs(want.astype(np.float64) - got.astype(np.float64)).max(initial=0)
        return f"integers {apart} apart, {case.steps} allowed" if apart > case.steps else ""
    if not np.array_equal(np.isfinite(want), np.isfinite(got)):
        return "finite in one, not in the other"
    finite = np.isfinite(got)
    scale = np.abs(got[finite]).max(initial=0.0)
    units = np.abs(want - got)[finite].max(initial=0.0) / max(scale, 1e-30) * 2**24
    return f"{units:.3g} units of 2**-24 apart, {case.units} allowed" if units > case.units else ""


def has_no_kernel(case: Case, opset: int) -> bool:
    """Whether onnxruntime lacks the operator at that opset, by the table above."""
    return any(op == case.op and opset >= since for op, since in NOT_IN_ONNXRUNTIME)


@pytest.mark.parametrize("case", CASES, ids=[f"{position}-{case}" for position, case in enumerate(CASES)])
def test_the_reference_agrees_with_onnxruntime_at_every_opset(case):
    compared = 0
    for opset in case.opsets():
        model, feeds = one_node_model(case, opset)
        got = run_reference(model, feeds)
        if has_no_kernel(case, opset):
            continue
        for want, value in zip(run_onnxruntime(model, feeds), got, strict=True):
            assert difference(case, want, value) == "", f"opset {opset}"
        compared += 1
    assert compared


def test_every_operator_of_the_reference_is_compared_somewhere():
    compared = {(case.domain, case.op) for case in CASES}
    assert {("", op) for op in registry.OPERATORS if op not in CHECKED_ELSEWHERE} <= compared
    assert {("com.microsoft", op) for op in contrib.OPERATORS} <= compared


def test_the_table_is_as_large_as_it_was():
    assert len(CASES) >= 550
    assert sum(len(case.opsets()) for case in CASES) >= 2300


def _onnx_reference_errs(case: Case, opset: int) -> bool:
    """Whether plain onnx.reference raises or is wrong where onnxruntime is right, on the float64 model."""
    from onnx.reference import ReferenceEvaluator

    model, feeds = one_node_model(case, opset)
    wide = {name: value.astype(np.float64) if value.dtype == np.float32 else value for name, value in feeds.items()}
    want = run_onnxruntime(model, feeds)
    try:
        got = ReferenceEvaluator(model).run(None, wide)
    except Exception:
        return True
    return any(difference(case, w, np.asarray(g)) != "" for w, g in zip(want, got, strict=True))


CONTROLS = [
    ("BatchNormalization", 7, {}),
    ("BatchNormalization", 9, {}),
    ("ConvTranspose", 11, {"group": 2}),
    ("Softmax", 11, {"axis": 1}),
    ("LogSoftmax", 11, {"axis": 0}),
    ("LRN", 13, {"size": 5}),
    ("Upsample", 9, {"mode": "linear"}),
    ("Resize", 10, {"mode": "nearest"}),
    ("GridSample", 16, {"mode": "bilinear"}),
    ("RoiAlign", 10, {"mode": "avg"}),
]


@pytest.mark.parametrize(("op", "opset", "attributes"), CONTROLS, ids=[f"{op}-{opset}" for op, opset, _ in CONTROLS])
def test_the_comparison_sees_where_plain_onnx_reference_errs(op, opset, attributes):
    chosen = [
        case
        for case in CASES
        if (case.domain, case.op) == ("", op)
        and case.first <= opset <= case.last
        and attributes.items() <= case.attributes.items()
    ]
    assert chosen
    if not any(_onnx_reference_errs(case, opset) for case in chosen):
        pytest.skip(f"onnx {onnx.__version__} has repaired {op} at opset {opset}")


def test_batch_normalization_at_opset_6_follows_its_formula():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((4, 3, 5)).astype(np.float32)
    scale, bias, mean, var = (generator.uniform(0.5, 2, 3).astype(np.float32) for _ in range(4))
    x64, columns = x.astype(np.float64), [v.astype(np.float64)[:, None] for v in (scale, bias, mean, var)]
    attributes = {"epsilon": 1e-3, "is_test": 1}
    model, feeds = one_node_model(Case("BatchNormalization", [x, scale, bias, mean, var], attributes), 6)
    want = (x64 - columns[2]) / np.sqrt(columns[3] + np.float64(np.float32(1e-3))) * columns[0] + columns[1]
    np.testing.assert_allclose(run_reference(model, feeds)[0], want, rtol=1e-13)
    model.graph.node[0].attribute[1].i = 0  # training: the batch's own statistics
    batch_mean, batch_var = x64.mean(axis=(0, 2))[:, None], x64.var(axis=(0, 2))[:, None]
    want = (x64 - batch_mean) / np.sqrt(batch_var + np.float64(np.float32(1e-3))) * columns[0] + columns[1]
    np.testing.assert_allclose(run_reference(model, feeds)[0], want, rtol=1e-12)


def test_batch_normalization_with_spatial_0_has_statistics_per_element():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((4, 3, 5)).astype(np.float32)
    statistics = [generator.uniform(0.5, 2, (3, 5)).astype(np.float32) for _ in range(4)]
    model, feeds = one_node_model(Case("BatchNormalization", [x, *statistics], {"spatial": 0}), 7)
    scale, bias, mean, var = (value.astype(np.float64) for value in statistics)
    want = (x.astype(np.float64) - mean) / np.sqrt(var + np.float64(np.float32(1e-5))) * scale + bias
    np.testing.assert_allclose(run_reference(model, feeds)[0], want, rtol=1e-13)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Pow"])
def test_operands_align_at_the_axis_they_name_or_at_the_last_before_opset_7(op):
    generator = np.random.default_rng(0)
    left, right = generator.uniform(1, 2, (2, 3, 4)).astype(np.float32), generator.uniform(1, 2, 3).astype(np.float32)
    for x, named in ((left, {"axis": 1}), (left.swapaxes(1, 2), {})):
        model, feeds = one_node_model(Case(op, [x, right], {"broadcast": 1, **named}), 6)
        modern, modern_feeds = one_node_model(Case(op, [x, right[:, None] if named else right]), 7)
        assert np.array_equal(run_reference(model, feeds)[0], run_reference(modern, modern_feeds)[0])


def test_each_channel_has_its_slope_before_opset_7():
    generator = np.random.default_rng(0)
    x, slope = generator.standard_normal((3, 2, 4)).astype(np.float32), np.float32([0.25, 2.0])
    model, feeds = one_node_model(Case("PRelu", [x, slope]), 6)
    modern, modern_feeds = one_node_model(Case("PRelu", [x, slope[:, None]]), 7)
    assert np.array_equal(run_reference(model, feeds)[0], run_reference(modern, modern_feeds)[0])


def test_operands_of_different_shapes_are_refused_before_opset_7_without_broadcast():
    model, feeds = one_node_model(Case("Add", [np.ones((2, 3), np.float32), np.ones(3, np.float32)]), 6)
    with pytest.raises(InputError, match=r"'Add' of domain '' at opset 6: shapes \(2, 3\) and \(3,\) differ"):
        run_reference(model, feeds)


def test_no_two_families_define_the_same_operator():
    assert len(registry.OPERATORS) == sum(len(family) for family in registry.FAMILIES)


_IMAGE = np.ones((1, 2, 8, 8), np.float32)
_TWICE = {"kernel_shape": [3, 3], "strides": [2, 2]}
REFUSED = [
    (Case("MaxPool", [_IMAGE], {**_TWICE, "auto_pad": "VALID", "ceil_mode": 1}), 17, "has no last window"),
    (Case("MaxPool", [_IMAGE], {**_TWICE, "auto_pad": "SAME_UPPER", "dilations": [1, 2]}), 17, "pads as if undilated"),
    (Case("ConvTranspose", [_IMAGE, np.ones((2, 1, 2, 2), np.float32)], {"strides": [3, 3], "auto_pad": "SAME_LOWER"}),
     17, r"windows that reach \(23, 23\) of \(24, 24\)"),
    (Case("Squeeze", [_IMAGE, np.zeros(0, np.int64)]), 13, "all or none"),
    (Case("Dropout", [_IMAGE, np.array(0.5, np.float32), np.array(True)]), 12, "draws random numbers"),
    (Case("Slice", [_IMAGE, *np.int64([[-1], [2**63 - 1], [3], [-1]])]), 13, "takes nothing, onnxruntime everything"),
    (Case("Slice", [_IMAGE, *np.int64([[-1], [2**31 - 1], [3], [-1]])]), 13, "takes nothing, onnxruntime everything"),
    (Case("Mod", [_IMAGE, _IMAGE]), 13, "floating operands need fmod=1"),
    (Case("Resize", [_IMAGE.astype(np.uint8), None, np.ones(4, np.float32)], {"mode": "linear"}), 13, "uint8"),
    (Case("Cast", [_IMAGE], {"to": 8}), 13, "a cast from float64 to object is not covered"),
    (Case("RandomNormalLike", [_IMAGE]), 13, "not covered by the float64 reference"),
    (Case("LSTM", [np.ones((1, 1, 1), np.float32), *[np.ones((1, 4, 1), np.float32)] * 2],
          {"hidden_size": 1, "activations": ["Sin", "Tanh", "Tanh"]}), 13, "activation 'sin'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "opset", "message"), REFUSED, ids=[f"{case.op}-{i}" for i, (case, *_) in enumerate(REFUSED)]
)
def test_what_has_no_sure_answer_is_refused(case, opset, message):
    model, feeds = one_node_model(case, opset)
    with pytest.raises(InputError, match=rf"operator '{case.op}' of domain '' at opset {opset}: .*{message}.*unusable"):
        run_reference(model, feeds)


def test_a_tensor_that_no_machine_can_hold_is_refused():
    model, feeds = one_node_model(Case("ConstantOfShape", [np.array([2**40, 2**20])]), 13)
    with pytest.raises(InputError, match="'ConstantOfShape' of domain '' at opset 13 failed"):
        run_reference(model, feeds)


def test_what_onnx_and_onnxruntime_give_differently_is_refused():
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(1, 1, 3, 4)).astype(np.float32) for _ in range(3)]
    case = Case("Attention", inputs, {"softcap": 1.5, "qk_matmul_output_mode": 0}, first=23, outputs=4)
    model, feeds = one_node_model(case, 23)
    with pytest.raises(InputError, match=r"before softcap is not covered \(reference unusable\)"):
        run_reference(model, feeds)
    del model.graph.node[0].output[3], model.graph.output[3]
    assert len(run_reference(model, feeds)) == 3

"""Lowered models mean the same, and what has no older form is refused by name."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from renorm_onnx.errors import InputError
from renorm_onnx.opset_lowering import NEWEST, lower_opset, nearest, raise_opset

X = np.random.default_rng(0).normal(1.0, 2.0, (2, 3, 4, 4)).astype(np.float32)


def model_of(body: str, out: str = "2, 3, 4, 4") -> onnx.ModelProto:
    return onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 18]>
        main (float[2, 3, 4, 4] x) => (float[{out}] y)
        <int64[2] axes = {{2, 3}}, int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}}, int64[2] sizes = {{1, 2}},
         float[4] scales = {{1.0, 1.0, 2.0, 2.0}}, int64[1] one = {{1}}, int64[4] four = {{2, 3, 4, 5}},
         float[2] two = {{2.0, 2.0}}, int64[1, 4] place = {{0, 0, 0, 0}}, float[1] row = {{9.0}}, int64[0] none = {{}}>
        {{ {body} }}
    """)


@pytest.mark.parametrize("target", [15, 16, 17])
@pytest.mark.parametrize(
    ("body", "out"),
    [
        ("y = ReduceMean <keepdims = 0> (x, axes)", "2, 3"),
        ("y = ReduceMax (x, axes)", "2, 3, 1, 1"),
        ("y = ReduceL2 (x)", "1, 1, 1, 1"),
        ("y = ReduceL2 (x, none)", "1, 1, 1, 1"),
        ("y = Pad (x, pads)", "2, 3, 6, 6"),
        ('y = Resize <mode = "nearest", antialias = 0> (x, , scales)', "2, 3, 8, 8"),
        ("a, b = Split <axis = 1> (x, sizes) y = Concat <axis = 1> (b, a)", "2, 3, 4, 4"),
        ("y = LeakyRelu <alpha = 0.3> (x)", "2, 3, 4, 4"),
        ("m = ReduceMean <keepdims = 0> (x, axes) y = Unsqueeze (m, axes)", "2, 3, 1, 1"),
        ("y = ReduceMean <noop_with_empty_axes = 1> (x, axes)", "2, 3, 1, 1"),
        ('y = Resize <mode = "nearest", keep_aspect_ratio_policy = "stretch"> (x, , scales)', "2, 3, 8, 8"),
        ('y = ScatterND <reduction = "none"> (x, place, row)', "2, 3, 4, 4"),
        ("m = LessOrEqual (x, x) n = Neg (x) y = Where (m, n, x)", "2, 3, 4, 4"),
        (
            "n = Size (x) truth = Equal (n, n) y = If (truth) <"
            "then_branch = some () => (float[2, 3, 1, 1] a) { a = ReduceMean (x, axes) }, "
            "else_branch = other () => (float[2, 3, 1, 1] b) { b = ReduceMax (x, axes) }>",
            "2, 3, 1, 1",
        ),
    ],
)
def test_a_lowered_operator_computes_the_same(body: str, out: str, target: int) -> None:
    proto = model_of(body, out)
    want = ReferenceEvaluator(proto).run(None, {"x": X})[0]
    model = ir.from_proto(proto)
    lower_opset(model, target)
    lowered = ir.to_proto(model)
    onnx.checker.check_model(lowered, full_check=True)
    assert lowered.opset_import[0].version == target
    got = ReferenceEvaluator(lowered).run(None, {"x": X})[0]
    np.testing.assert_array_equal(got, want)
    assert want.shape != X.shape or np.abs(want - X).max() > 0.1


@pytest.mark.parametrize(
    ("body", "target", "message"),
    [
        ("y = Mish (x)", 17, r"opset 17 cannot be reached: Mish .* has no form in it \(it is new\)"),
        ("s = Shape (x) a = Slice (s, one, sizes) y = ReduceMean (x, a)", 15, "its axes are computed"),
        ("y = ReduceMean <noop_with_empty_axes = 1> (x)", 15, "noop_with_empty_axes=1"),
        ("y = ReduceMean <noop_with_empty_axes = 1> (x, none)", 15, "noop_with_empty_axes=1"),
        ('y = Resize <antialias = 1, mode = "linear"> (x, , scales)', 15, "antialias=1"),
        ("a, y = Split <num_outputs = 2> (x)", 15, "num_outputs instead of sizes"),
        ("y = Pad (x, four, , axes)", 17, "axes are given"),
        ("y = Resize <axes = [2, 3]> (x, , two)", 17, "axes are given"),
        ('y = Resize <keep_aspect_ratio_policy = "not_larger"> (x, , , four)', 17, "keep_aspect_ratio_policy is given"),
        ('y = ScatterND <reduction = "max"> (x, place, row)', 17, "reduction='max'"),
        ('y = ScatterElements <reduction = "min"> (x, place, row)', 17, "reduction='min'"),
    ],
)
def test_what_has_no_older_form_is_refused(body: str, target: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lower_opset(ir.from_proto(model_of(body)), target)


def test_an_input_that_is_left_out_by_name_alone_counts_as_left_out() -> None:
    padded, split = (
        ir.from_proto(model_of(body)) for body in ("y = Pad (x, pads)", "a, y = Split <num_outputs = 2> (x)")
    )
    padded.graph.node(0).resize_inputs(4)
    lower_opset(padded, 17)
    assert padded.opset_imports[""] == 17
    split.graph.node(0).resize_inputs(2)
    with pytest.raises(InputError, match="num_outputs instead of sizes"):
        lower_opset(split, 17)


def test_axes_that_became_an_attribute_leave_no_initializer() -> None:
    model = ir.from_proto(model_of("y = ReduceMean (x, axes)"))
    lower_opset(model, 17)
    assert "axes" not in model.graph.initializers
    assert "pads" in model.graph.initializers


@pytest.mark.parametrize(("move", "start", "target"), [(lower_opset, 18, 17), (raise_opset, NEWEST, 26)])
def test_an_operator_of_another_domain_is_of_no_concern(monkeypatch, move, start, target) -> None:
    monkeypatch.setattr("renorm_onnx.opset_lowering._since", lambda op_type, opset: opset)
    proto = model_of("y = Mish (x)")
    proto.opset_import[0].version = start
    model = ir.from_proto(proto)
    model.graph.node(0).domain = "elsewhere"
    move(model, target)
    assert model.opset_imports[""] == target


def test_a_model_that_stayed_behind_is_not_declared_newer() -> None:
    model = ir.from_proto(model_of("y = Relu (x)"))
    raise_opset(model, 26)
    assert model.opset_imports[""] == 18


def of_newest(body: str) -> ir.Model:
    proto = model_of(body)
    proto.opset_import[0].version = NEWEST
    return ir.from_proto(proto)


def test_operators_without_a_newer_definition_are_declared_newer() -> None:
    model = of_newest('a = Gelu <approximate = "tanh"> (x) y = Add (a, x)')
    raise_opset(model, 26)
    proto = ir.to_proto(model)
    assert proto.opset_import[0].version == 26
    onnx.checker.check_model(proto, full_check=True)


@pytest.mark.parametrize(
    "body",
    [
        "y = Relu (x)",
        "n = Size (x) truth = Equal (n, n) y = If (truth) <"
        "then_branch = some () => (float[2, 3, 4, 4] a) { a = Relu (x) }, "
        "else_branch = other () => (float[2, 3, 4, 4] b) { b = Neg (x) }>",
    ],
)
def test_a_redefined_operator_is_not_declared_newer(monkeypatch, body) -> None:
    model = of_newest(body)
    monkeypatch.setattr(
        "renorm_onnx.opset_lowering._since", lambda op_type, opset: opset if op_type == "Relu" else NEWEST
    )
    with pytest.raises(InputError, match=r"opset 26 cannot be reached: Relu .* was redefined after 25; ask for 25"):
        raise_opset(model, 26)
    assert model.opset_imports[""] == NEWEST


def test_torch_is_asked_for_the_nearest_opset_that_it_reaches() -> None:
    assert [nearest(opset) for opset in (15, 18, 22, 25, 26)] == [18, 18, 22, 25, 25]

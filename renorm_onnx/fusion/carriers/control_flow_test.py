"""Maps enter and leave the bodies of If, Loop and Scan, where every run of them then computes the same."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx.parser
import pytest

from renorm_onnx.fusion import engine
from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carriers import control_flow
from renorm_onnx.fusion.carriers.exact_folding_test import (
    assert_fuses,
    assert_same,
    bn,
    build,
    norm,
    operators,
    quarters,
)
from renorm_onnx.fusion.report import Reason

INPUTS = "double[N,4,H,W] x, double[1] z"
WEIGHTS = {"V": quarters([4, 4, 1, 1]), "W": quarters([4, 4, 1, 1], 1), "b": quarters([4], 2)}


def choice(
    then: str, other: str, before: str = "", behind: str = "y = Identity(i)", **constants: Any
) -> onnx.ModelProto:
    """``i = If(z > k)`` of two branches that make `t` and `e`; `k` sends it one way or the other."""
    branches = f"then_branch = g () => (double t) {{ {then} }}, else_branch = h () => (double e) {{ {other} }}"
    body = f"{before} c = Greater(z, k) i = If(c) <{branches}> {behind}"
    used = {name: v for name, v in WEIGHTS.items() if f" {name}" in body}
    return build(body, INPUTS, "y", **(used | {"k": np.array([-99.0])} | constants))


def either_way(*texts: str, kept: Any = (), **constants: Any) -> onnx.ModelProto:
    """`assert_fuses` whichever branch is taken."""
    for k in (99.0, -99.0):
        fused = assert_fuses(choice(*texts, k=np.array([k]), **constants), kept)
    return fused


def test_both_branches_of_an_if_absorb_a_norm_behind_it() -> None:
    behind = f"r = Transpose<perm=[0,1,3,2]>(i) y = {bn('r')}"
    fused = either_way("t = Conv(x, V)", "f = Conv(x, W, b) e = Identity(f)", "", behind, **norm(4))
    assert operators(fused) == {"Greater": 1, "If": 1, "Conv": 2, "Identity": 1, "Transpose": 1}
    one = either_way("t = Conv(x, V)", "e = Relu(x)", "", f"y = {bn('i')}", kept=[Reason.SHIFT], **norm(4))
    assert operators(one)["BatchNormalization"] == 1
    text = "t = Conv(x, V)", "e = Conv(x, W)", "", f"r = Relu(i) n = {bn('i')} y = Add(r, n)"
    either_way(*text, kept=[Reason.CONSUMER], **norm(4))


def test_a_map_passes_through_both_branches_to_what_they_read_from_outside() -> None:
    texts = "t = Transpose<perm=[0,1,3,2]>(h)", "e = Transpose<perm=[0,1,3,2]>(h)", "h = Conv(x, V)", f"y = {bn('i')}"
    assert operators(either_way(*texts, **norm(4))) == {"Conv": 1, "Greater": 1, "If": 1, "Transpose": 2}
    other = texts[0], "e = Gather<axis=1>(h, j)", *texts[2:]
    either_way(*other, kept=[Reason.CONFLICT], j=np.array([1, 0, 3, 2]), **norm(4))
    bent = texts[0], "r = Relu(h) e = Transpose<perm=[0,1,3,2]>(r)", *texts[2:]
    either_way(*bent, **norm(4, positive=True, shift=False))
    beside = texts[0], "r = Relu(h) e = Conv(r, W)", *texts[2:]
    either_way(*beside, kept=[Reason.SUBGRAPH], **norm(4))


def test_a_norm_in_a_branch_goes_into_what_is_computed_outside_for_it_alone() -> None:
    fused = either_way(f"n = {bn('h')} t = Relu(n)", "e = Relu(x)", "h = Conv(x, V)", **norm(4))
    assert operators(fused)["BatchNormalization"] == 0
    fused = either_way(f"t = {bn('h')}", "e = Relu(x)", "h = Conv(x, V)", **norm(4))
    [taken] = [a.g for n in fused.graph.node for a in n.attribute if a.name == "then_branch"]
    assert [n.op_type for n in taken.node] == ["Identity"], "a body hands out only what it computes"
    both = f"n = {bn('h')} t = Relu(n)", f"m = {bn('h')} e = Relu(m)", "h = Conv(x, V)"
    either_way(*both, kept=[Reason.SUBGRAPH] * 2, **norm(4))


def test_a_name_that_stands_in_both_branches_does_not_get_outside() -> None:
    model = choice(f"n = {bn('h')} t = Relu(n)", "n = Relu(x) e = Relu(n)", "h = Conv(x, V)", **norm(4))
    fused = assert_fuses(model)
    assert "n" not in [o for node in fused.graph.node for o in node.output]


def test_a_norm_before_an_if_goes_into_all_that_reads_it_in_the_branches() -> None:
    fused = either_way("t = Conv(h, V)", "e = Conv(h, W, b)", f"h = {bn('x')}", **norm(4))
    assert operators(fused) == {"Greater": 1, "If": 1, "Conv": 2, "Identity": 1}
    either_way("t = Conv(h, V)", "e = Relu(h)", f"h = {bn('x')}", kept=[Reason.SHIFT], **norm(4, positive=True))
    either_way("t = Identity(h)", "e = Conv(h, W)", f"h = {bn('x')}", kept=[Reason.GRAPH_OUTPUT], **norm(4))
    out = "t = Conv(h, V)", "e = Conv(h, W)", f"h = {bn('x')}", "y = Add(i, h)"
    either_way(*out, kept=[Reason.SCALE], **norm(4))


def test_maps_cross_bodies_within_bodies() -> None:
    inner = "m = If(c) <then_branch = p () => (double u) { u = Conv(h, V) }, else_branch = q () => (double v) {"
    inner += f" w = {bn('h2')} v = Conv(w, W) }}> t = Identity(m)"
    before = f"h = {bn('x', 'first')} h2 = Conv(x, V)"
    texts = inner, "e = Conv(h, W, b)", before, f"y = {bn('i', 'last')}"
    fused = either_way(*texts, **norm(4), **norm(4, "first", 3), **norm(4, "last", 5))
    assert operators(fused) == {"Greater": 1, "If": 2, "Conv": 4, "Identity": 1}


def test_what_a_branch_hands_out_must_be_made_there_and_once() -> None:
    behind = f"y = {bn('i')}"
    model = choice("t = Conv(x, V)", "e = Conv(x, W)", "", behind, **norm(4))
    twice = onnx.ModelProto.FromString(model.SerializeToString())
    [node] = [n for n in twice.graph.node if n.op_type == "If"]
    node.output.append("j")
    for branch in node.attribute:
        branch.g.output.append(branch.g.output[0])
    assert_fuses(twice, [Reason.CONSUMER])
    stored = choice("t = Conv(x, V)", "e = Identity(x)", "", behind, **norm(4))
    for branch in stored.graph.node[1].attribute:
        if branch.name == "else_branch":
            del branch.g.node[:]
            branch.g.output[0].name = "e"
            branch.g.initializer.append(onnx.numpy_helper.from_array(quarters([2, 4, 4, 5]), "e"))
    assert_fuses(stored, [Reason.SUBGRAPH])


STATES = "(int64 turn, bool go, double[N,4,H,W] s) => (bool on, double a, double d)"


def repeated(text: str, behind: str, before: str = "", **constants: Any) -> onnx.ModelProto:
    """``f, y' = Loop(3)`` of a body that makes `a`, its next state, and `d`, which is stacked to `l`."""
    body = f"{before} f, l = Loop(three, , x) <body = r {STATES} {{ on = Identity(go) {text} }}> {behind}"
    used = {name: v for name, v in WEIGHTS.items() if f" {name}" in body}
    return build(body, "double[N,4,H,W] x", "y", three=np.array(3), **used, **constants)


def test_the_body_of_a_loop_absorbs_a_norm_behind_what_it_stacks() -> None:
    state = "g = Conv(s, V) a = Relu(g)"
    scale = {"k": quarters([4, 1, 1]), "t": quarters([4, 1, 1], 4)}
    fused = assert_fuses(repeated(f"{state} d = Conv(a, W)", "m = Mul(l, k) y = Add(m, t)", **scale))
    assert operators(fused) == {"Loop": 1, "Conv": 2, "Relu": 1, "Identity": 1}
    uniform = assert_fuses(repeated(f"{state} d = Conv(a, W)", "y = Mul(l, k)", k=np.array(-0.75)))
    assert operators(uniform)["Mul"] == 0
    assert_fuses(repeated("a = Conv(s, V) d = Relu(a)", f"y = {bn('f')}", **norm(4)), [Reason.CONSUMER])
    both = repeated("a = Conv(s, V) d = Identity(a)", "m = Mul(l, k) y = Add(m, t)", **scale)
    both.graph.node[0].attribute[0].g.output[2].name = "a"
    assert_fuses(both, [Reason.CONSUMER])
    asked = "g = Conv(s, V) a = Relu(g) d = Conv(a, W)"
    wrong = lambda node, name, maps: control_flow_asked(node, name, {i: turned(m) for i, m in maps.items()})  # noqa: E731
    control_flow_asked = control_flow._asked
    with mock.patch.object(control_flow, "_asked", wrong), pytest.raises(AssertionError, match="differs at"):
        assert_fuses(repeated(asked, "m = Mul(l, k) y = Add(m, t)", **scale))


def test_what_a_loop_hands_on_from_run_to_run_takes_no_map() -> None:
    """Not even where one convolution makes it, and nobody but the next run reads it."""
    body = "a = Conv(s, V) d = Relu(s)"
    assert_fuses(repeated(body, "y = Mul(f, k)", k=np.array(-0.75)), [Reason.CONSUMER])
    assert_fuses(repeated(body, f"y = {bn('f')}", **norm(4)), [Reason.CONSUMER])


def turned(given: AffineMap) -> AffineMap:
    """A map with its numbers the other way round, as a naive engine would have it."""
    return given._replace(scale=given.scale[::-1])


def test_a_body_that_runs_often_reads_one_value_from_outside() -> None:
    fused = assert_fuses(
        repeated(f"n = {bn('h')} d = Relu(n) a = Add(s, d)", "y = Identity(l)", "h = Conv(x, V)", **norm(4))
    )
    assert operators(fused)["BatchNormalization"] == 0
    fused = assert_fuses(repeated("d = Conv(h, V) a = Add(s, d)", "y = Identity(l)", f"h = {bn('x')}", **norm(4)))
    assert operators(fused)["BatchNormalization"] == 0


def scanned(axis: int, behind: str, **constants: Any) -> onnx.ModelProto:
    """Three rows of (5, 4) that are stacked to `l` along an axis."""
    body = "body = r (double[5,6] row) => (double[5,4] d) { d = MatMul(row, M) }"
    text = f"l = Scan(x) <num_scan_inputs = 1, scan_output_axes = [{axis}], {body}> {behind}"
    return build(text, "double[3,5,6] x", "y", M=quarters([6, 4]), **constants)


@pytest.mark.parametrize(("axis", "shape"), [(0, [4]), (1, [4]), (2, [4, 1]), (-1, [4, 1]), (-3, [4])])
def test_the_body_of_a_scan_absorbs_a_norm_along_another_axis_than_it_stacks(axis: int, shape: list[int]) -> None:
    constants = {"k": quarters(shape), "t": quarters(shape, 1)}
    fused = assert_fuses(scanned(axis, "m = Mul(l, k) y = Add(m, t)", **constants))
    assert operators(fused) == {"Scan": 1, "MatMul": 1, "Add": 1}
    naive = lambda node, name, maps: asked(node, name, {i: m.moved(lambda a: 1 - a) for i, m in maps.items()})  # noqa: E731
    asked = control_flow._asked
    with mock.patch.object(control_flow, "_asked", naive):
        _, report = engine.fuse(scanned(axis, "m = Mul(l, k) y = Add(m, t)", **constants))
    assert report.kept, "4 numbers along an axis of 5"


def test_a_norm_along_the_axis_that_a_scan_stacks_stays() -> None:
    assert_fuses(scanned(1, f"y = {bn('l')}", **norm(3)), [Reason.AXIS])


def test_before_ir_4_constants_of_bodies_are_stored_around_them_where_they_can_be_inputs() -> None:
    model = repeated(f"g = Conv(s, V) n = {bn('g')} a = Relu(n) d = Identity(a)", "y = Identity(l)", **norm(4))
    old = onnx.ModelProto.FromString(model.SerializeToString())
    old.ir_version = 3
    for tensor in old.graph.initializer:
        old.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(old)
    fused, report = engine.fuse(old)
    onnx.checker.check_model(fused)
    assert not report.kept
    assert operators(fused) == {"Loop": 1, "Conv": 1, "Relu": 1, "Identity": 3}
    assert [len(n.attribute[0].g.input) for n in fused.graph.node if n.op_type == "Loop"] == [3]
    assert {i.name for i in fused.graph.input} == {t.name for t in fused.graph.initializer} | {"x"}
    del fused.graph.input[1:]
    assert_same(model, fused)


def test_a_norm_that_only_a_dead_value_of_a_body_read_is_reported_as_gone() -> None:
    body = f"a = Relu(s) d = Identity(a) dead = {bn('h', 'last')}"
    before = f"g = {bn('x', 'first')} h = {bn('g')}"
    model = repeated(body, "y = Identity(l)", before, **norm(4), **norm(4, "first", 3), **norm(4, "last", 5))
    fused, report = engine.fuse(model)
    assert operators(fused)["BatchNormalization"] == 0
    assert not report.kept
    assert_same(model, fused)


def test_the_loop_of_a_function_that_was_opened_late_is_known_as_any_other() -> None:
    run = "Loop(three, , x) <body = r (int64 turn, bool go, double[2,4] s) => (bool on, double[2,4] a)"
    run += " { on = Identity(go) h = Mul(s, k) t = Add(h, k) a = MatMul(t, M) }>"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20, "own" : 1]> g (double[2,4] x) => (double[2,4] c, double[2,4] y) {{'
        f" c = {run} d = own.Run(x, three, k, M) y = {bn('d')} }}"
        f' <domain: "own", opset_import: ["" : 20]> Run (x, three, k, M) => (y) {{ e = {run} y = MatMul(e, M) }}'
    )
    stored = {"three": np.array(3), "k": quarters([4]), "M": quarters([4, 4])} | norm(4)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in stored.items())
    fused, report = engine.fuse(model)
    assert not report.kept
    assert operators(fused) == {"Loop": 2, "Identity": 2, "Add": 3, "MatMul": 3}
    assert not engine.fuse(fused)[1].changed

"""Sums: a scale goes to every operand, a shift to one; constants absorb what reaches them."""

from __future__ import annotations

import numpy as np
import pytest

from renorm_onnx import model_file
from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Desk, SetInput, Step
from renorm_onnx.fusion.carriers.addition import Addition
from renorm_onnx.fusion.carriers.exact_folding_test import (
    assert_fuses,
    backward,
    bn,
    build,
    forward,
    norm,
    operators,
    quarters,
)
from renorm_onnx.fusion.conftest import Builder, assert_same
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.fact_dims import CONSTANT_OPERATORS, RULES
from renorm_onnx.fusion.facts import Facts
from renorm_onnx.fusion.report import Reason

WEIGHTS = {"W": quarters([4, 3, 1, 1]), "V": quarters([4, 3, 1, 1], 1), "U": quarters([4, 3, 1, 1], 2)}


@pytest.mark.parametrize("body", ["Add(a, b)", "Sub(a, b)", "Sum(a, b, c)", "Mean(a, b, c)", "Sum(a)"])
def test_a_norm_behind_a_sum_of_branches_goes_into_all_of_them(body: str) -> None:
    text = f"a = Conv(x, W) b = Conv<strides=[1,1]>(x, V) c = Conv(x, U) d = {body} y = {bn('d')}"
    fused = assert_fuses(build(text, "double[N,3,H,W] x", "y", **WEIGHTS, **norm(4)))
    assert operators(fused)["BatchNormalization"] == 0


def test_an_operand_that_appears_twice_takes_the_shift_once() -> None:
    fused = backward("d = Sum(c, c)", 4)
    assert operators(fused) == {"Conv": 1, "Sum": 1}
    backward("d = Sub(c, c)", 4, [Reason.SHAPE])


def test_a_shift_does_not_enter_a_branch_that_meets_itself_again() -> None:
    """Scaling each path by itself would be right, shifting one would not."""
    lines = "p = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(c) d = Add(c, p)"
    backward(lines, 4, [Reason.CONFLICT], positive=True)
    backward(lines, 4, positive=True, shift=False)


def test_another_reader_of_a_branch_keeps_the_norm() -> None:
    text = f"a = Conv(x, W) b = Conv(x, V) d = Add(a, b) y = {bn('d')} z = Abs(b)"
    assert_fuses(build(text, "double[N,3,H,W] x", "y, z", **WEIGHTS, **norm(4)), [Reason.CONSUMER])


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1), (5,), (4, 5), (1,), (4, 4, 5), (2, 1, 4, 1)])
@pytest.mark.parametrize("order", ["Add(c, k)", "Add(k, c)", "Sub(c, k)", "Sub(k, c)", "Sum(c, k, c)"])
def test_a_constant_operand_takes_the_shift_and_is_widened(shape: tuple[int, ...], order: str) -> None:
    backward(f"d = {order}", 4, k=quarters(shape, 3))


@pytest.mark.parametrize("dims", ["1,1,1,1", "N,1,H,W", "W"])
def test_a_computed_operand_that_broadcasts_takes_no_map(dims: str) -> None:
    text = f"a = Conv(x, W) b = Abs(z) d = Add(a, b) y = {bn('d')}"
    assert_fuses(build(text, f"double[N,3,H,W] x, double[{dims}] z", "y", **WEIGHTS, **norm(4)), [Reason.SHAPE])


def test_an_open_channel_dimension_is_no_proof() -> None:
    text = f"a = Conv(x, W) b = Relu(z) d = Add(a, b) y = {bn('d')}"
    assert_fuses(build(text, "double[N,3,H,W] x, double[N,H,H,W] z", "y", **WEIGHTS, **norm(4)), [Reason.SHAPE])


def test_a_uniform_scale_enters_operands_of_any_shape() -> None:
    text = "a = Conv(x, W) b = Conv(x, V) m = ReduceMean<keepdims=0>(b) d = Add(a, m) y = Mul(d, k)"
    fused = assert_fuses(build(text, "double[N,3,H,W] x", "y", k=quarters([1], 5), **WEIGHTS))
    assert operators(fused)["Mul"] == 0


def test_a_norm_read_twice_by_a_sum_goes_forward() -> None:
    forward("d = Add(c, c)", 4)
    forward("d = Sub(c, c)", 4)
    fused = forward("e = Neg(c) d = Sub(c, e)", 4, [Reason.SCALE])
    assert operators(fused) == {"Neg": 1, "Sub": 1, "Conv": 1}


def test_a_shift_alone_goes_forward_into_a_constant_operand() -> None:
    text = "c = Add(x, k) e = Add(c, z) d = Add(p, e) y = Conv(d, W)"
    constants = {"k": quarters([3, 1, 1]), "p": quarters([4, 5], 1), "W": quarters([4, 3, 2, 2])}
    fused = assert_fuses(build(text, "double[N,3,H,W] x, double[N,3,H,W] z", "y", **constants))
    assert operators(fused) == {"Add": 2, "Conv": 1}


def test_a_scale_does_not_go_forward_past_an_operand_that_lacks_it() -> None:
    text = f"c = {bn('x')} d = Add(c, z) y = Conv(d, W)"
    assert_fuses(build(text, "double[N,3,H,W] x, double[N,3,H,W] z", "y", W=WEIGHTS["W"], **norm(3)), [Reason.SCALE])


def test_different_scales_do_not_go_forward_through_one_sum() -> None:
    text = f"c = {bn('x')} m = MaxPool<kernel_shape=[1,1]>(c) n = Neg(c) t = Mul(n, k) d = Add(m, t) y = Conv(d, W)"
    model = build(text, "double[N,3,H,W] x", "y", k=quarters([4, 5]), W=WEIGHTS["W"], **norm(3, positive=True))
    assert_fuses(model, [Reason.SHIFT])


def test_channels_in_another_order_lack_other_scales() -> None:
    forward("e = Gather<axis=1>(c, i) d = Add(c, e)", 4, [Reason.CONFLICT], i=np.array([1, 0, 3, 2]))


@pytest.mark.parametrize("last", ["Add(p, k)", "Sub(p, k)", "Sub(k, p)"])
def test_a_map_goes_forward_past_a_constant_of_its_axis(last: str) -> None:
    lines = f"p = MaxPool<kernel_shape=[2,2]>(c) d = {last}"
    fused = forward(lines, 4, positive=True, powers=True, k=quarters([4, 1, 1], 3))
    assert operators(fused) == {"MaxPool": 1, "Conv": 1}


@pytest.mark.parametrize("shape", [(4, 4, 5), (4, 5), (5,), (1, 4, 4, 5), (1, 4, 1)])
@pytest.mark.parametrize("order", ["Add(c, k)", "Add(k, c)", "Sub(c, k)", "Sub(k, c)", "Sum(c, k, k)", "Mean(k, c)"])
def test_a_map_goes_forward_past_a_constant_of_other_axes_which_is_divided(shape: tuple[int, ...], order: str) -> None:
    """As a position embedding behind a norm; scales that divide without rounding."""
    text = f"e = Mul(x, s) c = Add(e, t) d = {order} y = Conv(d, W)"
    scale = np.array([2.0, -0.5, 4, -1]).reshape(4, 1, 1)
    constants = {"s": scale, "t": quarters([4, 1, 1]), "k": quarters(shape, 3), "W": quarters([3, 4, 1, 1])}
    fused = assert_fuses(build(text, "double[N,4,H,W] x", "y", **constants))
    assert operators(fused) == {order.partition("(")[0]: 1, "Conv": 1}


def test_a_large_constant_is_not_written_out_for_every_channel() -> None:
    """It would be as many times as large as there are channels."""

    def kept(shape: tuple[int, ...]) -> list[Reason]:
        b = Builder()
        c = b.norm(b.node("Sigmoid", "x"), 32)
        model = b.model({"x": [1, 32, 64, 64]}, [b.conv(b.node("Add", c, b.normal(*shape)), 32, 5)])
        fused, report = fuse(model)
        assert_same(model, fused)
        return [norm.refusals[-1].reason for norm in report.kept]

    assert kept((1, 1, 64, 64)) == [Reason.SHAPE]
    assert kept((1, 32, 64, 64)) == kept((1, 1, 64, 1)) == []


def test_a_scale_of_zero_takes_no_constant_with_it() -> None:
    text = "c = Mul(x, s) e = Add(c, t) d = Add(e, k) y = Conv(d, W)"
    constants = {"s": np.array([2.0, 0, -1]).reshape(3, 1, 1), "t": quarters([3, 1, 1]), "k": quarters([3, 4, 5], 1)}
    assert_fuses(build(text, "double[N,3,H,W] x", "y", W=WEIGHTS["W"], **constants), [Reason.SCALE])


@pytest.mark.parametrize("last", ["Add(c, k)", "Add(k, c)", "Sub(c, k)", "Sub(k, c)"])
def test_a_scale_goes_past_a_constant_alone_and_so_past_what_bends(last: str) -> None:
    """``relu(s x + c) = s relu(x + c / s)``; a negative scale, or a shift of its own, ends there."""
    text = f"c = {bn('x')} e = {last} d = Relu(e) y = Conv(d, W)"
    constants = {"k": quarters([3, 1, 1], 3), "W": WEIGHTS["W"]}
    for positive, shift in ((True, False), (False, False), (True, True)):
        parameters = norm(3, positive=positive, shift=shift, powers=True)
        # What is left is the Add before the Relu, or the norm that took it up.
        fused = assert_fuses(build(text, "double[N,3,H,W] x", "y", **constants, **parameters), [Reason.SHIFT])
        assert operators(fused)["BatchNormalization"] == (shift or not positive)


@pytest.mark.parametrize(("last", "sign"), [("Add(x, k)", 1.0), ("Sub(x, k)", -1.0), ("Sub(k, x)", 1.0)])
@pytest.mark.parametrize(("small", "shift"), [(0.0, 0.0), (2.0**-12, 0.0), (3.75, 3.0)])
def test_a_large_scale_takes_a_constant_along_and_a_small_one_leaves_it(
    last: str, sign: float, small: float, shift: float
) -> None:
    """``s x + t + c`` in two channels; what is left behind is c - s c."""
    loaded = model_file.load(build(f"y = {last}", "double[N,2,H,W] x", "y", k=np.full((2, 1, 1), 512.0)))
    desk = Desk(Facts(loaded, RULES, CONSTANT_OPERATORS))
    position = 1 if last == "Sub(k, x)" else 0
    given = AffineMap.of([1024.0, small], [shift, shift], 1)
    step = Addition().forward(loaded.graph[0], {position: given}, desk)
    assert isinstance(step, Step)
    [edit] = step.edits
    assert isinstance(edit, SetInput)
    t = -shift if position else shift
    assert edit.parameter.float64().reshape(-1).tolist() == [0.5, 512.0]
    assert step.onward[0].equals(given.with_shift(np.array([t, t + sign * 512 * (1 - small)])))


def test_the_axis_of_a_map_is_counted_from_the_end_where_an_operand_broadcasts() -> None:
    text = "c = Add(x, k) d = Add(c, z) y = Conv(d, W)"
    constants = {"k": quarters([3, 1, 1]), "W": WEIGHTS["W"]}
    fused = assert_fuses(build(text, "double[3,H,W] x, double[N,3,H,W] z", "y", **constants))
    assert operators(fused) == {"Add": 1, "Conv": 1}


def test_operands_aligned_at_an_axis_as_before_opset_7_let_nothing_pass() -> None:
    """A square image, where the constant could be taken for one of channels."""
    from onnx import TensorProto, helper, numpy_helper

    from renorm_onnx.fusion.engine import FuseOptions

    arrays = {"k": quarters([3]), "W": WEIGHTS["W"], "s": np.array([2.0, -0.5, 4.0]).reshape(3, 1, 1)}
    nodes = [
        helper.make_node("Mul", ["x", "s"], ["n"], broadcast=1, axis=1),
        helper.make_node("Add", ["n", "k"], ["d"], broadcast=1, axis=3),
        helper.make_node("Conv", ["d", "W"], ["y"]),
    ]
    infos = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, [1, c, 3, 3]) for n, c in (("x", 3), ("y", 4))]
    stored = [numpy_helper.from_array(np.asarray(a, np.float64), n) for n, a in arrays.items()]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 6)], ir_version=4)
    fused, report = fuse(model, FuseOptions(allow_cancellation=True))
    assert [n.op_type for n in fused.graph.node] == ["Mul", "Add", "Conv"]
    assert not report.changed

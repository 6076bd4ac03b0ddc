"""Two normalizations in a row become one, from whichever side they meet."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from renorm_onnx.fusion import engine
from renorm_onnx.fusion.carriers.exact_folding_test import assert_fuses, bn, build, norm, operators, quarters
from renorm_onnx.fusion.conftest import Builder
from renorm_onnx.fusion.conftest import assert_same as assert_same_values
from renorm_onnx.fusion.report import Reason


@pytest.mark.parametrize(
    "text", [f"c = Mul(x, k) e = Add(c, l) y = {bn('e')}", f"e = {bn('x')} c = Mul(k, e) y = Sub(l, c)"]
)
def test_a_chain_beside_a_norm_is_absorbed_by_it(text: str) -> None:
    constants = {"k": np.array([2.0, -0.5, 4.0, -2.0]).reshape(4, 1, 1), "l": quarters([1, 4, 1, 1], 1)}
    fused = assert_fuses(build(text, "double[N,4,H,W] x", "y", **constants, **norm(4)), [Reason.GRAPH_INPUT])
    assert operators(fused) == {"BatchNormalization": 1}


def test_two_norms_become_one() -> None:
    text = f"a = {bn('x', 'p')} y = {bn('a')}"
    fused = assert_fuses(
        build(text, "double[N,4,H] x", "y", **norm(4, "p", powers=True), **norm(4, seed=3)), [Reason.GRAPH_INPUT]
    )
    assert operators(fused) == {"BatchNormalization": 1}


def test_a_channel_scaled_by_zero_becomes_constant() -> None:
    first = norm(4, "p", powers=True)
    first["p_s"][1] = 0.0
    text = f"a = {bn('x', 'p')} r = Abs(x) q = Add(a, a) y = {bn('q')}"
    fused = assert_fuses(build(text, "double[N,4,H] x", "y", **first, **norm(4, seed=3)), [Reason.GRAPH_INPUT])
    assert operators(fused)["BatchNormalization"] == 1


def stored(model: onnx.ModelProto, *letters: str) -> list[np.ndarray]:
    """Parameters of the only norm of a model, by their places."""
    [node] = [n for n in model.graph.node if n.op_type == "BatchNormalization"]
    known = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    return [known[node.input[1 + "sbmv".index(letter)]] for letter in letters]


def test_a_norm_that_absorbs_another_has_the_statistics_of_its_new_input() -> None:
    """Mean and variance of x, not of what the first norm made of it; gamma keeps all but the sign."""
    first, second = norm(4, "p", powers=True), norm(4, seed=3)
    text = f"a = {bn('x', 'p')} y = {bn('a')}"
    fused = assert_fuses(build(text, "double[N,4,H] x", "y", **first, **second), [Reason.GRAPH_INPUT])
    scale = first["p_s"] / np.sqrt(first["p_v"])
    shift = first["p_b"] - first["p_m"] * scale
    mean, variance, gamma = stored(fused, "m", "v", "s")
    assert np.array_equal(mean, (second["bn_m"] - shift) / scale)
    assert np.array_equal(variance, second["bn_v"] / scale**2)
    assert np.array_equal(gamma, second["bn_s"] * np.sign(scale))


def scaled_input(factor: float, mean: float, variance: float, *, dtype: str = "float32") -> onnx.ModelProto:
    """``Conv(norm(x * factor))``; the norm has that mean and variance in all four channels."""
    b = Builder(dtype=dtype)
    stats = [b.constant(v) for v in (np.full(4, 0.7), np.full(4, 0.1), np.full(4, mean), np.full(4, variance))]
    scaled = b.node("Mul", "x", b.constant(factor))
    y = b.node("Conv", b.node("BatchNormalization", scaled, *stats), b.normal(6, 4, 3, 3))
    return b.model({"x": ["n", 4, "h", "w"]}, [y])


@pytest.mark.parametrize(
    ("factor", "mean", "kept"), [(1024.0, 512.0, 512), (1000.0, 3.0, 0), (1 / 255, 0.5, 0), (-1 / 255, 6.0, 6)]
)
def test_how_far_an_input_lies_from_zero_does_not_depend_on_its_unit(factor: float, mean: float, kept: int) -> None:
    """The factor goes into the norm, which then stays or goes for the same reason as without it."""
    model = scaled_input(factor, mean, 1.0)
    fused, report = engine.fuse(model)
    assert_same_values(model, fused)
    if kept:
        assert report.kept[0].refusals[-1].reason == Reason.CANCELLATION
        assert f"has an input {kept} standard deviations from zero" in report.kept[0].detail
        again, second = engine.fuse(fused)
        assert not second.changed
        assert again.SerializeToString(deterministic=True) == fused.SerializeToString(deterministic=True)
        [mean_of, variance] = stored(fused, "m", "v")
        assert np.allclose(mean_of, mean / factor, rtol=1e-6)
        assert np.allclose(variance, 1 / factor**2, rtol=1e-4)
    else:
        assert not report.kept
    assert bool(engine.fuse(scaled_input(1.0, mean, 1.0))[1].kept) == bool(kept)


@pytest.mark.parametrize("target", ["fp32", "fp16"])
@pytest.mark.parametrize(("factor", "variance"), [(1 / 255, 9.0), (1024.0, 0.5), (1024.0, 0.0)])
def test_a_variance_that_its_type_does_not_hold_leaves_the_rest_to_gamma(
    factor: float, variance: float, target: str
) -> None:
    model = scaled_input(factor, 100.0, variance, dtype="float16" if target == "fp32" else "float32")
    fused, report = engine.fuse(model, engine.FuseOptions(target=target))
    assert report.kept[0].refusals[-1].reason == Reason.CANCELLATION
    assert report.affines_folded == 1
    [held] = stored(fused, "v")
    assert ((held >= 0) & (held <= 65504)).all()
    assert_same_values(model, fused, dtype="float16")


@pytest.mark.parametrize("factor", [100.0, 300.0, 1024.0])
def test_a_variance_of_next_to_nothing_becomes_zero_and_not_the_smallest_that_its_type_holds(factor: float) -> None:
    fused, _ = engine.fuse(scaled_input(factor, 100.0, 0.0, dtype="float16"))
    [held] = stored(fused, "v")
    assert not held.any()
    [node] = [n for n in fused.graph.node if n.op_type == "BatchNormalization"]
    assert node.attribute[0].f == pytest.approx(1e-5 / factor**2, rel=1e-3)


def test_a_norm_in_training_mode_absorbs_nothing() -> None:
    text = "a, m1, v1 = BatchNormalization<training_mode=1>(x, s, b, m, v) y = Mul(a, k)"
    constants = {"s": quarters([4]), "b": quarters([4], 1), "m": quarters([4], 2), "v": quarters([4], 3, positive=True)}
    model = build(text, "double[N,4,H] x", "y", k=np.array(2.5), **constants)
    assert_fuses(model, [Reason.TRAINING, Reason.TRAINING])


def test_a_vector_has_one_channel_and_no_axis_for_it() -> None:
    """ONNX BatchNormalization-15: of an input of one dimension, C is 1."""
    text = f"a = MatMul(x, B) y = {bn('a')}"
    fused = assert_fuses(build(text, "double[5,3] x", "y", B=quarters([3]), **norm(1)))
    assert operators(fused) == {"MatMul": 1, "Add": 1}
    text = f"a = {bn('x')} y = MatMul(a, B)"
    fused = assert_fuses(build(text, "double[3] x", "y", B=quarters([3, 2]), **norm(1)))
    assert operators(fused) == {"MatMul": 1, "Add": 1}
    text = f"e = {bn('x')} a = Relu(e) y = {bn('a')}"
    assert_fuses(build(text, "double[3] x", "y", **norm(1)), [Reason.GRAPH_INPUT, Reason.SHIFT])

"""Normalizations by statistics of their input absorb a map in their scale and bias."""

from __future__ import annotations

import numpy as np
import pytest

from renorm_onnx.fusion.carriers.exact_folding_test import assert_fuses, bn, build, norm, operators, quarters
from renorm_onnx.fusion.conftest import Builder
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.report import Reason

IMAGE = "double[N,4,H,W] x"


def channels(size: int = 4) -> dict[str, np.ndarray]:
    return {"s": quarters([size], 3), "b": quarters([size], 4)}


def test_a_norm_behind_instance_normalization_is_absorbed() -> None:
    text = f"c = InstanceNormalization(x, s, b) y = {bn('c')}"
    assert operators(assert_fuses(build(text, IMAGE, "y", **channels(), **norm(4)))) == {"InstanceNormalization": 1}


def test_a_norm_behind_group_normalization_is_absorbed_from_opset_21() -> None:
    text = f"c = GroupNormalization<num_groups=2>(x, s, b) y = {bn('c')}"
    model = build(text, IMAGE, "y", opset=21, **channels(), **norm(4))
    assert operators(assert_fuses(model)) == {"GroupNormalization": 1}
    assert_fuses(build(text, IMAGE, "y", opset=18, **channels(2), **norm(4)), [Reason.SCALE])


def test_a_map_per_group_is_absorbed_before_opset_21() -> None:
    text = "c = GroupNormalization<num_groups=2>(x, s, b) m = Mul(c, k) y = Add(m, l)"
    maps = {
        "k": np.array([2.0, 2.0, -0.5, -0.5]).reshape(4, 1, 1),
        "l": np.array([1.0, 1.0, 3.0, 3.0]).reshape(4, 1, 1),
    }
    fused = assert_fuses(build(text, IMAGE, "y", opset=20, **maps, **channels(2)))
    assert operators(fused) == {"GroupNormalization": 1}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axis", [-1, 2, 1])
def test_a_chain_behind_layer_normalization_is_absorbed(bias: bool, axis: int) -> None:
    shape = {-1: [5], 2: [4, 5], 1: [3, 4, 5]}[axis]
    text = f"c = LayerNormalization<axis={axis}>(x, s{', b' if bias else ''}) m = Mul(k, c) y = Sub(l, m)"
    constants = {"s": quarters(shape, 3)} | ({"b": quarters(shape, 4)} if bias else {})
    model = build(text, "double[N,3,4,5] x", "y", k=quarters([5]), l=quarters([5], 1), **constants)
    assert operators(assert_fuses(model)) == {"LayerNormalization": 1}


def test_a_map_along_an_axis_without_a_scale_is_refused() -> None:
    text = f"c = LayerNormalization(x, s) y = {bn('c')}"
    assert_fuses(build(text, "double[N,4,4,4] x", "y", s=quarters([4]), **norm(4)), [Reason.AXIS])
    text = "c = InstanceNormalization(x, s, b) y = Mul(c, k)"
    assert_fuses(build(text, "double[N,4,4,4] x", "y", k=quarters([4]), **channels()), [Reason.AXIS])


def test_a_shift_at_the_input_is_removed_and_a_scale_refused() -> None:
    text = "c = Add(x, k) y = InstanceNormalization(c, s, b)"
    fused = assert_fuses(build(text, IMAGE, "y", k=quarters([4, 1, 1]), **channels()))
    assert operators(fused) == {"InstanceNormalization": 1}
    text = "c = Add(x, k) y = LayerNormalization<axis=2>(c, s)"
    assert_fuses(build(text, "double[N,4,3,5] x", "y", k=quarters([4, 1, 1]), s=quarters([3, 5])))
    text = f"c = {bn('x')} y = InstanceNormalization(c, s, b)"
    assert_fuses(build(text, IMAGE, "y", **channels(), **norm(4)), [Reason.SCALE])


def test_a_shift_that_varies_within_a_normalized_set_is_refused() -> None:
    text = "c = Add(x, k) y = GroupNormalization<num_groups=2>(c, s, b)"
    assert_fuses(build(text, IMAGE, "y", opset=21, k=quarters([4, 1, 1]), **channels()), [Reason.SHIFT])
    for operator in ("InstanceNormalization", "GroupNormalization<num_groups=2>"):
        text = f"c = Add(x, k) y = {operator}(c, s, b)"
        model = build(text, "double[N,4,3,5] x", "y", opset=21, k=quarters([5]), **channels())
        assert_fuses(model, [Reason.AXIS])
    shared = np.repeat([0.75, -1.5], 2).reshape(4, 1, 1)
    text = "c = Add(x, k) y = GroupNormalization<num_groups=2>(c, s, b)"
    assert operators(assert_fuses(build(text, IMAGE, "y", opset=21, k=shared, **channels())))["Add"] == 0
    text = "c = Add(x, k) y = LayerNormalization(c, s)"
    assert_fuses(build(text, "double[N,4,3,5] x", "y", k=quarters([5]), s=quarters([5])), [Reason.AXIS])


@pytest.mark.parametrize(("operator", "shown"), [("LayerNormalization", ["y", "m"]), ("RMSNormalization", ["y"])])
def test_a_shift_at_the_input_that_an_output_shows_is_refused(operator: str, shown: list[str]) -> None:
    b = Builder()
    b.node(operator, b.node("Add", "x", b.constant(0.75)), b.normal(5), out="y")
    if operator == "LayerNormalization":
        b.nodes[-1].output.extend(["m", "i"])
        assert fuse(b.model({"x": [2, 5]}, ["y"]))[1].changed
    _, report = fuse(b.model({"x": [2, 5]}, shown, opset=23, ir_version=11))
    assert [r.reason for r in report.entries[0].refusals] == [Reason.GRAPH_INPUT, Reason.SHIFT]


def test_the_statistics_take_no_map() -> None:
    b = Builder()
    b.node("LayerNormalization", "x", b.normal(5), out="z")
    b.nodes[-1].output.extend(["m", "i"])
    b.node("Mul", "m", b.constant(0.75), out="y")
    _, report = fuse(b.model({"x": [2, 5]}, ["y", "z"]))
    assert [r.reason for r in report.entries[0].refusals] == [Reason.OUTPUTS, Reason.GRAPH_OUTPUT]


@pytest.mark.parametrize("parameters", ["z, b", "s, z"])
def test_a_layer_normalization_whose_parameters_are_not_constant_keeps_a_norm(parameters: str) -> None:
    text = f"c = LayerNormalization(x, {parameters}) m = Mul(c, k) y = Add(m, l)"
    constants = {"k": quarters([5], 1), "l": quarters([5], 2), "s": quarters([5], 3), "b": quarters([5], 4)}
    used = {name: value for name, value in constants.items() if name in "kl" or name in parameters}
    assert_fuses(build(text, "double[N,4,5] x, double[5] z", "y", **used), [Reason.WEIGHT])

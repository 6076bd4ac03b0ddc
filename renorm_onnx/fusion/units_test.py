"""A chain says how far its input lies from zero, whatever was folded into it or past it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Step
from renorm_onnx.fusion.conftest import Builder, assert_same, operators
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.units import KEY, multiplied, unit_after, unit_of

FAR = "has an input 256 standard deviations from zero if its first scale is 1 / sigma, more than 4"


@pytest.mark.parametrize("factor", [1024.0, 1 / 255])
@pytest.mark.parametrize(("divide", "by"), [("Div", 2.0), ("Mul", 0.5)])
def test_a_scale_before_a_chain_keeps_its_distance_from_zero(divide: str, by: float, factor: float) -> None:
    """``(x s - 512) / 2``: what is subtracted and the divisor become those of x."""
    b = Builder()
    scaled = b.node("Reshape", b.node("Mul", "x", b.constant(factor)), b.constant(np.array([-1, 4])))
    mean = b.constant(np.full(4, 512.0), "mean")
    y = b.node("MatMul", b.node(divide, b.node("Sub", scaled, mean), b.constant(np.full(4, by), "by")), b.normal(4, 5))
    model = b.model({"x": ["n", 2, 2]}, [y])
    fused, report = fuse(model)
    assert operators(fused) == ["Reshape", "Sub", divide, "MatMul"]
    assert FAR in report.kept[0].detail
    assert_same(model, fused)
    stored = {i.name: np.frombuffer(i.raw_data, np.float32) for i in fused.graph.initializer}
    assert np.allclose(stored["mean__fused"], 512 / factor, rtol=1e-7)
    assert np.allclose(stored["by__fused"], by / factor if divide == "Div" else by * factor, rtol=1e-7)
    assert not fuse(fused)[1].changed


def test_a_scale_behind_a_chain_leaves_its_distance_from_zero() -> None:
    """With a thousandth of its first scale it would seem to lie near enough, and be folded with a loss."""
    b = Builder()
    chain = b.node("Sub", "x", b.constant(np.full((4, 1, 1), 512.0)))
    chain = b.node("Mul", chain, b.constant(np.full((4, 1, 1), 0.5), "half"))
    pooled = b.node("MaxPool", chain, kernel_shape=[2, 2])
    model = b.model({"x": ["n", 4, 7, 7]}, [b.conv(b.node("Mul", pooled, b.constant(1e-3)), 4, 5)])
    fused, report = fuse(model)
    assert operators(fused) == ["Sub", "Mul", "MaxPool", "Conv"]
    assert report.affines_folded == 1
    assert "half__fused" in {i.name for i in fused.graph.initializer}
    assert FAR in report.kept[0].detail
    assert_same(model, fused)
    again, report = fuse(fused)
    assert not report.changed
    assert FAR in report.kept[0].detail
    assert again.SerializeToString() == fused.SerializeToString()


@pytest.mark.parametrize(
    "said", ["no number", "[2]", '{"axis": 1}', '{"axis": 1, "scale": [0, 1]}', '{"axis": 1, "scale": [[2]]}']
)
def test_a_unit_that_is_none_is_passed_over(said: str) -> None:
    node = ir.Node("", "Mul", [ir.Value(name="x"), ir.Value(name="c")], num_outputs=1)
    node.metadata_props[KEY] = said
    assert unit_of(node, {}) is None
    node.metadata_props[KEY] = '{"axis": 1, "scale": [2.0, 0.5]}'
    read = unit_of(node, {})
    assert read is not None
    assert read.equals(AffineMap.of([2.0, 0.5], [0.0, 0.0], 1))


def test_units_multiply_and_a_dead_channel_has_none() -> None:
    node = ir.Node("", "Mul", [ir.Value(name="x"), ir.Value(name="c")], num_outputs=1)
    scale, behind = AffineMap.of([2.0, 0.0, -4.0], [0.0, 0.0, 0.0], 1), Step((), {0: AffineMap.of(8.0, 3.0, None)})
    backward = unit_after("backward", node, scale, Step())
    assert backward is not None
    assert backward.equals(AffineMap.of([0.5, 1.0, -0.25], [0.0, 0.0, 0.0], 1))
    forward = unit_after("forward", node, None, behind)
    assert forward is not None
    assert multiplied(backward, forward).scale.tolist() == [4.0, 8.0, -2.0]
    assert multiplied(None, forward).equals(AffineMap.of(8.0, 0.0, None))
    assert multiplied(backward, AffineMap.of([1.0, 2.0], 0.0, 1)) is backward


def test_what_multiplies_nothing_has_no_unit() -> None:
    node = ir.Node("", "Mul", [ir.Value(name="x"), ir.Value(name="c")], num_outputs=1)
    assert unit_after("forward", node, None, Step()) is None
    assert unit_after("backward", node, AffineMap.of(1.0, 0.0, None), Step()) is None
    add = ir.Node("", "Add", [ir.Value(name="x"), ir.Value(name="c")], num_outputs=1)
    assert unit_after("backward", add, AffineMap.of(2.0, 0.0, None), Step()) is None

"""What a fold writes stays of the size of what it reads: computed constants are narrowed, and mean the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from renorm_onnx.fusion import operands
from renorm_onnx.fusion.conftest import TYPES, Builder, assert_same, largest_difference, operators
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.parameters import Parameter

C, SIDE = 6, 40


def computed_operand(kind: str, *, opset: int = 17, ir_version: int = 8, dtype: str = "float32") -> onnx.ModelProto:
    """A convolution, to which a constant of (1, C, SIDE, SIDE) elements is added that a few bytes compute; a norm."""
    b = Builder(dtype=dtype)
    sizes = b.constant(np.array([1, C, SIDE, SIDE]))
    if kind == "Tile":
        large = b.node(kind, b.normal(1, C, 1, 1), b.constant(np.array([1, 1, SIDE, SIDE])))
    elif kind == "ConstantOfShape":
        large = b.node(kind, sizes, value=numpy_helper.from_array(np.array([0.7], np.float32)))
    else:
        # Of rows, so that one axis beside the channels does not repeat itself.
        large = b.node("Expand", b.normal(C, SIDE, 1), sizes)
    summed = b.node("Add", b.conv("x", 3, C, 1), large)
    model = b.model({"x": ["n", 3, "h", "w"]}, [b.norm(summed, C)], opset=opset, ir_version=ir_version)
    # Of inputs that may be overridden, shape inference learns nothing.
    dims = ["n", C, SIDE, SIDE]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(model.graph.output[0].name, TYPES[dtype], dims))
    if ir_version < 4:
        for tensor in model.graph.initializer:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


@pytest.fixture(autouse=True)
def narrow_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "WRITTEN_WHOLE", 1000)


@pytest.mark.parametrize("ir_version", [3, 8])
@pytest.mark.parametrize(("kind", "numbers"), [("ConstantOfShape", C), ("Expand", C * SIDE)])
def test_a_large_computed_operand_is_written_without_what_repeats_itself(
    kind: str, numbers: int, ir_version: int
) -> None:
    model = computed_operand(kind, ir_version=ir_version)
    fused, report = fuse(model)
    assert len(report.folded) == 1
    assert sorted(operators(fused)) == ["Add", "Conv", "Expand"]
    (expand,) = (node for node in fused.graph.node if node.op_type == "Expand")
    data = next(t for t in fused.graph.initializer if t.name == expand.input[0])
    assert int(np.prod(data.dims)) == numbers
    assert fused.ByteSize() < 2 * model.ByteSize() + 1000
    assert_same(model, fused, h=SIDE, w=SIDE)
    again, second = fuse(fused)
    assert not second.changed
    assert operators(again) == operators(fused)


def test_an_operand_whose_repetition_was_taken_wrongly_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_of_every_axis(self: Parameter) -> Parameter:
        return Parameter.new(self.float64()[:1, :1, :1, :1], self.dtype)

    monkeypatch.setattr(Parameter, "narrowed", first_of_every_axis)
    model = computed_operand("Expand")
    assert largest_difference(model, fuse(model)[0], h=SIDE, w=SIDE) > 1e-2


@pytest.mark.parametrize(
    ("opset", "dtype", "whole"),
    [(7, "float32", True), (8, "float32", False), (12, "bfloat16", True), (13, "bfloat16", False)],
)
def test_before_there_is_an_expand_the_operand_is_written_whole(opset: int, dtype: str, whole: bool) -> None:
    model = computed_operand("Tile", opset=opset, dtype=dtype)
    fused, report = fuse(model)
    assert len(report.folded) == 1
    assert sorted(operators(fused)) == ["Add", "Conv"] + ([] if whole else ["Expand"])
    assert_same(model, fused, dtype=dtype, h=SIDE, w=SIDE)


def test_a_weight_that_is_an_output_too_stays_what_it_is() -> None:
    b = Builder()
    weight = b.normal(C, 3, 1, 1, name="w")
    y = b.norm(b.node("Conv", "x", weight), C)
    model = b.model({"x": ["n", 3, SIDE, SIDE]}, [y])
    model.graph.output.append(helper.make_tensor_value_info("w", 1, [C, 3, 1, 1]))
    fused, report = fuse(model)
    assert len(report.folded) == 1
    assert_same(model, fused)


def test_what_does_not_repeat_itself_and_what_is_small_is_stored_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = computed_operand("ConstantOfShape")
    monkeypatch.setattr(operands, "WRITTEN_WHOLE", C * SIDE * SIDE)
    fused, _ = fuse(model)
    assert operators(fused) == ["Conv", "Add"]
    assert_same(model, fused, h=SIDE, w=SIDE)


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (np.ones((4, 3)), (1, 1)),
        (np.arange(3.0) * np.ones((4, 1)), (1, 3)),
        (np.arange(12.0).reshape(4, 3), (4, 3)),
        (np.zeros((0, 3)), (0, 1)),
        (np.full((2, 2), np.nan), (2, 2)),
    ],
)
def test_narrowing_keeps_every_axis_that_matters(array: np.ndarray, shape: tuple[int, ...]) -> None:
    narrow = Parameter.new(array, ir.DataType.FLOAT).narrowed()
    assert narrow.shape == shape
    np.testing.assert_array_equal(np.broadcast_to(narrow.float64(), array.shape), array)


@pytest.mark.parametrize("read", ["once", "twice"])
def test_what_was_said_of_a_weight_is_not_said_of_what_it_became(read: str) -> None:
    b = Builder()
    weight = b.normal(4, 3, 3, 3)
    outputs = [b.norm(b.node("Conv", "x", weight), 4)]
    if read == "twice":
        outputs.append(b.node("Conv", "x", weight))
    model = b.model({"x": ["n", 3, 8, 8]}, outputs)
    annotation = model.graph.quantization_annotation.add(tensor_name=weight)
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=weight)
    fused, report = fuse(model)
    assert len(report.folded) == 1
    kept = [a.tensor_name for a in fused.graph.quantization_annotation]
    assert kept == ([] if read == "once" else [weight])
    changed = fused.graph.node[0].input[1]
    assert changed != weight
    assert_same(model, fused)

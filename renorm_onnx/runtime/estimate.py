"""How much work one run of a model is, from its shapes alone."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import onnx
import onnx_ir as ir

from renorm_onnx.fusion.fact import Dims
from renorm_onnx.fusion.fact_dims import CONSTANT_OPERATORS, RULES
from renorm_onnx.fusion.facts import Facts

_CONSTANT_KEPT = 4096  # elements; shapes and axes are smaller, weights usually larger

# Operator -> position of its weight.
_CONVOLUTIONS = {"Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3, "DeformConv": 1, "FusedConv": 1}
_PRODUCTS = {"MatMul": 1, "Gemm": 1, "MatMulInteger": 1, "QLinearMatMul": 3, "FusedMatMul": 1}


@dataclass(frozen=True)
class Cost:
    """What one run takes.

    Attributes:
        flops: Floating-point operations; a multiplication with its addition counts two.
        bytes: Weights plus the largest set of values alive at once, in float64.
        complete: Whether every shape was found; if not, both numbers are lower bounds.
    """

    flops: float
    bytes: float
    complete: bool

    def __str__(self) -> str:
        least = "" if self.complete else "at least "
        return f"{least}{self.flops / 1e9:.3g} GFLOP, {self.bytes / 1e6:.3g} MB"


LIMIT = Cost(10e9, 500e6, complete=True)
"""What is checked end to end without being asked for: some seconds; ResNet-50 at 224 x 224 takes 8.2 GFLOP."""


def estimate(model: ir.Model, sizes: Mapping[str, int] | None = None) -> Cost:
    """Estimate the cost of one run.

    Args:
        model: Not changed.
        sizes: Values for named sizes that vary; others count as 1 on the first axis, 32 on later ones.
    """
    shapes = inferred_shapes(model, sizes or {})
    flops, complete = 0.0, True
    live = peak = 0.0
    remaining = {value.name: len(value.uses()) for node in model.graph for value in node.outputs}
    for node in model.graph:
        outputs = [shapes.get(value.name or "") for value in node.outputs if value.name]
        complete &= None not in outputs
        count = sum(math.prod(shape) for shape in outputs if shape is not None)
        flops += _flops(node, shapes, count)
        live += count
        peak = max(peak, live)
        for value in {value.name: value for value in node.inputs if value is not None}.values():
            if value.name in remaining:
                remaining[value.name] -= sum(1 for other in node.inputs if other is value)
                shape = shapes.get(value.name or "")
                if remaining[value.name] == 0 and shape is not None:
                    live -= math.prod(shape)
    weights = sum(math.prod(constant_shape(value)) for value in model.graph.initializers.values())
    return Cost(flops, 8.0 * (weights + peak), complete)


def inferred_shapes(model: ir.Model, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every value of the main graph that follows from the inputs' sizes.

    Args:
        model: Not changed; its weights are not read.
        sizes: Values for sizes that vary, by name; others count as 1 on the first axis, 32 on later ones.
    """
    light = _without_weights(model)
    for value in light.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape(_size(sizes, axis, dim) for axis, dim in enumerate(value.shape))
    shapes = _proven(light)
    proto = ir.to_proto(light)
    with contextlib.suppress(Exception):  # a model that onnx cannot infer is still a model
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    for info in [*proto.graph.value_info, *proto.graph.output, *proto.graph.input]:
        kind = info.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            shapes[info.name] = tuple(dim.dim_value for dim in kind.shape.dim)
    for name, value in model.graph.initializers.items():
        shapes[name] = constant_shape(value)
    return shapes


def _size(sizes: Mapping[str, int], axis: int, dim: int | ir.SymbolicDim) -> int:
    if isinstance(dim, int):
        return dim
    return sizes.get(dim.value or "", sizes.get(f"axis {axis}", 32 if axis else 1))


def _proven(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Return the shapes that our facts prove, and state them in the model, in place of whatever it states itself.

    onnx follows few computations of shapes, and the facts know few operators; from their shapes onnx goes on.
    """
    values = [value for node in model.graph for value in node.outputs]
    for value in values:
        value.type, value.shape = None, None
    facts, shapes = Facts(model, RULES, CONSTANT_OPERATORS), {}
    for value in values:
        dims, dtype = facts[value].dims, facts[value].dtype
        if value.name and dims is not None and _are_numbers(dims):
            shapes[value.name] = dims
            if dtype is not None:
                value.type, value.shape = ir.TensorType(dtype), ir.Shape(dims)
    return shapes


def _are_numbers(dims: Dims) -> TypeGuard[tuple[int, ...]]:
    return all(isinstance(dim, int) for dim in dims)


def _without_weights(model: ir.Model) -> ir.Model:
    light = model.clone()
    for value in light.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.size > _CONSTANT_KEPT:
            empty = onnx.TensorProto(name=value.name, dims=tensor.shape.numpy(), data_type=int(tensor.dtype))
            value.const_value = ir.serde.TensorProtoTensor(empty)
    return light


def constant_shape(value: ir.Value) -> tuple[int, ...]:
    """Return the shape of what is stored for a value; that of a scalar where nothing is."""
    return tuple(value.const_value.shape.numpy()) if value.const_value is not None else ()


def _flops(node: ir.Node, shapes: Mapping[str, tuple[int, ...]], outputs: int) -> float:
    def shape(position: int) -> tuple[int, ...]:
        value = node.inputs[position] if position < len(node.inputs) else None
        return shapes.get(value.name or "", ()) if value is not None else ()

    if node.op_type in _CONVOLUTIONS:
        weight = shape(_CONVOLUTIONS[node.op_type])
        # (C_out, C_in/group, *k) over the outputs; transposed: (C_in, C_out/group, *k) over the inputs.
        over = math.prod(shape(0)) if node.op_type == "ConvTranspose" else outputs
        return 2.0 * over * math.prod(weight[1:])
    if node.op_type in _PRODUCTS:
        left = shape(0)
        transposed = node.op_type == "Gemm" and node.attributes.get_int("transA") == 1
        return 2.0 * outputs * (left[0 if transposed else -1] if left else 1)
    return float(outputs)

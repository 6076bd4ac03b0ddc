"""Matrix products."""

from collections.abc import Mapping

import numpy as np

from renorm_onnx.runtime.operators.call import Array, Call, Kernel, Result


def _gemm(call: Call) -> Result:
    """Y = alpha * A' * B' + beta * C (ONNX Gemm; C broadcasts to Y in every version)."""
    left, right, offset = call.inputs[0], call.inputs[1], call.input(2)
    left = left.T if call.integer("transA", 0) else left
    right = right.T if call.integer("transB", 0) else right
    if left.ndim != 2 or right.ndim != 2:
        raise ValueError("Gemm multiplies matrices")
    result = (left @ right) * _like(left, call.number("alpha", 1.0))
    if offset is None:
        return result
    if np.broadcast_shapes(offset.shape, result.shape) != result.shape:
        raise ValueError(f"C of shape {offset.shape} does not broadcast to {result.shape}")
    return result + offset * _like(left, call.number("beta", 1.0))


def _like(array: Array, factor: float) -> Array:
    return np.asarray(factor, dtype=array.dtype)


OPERATORS: Mapping[str, Kernel] = {
    "MatMul": lambda call: np.matmul(call.inputs[0], call.inputs[1]),
    "Gemm": _gemm,
    "Einsum": lambda call: np.einsum(call.text("equation", ""), *call.inputs, optimize=True),
}
"""Matrix products by name."""

"""Operators between floats and small integers (or 8-bit floats).

    quantize    q = saturate(round_half_even(x / scale) + zero_point)
    dequantize  x = (q - zero_point) * scale

Rounding here is what the operator means, so it happens; x / scale however is a float64, and where a float32 runtime
lands on the other side of a half its q differs by one.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from renorm_onnx.runtime.operators.call import (
    Array,
    Call,
    Kernel,
    Result,
    normalize_axis,
    promoted_onnx_type,
)
from renorm_onnx.runtime.operators.convolution import convolution
from renorm_onnx.runtime.operators.elementwise import cast


def _spread(parameter: Array, x: Array, call: Call) -> Array:
    """A scale or zero point, shaped to broadcast to `x`: per tensor, per axis, or per block along an axis."""
    if parameter.size == 1 and parameter.ndim <= 1:
        return parameter.reshape(())
    axis = normalize_axis(call.integer("axis", 1), x.ndim)
    block = call.integer("block_size", 0)
    if parameter.ndim == 1 and not block:
        return parameter.reshape(-1, *[1] * (x.ndim - 1 - axis))
    block = block or -(-x.shape[axis] // parameter.shape[axis])
    return np.repeat(parameter, block, axis=axis).take(range(x.shape[axis]), axis=axis)


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    info: Any = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
    return int(info.min), int(info.max)


def _is_integer(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iu" or dtype.name in ("int4", "uint4", "int2", "uint2")


def rounded(x: Array, zero: Array | None, dtype: np.dtype[Any], *, saturate: bool = True) -> Array:
    """`x`, already divided by the scale, as `dtype`."""
    offset = 0.0 if zero is None else zero.astype(np.float64)
    if not _is_integer(dtype):
        return cast(x + offset, dtype, saturate=saturate)
    low, high = _limits(dtype)
    return np.clip(np.rint(x) + offset, low, high).astype(np.int64).astype(dtype)


def _quantize(call: Call) -> Result:
    x, scale, zero = call.inputs[0], call.inputs[1], call.input(2)
    code = call.integer("output_dtype", 0)
    dtype = zero.dtype if zero is not None else promoted_onnx_type(code) if code else np.dtype(np.uint8)
    saturate = bool(call.integer("saturate", 1))
    return rounded(
        x / _spread(scale, x, call).astype(np.float64),
        None if zero is None else _spread(zero, x, call),
        dtype,
        saturate=saturate,
    )


def _dequantize(call: Call) -> Result:
    x, scale, zero = call.inputs[0], call.inputs[1], call.input(2)
    offset = 0.0 if zero is None else _spread(zero, x, call).astype(np.float64)
    return (x.astype(np.float64) - offset) * _spread(scale, x, call).astype(np.float64)


def _dynamic_quantize(call: Call) -> Result:
    """DynamicQuantizeLinear-11: uint8, the range widened to hold zero."""
    x = call.inputs[0]
    low, high = min(0.0, float(x.min(initial=0.0))), max(0.0, float(x.max(initial=0.0)))
    scale = (high - low) / 255
    zero = np.uint8(np.clip(np.rint(-low / scale), 0, 255)) if scale else np.uint8(0)
    quantized = rounded(x / scale if scale else x, np.asarray(zero), np.dtype(np.uint8))
    return quantized, np.asarray(scale), np.asarray(zero)


def _shifted(x: Array, zero: Array | None, *, shape: tuple[int, ...]) -> Array:
    """`x` minus its zero point, exactly, in float64 (products of 16-bit integers stay below 2**53)."""
    wide = x.astype(np.float64)
    if zero is None:
        return wide
    return wide - (zero.reshape(()) if zero.size == 1 else zero.reshape(shape)).astype(np.float64)


def _convolve_integers(call: Call, x: Array, x_zero: Array | None, weight: Array, w_zero: Array | None) -> Array:
    per_output = (-1, *[1] * (weight.ndim - 1))
    return convolution(call, _shifted(x, x_zero, shape=()), _shifted(weight, w_zero, shape=per_output))


def _conv_integer(call: Call) -> Result:
    return _convolve_integers(call, call.inputs[0], call.input(2), call.inputs[1], call.input(3)).astype(np.int32)


def _qlinear_conv(call: Call) -> Result:
    x, x_scale, x_zero, weight, w_scale, w_zero, y_scale, y_zero = call.inputs[:8]
    total = _convolve_integers(call, x, x_zero, weight, w_zero)
    per_channel = (-1, *[1] * (total.ndim - 2))
    if call.input(8) is not None:
        total = total + call.inputs[8].astype(np.float64).reshape(per_channel)
    factor = x_scale.reshape(()) * np.broadcast_to(w_scale, (weight.shape[0],)) / y_scale.reshape(())
    return rounded(total * factor.reshape(per_channel), y_zero.reshape(()), y_zero.dtype)


def _rowwise(parameter: Array, rank: int) -> Array:
    """A parameter of the left matrix: one value, one per row, or already shaped to broadcast."""
    return parameter[:, None] if parameter.ndim == 1 and parameter.size > 1 and rank > 1 else parameter


def matmul_integers(left: Array, left_zero: Array | None, right: Array, right_zero: Array | None) -> Array:
    """The product of two integer matrices minus their zero points, exact in float64."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    a = a if left_zero is None else a - _rowwise(left_zero, a.ndim).astype(np.float64)
    b = b if right_zero is None else b - right_zero.astype(np.float64)
    return np.asarray(np.matmul(a, b))


def _matmul_integer(call: Call) -> Result:
    product = matmul_integers(call.inputs[0], call.input(2), call.inputs[1], call.input(3))
    return product.astype(np.int64).astype(np.int32)


def _qlinear_matmul(call: Call) -> Result:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = call.inputs
    product = matmul_integers(a, a_zero, b, b_zero)
    factor = _rowwise(a_scale, a.ndim) * b_scale
    return rounded(product * factor / _rowwise(y_scale, a.ndim), _rowwise(y_zero, a.ndim), y_zero.dtype)


OPERATORS: Mapping[str, Kernel] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "ConvInteger": _conv_integer,
    "QLinearConv": _qlinear_conv,
    "MatMulInteger": _matmul_integer,
    "QLinearMatMul": _qlinear_matmul,
}
"""Quantized operators by name."""

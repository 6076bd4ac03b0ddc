"""Operators of onnxruntime's own domain, ``com.microsoft``, as its optimizer and its quantizer write them into files.

Source: onnxruntime, docs/ContribOperators.md. Compared with onnxruntime like all others.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from renorm_onnx.runtime.operators import (
    contrib_attention,
    convolution,
    elementwise,
    linear,
    normalization,
    pooling,
    quantized,
)
from renorm_onnx.runtime.operators.call import Array, Call, Kernel, Result, UnusableError


def _with_inputs(call: Call, *inputs: Any) -> Call:
    return replace(call, inputs=inputs)


def _fast_gelu(call: Call) -> Result:
    x = call.inputs[0] if call.input(1) is None else call.inputs[0] + call.inputs[1]
    return elementwise.gelu_by_tanh(x)


def _quick_gelu(call: Call) -> Result:
    x = call.inputs[0]
    return x * elementwise.sigmoid(call.number("alpha", 1.702) * x)


def _activated(name: str, x: Array, parameters: tuple[float, ...]) -> Array:
    """An activation fused behind another operator."""
    plain: Mapping[str, Callable[[Array], Any]] = {
        "": lambda v: v,
        "Relu": lambda v: np.maximum(v, 0),
        "Tanh": np.tanh,
        "Sigmoid": elementwise.sigmoid,
        "LeakyRelu": lambda v: np.where(v < 0, parameters[0] * v, v),
        "Clip": lambda v: np.clip(v, parameters[0], parameters[1]),
        "HardSigmoid": lambda v: np.clip(parameters[0] * v + parameters[1], 0, 1),
    }
    if name not in plain:
        raise UnusableError(f"activation {name!r} is not covered")
    return np.asarray(plain[name](x))


def _fused_conv(call: Call) -> Result:
    result = convolution.OPERATORS["Conv"](_with_inputs(call, *call.inputs[:3]))
    addend = call.input(3)
    parameters = call.attributes.get("activation_params", ())
    return _activated(call.text("activation", ""), result if addend is None else result + addend, parameters)


def _fused_gemm(call: Call) -> Result:
    parameters = tuple(call.number(f"activation_{name}", 0.0) for name in ("alpha", "beta", "gamma"))
    return _activated(call.text("activation", ""), linear.OPERATORS["Gemm"](call), parameters)


def _transposed(call: Call, side: str, x: Array) -> Array:
    """An operand of FusedMatMul: rows first, batches between, if its batches are transposed; then as for Gemm."""
    if call.integer(f"transBatch{side}", 0):
        x = np.moveaxis(x, 0, -2)
    return x.swapaxes(-1, -2) if call.integer(f"trans{side}", 0) and x.ndim > 1 else x


def _fused_matmul(call: Call) -> Result:
    left, right = (_transposed(call, side, x) for side, x in zip("AB", call.inputs, strict=True))
    return call.number("alpha", 1.0) * np.matmul(left, right)


def _skip_layer_normalization(call: Call) -> Result:
    total = call.inputs[0] + call.inputs[1]
    simplified = call.op_type == "SkipSimplifiedLayerNormalization"
    bias = call.input(3 if simplified else 4)
    total = total if bias is None else total + bias
    attributes = {"axis": -1, "epsilon": call.number("epsilon", 1e-12)}
    if simplified:
        inner = replace(call, inputs=(total, call.inputs[2]), attributes=attributes)
        return normalization.OPERATORS["RMSNormalization"](inner), None, None, total
    inner = replace(call, inputs=(total, call.inputs[2], call.input(3)), outputs=("y", "m", "s"), attributes=attributes)
    return (*normalization.OPERATORS["LayerNormalization"](inner), total)


def _real(x: Array, scale: Array, zero: Array | None) -> Array:
    """Dequantized values, one scale for the whole tensor."""
    offset = 0.0 if zero is None else zero.reshape(()).astype(np.float64)
    return np.asarray((x.astype(np.float64) - offset) * scale.reshape(()))


def _quantized(x: Array, scale: Array, zero: Array) -> Array:
    return quantized.rounded(x / scale.reshape(()), zero.reshape(()), zero.dtype)


def _qlinear_binary(function: Callable[[Array, Array], Array]) -> Kernel:
    def compute(call: Call) -> Result:
        values = call.inputs
        return _quantized(function(_real(*values[0:3]), _real(*values[3:6])), values[6], values[7])

    return compute


def _qlinear_unary(function: Callable[[Call, Array], Array]) -> Kernel:
    def compute(call: Call) -> Result:
        if call.integer("channels_last", 0):
            raise UnusableError("channels_last=1 is not covered")
        values = call.inputs
        return _quantized(function(call, _real(*values[:3])), values[3], values[4])

    return compute


def _qlinear_concat(call: Call) -> Result:
    parts = [_real(*call.inputs[start : start + 3]) for start in range(2, len(call.inputs), 3)]
    return _quantized(np.concatenate(parts, axis=call.integer("axis", 0)), call.inputs[0], call.inputs[1])


def _qgemm(call: Call) -> Result:
    """QGemm: C counts in steps of alpha * a_scale * b_scale; without a scale for Y the result stays a float."""
    a, a_scale, a_zero, b, b_scale, b_zero, offset = (*call.inputs, None)[:7]
    left, right = a.astype(np.float64) - a_zero, b.astype(np.float64)
    left = left.T if call.integer("transA", 0) else left
    right = (right.T if call.integer("transB", 0) else right) - b_zero.astype(np.float64)  # one per column
    total = left @ right + (0.0 if offset is None else offset)
    result = total * call.number("alpha", 1.0) * a_scale * b_scale
    return result if call.input(7) is None else _quantized(result, call.inputs[7], call.inputs[8])


def _matmul_integer_to_float(call: Call) -> Result:
    product = quantized.matmul_integers(call.inputs[0], call.input(4), call.inputs[1], call.input(5))
    result = product * call.inputs[2] * call.inputs[3]
    return result if call.input(6) is None else result + call.inputs[6]


def _dynamic_quantize_matmul(call: Call) -> Result:
    """DynamicQuantizeLinear of the left matrix, then as MatMulIntegerToFloat."""
    left, scale, zero = quantized.OPERATORS["DynamicQuantizeLinear"](_with_inputs(call, call.inputs[0]))
    right, right_scale, right_zero, bias = (call.input(index) for index in range(1, 5))
    return _matmul_integer_to_float(_with_inputs(call, left, right, scale, right_scale, zero, right_zero, bias))


def _average(call: Call, x: Array) -> Array:
    return np.asarray(pooling.OPERATORS["AveragePool"](_with_inputs(call, x)))


OPERATORS: Mapping[str, Kernel] = {
    "Gelu": lambda call: elementwise.gelu(call.inputs[0]),
    "BiasGelu": lambda call: elementwise.gelu(call.inputs[0] + call.inputs[1]),
    "FastGelu": _fast_gelu,
    "QuickGelu": _quick_gelu,
    "FusedConv": _fused_conv,
    "FusedGemm": _fused_gemm,
    "FusedMatMul": _fused_matmul,
    "SkipLayerNormalization": _skip_layer_normalization,
    "SkipSimplifiedLayerNormalization": _skip_layer_normalization,
    "QuantizeLinear": quantized.OPERATORS["QuantizeLinear"],
    "DequantizeLinear": quantized.OPERATORS["DequantizeLinear"],
    "QLinearAdd": _qlinear_binary(lambda a, b: a + b),
    "QLinearMul": _qlinear_binary(lambda a, b: a * b),
    "QLinearSigmoid": _qlinear_unary(lambda call, x: elementwise.sigmoid(x)),
    "QLinearLeakyRelu": _qlinear_unary(elementwise.leaky_relu),
    "QLinearAveragePool": _qlinear_unary(_average),
    "QLinearGlobalAveragePool": _qlinear_unary(lambda call, x: x.mean(axis=tuple(range(2, x.ndim)), keepdims=True)),
    "QLinearConcat": _qlinear_concat,
    "QGemm": _qgemm,
    "MatMulIntegerToFloat": _matmul_integer_to_float,
    "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    **contrib_attention.OPERATORS,
}
"""Operators of ``com.microsoft`` by name."""

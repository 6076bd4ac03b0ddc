"""Operators that act on elements: arithmetic, comparison, logic, activations, casts.

Below opset 7 two operands broadcast only when the attribute ``broadcast`` says so, the second one aligned with the
first at ``axis``; from 7 on as in numpy.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from renorm_onnx.runtime.operators.call import (
    Array,
    Call,
    Kernel,
    Result,
    UnusableError,
    is_floating,
    promoted_onnx_type,
)


def _aligned(call: Call) -> Result:
    """The two operands, shaped so that numpy broadcasts them as the opset means."""
    left, right = call.inputs[0], call.inputs[1]
    if call.opset >= 7:
        return left, right
    if not call.integer("broadcast", 0):
        if left.shape != right.shape:
            raise UnusableError(f"shapes {left.shape} and {right.shape} differ, but broadcast=0")
        return left, right
    axis = call.integer("axis", left.ndim - right.ndim) % max(left.ndim, 1)
    return left, right.reshape(right.shape + (1,) * (left.ndim - axis - right.ndim))


def _unary(function: Callable[[Any], Any]) -> Kernel:
    return lambda call: function(call.inputs[0])


def _binary(function: Callable[[Any, Any], Any]) -> Kernel:
    return lambda call: function(*_aligned(call))


def _variadic(function: Callable[[Any, Any], Any]) -> Kernel:
    return lambda call: functools.reduce(function, call.inputs)


def _divide(left: Array, right: Array) -> Array:
    if is_floating(left):
        return np.asarray(np.divide(left, right))
    if left.dtype.kind == "u":
        return np.asarray(left // np.where(right == 0, 1, right))
    divisor = np.where(right == 0, 1, right)  # division by zero is undefined in ONNX
    quotient = left // divisor
    return np.asarray(quotient + ((quotient < 0) & (quotient * divisor != left)), dtype=left.dtype)  # towards zero


def _modulo(call: Call) -> Result:
    left, right = call.inputs[0], call.inputs[1]
    if call.integer("fmod", 0):
        return np.fmod(left, right)
    if is_floating(left) and call.opset < 28:
        raise UnusableError("floating operands need fmod=1 below opset 28")
    return np.mod(left, right)


def _power(call: Call) -> Result:
    base, exponent = _aligned(call)
    if is_floating(base):
        return np.power(base, exponent)
    if is_floating(exponent) or np.any(exponent < 0):
        return np.asarray(np.power(base.astype(np.float64), exponent)).astype(base.dtype)
    return np.asarray(np.power(base, exponent.astype(base.dtype))).astype(base.dtype)


def _mean(call: Call) -> Result:
    return functools.reduce(np.add, call.inputs) / len(call.inputs)


def _shift_bits(call: Call) -> Result:
    function = np.left_shift if call.text("direction", "") == "LEFT" else np.right_shift
    return function(call.inputs[0], call.inputs[1])


def _clip(call: Call) -> Result:
    if call.opset < 11:  # the old defaults are float32's own limits, which nothing finite exceeds
        low, high = call.attributes.get("min"), call.attributes.get("max")
    else:
        low, high = call.input(1), call.input(2)
    result = call.inputs[0]
    if low is not None:
        result = np.maximum(result, low)
    return result if high is None else np.minimum(result, high)


def erf(x: Array) -> Array:
    """The error function, exact to the last bits of float64 (numpy has none)."""
    return np.fromiter(map(math.erf, x.ravel().tolist()), np.float64, x.size).reshape(x.shape)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow on either side."""
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, small) / (1.0 + small))


def _softplus(x: Array) -> Array:
    return np.asarray(np.logaddexp(0.0, x))


def gelu(x: Array) -> Array:
    """The product of x and the share of a standard normal distribution below it."""
    return np.asarray(0.5 * x * (1 + erf(x / math.sqrt(2))))


def gelu_by_tanh(x: Array) -> Array:
    """The usual approximation of `gelu`."""
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def _gelu(call: Call) -> Result:
    return (gelu_by_tanh if call.text("approximate", "none") == "tanh" else gelu)(call.inputs[0])


def _elu(call: Call) -> Result:
    x = call.inputs[0]
    return np.where(x > 0, x, call.number("alpha", 1.0) * np.expm1(np.minimum(x, 0)))


def _celu(call: Call) -> Result:
    x, alpha = call.inputs[0], call.number("alpha", 1.0)
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0) / alpha))


def _selu(call: Call) -> Result:
    x = call.inputs[0]
    alpha = call.number("alpha", 1.6732 if call.opset < 6 else 1.67326319217681884765625)
    gamma = call.number("gamma", 1.05070102214813232421875)
    return gamma * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def leaky_relu(call: Call, x: Array) -> Array:
    """LeakyRelu of `x` with the slope that `call` has."""
    return np.where(x < 0, call.number("alpha", 0.01) * x, x)


def _prelu(call: Call) -> Result:
    x, slope = call.inputs[0], call.inputs[1]
    if call.opset < 7 and slope.size > 1:  # one slope per channel
        slope = slope.reshape(-1, *[1] * (x.ndim - 2))
    return np.where(x < 0, slope * x, x)


def _hard_sigmoid(call: Call) -> Result:
    return np.clip(call.number("alpha", 0.2) * call.inputs[0] + call.number("beta", 0.5), 0.0, 1.0)


def _hard_swish(call: Call) -> Result:
    x = call.inputs[0]
    return x * np.clip(x / 6 + 0.5, 0.0, 1.0)


def _thresholded_relu(call: Call) -> Result:
    x = call.inputs[0]
    return np.where(x > call.number("alpha", 1.0), x, 0.0)


def _shrink(call: Call) -> Result:
    x, threshold, bias = call.inputs[0], call.number("lambd", 0.5), call.number("bias", 0.0)
    shrunk = np.where(x < -threshold, x + bias, np.where(x > threshold, x - bias, 0))
    return np.asarray(shrunk).astype(x.dtype)


def _swish(call: Call) -> Result:
    x = call.inputs[0]
    return x * sigmoid(call.number("alpha", 1.0) * x)


def _is_infinite(call: Call) -> Result:
    x = call.inputs[0]
    positive, negative = call.integer("detect_positive", 1), call.integer("detect_negative", 1)
    return np.isinf(x) & (((x > 0) & bool(positive)) | ((x < 0) & bool(negative)))


def cast(array: Array, dtype: np.dtype[Any], *, saturate: bool = True) -> Array:
    """`array` in another promoted type.

    Floats are truncated towards zero for an integer type and rounded for a type of 8 bits or fewer, beyond whose
    largest value they become that value, or with `saturate` off infinite or not a number (ONNX Cast-19).

    Raises:
        UnusableError: To or from strings, or to float8_e8m0fnu, which has rounding rules of its own.
    """
    if "O" in (array.dtype.kind, dtype.kind) or (dtype.name == "float8_e8m0fnu" and array.dtype != dtype):
        raise UnusableError(f"a cast from {array.dtype} to {dtype} is not covered")
    if dtype.kind == "b":
        return np.asarray(array != 0)
    if saturate and dtype.name.startswith("float8") and array.dtype != dtype:
        limit = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
        array = np.clip(array.astype(np.float64), -limit, limit)
    return array.astype(dtype, copy=False)


def _cast(call: Call) -> Result:
    to = promoted_onnx_type(call.integer("to", 0)) if call.op_type == "Cast" else call.inputs[1].dtype
    return cast(call.inputs[0], to, saturate=bool(call.integer("saturate", 1)))


def _dropout(call: Call) -> Result:
    x = call.inputs[0]
    training = call.input(2) if call.opset >= 12 else None
    ratio = call.input(1) if call.opset >= 12 else None
    if training is not None and bool(np.any(training)) and (ratio is None or float(np.ravel(ratio)[0]) != 0.0):
        raise UnusableError("Dropout in training mode draws random numbers")
    if call.opset < 7 and not call.integer("is_test", 0):
        raise UnusableError("Dropout in training mode (is_test=0) draws random numbers")
    # Below opset 10 the mask had the type of the data.
    mask = np.ones(x.shape, dtype=bool if call.opset >= 10 else x.dtype)
    return (x, mask) if call.wants(1) else x


_UNARY: Mapping[str, Callable[[Any], Any]] = {
    "Abs": np.abs, "Acos": np.arccos, "Acosh": np.arccosh, "Asin": np.arcsin, "Asinh": np.arcsinh,
    "Atan": np.arctan, "Atanh": np.arctanh, "BitwiseNot": np.invert, "Ceil": np.ceil, "Cos": np.cos,
    "Cosh": np.cosh, "Erf": erf, "Exp": np.exp, "Floor": np.floor, "IsNaN": np.isnan, "Log": np.log,
    "Neg": np.negative, "Not": np.logical_not, "Reciprocal": lambda x: 1 / x, "Round": np.rint,
    "Relu": lambda x: np.maximum(x, 0), "Sigmoid": sigmoid, "Sign": np.sign, "Sin": np.sin, "Sinh": np.sinh,
    "Softplus": _softplus, "Softsign": lambda x: x / (1 + np.abs(x)), "Sqrt": np.sqrt, "Tan": np.tan,
    "Tanh": np.tanh, "Mish": lambda x: x * np.tanh(_softplus(x)), "Identity": lambda x: x,
}  # fmt: skip

_BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _divide, "And": np.logical_and,
    "Or": np.logical_or, "Xor": np.logical_xor, "Equal": np.equal, "Less": np.less, "Greater": np.greater,
    "LessOrEqual": np.less_equal, "GreaterOrEqual": np.greater_equal, "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or, "BitwiseXor": np.bitwise_xor,
}  # fmt: skip

OPERATORS: Mapping[str, Kernel] = {
    **{name: _unary(function) for name, function in _UNARY.items()},
    **{name: _binary(function) for name, function in _BINARY.items()},
    "Sum": _variadic(np.add),
    "Max": _variadic(np.maximum),
    "Min": _variadic(np.minimum),
    "Mean": _mean,
    "BitShift": _shift_bits,
    "Mod": _modulo,
    "Pow": _power,
    "Clip": _clip,
    "Gelu": _gelu,
    "Elu": _elu,
    "Celu": _celu,
    "Selu": _selu,
    "LeakyRelu": lambda call: leaky_relu(call, call.inputs[0]),
    "PRelu": _prelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "ThresholdedRelu": _thresholded_relu,
    "Shrink": _shrink,
    "Swish": _swish,
    "IsInf": _is_infinite,
    "Where": lambda call: np.where(call.inputs[0], call.inputs[1], call.inputs[2]),
    "Cast": _cast,
    "CastLike": _cast,
    "Dropout": _dropout,
}
"""Elementwise operators by name."""

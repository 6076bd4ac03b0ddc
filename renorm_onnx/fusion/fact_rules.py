"""Which dimensions and contents elementwise operators and constants hand on: rules that `facts` derives with.

A rule gets the node, the facts about its inputs and the opset, and returns facts about its outputs; returning fewer, or
`UNKNOWN`, is always sound. Source of every formula: the ONNX operator specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx.fusion.fact import (
    MAX_COMPUTED_ELEMENTS,
    UNKNOWN,
    Content,
    Dimension,
    Dims,
    Fact,
    Rule,
    computed,
    stored,
    to_float64,
)
from renorm_onnx.fusion.fact_rounding import FLOATS, exactly, holds, jumping, rounded, rounding

Facts = Sequence[Fact]


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute, or `default` where it is absent or refers to a function's parameter."""
    found = node.attributes.data.get(name)  # its wrapper takes most of the time
    return default if found is None or found.ref_attr_name is not None else found.value


def broadcast(shapes: Sequence[Dims | None]) -> Dims | None:
    """The right-aligned broadcast of some dimensions; a size that may turn out otherwise is a new one."""
    if any(s is None for s in shapes):
        return None
    rank = max((len(s) for s in shapes if s is not None), default=0)
    padded = [(1,) * (rank - len(s)) + s for s in shapes if s is not None]
    result: list[int | Dimension] = []
    for sizes in zip(*padded, strict=True):
        real = [d for d in dict.fromkeys(sizes) if d != 1]
        fixed = [d for d in real if isinstance(d, int)]
        result.append(1 if not real else real[0] if len(real) == 1 else fixed[0] if fixed else Dimension())
    return tuple(result)


def _small(*contents: Content | None) -> bool:
    return all(c is not None and c.size <= MAX_COMPUTED_ELEMENTS for c in contents)


def same_dims(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    """The dimensions and the type of the first operand."""
    return [Fact(inputs[0].dims, dtype=inputs[0].dtype)]


def _unary(function: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Rule:
    def rule(node: ir.Node, inputs: Facts, opset: int) -> Facts:
        content = inputs[0].elements()
        if content is None or content.dtype == object:
            return same_dims(node, inputs, opset)
        with np.errstate(all="ignore"):
            return [computed(np.asarray(function(content)), inputs[0].dtype)]

    return rule


def _binary(function: Callable[[Any, Any], Any]) -> Rule:
    def rule(node: ir.Node, inputs: Facts, opset: int) -> Facts:
        if opset < 7 and attribute(node, "axis") is not None:  # aligns the second operand, which never broadcasts x
            return same_dims(node, inputs, opset)
        dims = broadcast([i.dims for i in inputs])
        contents = [i.elements() for i in inputs]
        sized = dims is not None and all(isinstance(d, int) for d in dims)
        if not sized or math.prod(dims or ()) > MAX_COMPUTED_ELEMENTS or not _small(*contents):  # type: ignore[arg-type]
            return [Fact(dims, dtype=inputs[0].dtype)]
        if any(c.dtype == object for c in contents if c is not None):
            sizes = _of_sizes(node.op_type, *contents)
            return [Fact(dims, dtype=inputs[0].dtype) if sizes is None else computed(sizes, inputs[0].dtype)]
        with np.errstate(all="ignore"):
            content = function(*contents)
        return [
            Fact(dims, dtype=inputs[0].dtype) if content is None else computed(np.asarray(content), inputs[0].dtype)
        ]

    return rule


def _of_sizes(operator: str, one: Content | None, two: Content | None) -> Content | None:
    """Arithmetic with sizes that are known at run time only: each result that depends on one is a new size.

    Only what cannot become negative is a size: sums and products, and what changes nothing.
    """
    neutral = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}.get(operator)
    function = {"Add": np.add, "Mul": np.multiply}.get(operator)

    def each(a: Any, b: Any) -> Any:
        if b == neutral:
            return a
        if function is None or any(not isinstance(v, Dimension) and v < 1 for v in (a, b)):
            raise ValueError("may be negative")
        if not isinstance(a, Dimension) and not isinstance(b, Dimension):
            return function(a, b)
        return b if a == neutral else Dimension()

    try:
        return None if neutral is None else np.asarray(np.frompyfunc(each, 2, 1)(one, two), dtype=object)
    except ValueError:
        return None


def _truth(rule: Rule) -> Rule:
    """A rule whose result is true or false, whatever its operands are."""

    def truth(node: ir.Node, inputs: Facts, opset: int) -> Facts:
        return [found._replace(dtype=ir.DataType.BOOL) for found in rule(node, inputs, opset)]

    return truth


def _divide(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """Division; of integers, towards zero as in C (ONNX Div-14), and unknown where the divisor is zero."""
    if a.dtype.kind == "f":
        return np.asarray(a / b)
    return None if (b == 0).any() else np.asarray(np.trunc(a / b)).astype(a.dtype)


def _variadic(function: Callable[[Any, Any], Any]) -> Rule:
    """Any number of operands, taken together two by two; a mean is divided by their number at the end."""
    pair = _binary(function)

    def rule(node: ir.Node, inputs: Facts, opset: int) -> Facts:
        total = inputs[0]
        for other in inputs[1:]:
            total = pair(node, [total, other], opset)[0]
        if node.op_type == "Mean" and total.content is not None:
            total = computed(np.asarray(total.content / len(inputs)), total.dtype)
        return [total]

    return rule


def _clip(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    content = inputs[0].elements()
    bounds: list[Any] = [attribute(node, "min"), attribute(node, "max")]
    for i in (1, 2):
        if i < len(node.inputs) and node.inputs[i] is not None:
            bounds[i - 1] = inputs[i].elements()
            if bounds[i - 1] is None:
                return same_dims(node, inputs, opset)
    if content is None or any(c is not None and np.asarray(c).dtype == object for c in (content, *bounds)):
        return same_dims(node, inputs, opset)
    for bound, limit in zip(bounds, (np.maximum, np.minimum), strict=True):
        content = content if bound is None else limit(content, np.asarray(bound, content.dtype))
    return [computed(np.asarray(content), inputs[0].dtype)]


def _identity(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    return [inputs[0]]


def _dropout(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    training = (len(inputs) > 2 and node.inputs[2] is not None) or (opset < 7 and not attribute(node, "is_test", 0))
    return same_dims(node, inputs, opset) if training else [inputs[0]]


def _converted(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    to = ir.DataType(attribute(node, "to", 0)) if node.op_type == "Cast" else inputs[1].dtype
    content = inputs[0].elements()
    plain = [Fact(inputs[0].dims, dtype=to)]
    if content is None or (to is None and content.dtype.kind == "f"):
        return plain
    if not inputs[0].exact and holds(to, inputs[0].dtype):
        return [computed(content, to)]
    if to is None or to.is_floating_point():
        if content.dtype == object or to not in (None, *FLOATS):
            return plain
        return [computed(to_float64(content) if to is None else rounded(content, to), to)]
    if content.dtype == object:
        return [computed(content, to)]
    with np.errstate(invalid="ignore"):
        return [computed(content.astype(to.numpy()), to)]


def _cast(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    to = ir.DataType(attribute(node, "to", 0)) if node.op_type == "Cast" else inputs[1].dtype
    if to == ir.DataType.BOOL:
        return exactly(_converted)(node, inputs, opset)
    narrows = to is None or to.is_floating_point()  # which moves a number no further than the fold rounds it anyway
    return (_converted if narrows else jumping(_converted))(node, inputs, opset)


def _constant(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    if (tensor := attribute(node, "value")) is not None:
        return [stored(tensor)]
    for name in ("value_float", "value_floats"):
        if (given := attribute(node, name)) is not None:
            return [computed(np.asarray(given, np.float64), ir.DataType.FLOAT)]
    for name in ("value_int", "value_ints"):
        if (given := attribute(node, name)) is not None:
            return [computed(np.asarray(given, np.int64), ir.DataType.INT64)]
    return [UNKNOWN]


def _constant_of_shape(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    sizes = inputs[0].integers()
    if sizes is None:
        return [UNKNOWN]
    tensor = attribute(node, "value")
    dtype = ir.DataType.FLOAT if tensor is None else tensor.dtype
    fixed = [s for s in sizes if isinstance(s, int)]
    if len(fixed) < len(sizes) or any(s < 0 for s in fixed) or math.prod(fixed) > MAX_COMPUTED_ELEMENTS:
        return [Fact(tuple(sizes), dtype=dtype)]
    fill = np.zeros(1) if tensor is None else np.asarray(tensor.numpy())
    return [computed(np.full(fixed, to_float64(fill)[0] if dtype.is_floating_point() else fill.reshape(-1)[0]), dtype)]


def _eye_like(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims, kind = inputs[0].dims, attribute(node, "dtype")
    dtype = inputs[0].dtype if kind is None else ir.DataType(kind)
    if dims is None or len(dims) != 2 or dtype is None or not dtype.is_floating_point():
        return [Fact(dims, dtype=dtype)]
    sizes = [d for d in dims if isinstance(d, int)]
    if len(sizes) < 2 or math.prod(sizes) > MAX_COMPUTED_ELEMENTS:
        return [Fact(dims, dtype=dtype)]
    return [computed(np.eye(sizes[0], sizes[1], int(attribute(node, "k", 0))), dtype)]


def _range(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    contents = [i.elements() for i in inputs]
    start, limit, delta = (None if c is None or c.dtype == object or c.size != 1 else c.reshape(()) for c in contents)
    if start is None or limit is None or delta is None or delta == 0:
        return [Fact((Dimension(),), dtype=inputs[0].dtype)]
    # How many there are is no more exact than the difference of the ends, which a runtime rounds, as it does each sum.
    whole = all(c.dtype.kind != "f" or float(c).is_integer() for c in (start, limit, delta))
    if not whole or not all(i.exact for i in inputs):
        return [Fact((Dimension(),), dtype=inputs[0].dtype)]
    count = max(math.ceil((limit - start) / delta), 0)
    if count > MAX_COMPUTED_ELEMENTS:
        return [Fact((count,), dtype=inputs[0].dtype)]
    return [computed(np.asarray(start + np.arange(count) * delta).astype(start.dtype), inputs[0].dtype)]


def _shape(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims = inputs[0].dims
    if dims is None:
        return [Fact(dtype=ir.DataType.INT64)]
    part = dims[slice(attribute(node, "start", 0), attribute(node, "end", None))]
    kind = np.int64 if all(isinstance(d, int) for d in part) else object
    return [computed(np.array(part, dtype=kind), ir.DataType.INT64)]


def _size(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims = inputs[0].dims
    if dims is None or not all(isinstance(d, int) for d in dims):
        return [Fact((), dtype=ir.DataType.INT64)]
    return [computed(np.asarray(math.prod(d for d in dims if isinstance(d, int))), ir.DataType.INT64)]


def _where(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    condition, yes, no = (i.elements() for i in inputs)
    dtype = inputs[1].dtype
    if condition is not None and yes is not None and no is not None and condition.dtype != object:
        return [computed(np.where(condition, yes, no), dtype)]
    return [Fact(broadcast([i.dims for i in inputs]), dtype=dtype)]


def _power(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(np.power(np.asarray(a, np.float64), b)).astype(np.asarray(a).dtype)


CONTENT_RULES: Mapping[str, Rule] = {
    "Add": rounding(_binary(np.add), once=True),
    "Sub": rounding(_binary(np.subtract), once=True),
    "Mul": rounding(_binary(np.multiply), once=True),
    "Div": rounding(_binary(_divide), once=True),
    "Pow": rounding(_binary(_power)),
    "Equal": _truth(exactly(_binary(np.equal))),
    "Greater": _truth(jumping(_binary(np.greater))),
    "GreaterOrEqual": _truth(jumping(_binary(np.greater_equal))),
    "Less": _truth(jumping(_binary(np.less))),
    "LessOrEqual": _truth(jumping(_binary(np.less_equal))),
    "And": _truth(_binary(np.logical_and)),
    "Or": _truth(_binary(np.logical_or)),
    "Not": _truth(_unary(np.logical_not)),
    "Neg": _unary(np.negative),
    "Sqrt": rounding(_unary(np.sqrt), once=True),
    "Reciprocal": rounding(_unary(np.reciprocal)),
    "Abs": _unary(np.abs),
    "Clip": _clip,
    "Exp": rounding(_unary(np.exp)),
    "Floor": jumping(_unary(np.floor)),
    "Log": rounding(_unary(np.log)),
    "Ceil": jumping(_unary(np.ceil)),
    "Sign": jumping(_unary(np.sign)),
    "Sin": rounding(_unary(np.sin)),
    "Cos": rounding(_unary(np.cos)),
    "Tanh": rounding(_unary(np.tanh)),
    "Sigmoid": rounding(_unary(lambda x: np.asarray(0.5 * (1 + np.tanh(0.5 * x))))),
    "Softplus": rounding(_unary(lambda x: np.asarray(np.logaddexp(x, 0.0)))),
    "Cast": _cast,
    "CastLike": _cast,
    "Constant": _constant,
    "EyeLike": _eye_like,
    "Range": rounding(_range, once=True),
    "ConstantOfShape": _constant_of_shape,
    "Dropout": _dropout,
    "Identity": _identity,
    "Shape": _shape,
    "Size": _size,
    "Where": _where,
    "Max": _variadic(np.maximum),
    "Min": _variadic(np.minimum),
    **dict.fromkeys(("Sum", "Mean"), rounding(_variadic(np.add))),
}

SAME_DIMS = (
    *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Mish", "HardSigmoid"),
    *("HardSwish", "Softsign", "Swish", "ThresholdedRelu", "Erf", "Round"),
    *("Softmax", "LogSoftmax", "Hardmax", "BatchNormalization", "LRN", "CumSum", "InstanceNormalization"),
    *("LayerNormalization", "GroupNormalization", "RMSNormalization", "LpNormalization", "MeanVarianceNormalization"),
    *("Trilu", "ReverseSequence", "ScatterElements", "ScatterND", "Scatter", "TensorScatter", "RotaryEmbedding"),
    *("Shrink", "CumProd", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cosh", "Sinh", "Tan"),
)

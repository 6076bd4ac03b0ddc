"""ONNX operators in exact rational arithmetic, for tests in which equal means equal.

Written from the operator specification alone, on numpy arrays of `Fraction`; shares nothing with the carriers or with
`runtime.reference`. `evaluate` returns every value of a model by name. A standard deviation that is not rational, which
occurs only inside normalizations by statistics of the input, is replaced by another function of the variance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.reference
from onnx import numpy_helper

from renorm_onnx.fusion.carriers.exact_bodies_test import BODIES
from renorm_onnx.fusion.carriers.exact_windows_test import (
    auto_pads,
    depth_to_space,
    pad,
    pool,
    resize,
    space_to_depth,
    taps_of,
)

Array = np.ndarray
to_fractions = np.frompyfunc(lambda x: Fraction(x) if math.isfinite(x) else x, 1, 1)


def exact(array: Any) -> Array:
    """Floats become fractions, infinities stay floats; integers and booleans stay."""
    array = np.asarray(array)
    if array.dtype.kind != "f":
        return array
    return np.asarray(to_fractions(array.astype(np.float64)), dtype=object)


def evaluate(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Every value that the model computes; of those in a body that runs often, the last."""
    opset = next(o.version for o in model.opset_import if o.domain == "")
    values = {name: exact(v) for name, v in feeds.items()}
    _run(model.graph, values, opset)
    return values


def _run(graph: onnx.GraphProto, values: dict[str, Array], opset: int) -> list[Array]:
    """Add what a graph computes to `values`, in place; return its outputs."""
    values |= {i.name: exact(numpy_helper.to_array(i)) for i in graph.initializer}
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        attributes = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
        inputs = [values[name] if name else None for name in node.input]
        if node.op_type in BODIES:
            outputs = BODIES[node.op_type](
                attributes, inputs, values, functools.partial(_run, values=values, opset=opset)
            )
        else:
            outputs = OPERATORS[node.op_type](attributes, inputs, opset, len(node.output))
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        outputs = [np.asarray(o, object) if isinstance(o, Fraction) else o for o in outputs]
        values |= {name: v for name, v in zip(node.output, outputs, strict=False) if name}
    return [values[o.name] for o in graph.output]


def _softmax(attributes: Mapping[str, Any], inputs: Sequence[Array], opset: int, count: int) -> Array:
    """With powers of 16, which are rational for multiples of a quarter, in place of those of e."""
    powers = np.frompyfunc(lambda x: Fraction(2) ** int(4 * x), 1, 1)(inputs[0])
    axis = attributes.get("axis", -1 if opset >= 13 else 1) % powers.ndim
    summed = axis if opset >= 13 else tuple(range(axis, powers.ndim))
    return np.asarray(powers / powers.sum(axis=summed, keepdims=True))


def root(value: Fraction) -> Fraction:
    """The square root, or for an irrational one some other number that depends on the value alone."""
    top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
    return Fraction(top, bottom) if Fraction(top, bottom) ** 2 == value else value / 3 + Fraction(2, 7)


roots = np.frompyfunc(root, 1, 1)


def _along(vector: Array, rank: int, axis: int = 1) -> Array:
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


def _conv(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    x, w, bias = (*inputs, None)[:3]
    n, group = w.ndim - 2, a.get("group", 1)
    kernel, strides, dilations = w.shape[2:], a.get("strides", [1] * n), a.get("dilations", [1] * n)
    pads = auto_pads(a, x.shape[2:], kernel, strides, dilations)
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:n], pads[n:], strict=True)], constant_values=Fraction(0))
    out = [(x.shape[2 + i] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1 for i in range(n)]
    y = np.full((x.shape[0], w.shape[0], *out), Fraction(0), dtype=object)
    rows, cols = w.shape[0] // group, w.shape[1]
    for tap in np.ndindex(*kernel):
        where = taps_of(tap, strides, dilations, out)
        for g in range(group):
            part = x[(slice(None), slice(g * cols, (g + 1) * cols), *where)]
            weights = w[(slice(g * rows, (g + 1) * rows), slice(None), *tap)]
            y[:, g * rows : (g + 1) * rows] += np.moveaxis(np.tensordot(weights, part, (1, 1)), 0, 1)
    return y if bias is None else y + _along(bias, y.ndim)


def _conv_transpose(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    x, w, bias = (*inputs, None)[:3]
    n, group = w.ndim - 2, a.get("group", 1)
    kernel, strides, dilations = w.shape[2:], a.get("strides", [1] * n), a.get("dilations", [1] * n)
    extra, pads = a.get("output_padding", [0] * n), a.get("pads", [0] * (2 * n))
    full = [(x.shape[2 + i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 for i in range(n)]
    rows, cols = w.shape[0] // group, w.shape[1]
    y = np.full((x.shape[0], cols * group, *(f + e for f, e in zip(full, extra, strict=True))), Fraction(0), object)
    for tap in np.ndindex(*kernel):
        where = taps_of(tap, strides, dilations, x.shape[2:])
        for g in range(group):
            weights = w[(slice(g * rows, (g + 1) * rows), slice(None), *tap)]
            part = np.tensordot(weights, x[:, g * rows : (g + 1) * rows], (0, 1))
            y[(slice(None), slice(g * cols, (g + 1) * cols), *where)] += np.moveaxis(part, 0, 1)
    crop = tuple(slice(pads[i], y.shape[2 + i] - pads[n + i]) for i in range(n))
    y = y[(slice(None), slice(None), *crop)]
    return y if bias is None else y + _along(bias, y.ndim)


def _gemm(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    left = inputs[0].T if a.get("transA", 0) else inputs[0]
    right = inputs[1].T if a.get("transB", 0) else inputs[1]
    y = Fraction(a.get("alpha", 1.0)) * left.dot(right)
    return y if len(inputs) < 3 or inputs[2] is None else y + Fraction(a.get("beta", 1.0)) * inputs[2]


def _batch_norm(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    x, gain, bias, mean, var = inputs
    sigma = roots(var + Fraction(a.get("epsilon", float(np.float32(1e-5)))))
    gain, bias, mean, sigma = (_along(v, x.ndim, min(1, x.ndim - 1)) for v in (gain, bias, mean, sigma))
    return gain * (x - mean) / sigma + bias


def _standardize(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    count = math.prod(x.shape[i] for i in axes)
    centred = x - x.sum(axis=axes, keepdims=True) / Fraction(count)
    variance = (centred * centred).sum(axis=axes, keepdims=True) / Fraction(count)
    return centred / roots(variance + Fraction(epsilon))


def _instance_norm(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    x, gain, bias = inputs
    y = _standardize(x, tuple(range(2, x.ndim)), a.get("epsilon", 1e-5))
    return y * _along(gain, x.ndim) + _along(bias, x.ndim)


def _group_norm(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    x, gain, bias = inputs
    groups = a["num_groups"]
    if opset < 21:
        gain, bias = (np.repeat(v, x.shape[1] // groups) for v in (gain, bias))
    grouped = x.reshape(x.shape[0], groups, -1)
    y = _standardize(grouped, (2,), a.get("epsilon", 1e-5)).reshape(x.shape)
    return y * _along(gain, x.ndim) + _along(bias, x.ndim)


def _layer_norm(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    x, gain, bias = (*inputs, None)[:3]
    axes = tuple(range(a.get("axis", -1) % x.ndim, x.ndim))
    y = _standardize(x, axes, a.get("epsilon", 1e-5)) * gain
    return y if bias is None else y + bias


def _prelu(x: Fraction, slope: Fraction) -> Fraction:
    return x if x >= 0 else slope * x


def _slope(function: Callable[[Any, Any], Any], default: float) -> Callable[..., Array]:
    each = np.frompyfunc(function, 2, 1)
    return lambda a, i, opset, n: each(i[0], Fraction(a.get("alpha", default)))


def _clip(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    low, high = (*inputs[1:], None, None)[:2]
    if opset < 11:
        low, high = (None if k not in a else np.asarray(Fraction(a[k]), object) for k in ("min", "max"))
    y = inputs[0]
    y = y if low is None else np.maximum(y, low)
    return y if high is None else np.minimum(y, high)


def _reshape(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    x, target = inputs
    if not a.get("allowzero", 0):
        target = [x.shape[i] if d == 0 else d for i, d in enumerate(target)]
    return x.reshape([int(d) for d in target])


def _axes(a: Mapping[str, Any], inputs: Sequence[Any]) -> tuple[int, ...] | None:
    given = a.get("axes") if "axes" in a else inputs[1] if len(inputs) > 1 else None
    return None if given is None else tuple(int(d) for d in given)


def _unsqueeze(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    return np.expand_dims(inputs[0], _axes(a, inputs))


def _flatten(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    x, axis = inputs[0], a.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _reduce(function: Callable[..., Any]) -> Callable[..., Array]:
    def run(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
        axes = _axes(a, inputs)
        if not axes:
            if a.get("noop_with_empty_axes", 0):
                return inputs[0]
            axes = tuple(range(inputs[0].ndim))
        return np.asarray(function(inputs[0], axis=axes, keepdims=bool(a.get("keepdims", 1))), dtype=object)

    return run


def _mean(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    return x.sum(axis=axis, keepdims=keepdims) / Fraction(math.prod(x.shape[i] for i in axis))


def _split(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, outputs: int) -> list[Array]:
    x, axis = inputs[0], a.get("axis", 0)
    sizes = a.get("split") or (inputs[1] if len(inputs) > 1 else None)
    part = math.ceil(x.shape[axis] / outputs)
    sizes = [part] * outputs if sizes is None else [int(s) for s in sizes]
    return np.split(x, np.cumsum(sizes)[:-1], axis)


def _slice(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    x = inputs[0]
    if opset < 10:
        starts, ends, axes, steps = a["starts"], a["ends"], a.get("axes"), None
    else:
        starts, ends, axes, steps = (*inputs[1:], None, None)[:4]
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * x.ndim
    for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
        start, end, step = (int(b) for b in bounds)
        index[axis] = slice(max(start, -x.shape[axis]) if step < 0 else start, end, step)
    return x[tuple(index)]


def _dequantize(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    x, scale, zero = (*inputs, None)[:3]
    axis, block = a.get("axis", 1), a.get("block_size", 0)
    x, zero = (exact(np.asarray(0 if v is None else v).astype(np.float64)) for v in (x, zero))
    spread = [zero, scale]
    for i, numbers in enumerate(spread):
        if block and numbers.ndim:
            spread[i] = np.repeat(numbers, block, axis).take(range(x.shape[axis]), axis)
        else:
            spread[i] = _along(numbers, x.ndim, axis) if numbers.size > 1 else numbers.reshape(())
    return np.asarray((x - spread[0]) * spread[1])


def _global(function: Callable[..., Any]) -> Callable[..., Array]:
    return lambda a, i, o, n: np.asarray(function(i[0], axis=tuple(range(2, i[0].ndim)), keepdims=True), object)


def _dot(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    return np.asarray(np.matmul(inputs[0], inputs[1]), dtype=object)


def _reverse_sequence(a: Mapping[str, Any], inputs: Sequence[Any], opset: int, _: int) -> Array:
    time, batch = a.get("time_axis", 0), a.get("batch_axis", 1)
    x = np.moveaxis(inputs[0], (time, batch), (0, 1)).copy()
    for index, length in enumerate(inputs[1]):
        x[:length, index] = x[:length, index][::-1]
    return np.moveaxis(x, (0, 1), (time, batch))


def _of(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, inputs, opset, outputs: function(*inputs)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": _of(np.add),
    "Sub": _of(np.subtract),
    "Mul": _of(np.multiply),
    "Div": _of(np.divide),
    "Neg": _of(np.negative),
    "Sum": lambda a, i, o, n: sum(i[1:], i[0]),
    "Mean": lambda a, i, o, n: sum(i[1:], i[0]) / Fraction(len(i)),
    "Abs": _of(np.abs),
    "Max": lambda a, i, o, n: functools.reduce(np.maximum, i),
    "Min": lambda a, i, o, n: functools.reduce(np.minimum, i),
    "Einsum": lambda a, i, o, n: np.asarray(np.einsum(a["equation"], *i), dtype=object),
    "ReverseSequence": _reverse_sequence,
    "Where": _of(np.where),
    "Greater": _of(lambda x, y: (x > y).astype(bool)),
    "Tile": lambda a, i, o, n: np.tile(i[0], i[1]),
    "Softmax": _softmax,
    "Relu": _of(lambda x: np.maximum(x, Fraction(0))),
    "LeakyRelu": _slope(lambda x, k: _prelu(x, k), float(np.float32(0.01))),
    "ThresholdedRelu": _slope(lambda x, k: x if x > k else Fraction(0), 1.0),
    "PRelu": _of(np.frompyfunc(_prelu, 2, 1)),
    "Clip": _clip,
    "Identity": _of(lambda x: x),
    "Cast": lambda a, i, o, n: i[0],
    "Dropout": lambda a, i, o, n: (i[0], np.ones(i[0].shape, bool)),
    "Constant": lambda a, i, o, n: exact(numpy_helper.to_array(a["value"])),
    "CastLike": lambda a, i, o, n: i[0],
    "Size": lambda a, i, o, n: np.asarray(i[0].size, np.int64),
    "Shape": lambda a, i, o, n: np.asarray(i[0].shape[a.get("start", 0) : a.get("end")], np.int64),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _dot,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "DequantizeLinear": _dequantize,
    "MaxPool": pool("max"),
    "AveragePool": pool("average"),
    "LpPool": pool("norm"),
    "GlobalAveragePool": _global(_mean),
    "GlobalMaxPool": _global(np.max),
    "GlobalLpPool": _global(lambda x, **k: roots(np.sum(x * x, **k))),
    "ReduceMean": _reduce(_mean),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceL1": _reduce(lambda x, **k: np.sum(np.abs(x), **k)),
    "Pad": pad,
    "Resize": resize,
    "Upsample": resize,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": lambda a, i, o, n: np.squeeze(i[0], _axes(a, i)),
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda a, i, o, n: np.transpose(i[0], a.get("perm")),
    "Expand": lambda a, i, o, n: np.broadcast_to(i[0], np.broadcast_shapes(i[0].shape, tuple(i[1]))).copy(),
    "Concat": lambda a, i, o, n: np.concatenate(i, a["axis"]),
    "Gather": lambda a, i, o, n: np.take(i[0], i[1], a.get("axis", 0)),
    "Split": _split,
    "Slice": _slice,
}


def test_roots_are_exact_where_they_are_rational() -> None:
    assert root(Fraction(9, 16)) == Fraction(3, 4)
    assert root(Fraction(2)) != root(Fraction(3))


def test_the_exact_operators_agree_with_the_reference_of_onnx() -> None:
    """One model through every window operator, against `onnx.reference` in float64."""
    body = """
        c = Conv<pads=[1,0,2,1], strides=[2,1], dilations=[1,2], group=2>(x, w, b)
        d = ConvTranspose<strides=[2,1], pads=[1,0,0,1], output_padding=[1,0]>(c, u)
        e, i = MaxPool<kernel_shape=[3,2], pads=[1,0,1,1], strides=[2,1]>(d)
        f = AveragePool<kernel_shape=[2,3], pads=[1,1,0,1], count_include_pad=1>(e)
        g = AveragePool<kernel_shape=[2,2], pads=[0,1,1,0], ceil_mode=1, strides=[2,2]>(f)
        h = Resize<mode="cubic", coordinate_transformation_mode="half_pixel">(g, , r)
        k = Resize<mode="linear", coordinate_transformation_mode="align_corners">(g, , r)
        l = Resize<mode="nearest">(g, , r)
        m = Pad<mode="reflect">(l, p)
        n = DepthToSpace<blocksize=2, mode="CRD">(m)
    """
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (double[1,4,7,8] x) => (double[1,1,1,1] n) {' + body + "}"
    )
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.integers(-4, 5, (4, 2, 3, 2)) / 4,
        "b": rng.integers(-4, 5, 4) / 4,
        "u": rng.integers(-4, 5, (4, 4, 3, 2)) / 4,
        "r": np.array([1, 1, 2, 1.5], np.float32),
        "p": np.array([0, 0, 1, 1, 0, 0, 1, 0]),
    }
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    x = rng.integers(-8, 9, (1, 4, 7, 8)) / 4
    found = evaluate(model, {"x": x})
    for name in "cdefghklmn":
        part = onnx.ModelProto.FromString(model.SerializeToString())
        del part.graph.output[:]
        part.graph.output.append(onnx.ValueInfoProto(name=name))
        [want] = onnx.reference.ReferenceEvaluator(part).run([name], {"x": x})
        limit = 1e-5 if name in "hk" else 1e-12  # onnx.reference interpolates in float32
        np.testing.assert_allclose(found[name].astype(np.float64), want, rtol=limit, atol=limit, err_msg=name)

"""Normalizations over batches, instances, groups, layers and neighbourhoods, and the softmax family.

All are (x - mean) / sqrt(var + epsilon) * scale + bias with different sets of elements to take mean and var over;
variances are biased, epsilon is float32 as stored.
"""

from collections.abc import Mapping

import numpy as np

from renorm_onnx.runtime.operators.call import Array, Call, Kernel, Result, normalize_axis


def _per_channel(vector: Array, x: Array) -> Array:
    """(C,) -> (C, 1, ...) so that it broadcasts along axis 1 of `x`."""
    return vector.reshape(-1, *[1] * (x.ndim - 2))


def _standardized(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    centered = x - x.mean(axis=axes, keepdims=True)
    return np.asarray(centered / np.sqrt((centered**2).mean(axis=axes, keepdims=True) + epsilon))


def _batch_training(call: Call) -> bool:
    """Whether BatchNormalization uses the batch's own statistics.

    By is_test at opset 6, by the number of outputs at 7 to 13, by training_mode from 14 on.
    """
    if call.opset >= 14:
        return bool(call.integer("training_mode", 0))
    if call.opset >= 7:
        return any(call.wants(index) for index in range(1, 5))
    return not call.integer("is_test", 0)


def _batch_normalization(call: Call) -> Result:
    """BatchNormalization at every opset; a batch of scalars, shape (N,), has one channel.

    At opsets 6 to 8, spatial=0 gives each element of a sample its own statistics, of shape (C, *).
    """
    x, scale, bias, mean, var = (np.asarray(value) for value in call.inputs[:5])
    epsilon = call.number("epsilon", 1e-5)
    if call.opset < 9 and not call.integer("spatial", 1):
        axes: tuple[int, ...] = (0,)
        shape: tuple[int, ...] = x.shape[1:]
    else:
        axes = (0, *range(2, x.ndim))
        shape = (-1, *[1] * (x.ndim - 2)) if x.ndim > 1 else (1,)
    training = _batch_training(call)
    now_mean, now_var = (x.mean(axis=axes), x.var(axis=axes)) if training else (mean, var)
    centered = x - now_mean.reshape(shape)
    factor = scale.reshape(shape) / np.sqrt(now_var.reshape(shape) + epsilon)
    result = np.asarray(centered * factor + bias.reshape(shape))
    if not training:
        return result
    momentum = call.number("momentum", 0.9)
    running = tuple(
        (old * momentum + new.reshape(old.shape) * (1 - momentum)) for old, new in ((mean, now_mean), (var, now_var))
    )
    # Below opset 14 two outputs more, which the specification leaves open: what onnxruntime saves for a gradient.
    return (result, *running, now_mean, 1 / np.sqrt(now_var + epsilon))


def _instance_normalization(call: Call) -> Result:
    x, scale, bias = call.inputs[:3]
    hat = _standardized(x, tuple(range(2, x.ndim)), call.number("epsilon", 1e-5))
    return hat * _per_channel(scale, x) + _per_channel(bias, x)


def _group_normalization(call: Call) -> Result:
    """Scale and bias are one per group at opsets 18 to 20, one per channel from 21 on."""
    x, scale, bias = call.inputs[:3]
    groups = call.integer("num_groups", 0)
    grouped = x.reshape(x.shape[0], groups, -1)
    hat = _standardized(grouped, (2,), call.number("epsilon", 1e-5)).reshape(x.shape)
    if call.opset < 21:
        scale, bias = (np.repeat(value, x.shape[1] // groups) for value in (scale, bias))
    return hat * _per_channel(scale, x) + _per_channel(bias, x)


def _layer_normalization(call: Call) -> Result:
    x, scale, bias = call.inputs[0], call.inputs[1], call.input(2)
    first = normalize_axis(call.integer("axis", -1), x.ndim)
    axes = tuple(range(first, x.ndim))
    mean = x.mean(axis=axes, keepdims=True)
    inverse = 1 / np.sqrt(((x - mean) ** 2).mean(axis=axes, keepdims=True) + call.number("epsilon", 1e-5))
    result = np.asarray((x - mean) * inverse * scale + (0 if bias is None else bias))
    return result if len(call.outputs) == 1 else (result, mean, inverse)


def _rms_normalization(call: Call) -> Result:
    x, scale = call.inputs[:2]
    axes = tuple(range(normalize_axis(call.integer("axis", -1), x.ndim), x.ndim))
    return x / np.sqrt((x**2).mean(axis=axes, keepdims=True) + call.number("epsilon", 1e-5)) * scale


def _mean_variance_normalization(call: Call) -> Result:
    """(x - mean) / (sqrt(var) + 1e-9), by the function body of MeanVarianceNormalization-13."""
    x, axes = call.inputs[0], call.integers("axes")
    axes = (0, 2, 3) if axes is None else axes
    deviation = np.sqrt(x.var(axis=axes, keepdims=True))
    return (x - x.mean(axis=axes, keepdims=True)) / (deviation + float(np.float32(1e-9)))


def _local_response(call: Call) -> Result:
    """LRN: x / (bias + alpha / size * sum of squares over `size` neighbouring channels) ** beta."""
    x, size = call.inputs[0], call.integer("size", 1)
    before = (size - 1) // 2
    pads = [(0, 0), (before, size - 1 - before)] + [(0, 0)] * (x.ndim - 2)
    squares = np.pad(x**2, pads)
    total = sum(squares[:, start : start + x.shape[1]] for start in range(size))
    base = call.number("bias", 1.0) + call.number("alpha", 1e-4) / size * np.asarray(total)
    return x / base ** call.number("beta", 0.75)


def _lp_normalization(call: Call) -> Result:
    x = call.inputs[0]
    norm = np.linalg.norm(x, ord=call.integer("p", 2), axis=call.integer("axis", -1), keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm != 0)


def _softmax_axes(call: Call) -> tuple[int, ...]:
    """The axes that sum to one: `axis` from opset 13 on, `axis` and all after it before."""
    rank = call.inputs[0].ndim
    if call.opset >= 13:
        return (normalize_axis(call.integer("axis", -1), rank),)
    axis = call.integer("axis", 1)
    return tuple(range(axis if axis == rank else normalize_axis(axis, rank), rank))


def _softmax(call: Call) -> Result:
    x, axes = call.inputs[0], _softmax_axes(call)
    exponentials = np.exp(x - x.max(axis=axes, keepdims=True, initial=-np.inf))
    return exponentials / exponentials.sum(axis=axes, keepdims=True)


def _log_softmax(call: Call) -> Result:
    x, axes = call.inputs[0], _softmax_axes(call)
    shifted = x - x.max(axis=axes, keepdims=True, initial=-np.inf)
    return shifted - np.log(np.exp(shifted).sum(axis=axes, keepdims=True))


def _hardmax(call: Call) -> Result:
    """One at the first largest element, zero elsewhere."""
    x, axes = call.inputs[0], _softmax_axes(call)
    moved = np.moveaxis(x, axes, range(-len(axes), 0)) if axes else x[..., None]
    flat = moved.reshape(*moved.shape[: moved.ndim - max(len(axes), 1)], -1)
    ones = (np.arange(flat.shape[-1]) == flat.argmax(axis=-1)[..., None]).astype(x.dtype).reshape(moved.shape)
    return np.moveaxis(ones, range(-len(axes), 0), axes) if axes else ones[..., 0]


OPERATORS: Mapping[str, Kernel] = {
    "BatchNormalization": _batch_normalization,
    "InstanceNormalization": _instance_normalization,
    "GroupNormalization": _group_normalization,
    "LayerNormalization": _layer_normalization,
    "RMSNormalization": _rms_normalization,
    "SimplifiedLayerNormalization": _rms_normalization,  # onnxruntime's own, though it lies in ONNX's domain
    "MeanVarianceNormalization": _mean_variance_normalization,
    "LRN": _local_response,
    "LpNormalization": _lp_normalization,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "Hardmax": _hardmax,
}
"""Normalizing operators by name."""

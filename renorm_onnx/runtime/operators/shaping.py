"""Operators that move, cut and join tensors without arithmetic; old forms have attributes for what are inputs now."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from renorm_onnx.runtime.operators.call import (
    Array,
    Call,
    Kernel,
    Result,
    UnusableError,
    as_integers,
    normalize_axis,
    promote,
    promoted_onnx_type,
)


def list_argument(call: Call, index: int, name: str, since: int) -> list[int] | None:
    """A list of integers that is attribute `name` below opset `since` and input `index` from there on."""
    if call.opset < since:
        values = call.integers(name)
        return None if values is None else list(values)
    tensor = call.input(index)
    return None if tensor is None else as_integers(tensor)


def _reshape(call: Call) -> Result:
    x, wanted = call.inputs[0], as_integers(call.inputs[1])
    if not call.integer("allowzero", 0):
        wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    return np.asarray(x).reshape(wanted)


def _flatten(call: Call) -> Result:
    x, axis = call.inputs[0], call.integer("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _squeeze(call: Call) -> Result:
    x, axes = call.inputs[0], list_argument(call, 1, "axes", 13)
    if axes == [] and 1 in x.shape:
        raise UnusableError("Squeeze with an empty list of axes: runtimes disagree whether it means all or none")
    return np.squeeze(x, axis=None if axes is None else tuple(axes))


def _unsqueeze(call: Call) -> Result:
    axes = list_argument(call, 1, "axes", 13) or []
    return np.expand_dims(call.inputs[0], tuple(axes))


def _transpose(call: Call) -> Result:
    return np.transpose(call.inputs[0], call.integers("perm"))


def _expand(call: Call) -> Result:
    x, shape = call.inputs[0], as_integers(call.inputs[1])
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape)))


def _concat(call: Call) -> Result:
    return np.concatenate(call.inputs, axis=call.integer("axis", 1))


def _split(call: Call) -> Result:
    x, axis = call.inputs[0], call.integer("axis", 0)
    sizes = list_argument(call, 1, "split", 13)
    length = x.shape[normalize_axis(axis, x.ndim)]
    if sizes is None:
        parts = call.integer("num_outputs", len(call.outputs))
        chunk = -(-length // parts)  # the last part may be smaller
        sizes = [min(chunk, length - start * chunk) for start in range(parts)]
    if sum(sizes) != length or min(sizes, default=0) < 0:
        raise ValueError(f"parts {sizes} of an axis of length {length}")
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis=axis))


def _slice(call: Call) -> Result:
    x = call.inputs[0]
    if call.opset < 10:
        starts, ends, axes = (list(call.integers(name) or ()) for name in ("starts", "ends", "axes"))
        steps: list[int] = []
    else:
        starts, ends, axes, steps = ([] if (v := call.input(i)) is None else as_integers(v) for i in range(1, 5))
    axes = axes or list(range(len(starts)))
    cut = [slice(None)] * x.ndim
    for position, (start, end, axis) in enumerate(zip(starts, ends, axes, strict=True)):
        step = steps[position] if steps else 1
        axis = normalize_axis(axis, x.ndim)
        if step < 0 and end in (2**31 - 1, 2**63 - 1):
            raise UnusableError(f"step {step} with end {end}: the specification takes nothing, onnxruntime everything")
        # A backward start before the first element is the first (Slice-13); else Python's rules are those of ONNX.
        cut[axis] = slice(max(start, -x.shape[axis]) if step < 0 else start, end, step)
    return x[tuple(cut)]


def _gather(call: Call) -> Result:
    return np.take(call.inputs[0], call.inputs[1], axis=call.integer("axis", 0))


def _gather_elements(call: Call) -> Result:
    x, indices, axis = call.inputs[0], call.inputs[1], call.integer("axis", 0)
    return x[_along(x, indices, axis)]


def _along(x: Array, indices: Array, axis: int) -> tuple[Array, ...]:
    """An index that replaces each element's coordinate on `axis` by `indices`."""
    axis = normalize_axis(axis, x.ndim)
    places: list[Array] = list(np.indices(indices.shape, sparse=True))
    places[axis] = np.where(indices < 0, indices + x.shape[axis], indices)
    return tuple(places)


def _gather_nd(call: Call) -> Result:
    x, indices, batch = call.inputs[0], call.inputs[1], call.integer("batch_dims", 0)
    lead = indices.shape[:batch]
    flat_x = x.reshape(-1, *x.shape[batch:])
    flat_indices = indices.reshape(-1, *indices.shape[batch:])
    rows = [data[tuple(np.moveaxis(where, -1, 0))] for data, where in zip(flat_x, flat_indices, strict=True)]
    return np.stack(rows).reshape(*lead, *rows[0].shape)


_COMBINE = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def _scattered(call: Call, where: tuple[Array, ...]) -> Array:
    result = call.inputs[0].copy()
    how = call.text("reduction", "none")
    if how == "none":
        result[where] = call.inputs[2]
    else:
        _COMBINE[how].at(result, where, call.inputs[2])
    return result  # type: ignore[no-any-return]


def _scatter_elements(call: Call) -> Result:
    return _scattered(call, _along(call.inputs[0], call.inputs[1], call.integer("axis", 0)))


def _scatter_nd(call: Call) -> Result:
    return _scattered(call, tuple(np.moveaxis(call.inputs[1], -1, 0)))


def _pad(call: Call) -> Result:
    x, mode = call.inputs[0], call.text("mode", "constant")
    pads = list_argument(call, 1, "pads", 11) or []
    axes = list_argument(call, 3, "axes", 18) if call.opset >= 18 else None
    axes = list(range(x.ndim)) if axes is None else [normalize_axis(axis, x.ndim) for axis in axes]
    widths = [(0, 0)] * x.ndim
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        widths[axis] = (before, after)
    # Negative pads crop, before anything is added.
    cut = tuple(slice(max(-a, 0), n - max(-b, 0)) for n, (a, b) in zip(x.shape, widths, strict=True))
    widths = [(max(a, 0), max(b, 0)) for a, b in widths]
    if mode != "constant":
        return np.pad(x[cut], widths, mode=mode)  # type: ignore[call-overload,no-any-return]
    value = call.number("value", 0.0) if call.opset < 11 else call.input(2)
    return np.pad(x[cut], widths, constant_values=0 if value is None else np.ravel(value)[0])


def _tile(call: Call) -> Result:
    return np.tile(call.inputs[0], as_integers(call.inputs[1]))


def _depth_to_space(call: Call) -> Result:
    x, block = call.inputs[0], call.integer("blocksize", 1)
    n, c, h, w = x.shape
    if call.text("mode", "DCR") == "CRD":
        split = x.reshape(n, c // block**2, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)
    else:
        split = x.reshape(n, block, block, c // block**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    return split.reshape(n, c // block**2, h * block, w * block)


def _space_to_depth(call: Call) -> Result:
    x, block = call.inputs[0], call.integer("blocksize", 1)
    n, c, h, w = x.shape
    order = (0, 1, 3, 5, 2, 4) if call.text("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    split = x.reshape(n, c, h // block, block, w // block, block).transpose(order)
    return split.reshape(n, c * block**2, h // block, w // block)


def _shape(call: Call) -> Result:
    shape = np.array(call.inputs[0].shape, dtype=np.int64)
    end = call.attributes.get("end")
    return shape[call.integer("start", 0) : None if end is None else int(end)]


def _constant(call: Call) -> Result:
    (name, value), *rest = call.attributes.items()
    if rest or name == "sparse_value":
        raise UnusableError(f"a Constant with the attributes {sorted(call.attributes)}")
    if name == "value":
        return promote(value.numpy())
    types = {"value_float": np.float64, "value_floats": np.float64, "value_int": np.int64, "value_ints": np.int64}
    return np.asarray(value, dtype=types.get(name, object))


def _constant_of_shape(call: Call) -> Result:
    value = call.attributes.get("value")
    filler = np.zeros(1) if value is None else promote(value.numpy())
    return np.full(as_integers(call.inputs[0]), filler.ravel()[0], dtype=filler.dtype)


def _one_hot(call: Call) -> Result:
    indices, depth, values = call.inputs[0], int(np.ravel(call.inputs[1])[0]), call.inputs[2]
    axis = normalize_axis(call.integer("axis", -1), indices.ndim + 1)
    indices = np.where(indices < 0, indices + depth, indices)
    hot = np.arange(depth).reshape(-1, *[1] * (indices.ndim - axis)) == np.expand_dims(indices, axis)
    return np.where(hot, values[1], values[0])


def _trilu(call: Call) -> Result:
    diagonal = 0 if call.input(1) is None else int(np.ravel(call.inputs[1])[0])
    return (np.triu if call.integer("upper", 1) else np.tril)(call.inputs[0], diagonal)


def _reverse_sequence(call: Call) -> Result:
    x, lengths = call.inputs[0], as_integers(call.inputs[1])
    result = np.moveaxis(x.copy(), (call.integer("batch_axis", 1), call.integer("time_axis", 0)), (0, 1))
    for row, length in zip(result, lengths, strict=True):
        row[:length] = row[:length][::-1].copy()
    return np.moveaxis(result, (0, 1), (call.integer("batch_axis", 1), call.integer("time_axis", 0)))


def _range(call: Call) -> Result:
    start, limit, delta = (np.ravel(value)[0] for value in call.inputs)
    count = max(int(np.ceil((limit - start) / delta)), 0)
    return np.asarray(start + np.arange(count, dtype=call.inputs[0].dtype) * delta, dtype=call.inputs[0].dtype)


def _eye_like(call: Call) -> Result:
    x, code = call.inputs[0], call.attributes.get("dtype")
    return np.eye(
        x.shape[0], x.shape[1], k=call.integer("k", 0), dtype=x.dtype if code is None else promoted_onnx_type(code)
    )


def _compress(call: Call) -> Result:
    axis: Any = call.attributes.get("axis")
    return np.compress(call.inputs[1], call.inputs[0], axis=axis)


def _center_crop_pad(call: Call) -> Result:
    x, shape = call.inputs[0], as_integers(call.inputs[1])
    axes: Sequence[int] = call.integers("axes") or range(x.ndim)
    for axis, wanted in zip(axes, shape, strict=True):
        axis = normalize_axis(axis, x.ndim)
        have = x.shape[axis]
        if wanted <= have:
            start = (have - wanted) // 2
            x = np.take(x, range(start, start + wanted), axis=axis)
        else:
            widths = [(0, 0)] * x.ndim
            widths[axis] = ((wanted - have) // 2, wanted - have - (wanted - have) // 2)
            x = np.pad(x, widths)
    return x


OPERATORS: Mapping[str, Kernel] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Expand": _expand,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Pad": _pad,
    "Tile": _tile,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Shape": _shape,
    "Size": lambda call: np.asarray(call.inputs[0].size, dtype=np.int64),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "OneHot": _one_hot,
    "Trilu": _trilu,
    "ReverseSequence": _reverse_sequence,
    "Range": _range,
    "EyeLike": _eye_like,
    "NonZero": lambda call: np.array(np.nonzero(call.inputs[0]), dtype=np.int64),
    "Compress": _compress,
    "CenterCropPad": _center_crop_pad,
}
"""Shaping operators by name."""

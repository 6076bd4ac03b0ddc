"""The dimensions and contents that operators hand on which only rearrange elements.

Source: the ONNX specification of Reshape, Squeeze, Unsqueeze, Flatten, Transpose, Expand, Concat, Gather and Slice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.fact import MAX_COMPUTED_ELEMENTS, Dimension, Dims, Fact, Rule, computed
from renorm_onnx.fusion.fact_rules import attribute, broadcast

Facts = Sequence[Fact]
_INT_MAX = (2**31 - 1, 2**63 - 1)


def axes_of(node: ir.Node, inputs: Facts) -> list[int] | None:
    """The `axes` of Squeeze, Unsqueeze and Reduce*: an attribute before opset 13 (18), an input since."""
    if (given := attribute(node, "axes")) is not None:
        return [int(a) for a in given]
    return inputs[1].fixed_integers() if len(node.inputs) > 1 and node.inputs[1] is not None else None


def _expand(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    sizes = inputs[1].integers()
    dims = None if sizes is None else broadcast([inputs[0].dims, tuple(sizes)])
    content = inputs[0].elements()
    fixed = dims is not None and all(isinstance(d, int) for d in dims)
    narrow = inputs[0] if inputs[0].is_constant else None
    if content is None or dims is None or not fixed or math.prod(dims) > MAX_COMPUTED_ELEMENTS:  # type: ignore[arg-type]
        return [Fact(dims, dtype=inputs[0].dtype, unexpanded=narrow)]
    return [computed(np.broadcast_to(content, dims), inputs[0].dtype)._replace(unexpanded=narrow)]  # type: ignore[arg-type]


def _reshaped(fact: Fact, dims: Dims) -> Fact:
    content = fact.elements()
    if content is not None and all(isinstance(d, int) for d in dims) and math.prod(dims) == content.size:  # type: ignore[arg-type]
        return computed(content.reshape(dims), fact.dtype)  # type: ignore[arg-type]
    return Fact(dims, dtype=fact.dtype)


def _squeeze(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims, axes = inputs[0].dims, axes_of(node, inputs)
    if dims is None or (axes is None and not all(isinstance(d, int) for d in dims)):
        return [Fact(dtype=inputs[0].dtype)]
    gone = {i for i, d in enumerate(dims) if d == 1} if axes is None else {a % len(dims) for a in axes}
    return [_reshaped(inputs[0], tuple(d for i, d in enumerate(dims) if i not in gone))]


def _unsqueeze(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims, axes = inputs[0].dims, axes_of(node, inputs)
    if dims is None or axes is None:
        return [Fact(dtype=inputs[0].dtype)]
    new = {a % (len(dims) + len(axes)) for a in axes}
    rest = iter(dims)
    return [_reshaped(inputs[0], tuple(1 if i in new else next(rest) for i in range(len(dims) + len(axes))))]


def _flatten(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims = inputs[0].dims
    if dims is None:
        return [Fact((Dimension(), Dimension()), dtype=inputs[0].dtype)]
    axis = int(attribute(node, "axis", 1))
    axis += len(dims) if axis < 0 else 0
    return [_reshaped(inputs[0], (_merged(dims[:axis]), _merged(dims[axis:])))]


def _merged(dims: Dims) -> int | Dimension:
    if all(isinstance(d, int) for d in dims):
        return math.prod(d for d in dims if isinstance(d, int))
    rest = [d for d in dims if d != 1]
    return rest[0] if len(rest) == 1 else Dimension()


def _reshape(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    target = attribute(node, "shape") if opset < 5 else inputs[1].integers()
    dims = inputs[0].dims
    if target is None:
        return [Fact(dtype=inputs[0].dtype)]
    result: list[int | Dimension] = list(target)
    if not attribute(node, "allowzero", 0):
        for i, d in enumerate(result):
            if d == 0:
                result[i] = dims[i] if dims is not None and i < len(dims) else Dimension()
    if -1 in result:
        hole = result.index(-1)
        result[hole] = _remaining(dims, [d for i, d in enumerate(result) if i != hole])
    return [_reshaped(inputs[0], tuple(result))]


def _remaining(dims: Dims | None, others: list[int | Dimension]) -> int | Dimension:
    """The size that a -1 in Reshape stands for: the input's sizes divided by the others."""
    if dims is None:
        return Dimension()
    left, known = list(dims), 1
    for d in others:
        if isinstance(d, Dimension):
            if d not in left:
                return Dimension()
            left.remove(d)
        else:
            known *= d
    run_time = [d for d in left if isinstance(d, Dimension)]
    fixed = math.prod(d for d in left if isinstance(d, int))
    if known == 0 or fixed % known:
        return Dimension()
    if not run_time:
        return fixed // known
    return run_time[0] if len(run_time) == 1 and fixed == known else Dimension()


def _transpose(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims = inputs[0].dims
    if dims is None:
        return [Fact(dtype=inputs[0].dtype)]
    order = attribute(node, "perm") or list(reversed(range(len(dims))))
    content = inputs[0].elements()
    if content is not None:
        return [computed(np.transpose(content, order), inputs[0].dtype)]
    return [Fact(tuple(dims[i] for i in order), dtype=inputs[0].dtype)]


def _tile(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims, repeats, dtype = inputs[0].dims, inputs[1].integers(), inputs[0].dtype
    if dims is None or repeats is None or len(dims) != len(repeats):
        return [Fact(dtype=dtype)]
    content = inputs[0].elements()
    counts = [r for r in repeats if isinstance(r, int)]
    if content is not None and len(counts) == len(dims) and content.size * math.prod(counts) <= MAX_COMPUTED_ELEMENTS:
        return [computed(np.tile(content, counts), dtype)]
    pairs = zip(dims, repeats, strict=True)
    sizes = (d if r == 1 else d * r if isinstance(d, int) and isinstance(r, int) else Dimension() for d, r in pairs)
    return [Fact(tuple(sizes), dtype=dtype)]


def _concat(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    ranks = {i.rank for i in inputs if i.rank is not None}
    if len(ranks) != 1:
        return [Fact(dtype=inputs[0].dtype)]
    axis = int(attribute(node, "axis", 1)) % max(ranks.pop(), 1)
    contents = [i.elements() for i in inputs]
    arrays = [c for c in contents if c is not None]
    if len(arrays) == len(inputs) and sum(c.size for c in arrays) <= MAX_COMPUTED_ELEMENTS:
        return [computed(np.concatenate(arrays, axis), inputs[0].dtype)]
    known = [i.dims for i in inputs if i.dims is not None]
    dims = list(known[0])
    sizes = [d[axis] for d in known]
    whole = len(known) == len(inputs) and all(isinstance(s, int) for s in sizes)
    dims[axis] = sum(s for s in sizes if isinstance(s, int)) if whole else Dimension()
    return [Fact(tuple(dims), dtype=inputs[0].dtype)]


def _gather(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims, index = inputs[0].dims, inputs[1]
    if dims is None or index.dims is None:
        return [Fact(dtype=inputs[0].dtype)]
    axis = int(attribute(node, "axis", 0)) % len(dims)
    content, where = inputs[0].elements(), index.elements()
    size = dims[axis]
    if content is not None and where is not None and where.dtype != object and isinstance(size, int):
        inside = bool(((where >= -size) & (where < size)).all())
        if inside and content.size // max(size, 1) * where.size <= MAX_COMPUTED_ELEMENTS:
            return [computed(np.take(content, where, axis), inputs[0].dtype)]
    return [Fact(dims[:axis] + index.dims + dims[axis + 1 :], dtype=inputs[0].dtype)]


def slice_bounds(node: ir.Node, inputs: Facts, opset: int, dims: Dims) -> list[tuple[int, slice]] | None:
    """The axes that Slice cuts out of `dims` and how, where that is known: attributes before opset 10, inputs since.

    Python's rules for what lies outside the sequence are those of ONNX, but for a backward start before the first
    element, which is the first (Slice-13). A backward end of `INT_MAX` is not known: nothing is left of the axis, but
    onnxruntime takes all that is before the start.
    """
    lists: list[list[int] | None]
    if opset < 10:
        lists = [attribute(node, name) for name in ("starts", "ends", "axes")] + [None]
    else:
        given = [i < len(node.inputs) and node.inputs[i] is not None for i in range(1, 5)]
        lists = [inputs[i].fixed_integers() if there else None for i, there in enumerate(given, 1)]
        if any(there and values is None for there, values in zip(given, lists, strict=True)):
            return None
    starts, ends, axes, steps = lists
    if starts is None or ends is None:
        return None
    steps = steps or [1] * len(starts)
    axes = axes or list(range(len(starts)))
    cuts = []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step == 0 or (step < 0 and end in _INT_MAX):
            return None
        size = dims[axis % len(dims)]
        if step < 0 and isinstance(size, int):
            start = max(start, -size)
        cuts.append((axis % len(dims), slice(start, end, step)))
    return cuts


def _slice(node: ir.Node, inputs: Facts, opset: int) -> Facts:
    dims, dtype = inputs[0].dims, inputs[0].dtype
    if dims is None:
        return [Fact(dtype=dtype)]
    cuts = slice_bounds(node, inputs, opset, dims)
    if cuts is None:
        return [Fact(tuple(Dimension() for _ in dims), dtype=dtype)]
    content = inputs[0].elements()
    if content is not None:
        index = [slice(None)] * len(dims)
        for axis, part in cuts:
            index[axis] = part
        return [computed(content[tuple(index)], dtype)]
    result: list[int | Dimension] = list(dims)
    for axis, part in cuts:
        size = result[axis]
        result[axis] = len(range(*part.indices(size))) if isinstance(size, int) else _cut(size, part)
    return [Fact(tuple(result), dtype=dtype)]


def _cut(size: Dimension, part: slice) -> Dimension:
    """The size that is left of a run-time size: the same if nothing is cut off."""
    return size if part.start == 0 and part.step == 1 and part.stop >= 2**31 - 1 else Dimension()


LAYOUT_RULES: Mapping[str, Rule] = {
    "Concat": _concat,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}

"""Operators that run graphs (If, Loop, Scan), and the sequences and optionals that travel between them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from renorm_onnx.runtime.operators.call import (
    Array,
    Call,
    Kernel,
    Result,
    UnusableError,
    as_integers,
    normalize_axis,
    promoted_type,
)


def _if(call: Call) -> Result:
    branch = "then_branch" if bool(np.ravel(call.inputs[0])[0]) else "else_branch"
    return tuple(call.body(branch, []))


def _stacked(parts: Sequence[Array], output: ir.Value, axis: int = 0) -> Array:
    """One part per iteration joined along a new axis; without iterations, an empty tensor of the declared type."""
    if parts:
        return np.stack(parts, axis=axis)
    if output.dtype is None or output.shape is None or not all(isinstance(n, int) for n in output.shape):
        raise UnusableError(f"no iteration gives {output.name!r} a value, and its shape is not declared")
    shape = [int(n) for n in output.shape if isinstance(n, int)]
    shape.insert(normalize_axis(axis, len(shape) + 1), 0)
    return np.zeros(shape, dtype=promoted_type(output.dtype.numpy()))


def _loop(call: Call) -> Result:
    """Loop: at most M iterations while the condition holds; both are optional."""
    limit = None if call.input(0) is None else int(np.ravel(call.inputs[0])[0])
    going = call.input(1) is None or bool(np.ravel(call.inputs[1])[0])
    carried = list(call.inputs[2:])
    body: ir.Graph = call.attributes["body"]
    outputs = body.outputs[1 + len(carried) :]
    scans: list[list[Any]] = [[] for _ in outputs]
    iteration = 0
    while going and (limit is None or iteration < limit):
        condition, *results = call.body("body", [np.asarray(iteration, np.int64), np.asarray(going), *carried])
        going = bool(np.ravel(condition)[0])
        for scan, part in zip(scans, results[len(carried) :], strict=True):
            scan.append(part)
        carried = results[: len(carried)]
        iteration += 1
    return (*carried, *(_stacked(scan, output) for scan, output in zip(scans, outputs, strict=True)))


def _scan(call: Call) -> Result:
    """Scan from opset 9 on; at opset 8, where it runs over a batch, one sample after the other."""
    count = call.integer("num_scan_inputs", 0)
    if call.opset >= 9:
        states = call.inputs[: len(call.inputs) - count]
        return _scan_one(call, states, call.inputs[len(states) :])
    if call.input(0) is not None:
        raise UnusableError("sequence_lens of Scan at opset 8 is not covered")
    given = call.inputs[1:]
    samples = [
        _scan_one(call, [v[i] for v in given[: len(given) - count]], [v[i] for v in given[len(given) - count :]])
        for i in range(given[0].shape[0])
    ]
    return tuple(np.stack(parts) for parts in zip(*samples, strict=True))


def _scan_one(call: Call, states: Sequence[Any], scanned: Sequence[Array]) -> Result:
    body: ir.Graph = call.attributes["body"]
    outputs = body.outputs[len(states) :]
    in_axes = call.integers("scan_input_axes") or (0,) * len(scanned)
    out_axes = call.integers("scan_output_axes") or (0,) * len(outputs)
    backwards = call.integers("scan_input_directions" if call.opset >= 9 else "directions") or (0,) * len(scanned)
    rows = [np.moveaxis(v, axis, 0) for v, axis in zip(scanned, in_axes, strict=True)]
    rows = [row[::-1] if back else row for row, back in zip(rows, backwards, strict=True)]
    carried = list(states)
    scans: list[list[Any]] = [[] for _ in outputs]
    for parts in zip(*rows, strict=True):
        results = call.body("body", [*carried, *map(np.asarray, parts)])
        for scan, part in zip(scans, results[len(carried) :], strict=True):
            scan.append(part)
        carried = results[: len(carried)]
    out_backwards = call.integers("scan_output_directions") or (0,) * len(outputs)
    stacks = (
        _stacked(scan[::-1] if back else scan, output, axis)
        for scan, output, axis, back in zip(scans, outputs, out_axes, out_backwards, strict=True)
    )
    return (*carried, *stacks)


def _place(call: Call, index: int, default: int) -> int:
    """A position in a sequence, given as an optional scalar input."""
    value = call.input(index)
    return default if value is None else int(np.ravel(value)[0])


def _sequence_at(call: Call) -> Result:
    return call.inputs[0][_place(call, 1, 0)]


def _sequence_erase(call: Call) -> Result:
    items = list(call.inputs[0])
    del items[_place(call, 1, -1)]
    return items


def _sequence_insert(call: Call) -> Result:
    items = list(call.inputs[0])
    items.insert(_place(call, 2, len(items)), call.inputs[1])
    return items


def _concat_from_sequence(call: Call) -> Result:
    join = np.stack if call.integer("new_axis", 0) else np.concatenate
    return join(call.inputs[0], axis=call.integer("axis", 0))


def _split_to_sequence(call: Call) -> Result:
    x, axis = call.inputs[0], normalize_axis(call.integer("axis", 0), call.inputs[0].ndim)
    if call.input(1) is None:
        parts = np.split(x, x.shape[axis], axis=axis)
        return parts if call.integer("keepdims", 1) else [part.squeeze(axis) for part in parts]
    sizes = as_integers(call.inputs[1])
    if np.ndim(call.inputs[1]) == 0:
        return np.split(x, range(sizes[0], x.shape[axis], sizes[0]), axis=axis)
    return np.split(x, np.cumsum(sizes)[:-1], axis=axis)


OPERATORS: Mapping[str, Kernel] = {
    "If": _if,
    "Loop": _loop,
    "Scan": _scan,
    "SequenceConstruct": lambda call: list(call.inputs),
    "SequenceEmpty": lambda call: [],
    "SequenceAt": _sequence_at,
    "SequenceErase": _sequence_erase,
    "SequenceInsert": _sequence_insert,
    "SequenceLength": lambda call: np.asarray(len(call.inputs[0]), np.int64),
    "ConcatFromSequence": _concat_from_sequence,
    "SplitToSequence": _split_to_sequence,
    "Optional": lambda call: call.input(0),
    "OptionalGetElement": lambda call: call.inputs[0],
    "OptionalHasElement": lambda call: np.asarray(call.input(0) is not None),
}
"""Control-flow operators by name."""

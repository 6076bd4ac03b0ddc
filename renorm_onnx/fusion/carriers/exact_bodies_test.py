"""Operators that hold bodies, run in exact arithmetic by `exact_values_test`: If, Loop, Scan (from opset 9 on)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

Array = np.ndarray
Run = Callable[[onnx.GraphProto], "list[Array]"]


def _if(a: Mapping[str, Any], inputs: Sequence[Any], values: dict[str, Array], run: Run) -> list[Array]:
    return run(a["then_branch"] if inputs[0].reshape(()) else a["else_branch"])


def _loop(a: Mapping[str, Any], inputs: Sequence[Any], values: dict[str, Array], run: Run) -> list[Array]:
    count, goes_on, *carried = inputs
    body, turn, stacks = a["body"], 0, []
    goes_on = goes_on is None or bool(goes_on)
    while goes_on and (count is None or turn < count):
        given = [np.asarray(turn), np.asarray(goes_on), *carried]
        values |= {i.name: v for i, v in zip(body.input, given, strict=True)}
        again, *found = run(body)
        goes_on, carried = bool(again), found[: len(carried)]
        stacks.append(found[len(carried) :])
        turn += 1
    return [*carried, *(np.stack(rows) for rows in zip(*stacks, strict=True))]


def _scan(a: Mapping[str, Any], inputs: Sequence[Any], values: dict[str, Array], run: Run) -> list[Array]:
    body, count = a["body"], len(inputs) - a["num_scan_inputs"]
    carried, rows = list(inputs[:count]), inputs[count:]
    inward = a.get("scan_input_axes", [0] * len(rows))
    outward = a.get("scan_output_axes", [0] * len(body.output))
    stacks = []
    for turn in range(rows[0].shape[inward[0]]):
        given = [*carried, *(np.take(r, turn, axis) for r, axis in zip(rows, inward, strict=True))]
        values |= {i.name: v for i, v in zip(body.input, given, strict=True)}
        found = run(body)
        carried = found[:count]
        stacks.append(found[count:])
    return [*carried, *(np.stack(s, axis) for s, axis in zip(zip(*stacks, strict=True), outward, strict=False))]


BODIES = {"If": _if, "Loop": _loop, "Scan": _scan}

"""Operators of detection heads: which boxes survive, and what lies inside them."""

from collections.abc import Mapping

import numpy as np

from renorm_onnx.runtime.operators.call import Array, Call, Kernel, Result


def _corners(boxes: Array, *, center: bool) -> Array:
    """Boxes (N, 4) as [low_1, low_2, high_1, high_2], whichever way they are given."""
    if center:  # x, y, width, height
        return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    return np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)


def _overlap(box: Array, others: Array) -> Array:
    """Intersection over union of one box with many."""
    sides = np.clip(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]), 0, None)
    common = sides.prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - common
    return np.where(union > 0, common / np.where(union > 0, union, 1), 0.0)


def _non_max_suppression(call: Call) -> Result:
    """NonMaxSuppression-11: greedily the highest score, the lower index among equals."""
    boxes, scores = call.inputs[:2]
    limit = 0 if call.input(2) is None else int(np.ravel(call.inputs[2])[0])
    most_overlap = 0.0 if call.input(3) is None else float(np.ravel(call.inputs[3])[0])
    least_score = None if call.input(4) is None else float(np.ravel(call.inputs[4])[0])
    found = []
    for batch, (sample, by_class) in enumerate(zip(boxes, scores, strict=True)):
        corners = _corners(sample, center=bool(call.integer("center_point_box", 0)))
        for label, row in enumerate(by_class):
            order = np.argsort(-row, kind="stable")
            if least_score is not None:
                order = order[row[order] > least_score]
            for _ in range(limit):
                if not order.size:
                    break
                best, order = order[0], order[1:]
                found.append((batch, label, int(best)))
                order = order[_overlap(corners[best], corners[order]) <= most_overlap]
    return np.array(found, dtype=np.int64).reshape(-1, 3)


OPERATORS: Mapping[str, Kernel] = {"NonMaxSuppression": _non_max_suppression}
"""Detection operators by name."""

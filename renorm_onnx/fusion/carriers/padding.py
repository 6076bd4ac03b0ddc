"""Pad: what repeats the image passes a map along other axes; a constant border passes it if it can take it.

Before:
    ``y = s * pad(x, v) + t``              ``y = pad(s * x + t, v)``
After:
    ``y = pad(s * x + t, s v + t)``        ``y = s * pad(x, (v - t) / s) + t``
Formula:
    The border has one value for all channels, so s_c v + t_c must be one number for all channels c that have a
    border; with v = 0 that is t = 0, the usual case. At the input, the new value u must solve s_c u + t_c = v for
    all of them. Along the map's own axis, a constant border has entries of its own: at the output any that agree with
    the value, at the input the identity; and modes reflect, edge and wrap copy channels with their entries, which
    must be equal at the output. Source: ONNX Pad-2, 11, 13, 18, 19, 21, 23.
Refuses when:
    no single value fits all channels (a normalization with a shift before a zero border); the pads or the value are
    not constant; channels that are copies would have to differ; one axis is cropped and padded by copies.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, SetAttribute, SetInput, Step, refuse
from renorm_onnx.fusion.carriers.gemm import element_type
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.parameters import Parameter
from renorm_onnx.fusion.report import Reason, Refusal


class Pad(Carrier):
    """A border around the image, in all modes."""

    operators = ("Pad",)

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Move the border's value with the map."""
        given = maps[0]
        pads = _pads(node, desk)
        if given.axis is not None and pads is None:
            return refuse(Reason.SHAPE, node, "has pads that are not constant", structural=True)
        begin, end = (0, 0) if given.axis is None or pads is None else pads[given.axis]
        inner, copied = given, np.ones(given.channels, bool)
        if (begin or end) and given.axis is not None:
            size = given.channels - begin - end
            places = _places(node, size, begin, end)
            if places is None:
                return refuse(Reason.AXIS, node, "pads the axis that the map runs along by copies, and crops it")
            copied = places >= 0
            inner = given.take(np.flatnonzero(copied)).scattered(places[copied], size, given.axis)
            if not inner.take(places[copied]).equals(given.take(np.flatnonzero(copied))):
                return refuse(Reason.CONFLICT, node, "copies channels that would have to become different ones")
        if attribute(node, "mode", "constant") != "constant" or (pads is not None and not _has_border(pads)):
            return Step((), {0: inner})
        value = _value(node, desk)
        if value is None:
            return refuse(Reason.NOT_CONSTANT, node, "has a value that is not constant", structural=True)
        others = {} if pads is None else {a: p for a, p in pads.items() if a != given.axis}
        bordered = ~copied if (begin or end) and not _has_border(others) else np.ones(given.channels, bool)
        wanted = (given.scale * value + given.shift)[bordered]
        if (wanted != wanted[:1]).any():
            return refuse(Reason.PADDING, node, f"pads with {value:g}, which would have to differ between channels")
        return _with_value(node, float(wanted[0]), value, inner, desk)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Give the border the value that becomes the old one under the map."""
        if set(maps) != {0}:
            return refuse(Reason.WEIGHT, node, "gets its value from the norm")
        given = maps[0]
        pads = _pads(node, desk)
        if given.axis is not None and pads is None:
            return refuse(Reason.SHAPE, node, "has pads that are not constant", structural=True)
        begin, end = (0, 0) if given.axis is None or pads is None else pads[given.axis]
        outer = given
        if (begin or end) and given.axis is not None:
            places = _places(node, given.channels, begin, end)
            if places is None:
                return refuse(Reason.AXIS, node, "pads the axis that the map runs along by copies, and crops it")
            # What the border along the axis holds is no part of x, and stays as it is.
            outer = given.take(places[places >= 0]).scattered(np.flatnonzero(places >= 0), places.size, given.axis)
        if attribute(node, "mode", "constant") != "constant" or (pads is not None and not _has_border(pads)):
            return Step((), {0: outer})
        value = _value(node, desk)
        if value is None:
            return refuse(Reason.NOT_CONSTANT, node, "has a value that is not constant", structural=True)
        if pads is not None and not _has_border({a: p for a, p in pads.items() if a != given.axis}):
            return Step((), {0: outer})
        first = int(np.argmax(given.scale != 0))
        if given.scale[first] == 0:
            return refuse(Reason.PADDING, node, "has a border that a scale of zero cannot give back")
        wanted = float((value - given.shift[first]) / given.scale[first])
        differ = (given.scale != given.scale[first]) | (given.shift != given.shift[first])
        moves = (given.scale * wanted + given.shift != value)[differ].any()
        if moves or (wanted != value and (begin > 0 or end > 0)):
            return refuse(Reason.PADDING, node, f"pads with {value:g}, which would have to differ between channels")
        return _with_value(node, wanted, value, outer, desk)


def _places(node: ir.Node, size: int, begin: int, end: int) -> np.ndarray | None:
    """Where each element along a padded axis of `size` elements comes from, -1 for a constant; None if not followed."""
    mode = attribute(node, "mode", "constant")
    inner = np.arange(size)[max(-begin, 0) : size - max(-end, 0)]
    widths = (max(begin, 0), max(end, 0))
    if mode == "constant":
        return np.pad(inner, widths, constant_values=-1)
    if begin < 0 or end < 0:
        return None
    return np.asarray(np.pad(inner, widths, mode=mode))


def _has_border(pads: Mapping[int, tuple[int, int]]) -> bool:
    return any(n > 0 for pair in pads.values() for n in pair)


def _pads(node: ir.Node, desk: Desk) -> dict[int, tuple[int, int]] | None:
    """Begin and end of the border along each axis; None where not constant."""
    facts, rank = desk.inputs(node), desk.fact(node.inputs[0]).rank
    pads = attribute(node, "pads") if desk.opset < 11 else facts[1].fixed_integers() if len(facts) > 1 else None
    if rank is None or pads is None:
        return None
    axes: list[int] = list(range(rank))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        named = facts[3].fixed_integers()
        if named is None:
            return None
        axes = [a % rank for a in named]
    if len(pads) != 2 * len(axes):
        return None
    found = dict.fromkeys(range(rank), (0, 0))
    for i, axis in enumerate(axes):
        found[axis] = (pads[i], pads[len(axes) + i])
    return found


def _value(node: ir.Node, desk: Desk) -> float | None:
    """What the border holds; None where not constant."""
    if desk.opset < 11:
        return float(attribute(node, "value", 0.0))
    if not desk.has_input(node, 2):
        return 0.0
    parameter = desk.parameter(node, 2)
    return None if parameter is None else float(parameter.float64().reshape(-1)[0])


def _with_value(node: ir.Node, wanted: float, value: float, onward: AffineMap, desk: Desk) -> Step | Refusal:
    """Pass a map on, and give the border another value."""
    if wanted == value:
        return Step((), {0: onward})
    if desk.opset < 11:
        return Step((SetAttribute(node, ir.AttrFloat32("value", wanted)),), {0: onward})
    dtype = element_type(node, desk)
    if dtype is None:
        return refuse(Reason.DTYPE, node, "has an unknown element type", structural=True)
    return Step((SetInput(node, 2, Parameter.new(wanted, dtype)),), {0: onward})


CARRIERS = (Pad(),)

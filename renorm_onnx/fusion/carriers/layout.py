"""Reshape, Flatten, Squeeze, Unsqueeze, Transpose, Expand: a map passes along the axis where its channels end up.

Before:
    ``y = s * reshape(x) + t``
After:
    ``y = reshape(s' * x + t')``
Formula:
    Let the map run along an axis of C elements with S elements behind it in memory, and let axis i on the other
    side have B elements with T behind it. Element e of axis i lies in channel (e // r) mod C with r = S / T, if r
    is a whole number and C r divides B = q C r; so each channel stands r times in a row, and all of that q times
    over. The other way round C = q B r, and the map must repeat itself like that. Only products that are proven
    count: sizes that are open at run time cancel when they are the same, and q is as good as r, from the elements
    before the axis. A uniform map passes everything. Source: ONNX Reshape-1, 5, 13, 14, Flatten, Squeeze,
    Unsqueeze, Transpose, Expand.
Refuses when:
    no axis on the other side is proven to hold the channels; Expand broadcasts along the map.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Step, refuse
from renorm_onnx.fusion.carriers.addition import aligned, has_channels, outward
from renorm_onnx.fusion.fact_layout import axes_of
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.facts import Dims, product
from renorm_onnx.fusion.report import Reason, Refusal


def uniform(given: AffineMap) -> AffineMap | None:
    """The map without an axis, if all its entries are equal."""
    if given.axis is None:
        return given
    same = (given.scale == given.scale[0]).all() and (given.shift == given.shift[0]).all()
    return AffineMap.of(given.scale[0], given.shift[0], None) if same else None


def ratio(top: Dims, bottom: Dims) -> int | None:
    """How many times larger the product of `top` is than that of `bottom`, if that is proven and whole."""
    (a, open_a), (b, open_b) = product(top), product(bottom)
    return a // b if open_a == open_b and b > 0 and a > 0 and a % b == 0 else None


def rearranged(given: AffineMap, source: Dims, target: Dims) -> AffineMap | None:
    """The map along an axis of `target`, whose elements are those of `source` in the same order; None if there is none.

    Args:
        given: A map along an axis of `source`.
        source: Dimensions where the map is given.
        target: Dimensions of the same elements on the other side.
    """
    assert given.axis is not None
    before, behind, channels = source[: given.axis], source[given.axis + 1 :], given.channels
    for axis, size in enumerate(target):
        if not isinstance(size, int) or size < 2:
            continue
        sides = (target[:axis], target[axis + 1 :])
        found = _spread(given, size, ratio(before, sides[0]), ratio(behind, sides[1]))
        if found is None and channels % size == 0:
            found = _gathered(given, size, ratio(sides[0], before), ratio(sides[1], behind))
        if found is not None:
            return found.on_axis(axis)
    return None


def _spread(given: AffineMap, size: int, over: int | None, inner: int | None) -> AffineMap | None:
    """Each channel `inner` times in a row, all `over` times; one of the two may be unknown."""
    if (over is None and inner is None) or size % given.channels:
        return None
    over = size // (given.channels * inner) if over is None and inner else over
    inner = size // (given.channels * over) if inner is None and over else inner
    if not over or not inner or over * inner * given.channels != size:
        return None
    return given.take(np.tile(np.repeat(np.arange(given.channels), inner), over))


def _gathered(given: AffineMap, size: int, over: int | None, inner: int | None) -> AffineMap | None:
    """The inverse: the map of `size` channels that `given` repeats, if it does."""
    if over is None and inner is None:
        return None
    over = given.channels // (size * inner) if over is None and inner else over
    inner = given.channels // (size * over) if inner is None and over else inner
    if not over or not inner or over * inner * size != given.channels:
        return None
    scale, shift = (v.reshape(over, size, inner) for v in (given.scale, given.shift))
    if (scale != scale[:1, :, :1]).any() or (shift != shift[:1, :, :1]).any():
        return None
    return AffineMap(scale[0, :, 0], shift[0, :, 0], given.axis)


class Reshape(Carrier):
    """Operators that keep the elements and their order."""

    operators = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Find the axis of the input that holds the channels."""
        return self._pass(node, maps, node.outputs[0], node.inputs[0], desk)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Find the axis of the output that holds the channels."""
        return self._pass(node, maps, node.inputs[0], node.outputs[0], desk)

    def _pass(
        self, node: ir.Node, maps: Mapping[int, AffineMap], here: ir.Value | None, there: ir.Value | None, desk: Desk
    ) -> Step | Refusal:
        given = maps[0]
        if (same := uniform(given)) is not None:
            return Step((), {0: same})
        if node.op_type in ("Squeeze", "Unsqueeze"):
            moved = self._kept_axis(node, given, desk, down=(here is node.inputs[0]))
        else:
            source, target = desk.dims(here), desk.dims(there)
            moved = None if source is None or target is None else rearranged(given, source, target)
        if moved is None:
            return refuse(Reason.SHAPE, node, "is not proven to keep the channels on one axis")
        return Step((), {0: moved})

    def _kept_axis(self, node: ir.Node, given: AffineMap, desk: Desk, *, down: bool) -> AffineMap | None:
        """The axis of the map on the other side of Squeeze or Unsqueeze; `down` from the input to the output."""
        facts = desk.inputs(node)
        rank, axes = facts[0].rank, axes_of(node, facts)
        long = rank if node.op_type == "Squeeze" or rank is None or axes is None else rank + len(axes)
        dims = facts[0].dims
        if axes is None and node.op_type == "Squeeze" and dims is not None and all(isinstance(d, int) for d in dims):
            axes = [i for i, d in enumerate(dims) if d == 1]
        if long is None or axes is None or given.axis is None:
            return None
        gone = {a % long for a in axes}
        left = [i for i in range(long) if i not in gone]
        if down == (node.op_type == "Squeeze"):
            return given.on_axis(left.index(given.axis)) if given.axis in left else None
        return given.on_axis(left[given.axis]) if given.axis < len(left) else None


class Transpose(Carrier):
    """The axes in another order."""

    operators = ("Transpose",)

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Output axis k is input axis perm[k]."""
        order = self._order(node, desk)
        if maps[0].axis is None:
            return Step((), {0: maps[0]})
        if order is None:
            return refuse(Reason.SHAPE, node, "has an input of unknown rank", structural=True)
        return Step((), {0: maps[0].on_axis(order[maps[0].axis])})

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Input axis perm[k] is output axis k."""
        order = self._order(node, desk)
        if maps[0].axis is None:
            return Step((), {0: maps[0]})
        if order is None:
            return refuse(Reason.SHAPE, node, "has an input of unknown rank", structural=True)
        return Step((), {0: maps[0].on_axis(order.index(maps[0].axis))})

    def _order(self, node: ir.Node, desk: Desk) -> list[int] | None:
        given, rank = attribute(node, "perm"), desk.fact(node.inputs[0]).rank
        return list(given) if given else None if rank is None else list(reversed(range(rank)))


class Expand(Carrier):
    """Broadcasting to a larger shape."""

    operators = ("Expand",)

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass the map if the input has the channels already."""
        seen = aligned(maps[0], desk.fact(node.inputs[0]).rank, desk.fact(node.outputs[0]).rank)
        if seen is None or not has_channels(node.inputs[0], seen, desk):
            return refuse(Reason.SHAPE, node, "is not proven to have all the channels before it expands")
        return Step((), {0: seen})

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass the map along the same axis, counted from the last."""
        seen = outward(maps[0], desk.fact(node.inputs[0]).rank, desk.fact(node.outputs[0]).rank)
        if seen is None:
            return refuse(Reason.SHAPE, node, "expands to an unknown rank")
        return Step((), {0: seen})


CARRIERS = (Reshape(), Transpose(), Expand())

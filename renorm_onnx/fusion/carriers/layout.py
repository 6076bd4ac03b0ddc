"""Reshape, Flatten, Squeeze, Unsqueeze, Transpose, Expand: a map passes along the axis where its channels end up.

Before:
    ``y = s * reshape(x) + t``
After:
    ``y = reshape(s' * x + t')``
Formula:
    Sizes on both sides are split, from the front and from the back, into factors that are proven equal: (N, 6, H) and
    (N, 2, 3, H) are both (N, 2, 3, H). What lies between is one block, whose elements are counted through if all its
    sizes are fixed. So channels that are split make a map along several axes, which Transpose turns and another
    Reshape joins again (channel shuffle, heads of attention); channels with S elements behind them stand S times in
    a row (Flatten); joined to a batch of open size they repeat themselves. Axes along which all numbers are equal are
    dropped. Sizes that are open at run time are equal only to themselves. Source: ONNX Reshape-1, 5, 13, 14, Flatten,
    Squeeze, Unsqueeze, Transpose, Expand.
Refuses when:
    the channels are mixed with elements of which the number is not proven; Expand broadcasts along the map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Step, refuse
from renorm_onnx.fusion.carriers.addition import aligned, has_channels, outward
from renorm_onnx.fusion.fact import MAX_COMPUTED_ELEMENTS, Dimension, Dims
from renorm_onnx.fusion.fact_layout import axes_of
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.report import Reason, Refusal

Factor = tuple["int | Dimension", int]  # one of the sizes that an axis is the product of, and the axis


def rearranged(given: AffineMap, source: Dims, target: Dims) -> AffineMap | None:
    """The map along axes of `target`, whose elements are those of `source` in the same order; None if there is none.

    Args:
        given: A map along axes of `source`.
        source: Dimensions where the map is given.
        target: Dimensions of the same elements on the other side.
    """
    given = given.reduced()
    ours, theirs = _factors(given, source), [(size, axis) for axis, size in enumerate(target)]
    if any(n == 0 for n, _ in (*ours, *theirs)):
        return None
    front = _matched(ours, theirs, 0)
    back = [pairs[::-1] for pairs in _matched(ours, theirs, -1)]
    # All that is left belongs to one axis: it is the product of it.
    if len(theirs) == 1:
        theirs = [(n, theirs[0][1]) for n, _ in ours]
    varies = [n if a in given.axes and isinstance(n, int) else 1 for n, a in (*front[0], *ours, *back[0])]
    numbers = np.stack([given.scale, given.shift]).reshape([2, *varies])
    if [n for n, _ in ours] != [n for n, _ in theirs]:
        start, stop = len(front[0]), len(front[0]) + len(ours)
        block = _counted(numbers[0].shape[start:stop], [n for n, _ in ours], [n for n, _ in theirs])
        if block is None:
            return None
        numbers = np.broadcast_to(numbers, [2, *varies[:start], *block[0], *varies[stop:]])
        numbers = numbers.reshape([2, *varies[:start], *block[1], *varies[stop:]])
    return _joined(numbers, [*front[1], *theirs, *back[1]], target)


def _factors(given: AffineMap, source: Dims) -> list[Factor]:
    """The sizes of `source`; where the map runs, as long as it is, and of a period behind the number of periods."""
    lengths = dict(zip(given.axes, given.scale.shape, strict=False))
    found: list[Factor] = []
    for axis, size in enumerate(source):
        assert axis in given.periodic or lengths.get(axis, size) == size or isinstance(size, Dimension)
        found += [(Dimension(), axis)] if axis in given.periodic else []
        found.append((lengths.get(axis, size), axis))
    return found


def _counted(
    shape: Sequence[int], ours: Sequence[int | Dimension], theirs: Sequence[int | Dimension]
) -> tuple[list[int], list[int]] | None:
    """Sizes by which the elements of a block are counted through on both sides: ones if the map is the same for all."""
    if all(n == 1 for n in shape):
        return [1] * len(ours), [1] * len(theirs)
    one, two = [n for n in ours if isinstance(n, int)], [n for n in theirs if isinstance(n, int)]
    fixed = len(one) == len(ours) and len(two) == len(theirs)
    return (one, two) if fixed and math.prod(one) == math.prod(two) <= MAX_COMPUTED_ELEMENTS else None


def _matched(ours: list[Factor], theirs: list[Factor], end: int) -> tuple[list[Factor], list[Factor]]:
    """Take equal factors off one end of both lists, in place, as long as there are any; a one is left out."""
    taken: tuple[list[Factor], list[Factor]] = ([], [])
    while True:
        for side in (ours, theirs):
            while side and side[end][0] == 1:
                side.pop(end)
        if not ours or not theirs:
            return taken
        (a, i), (b, j) = ours[end], theirs[end]
        common = a if a is b else math.gcd(a, b) if isinstance(a, int) and isinstance(b, int) else None
        if common is None or common not in (a, b):
            return taken
        for side, size, axis, done in ((ours, a, i, taken[0]), (theirs, b, j, taken[1])):
            done.append((common, axis))
            if size == common:
                side.pop(end)
            else:
                side[end] = (size // common, axis)  # type: ignore[operator]


def _joined(numbers: np.ndarray, factors: Sequence[Factor], target: Dims) -> AffineMap | None:
    """The map whose numbers, of shape (2, *factors), vary along `factors`, with the factors of each axis multiplied."""
    full, shape, axes, periodic = [2], [2], [], set()
    for axis in range(len(target)):
        own = [(n, numbers.shape[i]) for i, (n, a) in enumerate(factors, 1) if a == axis]
        start = max((i for i, (n, _) in enumerate(own, 1) if isinstance(n, Dimension)), default=0)
        if any(length > 1 for _, length in own[:start]):
            return None
        fixed = [n for n, _ in own[start:] if isinstance(n, int)] if any(length > 1 for _, length in own) else []
        full += [*[1] * (len(own) - len(fixed)), *fixed]
        if not fixed:
            continue
        axes.append(axis)
        shape.append(math.prod(fixed))
        if start:
            periodic.add(axis)
    if math.prod(full) > MAX_COMPUTED_ELEMENTS:
        return None
    both = np.broadcast_to(numbers, full).reshape(shape)
    joined = AffineMap(both[0], both[1], tuple(axes), frozenset(periodic))
    for axis in periodic:
        if isinstance(length := target[axis], int):
            joined = joined.counted(axis, length)
    return joined.reduced()


class Reshape(Carrier):
    """Operators that keep the elements and their order."""

    operators = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Find the axes of the input that hold the channels."""
        return self._pass(node, maps, node.outputs[0], node.inputs[0], desk)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Find the axes of the output that hold the channels."""
        return self._pass(node, maps, node.inputs[0], node.outputs[0], desk)

    def _pass(
        self, node: ir.Node, maps: Mapping[int, AffineMap], here: ir.Value | None, there: ir.Value | None, desk: Desk
    ) -> Step | Refusal:
        given = maps[0].reduced()
        if given.is_uniform:
            return Step((), {0: given})
        if node.op_type in ("Squeeze", "Unsqueeze"):
            moved = self._kept_axes(node, given, desk, down=(here is node.inputs[0]))
        else:
            source, target = desk.dims(here), desk.dims(there)
            moved = None if source is None or target is None else rearranged(given, source, target)
        if moved is None:
            return refuse(Reason.SHAPE, node, "is not proven to keep the channels together")
        return Step((), {0: moved})

    def _kept_axes(self, node: ir.Node, given: AffineMap, desk: Desk, *, down: bool) -> AffineMap | None:
        """The axes of the map on the other side of Squeeze or Unsqueeze; `down` from the input to the output."""
        facts = desk.inputs(node)
        rank, axes = facts[0].rank, axes_of(node, facts)
        long = rank if node.op_type == "Squeeze" or rank is None or axes is None else rank + len(axes)
        dims = facts[0].dims
        if axes is None and node.op_type == "Squeeze" and dims is not None and all(isinstance(d, int) for d in dims):
            axes = [i for i, d in enumerate(dims) if d == 1]
        if long is None or axes is None:
            return None
        gone = {a % long for a in axes}
        left = [i for i in range(long) if i not in gone]
        if down == (node.op_type == "Squeeze"):
            return given.moved(left.index) if set(given.axes) <= set(left) else None
        return given.moved(left.__getitem__) if given.axes[-1] < len(left) else None


class Transpose(Carrier):
    """The axes in another order."""

    operators = ("Transpose",)
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Output axis k is input axis perm[k]."""
        order = self._order(node, desk)
        if order is None and maps[0].axes:
            return refuse(Reason.SHAPE, node, "has an input of unknown rank", structural=True)
        return Step((), {0: maps[0].moved((order or []).__getitem__)})

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Input axis perm[k] is output axis k."""
        order = self._order(node, desk)
        if order is None and maps[0].axes:
            return refuse(Reason.SHAPE, node, "has an input of unknown rank", structural=True)
        return Step((), {0: maps[0].moved((order or []).index)})

    def _order(self, node: ir.Node, desk: Desk) -> list[int] | None:
        given, rank = attribute(node, "perm"), desk.fact(node.inputs[0]).rank
        return list(given) if given else None if rank is None else list(reversed(range(rank)))


class Expand(Carrier):
    """Broadcasting to a larger shape."""

    operators = ("Expand",)
    many_axes = True

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

"""Concat, Split, Slice, Gather, ReverseSequence: a map is cut and joined with the channels, or passes along others.

Before:
    ``y = s * concat(a, b) + t``                     ``p, q = s * split(x) + t``
After:
    ``y = concat(s1 * a + t1, s2 * b + t2)``         ``p, q = split(s * x + t)``
Formula:
    Along the axis that is joined or cut, every piece has its part of the map; a piece that nothing changes has the
    identity. Maps along other axes stay what they are, and if those of the pieces differ, the whole has a map along
    both axes. What Slice and Gather leave out has the identity, where someone else reads it; an index that occurs
    twice must get the same numbers twice. A single index takes one channel out, whose map does not run along that
    axis. ReverseSequence turns each sequence by its own length, and leaves all axes but that of time as they are.
    Source: ONNX Concat, Split-2 to 18, Slice-1, 10, 13, Gather, ReverseSequence-10.
Refuses when:
    sizes, bounds or indices that decide where channels go are not constant; Gather makes several axes of the
    channels; the map runs along the time of ReverseSequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import IDENTITY, AffineMap, concatenate
from renorm_onnx.fusion.carrier import Carrier, Desk, Step, refuse
from renorm_onnx.fusion.fact_dims import split_sizes
from renorm_onnx.fusion.fact_layout import slice_bounds
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.report import Reason, Refusal


def joined(
    node: ir.Node, maps: Sequence[AffineMap], sizes: Sequence[int] | None, axis: int | None
) -> AffineMap | Refusal:
    """One map for the whole, from the maps of pieces that lie side by side along `axis`."""
    if all(m.equals(maps[0]) for m in maps) and (not maps[0].axes or (axis is not None and axis not in maps[0].axes)):
        return maps[0]
    lengths = [dict(zip(m.axes, m.scale.shape, strict=False)) for m in maps]
    if sizes is None or axis is None or any(own.get(axis, n) != n for own, n in zip(lengths, sizes, strict=True)):
        return refuse(Reason.SHAPE, node, "has pieces whose sizes are not proven")
    return concatenate(maps, sizes, axis)


def pieces(
    node: ir.Node, given: AffineMap, sizes: Sequence[int] | None, axis: int | None, count: int
) -> list[AffineMap] | Refusal:
    """The maps of `count` pieces that lie side by side along `axis`, from that of the whole."""
    if not given.axes or (axis is not None and axis not in given.axes):
        return [given] * count
    if sizes is None or axis is None or sum(sizes) != given.scale.shape[given.axes.index(axis)]:
        return refuse(Reason.SHAPE, node, "has pieces whose sizes are not proven")
    ends = np.cumsum(sizes)
    return [given.take(slice(int(e - n), int(e)), axis) for e, n in zip(ends, sizes, strict=True)]


class Concat(Carrier):
    """Joins its inputs along one axis."""

    operators = ("Concat",)
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Cut the map up for the inputs."""
        sizes, axis = self._sizes(node, desk)
        found = pieces(node, maps[0], sizes, axis, len(node.inputs))
        if isinstance(found, Refusal):
            return found
        return Step((), {i: m for i, m in enumerate(found) if not m.is_identity})

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Join the maps of the inputs; those that do not change have the identity."""
        sizes, axis = self._sizes(node, desk)
        total = joined(node, [maps.get(i, IDENTITY) for i in range(len(node.inputs))], sizes, axis)
        return total if isinstance(total, Refusal) else Step((), {0: total})

    def _sizes(self, node: ir.Node, desk: Desk) -> tuple[list[int] | None, int | None]:
        """The length of each input along the axis, and the axis; None where not proven."""
        axis = int(attribute(node, "axis", 1))
        ranks = [f.rank for f in desk.inputs(node) if f.rank is not None]
        if axis < 0:
            axis = axis + ranks[0] if ranks else axis
        known = [d[axis] for d in (desk.dims(v) for v in node.inputs) if d is not None and 0 <= axis < len(d)]
        sizes = [s for s in known if isinstance(s, int)]
        return sizes if len(sizes) == len(node.inputs) else None, axis if axis >= 0 else None


class Split(Carrier):
    """Cuts its input along one axis."""

    operators = ("Split",)
    many_axes = True
    cuts = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Join what is demanded of the outputs; one that nobody reads follows the others."""
        sizes, axis = self._sizes(node, desk)
        default = next(iter(maps.values()))
        unread = [not o.uses() and not o.is_graph_output() for o in node.outputs]
        spare = IDENTITY if axis in default.axes else default
        whole = [maps.get(i, spare if unread[i] else IDENTITY) for i in range(len(node.outputs))]
        total = joined(node, whole, sizes, axis)
        return total if isinstance(total, Refusal) else Step((), {0: total})

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Cut the map up for the outputs."""
        if set(maps) != {0}:
            return refuse(Reason.SHAPE, node, "gets its sizes from the norm")
        sizes, axis = self._sizes(node, desk)
        found = pieces(node, maps[0], sizes, axis, len(node.outputs))
        return found if isinstance(found, Refusal) else Step((), dict(enumerate(found)))

    def _sizes(self, node: ir.Node, desk: Desk) -> tuple[list[int] | None, int | None]:
        rank = desk.fact(node.inputs[0]).rank
        axis = int(attribute(node, "axis", 0))
        sizes = split_sizes(node, desk.inputs(node), desk.opset) if rank is not None else None
        if sizes is not None and len(sizes) != len(node.outputs):
            sizes = None
        return sizes, axis if axis >= 0 else None if rank is None else axis + rank


class Slice(Carrier):
    """Cuts a box out of its input."""

    operators = ("Slice",)
    many_axes = True
    cuts = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Put the map where its channels come from, and the identity elsewhere."""
        return self._pass(node, maps, desk, backward=True)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Cut the map like the channels."""
        return self._pass(node, maps, desk, backward=False)

    def _pass(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk, *, backward: bool) -> Step | Refusal:
        given, dims = maps[0], desk.dims(node.inputs[0])
        apart = backward and desk.apart
        if not given.axes and not apart:
            return Step((), {0: given})
        cuts = None if dims is None else slice_bounds(node, desk.inputs(node), desk.opset, dims)
        if dims is None or cuts is None:
            no = refuse(Reason.SHAPE, node, "cuts at places that are not constant")
            return no if given.axes else Step((), {0: given})
        for axis, part in cuts:
            size = dims[axis]
            if axis in given.axes and not isinstance(size, int):
                return refuse(Reason.SHAPE, node, "cuts channels of which the number is not proven")
            if not backward:
                given = given.take(part, axis)
            elif isinstance(size, int) and (axis in given.axes or (apart and len(range(size)[part]) < size)):
                given = given.scattered(part, size, axis)
        return Step((), {0: given})


class Gather(Carrier):
    """Takes elements along one axis by their indices; of a constant table, rows of it."""

    operators = ("Gather",)
    many_axes = True
    cuts = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Put the map where its channels come from, and the identity elsewhere."""
        given = maps[0]
        place = self._place(node, desk)
        if not given.axes and (not desk.apart or place is None):
            return Step((), {0: given})
        if place is None:
            return refuse(Reason.SHAPE, node, "has operands of unknown rank", structural=True)
        axis, width, size = place
        cut = {a for a in given.axes if axis <= a < axis + width}
        indices = self._indices(node, desk)
        if cut and (indices is None or width != 1 or not isinstance(size, int)):
            return refuse(Reason.AXIS, node, "takes channels at places that are not constant")
        own = given.moved(lambda a: a if a < axis + len(cut) else a - width + 1)
        if indices is None or not isinstance(size, int) or not (cut or (desk.apart and width < 2)):
            return Step((), {0: own})
        places = indices.reshape(-1) % size
        full = own.scattered(places, size, axis)
        if not full.take(places, axis).equals(own.spread(places.size, axis)):
            return refuse(Reason.CONFLICT, node, "takes one channel twice, for two different maps")
        return Step((), {0: full})

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Take the numbers of the map like the channels."""
        if set(maps) != {0}:
            return refuse(Reason.WEIGHT, node, "gets its indices from the norm")
        given = maps[0]
        if not given.axes:
            return Step((), {0: given})
        place = self._place(node, desk)
        if place is None:
            return refuse(Reason.SHAPE, node, "has operands of unknown rank", structural=True)
        axis, width, size = place
        if axis in given.axes:
            indices = self._indices(node, desk)
            if indices is None or width > 1 or not isinstance(size, int):
                return refuse(Reason.AXIS, node, "takes channels at places that are not constant")
            given = given.take(indices.reshape(-1) % size, axis)
            given = given if width else given.reduced()
        return Step((), {0: given.moved(lambda a: a + width - 1 if a > axis else a)})

    def _place(self, node: ir.Node, desk: Desk) -> tuple[int, int, object] | None:
        """The axis of the data, how many axes of the output stand for it, and its size."""
        dims, width = desk.dims(node.inputs[0]), desk.fact(node.inputs[1]).rank
        if dims is None or width is None:
            return None
        axis = int(attribute(node, "axis", 0)) % len(dims)
        return axis, width, dims[axis]

    def _indices(self, node: ir.Node, desk: Desk) -> np.ndarray | None:
        found = desk.fact(node.inputs[1]).elements()
        return None if found is None or found.dtype == object else found.astype(np.int64)


class ReverseSequence(Carrier):
    """Turns the first elements of each sequence around."""

    operators = ("ReverseSequence",)
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass what does not run along time."""
        return self._pass(node, maps)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Pass what does not run along time."""
        return self._pass(node, maps)

    def _pass(self, node: ir.Node, maps: Mapping[int, AffineMap]) -> Step | Refusal:
        time = int(attribute(node, "time_axis", 0))
        if set(maps) != {0} or time in maps[0].axes or time < 0:
            return refuse(Reason.AXIS, node, f"turns around axis {time}, which the map runs along")
        return Step((), {0: maps[0]})


CARRIERS = (Concat(), Split(), Slice(), Gather(), ReverseSequence())

"""Tile: a map passes along axes that are not repeated, and along those that are if it repeats itself likewise.

Before:
    ``y = s * tile(x) + t``
After:
    ``y = tile(s' * x + t')``
Formula:
    Along an axis of n elements that is repeated r times, element e of the output is element e mod n of the input: at
    the input the numbers of a map are repeated, at the output they must be n numbers r times over. Source: ONNX
    Tile-6, 13.
Refuses when:
    the map runs along a repeated axis of open size, or is not the same in each repetition; the repeats are not
    constant.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Step, refuse
from renorm_onnx.fusion.report import Reason, Refusal


class Tile(Carrier):
    """Copies of a tensor side by side."""

    operators = ("Tile",)
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Ask for the numbers of the first copy, if the others have the same."""
        return self._pass(node, maps, desk, backward=True)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Repeat the numbers like the elements."""
        return self._pass(node, maps, desk, backward=False)

    def _pass(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk, *, backward: bool) -> Step | Refusal:
        if set(maps) != {0}:
            return refuse(Reason.SHAPE, node, "gets its repeats from the norm")
        given = maps[0]
        repeats, dims = desk.fact(node.inputs[1]).integers(), desk.dims(node.inputs[0])
        for axis in given.axes:
            count = None if repeats is None or axis >= len(repeats) else repeats[axis]
            size = None if dims is None else dims[axis]
            if count == 1:
                continue
            if not isinstance(count, int) or not isinstance(size, int):
                return refuse(Reason.SHAPE, node, f"is not proven to repeat {axis=} so many times")
            first = given.take(np.arange(size), axis) if backward else given
            whole = first.take(np.tile(np.arange(size), count), axis)
            if backward and not whole.equals(given):
                return refuse(Reason.CONFLICT, node, "repeats channels that would have to become different ones")
            given = first if backward else whole
        return Step((), {0: given})


CARRIERS = (Tile(),)

"""DepthToSpace and SpaceToDepth: a map passes to the channels that become one channel.

Before:
    ``y = s * depth_to_space(x) + t``        ``y = s * space_to_depth(x) + t``
After:
    ``y = depth_to_space(s' * x + t')``      ``y = space_to_depth(s' * x + t')``
Formula:
    With blocksize b, depth channel k b^2-fold holds space channel c: k = p C + c (mode DCR, and SpaceToDepth) or k
    = c b^2 + p (mode CRD), p = 0 .. b^2 - 1. From space to depth each number of the map is repeated for every p;
    from depth to space the numbers of all p must be equal. Source: ONNX DepthToSpace-1, 11, 13, SpaceToDepth-1, 13.
Refuses when:
    the map does not run along the channels; depth channels that become one space channel have different maps.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Step, refuse
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.report import Reason, Refusal


class DepthToSpace(Carrier):
    """Blocks of pixels as channels, and back."""

    operators = ("DepthToSpace", "SpaceToDepth")

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """From the output's channels to the input's."""
        return self._pass(node, maps[0], to_depth=node.op_type == "DepthToSpace")

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """From the input's channels to the output's."""
        return self._pass(node, maps[0], to_depth=node.op_type == "SpaceToDepth")

    def _pass(self, node: ir.Node, given: AffineMap, *, to_depth: bool) -> Step | Refusal:
        if given.axis is None:
            return Step((), {0: given})
        if given.axis != 1:
            return refuse(Reason.AXIS, node, f"has its channels on axis 1, the map runs along axis {given.axis}")
        block = int(attribute(node, "blocksize", 1)) ** 2
        crd = attribute(node, "mode", "DCR") == "CRD"
        if to_depth:
            channels = np.arange(given.channels)
            return Step((), {0: given.take(np.repeat(channels, block) if crd else np.tile(channels, block))})
        if given.channels % block:
            return refuse(Reason.SHAPE, node, f"makes blocks of {block} channels of a map of {given.channels}")
        shape = (-1, block) if crd else (block, -1)
        columns = np.arange(given.channels).reshape(shape)
        columns = columns if crd else columns.T  # (C, b^2): the depth channels of each space channel
        merged = given.take(columns[:, 0])
        if any(not given.take(columns[:, p]).equals(merged) for p in range(1, block)):
            return refuse(Reason.AXIS, node, "makes one channel of several that have different maps")
        return Step((), {0: merged})


CARRIERS = (DepthToSpace(),)

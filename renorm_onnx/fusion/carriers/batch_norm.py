"""BatchNormalization at inference: absorbs a map at either side, so that two norms in a row become one.

Before:
    ``y = s * (gamma (x - mean) / sigma + B) + t``           ``y = gamma ((s * x + t) - mean) / sigma + B``
After:
    ``y = (s gamma) (x - mean) / sigma + (s B + t)``         ``y = +-gamma (x - (mean - t) / s) / (sigma / |s|) + B``
Formula:
    All parameters have shape (C,) and run along axis 1; sigma = sqrt(var + epsilon). At the output sigma is untouched.
    At the input mean and sigma become those of x, so that the node still says how far its input lies from zero::

        epsilon' = epsilon / max(1, s^2)        var' = (var + epsilon) / s^2 - epsilon'

    A variance that its type does not hold becomes the nearest that it does, and gamma takes the rest. A channel with
    s = 0 is constant: gamma and mean become 0 there and B becomes B + gamma (t - mean) / sigma.
    Source: ONNX BatchNormalization-6 .. 15.
Refuses when:
    the node is in training mode or has further outputs in use; the map does not run along the channels; at the
    input, a parameter that must change is not constant.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Edit, SetAttribute, SetInput, Step, refuse
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.parameters import Parameter, largest, smallest_normal
from renorm_onnx.fusion.report import Reason, Refusal
from renorm_onnx.fusion.sources import batch_normalization


class BatchNormalization(Carrier):
    """A normalization that stands in the way of another, or beside it."""

    operators = ("BatchNormalization",)

    def _full(self, node: ir.Node, given: AffineMap, desk: Desk) -> AffineMap | Refusal:
        """The map per channel, if this node takes one at all."""
        own = batch_normalization(node, desk).map
        if isinstance(own, Refusal):
            return own
        if given.axis not in (None, 1):
            return refuse(Reason.AXIS, node, f"has its channels on axis 1, the map runs along axis {given.axis}")
        full = given.spread(own.channels, 1)
        if full.channels != own.channels:
            return refuse(Reason.AXIS, node, f"has {own.channels} channels, the map {full.channels}")
        return full

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale gamma, map B."""
        if set(maps) != {0}:
            return refuse(Reason.OUTPUTS, node, "has further outputs that are used")
        full = self._full(node, maps[0], desk)
        if isinstance(full, Refusal):
            return full
        onward = {2: full.on_axis(0)}
        if full.has_scale:
            onward[1] = full.without_shift().on_axis(0)
        return Step((), onward)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Map mean and variance; a channel that is scaled by zero becomes constant."""
        if set(maps) != {0}:
            return refuse(Reason.NOT_CONSTANT, node, "gets a parameter from the norm")
        full = self._full(node, maps[0], desk)
        if isinstance(full, Refusal):
            return full
        operands = [desk.parameter(node, i) for i in range(1, 5)]
        gamma, bias, mean, var = (p for p in operands if p is not None)
        dead = full.scale == 0
        divisor = np.where(dead, 1.0, full.scale)
        moved = np.where(dead, 0.0, (mean.float64() - full.shift) / divisor)
        edits: list[Edit] = [SetInput(node, 3, Parameter.new(moved, mean.dtype))]
        epsilon = float(attribute(node, "epsilon", np.float32(1e-5)))
        squared = var.float64() + epsilon
        if full.has_scale:
            least = float(_below(epsilon / max(1.0, float(np.max(divisor**2)))))
            spread = squared / divisor**2
            limits = smallest_normal(var.dtype), min(largest(var.dtype), desk.max_weight)
            held = np.where(spread - least > limits[0] / 2, np.clip(spread - least, *limits), 0.0)
            rest = np.abs(divisor) * np.sqrt((held + least) / squared)
            rest = np.where(held == spread - least, 1.0, rest) * np.sign(full.scale)
            edits += [SetInput(node, 4, Parameter.new(held, var.dtype)), SetInput(node, 1, gamma.scaled(rest))]
            edits += [SetAttribute(node, ir.AttrFloat32("epsilon", least))] if least != epsilon else []
        if dead.any():
            constant = gamma.float64() * (full.shift - mean.float64()) / np.sqrt(squared)
            edits.append(SetInput(node, 2, Parameter.new(bias.float64() + np.where(dead, constant, 0.0), bias.dtype)))
        return Step(tuple(edits))


def _below(number: float) -> np.float32:
    """The largest float32 that is no larger than a number."""
    near = np.float32(number)
    return near if near <= number else np.nextafter(near, np.float32(0))


CARRIERS = (BatchNormalization(),)

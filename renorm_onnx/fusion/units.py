"""In which unit a chain multiplies, after folds into it or past it.

A chain that subtracts its mean says how far its input lies from zero by the mean times its first scale. A map that
follows is taken up by that scale, or goes past it to what is subtracted from: what they say together changes, though
nothing lies anywhere else. So the factor is remembered for the node that multiplies, by which the numbers that it has
now say what the model said.

Formula, for folds one after another::

    |mean| / sigma = |mean'| * scale' * unit        gain = gain' / unit        unit = product of those of the folds

    backward    1 / the scale demanded of the output, whichever operand takes it
    forward     the scale that goes on; one that is taken up changes mean and scale alike
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import IDENTITY, AffineMap, UnlikeAxesError
from renorm_onnx.fusion.carrier import Step

# Where a node says it in the file, or a second run would not know.
KEY = "renorm_onnx.unit"


def unit_of(node: ir.Node, units: Mapping[ir.Node, AffineMap]) -> AffineMap | None:
    """The unit that `node` multiplies in: that of folds of this run, or else what an earlier run wrote.

    Args:
        node: Multiplies.
        units: Those of this run.
    """
    if node in units:
        return units[node]
    try:
        said = json.loads(node.metadata_props[KEY])
        axis, scale = said["axis"], np.array(said["scale"], np.float64)
        return AffineMap.of(scale, np.zeros(scale.shape), axis) if scale.ndim == 1 and (scale != 0).all() else None
    except (KeyError, TypeError, ValueError):  # nothing, or not by us
        return None


def write_units(units: Mapping[ir.Node, AffineMap]) -> None:
    """Let the operators that are still there say their units, in place."""
    for node, unit in units.items():
        if node.graph is not None and unit.is_simple and unit.has_scale:
            node.metadata_props[KEY] = json.dumps({"axis": unit.axis, "scale": unit.scale.tolist()})


def unit_after(way: str, node: ir.Node, demand: AffineMap | None, step: Step) -> AffineMap | None:
    """The factor that a step leaves to remember; None if there is none, or `node` does not multiply.

    Args:
        way: "backward" or "forward".
        node: Who took the step.
        demand: Backward: what its output was to become.
        step: What it answered.
    """
    if node.op_type not in ("Mul", "Div"):
        return None
    found = demand if way == "backward" else step.onward.get(0)
    if found is None or not found.is_simple or not found.has_scale:
        return None
    scale = np.where(found.scale == 0, 1.0, found.scale)  # a dead channel has no unit
    return found._replace(scale=scale if way == "forward" else 1.0 / scale, shift=np.zeros(scale.shape))


def multiplied(one: AffineMap | None, two: AffineMap) -> AffineMap:
    """Two units, one after the other; the first where they count the channels differently, as no chain does."""
    try:
        return (IDENTITY if one is None else one).then(two)
    except UnlikeAxesError:
        return IDENTITY if one is None else one

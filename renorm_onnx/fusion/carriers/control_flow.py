"""If, Loop, Scan: a map of what they hand out passes into their bodies, to what these hand out.

Before:
    ``y = s * if(c, a, b) + t``              ``y = s * stack(body(i) for i in runs) + t``
After:
    ``y = if(c, s * a + t, s * b + t)``      ``y = stack(s * body(i) + t for i in runs)``
Formula:
    An output of If is the same output of one of its branches, so both take the map. One that Loop or Scan stacks along
    an axis is an output of the body in which that axis is missing: the axes behind it lie one further to the front.
    What a body reads from outside needs no rule: it is the same value inside. Source: ONNX If-1, Loop-1, Scan-9, and
    later versions of them.
Refuses when:
    the output is what the last run hands on, which every run but the first reads; the map runs along the axis that is
    stacked; a body hands out a value twice, or one that it does not compute.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Step, refuse
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.report import Reason, Refusal


class Choice(Carrier):
    """One of two bodies runs."""

    operators = ("If",)
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Ask both branches for the map."""
        inside: dict[ir.Value, AffineMap] = {}
        for name in ("then_branch", "else_branch"):
            asked = _asked(node, name, maps)
            if isinstance(asked, Refusal):
                return asked
            inside |= asked
        return Step(inside=inside)


class Repetition(Carrier):
    """One body runs any number of times; what it hands out is handed on, or stacked."""

    operators = ("Loop", "Scan")
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Ask the body for the map of one run."""
        if node.op_type == "Scan" and desk.opset < 9:
            return refuse(Reason.OPSET, node, "has an axis of batches, as before opset 9", structural=True)
        inputs, loop = len(node.attributes["body"].as_graph().inputs), node.op_type == "Loop"
        carried = inputs - (2 if loop else int(attribute(node, "num_scan_inputs", 0)))
        axes = attribute(node, "scan_output_axes") or [0] * len(node.outputs)
        moved = {}
        for index, given in maps.items():
            if index < carried:
                return refuse(Reason.CONSUMER, node, f"hands {node.outputs[index].name!r} on from run to run")
            stacked, rank = int(axes[index - carried]), desk.fact(node.outputs[index]).rank
            stacked += rank if stacked < 0 and rank is not None else 0
            if given.axes and (stacked < 0 or stacked in given.axes):
                return refuse(Reason.AXIS, node, f"stacks what its runs hand out along axis {stacked}")
            # The first output of a Loop's body says whether it runs again.
            moved[index + loop] = given.moved(lambda a, stacked=stacked: a - (a > stacked))  # type: ignore[misc]
        asked = _asked(node, "body", moved)
        return asked if isinstance(asked, Refusal) else Step(inside=asked)


def _asked(node: ir.Node, name: str, maps: Mapping[int, AffineMap]) -> dict[ir.Value, AffineMap] | Refusal:
    """What is asked of the values that a body hands out, at the places where `maps` asks for something."""
    body = node.attributes[name].as_graph()
    handed_out = list(body.outputs)
    for place in maps:
        value = handed_out[place]
        maker = value.producer()
        if maker is None or maker.graph is not body:
            return refuse(Reason.SUBGRAPH, node, f"has a {name} that hands out {value.name!r}, not made there")
        if handed_out.count(value) > 1:
            return refuse(Reason.CONSUMER, node, f"has a {name} that hands out {value.name!r} twice")
    return {handed_out[place]: given for place, given in maps.items()}


CARRIERS = (Choice(), Repetition())

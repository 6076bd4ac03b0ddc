"""Where no map can go, remembered, so that many norms with one long way to an obstacle take linear time.

What is remembered of a node must hold for every map: one that the node could take up itself, or that it would cut down
to nothing, might go where another could not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from renorm_onnx.fusion.carrier import Carrier, Desk, Step
from renorm_onnx.fusion.report import Refusal

# Nodes on the way, and what they answered, in order.
Trail = Sequence[tuple[ir.Node, Step]]


class DeadEnds:
    """The dead ends of one model as it stands.

    Args:
        desk: Knows which operands are constant.
        carrier_of: Who answers for a node.

    Attributes:
        backward: Nodes of which no output can be asked to change, and why.
        forward: Nodes that let nothing through which reaches them by one operand, and why.
    """

    def __init__(self, desk: Desk, carrier_of: Callable[[ir.Node], Carrier | None]) -> None:
        self._desk = desk
        self._carrier_of = carrier_of
        self.backward: dict[ir.Node, Refusal] = {}
        self.forward: dict[ir.Node, Refusal] = {}

    def mark_backward(self, trail: Trail, refusal: Refusal) -> Refusal:
        """Note the nodes that could only pass everything on to what refused; return `refusal`."""
        for node, step in reversed(trail):
            if step.edits or len(step.onward) != 1 or len([i for i in node.inputs if i is not None]) != 1:
                break
            self.backward[node] = refusal
        return refusal

    def mark_forward(self, trail: Trail, refusal: Refusal) -> Refusal:
        """Note the nodes that could only pass everything on to a dead end or an output of a graph; return `refusal`.

        Args:
            trail: The nodes among those on the way that were reached by one operand.
            refusal: What ended there.
        """
        for node, step in reversed(trail):
            if len(step.onward) != 1 or self._may_end(node, step):
                continue
            passed = node.outputs[next(iter(step.onward))]
            readers = [user for user, _ in passed.uses()]
            once = len(set(readers)) == len(readers)
            if passed.is_graph_output() or (once and any(user in self.forward for user in readers)):
                self.forward[node] = refusal
        return refusal

    def _may_end(self, node: ir.Node, step: Step) -> bool:
        """Whether another map than the one that `step` passed on might need to go no further than to `node`."""
        carrier = self._carrier_of(node)
        constant = any(self._desk.parameter(node, i) is not None for i in range(len(node.inputs)))
        return bool(step.edits or step.demands or constant or (carrier is not None and carrier.cuts))

"""For each norm: the whole path to operators that absorb it, or the reason there is none.

A plan is a walk over values. Backward, the norm's input is asked to become ``M(input)`` and the demand moves towards
the inputs of the graph; forward, the norm's output is replaced by its input and every reader is told what it now lacks.

What makes the walk sound, and linear in the nodes it visits:

* one map for each value, not for each path: two demands on one value must be equal;
* a value may change only if every one of its readers takes part, in whatever graph: another reader or a graph output
  refuses;
* nodes are visited once, in topological order (backward in reverse), when all their maps have arrived;
* all or nothing: edits are collected and applied only if every path ends in an absorber.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx.fusion.affine import IDENTITY, AffineMap
from renorm_onnx.fusion.carrier import AddAfter, Carrier, Desk, Edit, SetInput, Step, ask, label, refuse
from renorm_onnx.fusion.dead_ends import DeadEnds
from renorm_onnx.fusion.fact import MALFORMED
from renorm_onnx.fusion.node_queue import NodeQueue
from renorm_onnx.fusion.ranges import Ranges
from renorm_onnx.fusion.report import Reason, Refusal
from renorm_onnx.fusion.sources import Norm
from renorm_onnx.fusion.units import unit_after

# Who reads a value: a node at one of its operands; or an operator that hands it out of a body, as that value.
Reader = tuple[ir.Node, int] | ir.Value


@dataclass(eq=False)
class Plan:
    """What must be done for one norm to disappear.

    Args:
        norm: The norm.
        way: "backward" or "forward".
        edits: Changes of operands and attributes.
        changed: Values that will hold something else than before and so need another name.
        into: The operators that absorb.
        units: Operators that multiply in another unit from now on; see `units`.
    """

    norm: Norm
    way: str
    edits: list[Edit] = field(default_factory=list)
    changed: list[ir.Value] = field(default_factory=list)
    into: list[str] = field(default_factory=list)
    units: dict[ir.Node, AffineMap] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """How far a fold may go numerically.

    Args:
        max_kappa: Largest kappa of a norm that is moved past its own input (forward), whose error grows with it; and
            how many standard deviations from zero its output may lie to be rounded to a narrower type (backward).
        max_weight: Largest absolute value that a folded parameter may have, besides the limit of its type.
    """

    max_kappa: float = 4.0
    max_weight: float = float("inf")


class Planner:
    """Makes plans on one model as it stands now.

    Args:
        order: Position of each node; readers come after what they read, and an operator after the bodies inside it.
        desk: Facts and pending operands.
        carriers: Operator -> who answers for it.
        limits: Numerical guards.
        across: Whether maps may enter and leave the bodies of operators.
    """

    def __init__(
        self,
        order: Mapping[ir.Node, float],
        desk: Desk,
        carriers: Mapping[str, Carrier],
        limits: Limits,
        *,
        across: bool,
    ) -> None:
        self._order = order
        self._desk = desk
        self._carriers = carriers
        self._limits = limits
        self._across = across
        self._ranges = Ranges(desk, limits.max_kappa, limits.max_weight)
        self._ends = DeadEnds(desk, self._carrier)
        self._places: dict[tuple[ir.Node, int, int], npt.NDArray[np.int64] | None] = {}

    def plan(self, norm: Norm) -> Plan | tuple[Refusal, ...]:
        """The plan for `norm`, backward before forward since only that way never costs accuracy; or both reasons."""
        if isinstance(norm.map, Refusal):
            return (norm.map,)
        try:
            # A vector is of one channel to BatchNormalization, and has no axis for it.
            alone = norm.map.axes == (1,) and norm.map.channels == 1
            beyond = alone and self._desk.fact(norm.input).rank == 1
            return self._either_way(norm, norm.map.reduced() if beyond else norm.map)
        except MALFORMED as error:
            why = "stands beside an operator that breaks its specification" + (f" ({error})" if str(error) else "")
            return (refuse(Reason.MALFORMED, norm.nodes[0], why.replace("\n", " ")),)

    def _either_way(self, norm: Norm, demand: AffineMap) -> Plan | tuple[Refusal, ...]:
        self._desk.apart = False
        backward = self._backward(norm, demand)
        if isinstance(backward, Refusal) and backward.reason == Reason.CONSUMER:
            self._desk.apart = True
            again = self._backward(norm, demand)
            backward = again if isinstance(again, Plan) else backward
        if isinstance(backward, Plan):
            return backward
        forward = self._forward(norm, demand)
        return forward if isinstance(forward, Plan) else (backward, forward)

    def _carrier(self, node: ir.Node) -> Carrier | None:
        return self._carriers.get(node.op_type) if node.domain == "" else None

    def _backward(self, norm: Norm, demand: AffineMap) -> Plan | Refusal:
        plan = Plan(norm, "backward")
        if norm.input.producer() is None:
            return _no_producer(norm.input)
        demands: dict[ir.Value, AffineMap] = {norm.input: demand}
        settled: set[Reader] = {(norm.nodes[0], _index_of(norm.nodes[0], norm.input))}
        refusal = self._carry_back(plan, demands, settled, taken=())
        if refusal is not None:
            return refusal
        plan.changed += [v for v in demands if v is not norm.input]
        return plan

    def _carry_back(
        self,
        plan: Plan,
        demands: dict[ir.Value, AffineMap],
        settled: set[Reader],
        taken: Collection[ir.Node],
    ) -> Refusal | None:
        """Meet demands on values by what computes them, up to operators that absorb; extends all but `taken` in place.

        Args:
            plan: Gets the edits.
            demands: What values have to become.
            settled: Readers and their operands that ask for it.
            taken: Operators that may not change this way, since they change another.

        Returns:
            The first obstacle, if there is one.
        """
        queue = NodeQueue(self._order, backward=True)
        trail: list[tuple[ir.Node, Step]] = []
        queue.add([v.producer() for v in demands])
        while queue:
            node = queue.pop()
            if node in self._ends.backward:
                return self._ends.mark_backward(trail, self._ends.backward[node])
            if node in taken:
                return refuse(Reason.CONFLICT, node, "would have to change for what follows it and for what it reads")
            step = self._answer_backward(node, plan.norm, demands, settled)
            if isinstance(step, Refusal):
                if step.structural:
                    self._ends.backward[node] = step
                    self._ends.mark_backward(trail, step)
                return step
            trail.append((node, step))
            refusal = self._take(plan, node, step)
            if (unit := unit_after("backward", node, demands.get(node.outputs[0]), step)) is not None:
                plan.units[node] = unit
            if refusal is not None:
                return refusal
            if node.op_type in ("Cast", "CastLike") and (why := self._ranges.objection_to_cast(node, plan.norm)):
                return refuse(why[0], node, why[1])
            asked: list[tuple[int | ir.Value, AffineMap]] = [*step.onward.items(), *step.inside.items()]
            for place, onward in asked:
                refusal = self._demand(plan, node, place, onward, demands, settled)
                if refusal is not None:
                    return self._ends.mark_backward(trail, refusal) if refusal.structural else refusal
                value = _value_at(node, place)
                queue.add([value.producer()] if value in demands else [])
        plan.changed += [o for o in _unread(trail) if o not in demands]
        return None

    def _answer_backward(
        self,
        node: ir.Node,
        norm: Norm,
        demands: Mapping[ir.Value, AffineMap],
        settled: set[Reader],
    ) -> Step | Refusal:
        if not self._across and node.graph is not norm.nodes[0].graph:
            return _crosses(node)
        maps = {i: demands[o] for i, o in enumerate(node.outputs) if o in demands}
        for index in maps:
            value = node.outputs[index]
            if value.is_graph_output() and value not in settled:
                return Refusal(Reason.GRAPH_OUTPUT, value.name or "", f"{value.name!r} is an output of the graph too")
            for user, position in value.uses():
                if (user, position) in settled or reads_no_elements(user, position):
                    continue
                if self._reads_another_part(user, position, maps[index]):
                    continue
                if user.graph is not node.graph:
                    return Refusal(
                        Reason.SUBGRAPH, value.name or "", f"{value.name!r} is read inside a subgraph by {label(user)}"
                    )
                return Refusal(Reason.CONSUMER, value.name or "", f"{label(node)} is read by {label(user)} too")
        return ask(self._carrier(node), "backward", node, maps, self._desk)

    def _reads_another_part(self, user: ir.Node, position: int, given: AffineMap) -> bool:
        """Whether `user` cuts out of its data only what the map leaves as it is."""
        carrier = self._carrier(user)
        if carrier is None or not carrier.cuts or position != 0 or not self._desk.apart:
            return False
        if given.is_simple and given.axis is not None:
            key = user, given.axis, given.channels
            if key not in self._places:
                self._places[key] = self._places_read(carrier, *key)
            if (places := self._places[key]) is not None:
                return not np.count_nonzero(given.scale[places] != 1) and not np.count_nonzero(given.shift[places])
        step = ask(carrier, "forward", user, {0: given}, self._desk)
        return isinstance(step, Step) and bool(step.onward) and all(m.is_identity for m in step.onward.values())

    def _places_read(self, carrier: Carrier, user: ir.Node, axis: int, length: int) -> npt.NDArray[np.int64] | None:
        """The places along an axis that `user` cuts out: it hands on a number for each. None where that is not known.

        Many that cut up one value are asked once each, and not again for the norm behind every one of them.
        """
        step = ask(carrier, "forward", user, {0: AffineMap.of(2.0 + np.arange(length), 0.0, axis)}, self._desk)
        found = list(step.onward.values()) if isinstance(step, Step) else []
        return found[0].scale.reshape(-1).astype(np.int64) - 2 if len(found) == 1 and found[0].scale.size else None

    def _demand(
        self,
        plan: Plan,
        node: ir.Node,
        place: int | ir.Value,
        onward: AffineMap,
        demands: dict[ir.Value, AffineMap],
        settled: set[Reader],
    ) -> Refusal | None:
        """Ask what stands at a place to become ``onward(it)``: a constant operand at once, any other value later."""
        value = _value_at(node, place)
        parameter = self._desk.parameter(node, place) if isinstance(place, int) else None
        if parameter is not None and isinstance(place, int):
            rank, shape = len(parameter.shape), dict(enumerate(parameter.shape))
            lengths = zip(onward.axes, onward.scale.shape, strict=False)
            if onward.periodic or any(shape.get(a) != n for a, n in lengths):
                return refuse(Reason.SHAPE, node, f"has operand {place} of shape {parameter.shape}, not of the map's")
            return self._take(plan, node, Step((SetInput(node, place, parameter.mapped(*onward.along(rank))),)))
        if value is None:
            return refuse(Reason.WEIGHT, node, f"has no operand {place}")
        if value in demands and not demands[value].equals(onward):
            readers = {node, *(user for user, position in value.uses() if (user, position) in settled)}
            both = self._united(demands[value], onward, readers, demands)
            if both is None:
                why = f"{value.name!r} would have to become two things at once"
                return Refusal(Reason.CONFLICT, value.name or "", why)
            onward = both
        if value.producer() is None:
            return (
                refuse(Reason.OVERRIDABLE, node, f"reads {value.name!r}, an input of the model with a default")
                if (self._desk.facts.is_overridable(value))
                else _no_producer(value)
            )
        demands[value] = onward
        settled.add((node, place) if isinstance(place, int) else place)
        return None

    def _united(
        self, one: AffineMap, two: AffineMap, readers: Collection[ir.Node], demands: Mapping[ir.Value, AffineMap]
    ) -> AffineMap | None:
        """The map that meets two demands on one value, of which each reader cuts out a part of its own; or None."""
        both = one.overlaid(two)
        if both is None:
            return None
        for reader in readers:
            carrier = self._carrier(reader)
            if carrier is None or not carrier.cuts:
                return None
            step = ask(carrier, "forward", reader, {0: both}, self._desk)
            for index, output in enumerate(reader.outputs):
                got = step.onward.get(index, IDENTITY) if isinstance(step, Step) else None
                if got is None or not got.means(demands.get(output, IDENTITY)):
                    return None
        return both

    def _forward(self, norm: Norm, given: AffineMap) -> Plan | Refusal:
        if norm.kappa > self._limits.max_kappa and given.has_shift:
            known = "" if norm.form == "BatchNormalization" else " if its first scale is 1 / sigma"
            return refuse(
                Reason.CANCELLATION,
                norm.nodes[0],
                f"has an input {norm.kappa:.3g} standard deviations from zero{known}, more than "
                f"{self._limits.max_kappa:g}: folded into what follows, that part of the precision would be lost",
            )
        plan = Plan(norm, "forward")
        arrivals: dict[ir.Value, AffineMap] = {norm.output: given}
        demands: dict[ir.Value, AffineMap] = {}
        settled: set[Reader] = set()
        queue = NodeQueue(self._order, backward=False)
        trail: list[tuple[ir.Node, Step]] = []
        lone: list[tuple[ir.Node, Step]] = []
        refusal = self._spread(norm.output, norm, queue)
        while queue and refusal is None:
            node = queue.pop()
            maps = {i: arrivals[v] for i, v in enumerate(node.inputs) if v is not None and v in arrivals}
            dead = self._ends.forward.get(node) if len(maps) == 1 else None
            step: Step | Refusal = dead or ask(self._carrier(node), "forward", node, maps, self._desk)
            if isinstance(step, Refusal):
                if step.structural:
                    self._ends.forward[node] = step
                return self._ends.mark_forward(lone, step)
            trail.append((node, step))
            lone += trail[-1:] if len(maps) == 1 else []
            refusal = self._take(plan, node, step)
            if (unit := unit_after("forward", node, None, step)) is not None:
                plan.units[node] = unit
            for index, demand in step.demands.items():
                refusal = refusal or self._demand(plan, node, index, demand, demands, settled)
            for index, onward in step.onward.items():
                if refusal is not None or onward.is_identity:
                    continue
                arrivals[node.outputs[index]] = onward
                refusal = self._spread(node.outputs[index], norm, queue)
                if refusal is not None:
                    self._ends.mark_forward(lone, refusal)
        refusal = refusal or self._carry_back(plan, demands, settled, taken={*norm.nodes, *queue.seen})
        if refusal is not None:
            return refusal
        plan.changed += [v for v in (*arrivals, *demands) if v is not norm.output]
        plan.changed += [o for o in _unread(trail) if o not in arrivals]
        return plan

    def _spread(self, value: ir.Value, norm: Norm, queue: NodeQueue) -> Refusal | None:
        """Line up every reader of a value that changed."""
        if value.is_graph_output():
            return Refusal(Reason.GRAPH_OUTPUT, value.name or "", f"{value.name!r} is an output of the graph")
        for user, position in value.uses():
            if reads_no_elements(user, position):
                continue
            if not self._across and user.graph is not norm.nodes[0].graph:
                return _crosses(user)
            queue.add([user])
        return None

    def _take(self, plan: Plan, node: ir.Node, step: Step) -> Refusal | None:
        """Add a step's edits to the plan, unless a number would leave its type."""
        for edit in step.edits:
            if isinstance(edit, SetInput | AddAfter) and (why := self._ranges.objection(edit)):
                return refuse(why[0], node, why[1])
        if step.edits or not (step.onward or step.inside):
            plan.edits.extend(step.edits)
            if (name := label(node)) not in plan.into:
                plan.into.append(name)
        return None


def reads_no_elements(node: ir.Node, position: int) -> bool:
    """Whether `node` reads only the shape or the type of its operand, which no map changes."""
    if node.domain != "":
        return False
    return node.op_type in ("Shape", "Size") or (node.op_type == "CastLike" and position == 1)


def _value_at(node: ir.Node, place: int | ir.Value) -> ir.Value | None:
    if not isinstance(place, int):  # to ask whether it is a value takes longer than all the rest
        return place
    return node.inputs[place] if place < len(node.inputs) else None


def _unread(trail: Iterable[tuple[ir.Node, Step]]) -> Iterator[ir.Value]:
    """The outputs that nobody reads of operators that pass a map on: they change with the others (Split, Indices)."""
    # Not those of bodies.
    outputs = (o for node, step in trail if not step.inside for o in node.outputs)
    return (o for o in outputs if o.name and not o.uses() and not o.is_graph_output())


def _index_of(node: ir.Node, value: ir.Value) -> int:
    return next(i for i, v in enumerate(node.inputs) if v is value)


def _no_producer(value: ir.Value) -> Refusal:
    if value.is_initializer():
        why = f"{value.name!r} is stored in the model; no operator computes it"
        return Refusal(Reason.NOT_CONSTANT, value.name or "", why)
    return Refusal(Reason.GRAPH_INPUT, value.name or "", f"{value.name!r} is an input of the graph", structural=True)


def _crosses(node: ir.Node) -> Refusal:
    return Refusal(Reason.SUBGRAPH, node.name or "", f"{label(node)} lies in another graph or subgraph")

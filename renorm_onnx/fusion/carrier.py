"""What an operator may answer when an affine map arrives, and what it may ask before it answers.

An operator that *absorbs* a map returns a `Step` with edits and nothing onward. One that lets it *pass* returns the
maps that go on. One that can do neither returns a `Refusal`. Both directions have the same form:

* backward: the operator is asked to deliver ``M(output)`` instead of ``output``; onward maps are demands on its inputs;
* forward: the operator is given ``x`` where ``M(x)`` stood; onward maps say what its outputs now lack, and demands what
  its other operands, a weight or a bias, have to become.

A demand on a constant operand is met by the planner, which maps the constant, and one on any other by what computes it;
so an operator need not tell stored weights from computed or quantized ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import onnx
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap, UnlikeAxesError
from renorm_onnx.fusion.fact import Dims, Fact
from renorm_onnx.fusion.facts import Facts
from renorm_onnx.fusion.parameters import Parameter
from renorm_onnx.fusion.report import Reason, Refusal

# How many operators a search goes back for the one that hides a shape. It need not be the first: all have none.
MAX_NAMED = 100
BROADCASTING = ("Add", "Sub", "Mul", "Div")


@dataclass(eq=False, slots=True)
class SetInput:
    """Give `node` the constant `parameter` as input `index`; inputs in between that were absent stay absent."""

    node: ir.Node
    index: int
    parameter: Parameter


@dataclass(frozen=True, eq=False)
class SetAttribute:
    """Set an attribute of `node`."""

    node: ir.Node
    attribute: ir.Attr


@dataclass(frozen=True, eq=False)
class AddAfter:
    """Add the constant `parameter` to the only output of `node`."""

    node: ir.Node
    parameter: Parameter


Edit = SetInput | SetAttribute | AddAfter


class Step(NamedTuple):
    """One operator's answer: what changes in it, and the maps that go on.

    Args:
        edits: Applied only if the whole plan succeeds.
        onward: Backward: input index -> map demanded of that input. Forward: output index -> map it now lacks.
        demands: Forward: input index -> map demanded of that input, which did not change.
        inside: Backward: value that a body inside the operator hands out -> map demanded of it.
    """

    edits: tuple[Edit, ...] = ()
    onward: Mapping[int, AffineMap] = MappingProxyType({})
    demands: Mapping[int, AffineMap] = MappingProxyType({})
    inside: Mapping[ir.Value, AffineMap] = MappingProxyType({})


class Desk:
    """What carriers may read: facts about values, and constant operands with the folds already planned for them."""

    def __init__(self, facts: Facts, max_weight: float = float("inf")) -> None:
        self.facts = facts
        self.max_weight = max_weight
        self.pending: dict[tuple[ir.Node, int], Parameter] = {}
        facts.operands = self.pending  # type: ignore[assignment]
        # By what the first scale of a chain has to be multiplied to say what the model said; see `units`.
        self.units: dict[ir.Node, AffineMap] = {}
        # Whether others read what Slice and Gather leave out of their data, so that it must stay as it is.
        self.apart = False

    @property
    def opset(self) -> int:
        """The version of the default operator set that the model imports."""
        return self.facts.opset

    def fact(self, value: ir.Value | None) -> Fact:
        """What is proven about `value`."""
        return self.facts[value]

    def dims(self, value: ir.Value | None) -> Dims | None:
        """The dimensions of `value`, or None where not even the rank is proven."""
        return self.facts[value].dims

    def inputs(self, node: ir.Node) -> list[Fact]:
        """The facts about all inputs of `node`."""
        return [self.facts[i] for i in node.inputs]

    def parameter(self, node: ir.Node, index: int) -> Parameter | None:
        """The constant float operand at `index`, as it will be; None where absent or not constant."""
        pending = self.pending.get((node, index))
        if pending is not None:
            return pending
        inputs = node.inputs
        value = inputs[index] if index < len(inputs) else None
        if value is None:
            return None
        if value.producer() is None:
            tensor = self.facts.tensor(value)
            return None if tensor is None else Parameter.stored(tensor)
        return Parameter.of(self.unexpanded(node, index) or self.facts[value])

    def is_constant(self, node: ir.Node, index: int) -> bool:
        """Whether the operand at `index` is constant, or is but for an Expand that changes nothing for `node`."""
        return self.facts.is_constant(node.inputs[index]) or self.unexpanded(node, index) is not None

    def unexpanded(self, node: ir.Node, index: int) -> Fact | None:
        """What an Expand repeats to no more than the size of the other operand, which broadcasts it anyway.

        Exporters write ``x - mean.expand_as(x)`` so; the operand is no constant, its run-time shape being that of x. Of
        two such operands neither is: each has its size from the other.
        """
        value = node.inputs[index]
        maker = None if value is None else value.producer()
        if maker is None or maker.op_type != "Expand" or node.op_type not in BROADCASTING or len(node.inputs) != 2:
            return None
        fact, (other, _, _, _, narrow, _) = self.facts[value], self.facts[node.inputs[1 - index]]
        if fact.unexpanded is None or fact.dims is None or other is None or len(fact.dims) > len(other) or narrow:
            return None
        tail = other[len(other) - len(fact.dims) :]
        return fact.unexpanded if all(d in (1, o) for d, o in zip(fact.dims, tail, strict=True)) else None

    def has_input(self, node: ir.Node, index: int) -> bool:
        """Whether the optional operand at `index` is given, or will be; an empty name is none."""
        return (node, index) in self.pending or (index < len(node.inputs) and node.inputs[index] is not None)

    def hidden_shape(self, node: ir.Node) -> str:
        """What hides the rank of an operand of `node`, as the end of a sentence; empty if all ranks are known."""
        value = next((i for i in node.inputs if i is not None and self.facts[i].dims is None), None)
        if value is None:
            return ""
        maker = value.producer()
        for _ in range(MAX_NAMED):
            if maker is None or self.facts.rule(maker) is None:
                break
            before = next((i for i in maker.inputs if i is not None and self.facts[i].dims is None), None)
            if before is None:
                break
            value, maker = before, before.producer()
        named = repr(value.name) if maker is None else domain_of(maker) + label(maker)
        return f"; the shape of {named} is unknown"

    def is_overridable(self, node: ir.Node, index: int) -> bool:
        """Whether the operand is an initializer that the caller of the model may replace."""
        value = node.inputs[index] if index < len(node.inputs) else None
        return value is not None and self.facts.is_overridable(value)


def label(node: ir.Node) -> str:
    """What a person calls a node: its operator and its name, or that of its output."""
    name = node.name or (node.outputs[0].name if node.outputs else "")
    return f"{node.op_type} {name!r}"


def domain_of(node: ir.Node) -> str:
    """The domain of an operator before its label; empty for ONNX's own."""
    return f"{node.domain}::" if node.domain != "" else ""


class Carrier:
    """What one operator family does with a map; the base refuses everything.

    Subclasses live in `fusion/carriers/`, one file for each family, whose docstring states Before, After, Formula and
    Refuses when. They never change a graph. Those with `many_axes` are also asked about maps that are not simple;
    those that `cut` read a part of their data.
    """

    operators: tuple[str, ...] = ()
    many_axes = False
    cuts = False

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Answer a demand.

        Args:
            node: The operator; only read.
            maps: Output index -> the map that its consumers demand; an output without an entry must not change.
            desk: What may be asked.

        Returns:
            The step, or why there is none.
        """
        return no_rule(node, desk.opset)

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Answer an arrival.

        Args:
            node: The operator; only read.
            maps: Input index -> the map that its value lacks from now on; an input without an entry is unchanged.
            desk: What may be asked.

        Returns:
            The step, or why there is none.
        """
        return no_rule(node, desk.opset)


def no_rule(node: ir.Node, opset: int) -> Refusal:
    """The refusal of an operator that neither absorbs nor passes an affine map, or of what is no operator at all."""
    exists = node.domain != "" or onnx.defs.has(node.op_type, opset)
    why = "neither absorbs nor passes a scale and shift" if exists else f"is no operator of opset {opset}"
    name = node.name or node.outputs[0].name or ""
    return Refusal(Reason.OPERATOR, name, f"{domain_of(node)}{label(node)} {why}", structural=True)


def ask(carrier: Carrier | None, way: str, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
    """The answer of `carrier`, going "backward" or "forward"; without one, or for a map that it does not take, no."""
    if carrier is None:
        return no_rule(node, desk.opset)
    if not carrier.many_axes and not all(m.is_simple for m in maps.values()):
        return refuse(Reason.AXIS, node, "takes maps along one axis, and the channels are split over several")
    try:
        answer = carrier.backward(node, maps, desk) if way == "backward" else carrier.forward(node, maps, desk)
    except UnlikeAxesError:
        return refuse(Reason.SHAPE, node, "meets maps that count the elements of one axis differently")
    if isinstance(answer, Refusal) and answer.reason == Reason.SHAPE and (hidden := desk.hidden_shape(node)):
        return replace(answer, detail=answer.detail + hidden)
    return answer


def refuse(reason: Reason, node: ir.Node, why: str, *, structural: bool = False) -> Refusal:
    """A refusal by `node`; `why` completes the sentence that its label begins."""
    return Refusal(reason, node.name or node.outputs[0].name or "", f"{label(node)} {why}", structural)

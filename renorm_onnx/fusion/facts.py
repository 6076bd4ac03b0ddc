"""What is proven about each value: its dimensions, and its content where that does not depend on the inputs.

`value_info` and equal names of symbolic dimensions prove nothing: onnxruntime runs such models with other sizes. So
every fact is derived here from graph inputs (whose declared rank and fixed sizes onnxruntime enforces), from constants
and from the operators between (`fact_rules`). A size that is not fixed is a `Dimension`, equal only to itself.

Contents are evaluated in float64 whatever the element type, since a fold is to be equal in real arithmetic. A runtime
rounds them at every step, which moves them little, but not where they jump: ``int(10.0 * 0.7)`` is 7 in float32 and 6
in float64. So nothing is known behind a jump unless what jumps is exact. Contents of integer values may hold
dimensions: ``Reshape(x, Concat(Shape(x)[0], 128))`` is understood.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import onnx_ir as ir

from renorm_onnx.fusion.fact import (
    MALFORMED,
    MAX_COMPUTED_ELEMENTS,
    MAX_REMEMBERED_ELEMENTS,
    UNKNOWN,
    Content,
    Dimension,
    Dims,
    Fact,
    Rule,
    computed,
    stored,
)
from renorm_onnx.model_walk import bodies_of, graphs_of, nodes_of


class Operand(Protocol):
    """A constant operand as it will be."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""

    def float64(self) -> Content:
        """Its elements."""


class Facts:
    """Derives facts on demand and remembers them until `forget`.

    Args:
        model: Only read. Before IR version 4, an initializer that is also a graph input is a constant; from 4 on a
            caller may override it.
        rules: Operator name -> rule; of other domains than ONNX's own, "domain::name".
        constant_operators: Those whose rule may give contents.
        assume_constant_initializers: Treat overridable initializers as constants.
    """

    def __init__(
        self,
        model: ir.Model,
        rules: Mapping[str, Rule],
        constant_operators: Collection[str],
        *,
        assume_constant_initializers: bool = False,
    ) -> None:
        self.opset = model.opset_imports.get("", 1)
        self._main = model.graph
        self._rules = rules
        self._functions = model.functions
        self._constant_operators = constant_operators
        self._all_constant = assume_constant_initializers or model.ir_version < 4
        self._known: dict[ir.Value, Fact] = {}
        self._remembered = 0
        self._bodies: dict[ir.Graph, ir.Node] | None = None
        # Inductions under way. Within one none is begun for what a body inside hands out: each round would repeat it.
        self._proving = 0
        # Operands that are not written into the graph yet, and the nodes that have some: by these it is to be read.
        self.operands: dict[tuple[ir.Node, int], Operand] = {}
        self.changed: set[ir.Node] = set()

    def change(self, node: ir.Node) -> None:
        """Take note that `node` changes; what is known of the content of all that is computed from it is forgotten."""
        self.changed.add(node)
        pending = list(node.outputs)
        while pending:
            value = pending.pop()
            fact = self._known.get(value)
            if fact is not None and (fact.content is not None or fact.unexpanded is not None):
                del self._known[value]
                pending.extend(output for user in value.consumers() for output in user.outputs)

    def forget(self) -> None:
        """Drop what was derived, after the graph changed."""
        self._known.clear()
        self._remembered = 0
        self._bodies = None

    def is_overridable(self, value: ir.Value) -> bool:
        """Whether `value` is an initializer that the caller of the model may replace."""
        return value.is_initializer() and value.is_graph_input() and not self._all_constant

    def tensor(self, value: ir.Value) -> ir.TensorProtocol | None:
        """What is stored for `value`, unless the caller of the model may replace it."""
        fixed = value.is_initializer() and (self._all_constant or not value.is_graph_input())
        return value.const_value if fixed else None

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether the elements of `value` are known; does not derive facts where the answer is plainly no."""
        if value is None:
            return False
        node = value.producer()
        if node is None:
            return value.is_initializer() and not self.is_overridable(value)
        return node.op_type in self._constant_operators and self[value].is_constant

    def __getitem__(self, value: ir.Value | None) -> Fact:
        """The fact about `value`; derived without recursion, since graphs may be 10,000 operators deep."""
        if value is None:
            return UNKNOWN
        known = self._known.get(value)
        if known is not None:
            return known
        if value.producer() is None:
            known = self._known[value] = self._leaf(value)
            return known
        stack = [value]
        while stack:
            current = stack[-1]
            node = current.producer()
            if current in self._known:
                stack.pop()
            elif node is None:
                self._known[stack.pop()] = self._leaf(current)
            else:
                reads = node.inputs if node.op_type not in _HOLDERS else (*self._handed_out(node), *node.inputs)
                missing = [i for i in reads if i is not None and i not in self._known]
                if missing and (node.op_type in _HOLDERS or self.rule(node) is not None):
                    for i in missing:
                        self._known.setdefault(i, UNKNOWN) if i in node.outputs else stack.append(i)
                    continue
                self._derive(node)
                stack.pop()
        return self._known[value]

    def _leaf(self, value: ir.Value) -> Fact:
        tensor = self.tensor(value)
        if tensor is not None:
            return stored(tensor)
        node = self._repeater(value)
        if node is not None:
            row = self._row(node, value)
            if row is None:
                for given in node.inputs:  # which is outside the body, and would not be proven within the induction
                    self[given]
                self._proving += 1
                try:
                    self._carry(node)
                finally:
                    self._proving -= 1
            return row or self._known.get(value, Fact(dtype=value.dtype))
        declared = value.shape if value.is_graph_input() and value.graph is self._main else None
        if declared is None:
            return Fact(dtype=value.dtype)
        return Fact(tuple(d if isinstance(d, int) else Dimension() for d in declared), dtype=value.dtype)

    def _repeater(self, value: ir.Value) -> ir.Node | None:
        """The Loop or Scan (from opset 9 on) of whose body `value` is an input."""
        graph = value.graph
        if graph is self._main or not value.is_graph_input() or not isinstance(graph, ir.Graph):
            return None
        if self._bodies is None:
            known = (n for n in nodes_of(self._main) if n.domain == "")
            repeaters = (n for n in known if n.op_type == "Loop" or (n.op_type == "Scan" and self.opset >= 9))
            self._bodies = {n.attributes["body"].as_graph(): n for n in repeaters}
        return self._bodies.get(graph)

    def _row(self, node: ir.Node, value: ir.Value) -> Fact | None:
        """The fact about an input of a Scan body that is one slice at a time of an operand outside (ONNX Scan-9)."""
        graph = node.attributes["body"].as_graph()
        place, count = graph.inputs.index(value), len(graph.inputs)
        first = count - (node.attributes["num_scan_inputs"].as_int() if node.op_type == "Scan" else 0)
        if len(node.inputs) != count or place < first:
            return None
        axes = node.attributes["scan_input_axes"].as_ints() if "scan_input_axes" in node.attributes else [0] * count
        whole = self[node.inputs[place]]
        if whole.dims is None:
            return None
        axis = axes[place - first] % len(whole.dims)
        return Fact(whole.dims[:axis] + whole.dims[axis + 1 :], dtype=whole.dtype)

    def _carry(self, node: ir.Node) -> None:
        """Find what holds of the values that a body hands to its next run, by induction.

        They have the dimensions of the initial values in the first run. If a run that is given these hands on the
        same, all runs are; otherwise the dimensions that it changes are open, and the rest is tried again.
        """
        graph, begin, end, count = _carried(node)
        carried, handed_on = graph.inputs[begin : begin + count], graph.outputs[end : end + count]
        first = [self[v].dims for v in node.inputs[begin : begin + count]]
        if not len(carried) == len(handed_on) == len(first):
            return
        for value in graph.inputs:
            if value not in carried:  # the run's number, the condition: handed on, they must not lead here again
                self._known[value] = self._row(node, value) or Fact(dtype=value.dtype)
        known, opened = len(self._known), set[Dimension]()
        for _ in range(2 + sum(len(dims) for dims in first if dims is not None)):
            for value, dims in zip(carried, first, strict=True):
                self._known[value] = Fact(dims, dtype=value.dtype)
            then = [_common(dims, self[value].dims, opened) for dims, value in zip(first, handed_on, strict=True)]
            if then == first:
                return
            first = then
            self._retract(graph, known)
        for value in carried:
            self._known[value] = Fact(dtype=value.dtype)

    def _retract(self, graph: ir.Graph, known: int) -> None:
        """Forget, of all but the first `known` facts, those about a body: no other rests on what it assumed.

        Those about the bodies around it are kept, or each would be proven again in every round of each one inside.
        """
        kept: dict[ir.Value, Fact] = {}
        inside = set(graphs_of(graph))
        while len(self._known) > known:
            value, fact = self._known.popitem()
            if value.graph not in inside:
                kept[value] = fact
        self._known.update(kept)

    def rule(self, node: ir.Node) -> Rule | None:
        """The rule of an operator; none of what a function of the model defines otherwise."""
        if node.domain == "":
            return self._rules.get(node.op_type)
        rule = self._rules.get(f"{node.domain}::{node.op_type}")
        return None if rule is None or node.op_identifier() in self._functions else rule

    def _derive(self, node: ir.Node) -> None:
        known = node.domain == ""
        rule = self.rule(node)
        found: Sequence[Fact] = ()
        inputs = [self._known.get(i, UNKNOWN) if i is not None else UNKNOWN for i in node.inputs] if rule else []
        if node in self.changed and node.op_type in self._constant_operators:
            inputs = [self._as_changed(node, index, fact) for index, fact in enumerate(inputs)]
        try:
            if rule is not None:
                found = rule(node, inputs, self.opset)
            elif known and node.op_type in _HOLDERS:
                found = self._from_bodies(node)
        except MALFORMED:
            found = ()
        for index, output in enumerate(node.outputs):
            fact = found[index] if index < len(found) else UNKNOWN
            if fact.dtype is None and output.dtype is not None:
                fact = fact._replace(dtype=output.dtype)
            if fact.content is not None:
                self._remembered += fact.content.size
                moved = fact.content.dtype.kind == "f" and node.op_type not in _SETTLING
                if moved and not all(i.exact for i in inputs):
                    fact = fact._replace(exact=False)
                if self._remembered > MAX_REMEMBERED_ELEMENTS:
                    fact = fact._replace(content=None)
            self._known[output] = fact

    def _as_changed(self, node: ir.Node, index: int, fact: Fact) -> Fact:
        operand = self.operands.get((node, index))
        if operand is None:
            return fact
        if math.prod(operand.shape) > MAX_COMPUTED_ELEMENTS:
            return fact._replace(content=None, tensor=None)
        return computed(operand.float64(), fact.dtype)

    def _handed_out(self, node: ir.Node) -> list[ir.Value]:
        """The outputs of the bodies inside a node, if they are to prove something about its own."""
        if self._proving and node.op_type != "If":
            return []
        return [value for body in bodies_of(node) for value in body.outputs]

    def _from_bodies(self, node: ir.Node) -> list[Fact]:
        """The facts about the outputs of If, in which both branches agree, and of Loop and Scan (from opset 9 on).

        What is handed on from run to run has, behind the last run, the dimensions that it has before each; what is
        stacked has one more. Sizes that a body leaves open are others outside.
        """
        if node.op_type == "If":
            ways = [node.attributes[name].as_graph().outputs for name in ("then_branch", "else_branch")]
            pairs = [[self._known.get(v, UNKNOWN) for v in pair] for pair in zip(*ways, strict=True)]
            return [Fact(_common(one.dims, two.dims, set()), dtype=one.dtype) for one, two in pairs]
        if (node.op_type == "Scan" and self.opset < 9) or self._proving:
            return []
        graph, begin, end, count = _carried(node)
        axes = node.attributes["scan_output_axes"].as_ints() if "scan_output_axes" in node.attributes else None
        found = []
        for place, value in enumerate(graph.outputs[end:]):
            dims = self[graph.inputs[begin + place] if place < count else value].dims
            if dims is not None:
                dims = tuple(d if isinstance(d, int) else Dimension() for d in dims)
            if dims is not None and place >= count:
                axis = 0 if axes is None else axes[place - count] % (len(dims) + 1)
                dims = (*dims[:axis], Dimension(), *dims[axis:])
            found.append(Fact(dims, dtype=value.dtype))
        return found


# What they give is known whatever a runtime rounded before, or not at all.
_SETTLING = frozenset({"Ceil", "Floor", "Sign"})
# Operators with bodies, of which the outputs are those of the bodies.
_HOLDERS = frozenset({"If", "Loop", "Scan"})


def _carried(node: ir.Node) -> tuple[ir.Graph, int, int, int]:
    """The body of a Loop or Scan; where among its inputs and outputs stands what it hands from run to run, how many."""
    graph = node.attributes["body"].as_graph()
    begin, end = (2, 1) if node.op_type == "Loop" else (0, 0)
    return graph, begin, end, len(graph.inputs) - (begin or node.attributes["num_scan_inputs"].as_int())


def _common(one: Dims | None, two: Dims | None, opened: set[Dimension]) -> Dims | None:
    """The dimensions `one`, where `two` agrees or they are `opened`; the others are from now on. None of other rank."""
    if one is None or two is None or len(one) != len(two):
        return None
    differ = [a != b and a not in opened for a, b in zip(one, two, strict=True)]
    fresh = tuple(Dimension() if new else a for a, new in zip(one, differ, strict=True))
    opened.update(d for d, new in zip(fresh, differ, strict=True) if new and isinstance(d, Dimension))
    return fresh

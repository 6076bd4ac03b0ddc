"""An If that always goes one way becomes the nodes of that way, so that norms before, in and behind it can be folded.

Exporters write such an If where they cannot tell a size: ``If(Equal(Shape(x)[1], 1)) {Squeeze(x)} {x}``. The condition
must be proven without any rounding: from stored values, sizes and integers alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from renorm_onnx.fusion.facts import Facts
from renorm_onnx.fusion.rewriter import Rewriter
from renorm_onnx.model_walk import graphs_of, nodes_of


def open_conditionals(model: ir.Model, facts: Facts, rewriter: Rewriter) -> list[ir.Node]:
    """Replace, in place, every If of which the condition is proven by the branch that it takes.

    Nodes of the branch, and what they compute, get another name where theirs stands elsewhere in the model too, those
    of graphs inside it as well, to which more becomes visible; the outputs keep theirs.

    Args:
        model: Changed in place; facts about its values are to be forgotten afterwards.
        facts: About `model` as it is.
        rewriter: Of `model`.

    Returns:
        The nodes that are to be deleted: each If, and all that its other branch holds.
    """
    proven = [
        (node, taken)
        for node in nodes_of(model.graph)
        if node.op_type == "If" and node.domain == ""
        if (taken := _way_taken(node, facts)) is not None
    ]
    borne = Counter(map(_key, _named(graphs_of(model.graph)))) if proven else Counter()
    gone: dict[ir.Node, None] = {}
    # An outer If first: one that lies in a branch which is not taken needs no opening.
    for node, taken in proven:
        if node not in gone:
            gone.update(dict.fromkeys(_open(node, rewriter, borne, taken=taken)))
    return list(gone)


def _named(graphs: Iterable[ir.Graph]) -> Iterator[ir.Value | ir.Node]:
    """The nodes of some graphs, and the values that they give names to."""
    for graph in graphs:
        yield from dict.fromkeys((*graph.inputs, *graph.initializers.values()))
        for node in graph:
            yield node
            yield from node.outputs


def _key(named: ir.Value | ir.Node) -> tuple[type, str | None]:
    """A name where it must be the only one: a node may be called as a value is."""
    return type(named), named.name


def _way_taken(node: ir.Node, facts: Facts) -> bool | None:
    """Whether the condition is proven true or false; None where it is not."""
    branches = [node.attributes.get(name) for name in ("then_branch", "else_branch")]
    if not node.inputs or any(b is None or len(b.as_graph().outputs) != len(node.outputs) for b in branches):
        return None
    content = facts[node.inputs[0]].elements() if _is_discrete(node.inputs[0], facts) else None
    return None if content is None or content.dtype == object or content.size != 1 else bool(content.reshape(-1)[0])


def _is_discrete(value: ir.Value | None, facts: Facts) -> bool:
    """Whether `value` is computed from sizes and from numbers that are no floats: floats may round either way."""
    stack, seen = [value], {value}
    while stack:
        current = stack.pop()
        node = None if current is None else current.producer()
        kind = facts[current].dtype
        if kind is None or kind.is_floating_point():
            return False
        if node is not None and node.op_type not in ("Shape", "Size"):
            stack += [i for i in node.inputs if i is not None and i not in seen]
            seen.update(node.inputs)
    return True


def _open(node: ir.Node, rewriter: Rewriter, borne: Counter[tuple[type, str | None]], *, taken: bool) -> list[ir.Node]:
    """Put the nodes of one branch in the place of an If, keeping `borne`, in place too; return what is to go."""
    outer = node.graph
    assert isinstance(outer, ir.Graph), "an If that is gone is not opened"
    branch, other = (node.attributes[f"{w}_branch"].as_graph() for w in ("then", "else")[:: 1 if taken else -1])
    dead = [node]
    borne.subtract(map(_key, _named(graphs_of(other))))
    for graph in graphs_of(other):
        dead.extend(graph)
        graph.outputs.clear()
    moved = list(_named(graphs_of(branch)))
    results, nodes, stored = list(branch.outputs), list(branch), list(branch.initializers.values())
    branch.outputs.clear()
    branch.initializers.clear()
    branch.remove(nodes)
    for named in moved:
        if named.name and borne[_key(named)] > 1:
            borne[_key(named)] -= 1
            named.name = rewriter.names.unique(named.name)
    home, as_input = rewriter.home(outer)
    for value in stored:
        home.register_initializer(value)
        if as_input:
            home.inputs.append(value)
    outer.insert_before(node, nodes)
    made = {v for inner in nodes for v in inner.outputs}
    for old, new in zip(node.outputs, results, strict=True):
        if new not in made:  # a value from outside, a constant, or one that is handed out twice
            new = rewriter.copy_before(node, new, node.name or old.name)
        made.discard(new)
        rewriter.take_over(old, new)
    return dead

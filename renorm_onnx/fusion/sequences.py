"""A tensor that is split into a sequence, of which each element is taken out by its number, is only split.

torch exports ``x.split([4, 5], dim=1)`` so: SplitToSequence and a SequenceAt for each piece, which are one Split. No
map passes a sequence, which is one value of several pieces.
"""

from __future__ import annotations

import onnx_ir as ir

from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.facts import Facts
from renorm_onnx.fusion.rewriter import Rewriter
from renorm_onnx.model_walk import nodes_of

# From this opset on, Split takes its sizes as an operand.
OLDEST_OPSET = 13


def open_sequences(model: ir.Model, facts: Facts, rewriter: Rewriter) -> list[ir.Node]:
    """Replace, in place, each SplitToSequence of proven sizes whose elements are taken out one by one, by a Split.

    Args:
        model: Changed in place; facts about its values are to be forgotten afterwards.
        facts: About `model` as it is.
        rewriter: Of `model`.

    Returns:
        The nodes that are to be deleted: each SplitToSequence, and those that take its elements out.
    """
    gone: list[ir.Node] = []
    if facts.opset < OLDEST_OPSET:
        return gone
    for node in list(nodes_of(model.graph)):
        if node.op_type != "SplitToSequence" or node.domain not in ("", "ai.onnx"):
            continue
        sizes, taken = _sizes(node, facts), _elements(node, facts)
        if sizes is not None and taken is not None and all(-len(sizes) <= i < len(sizes) for i in taken.values()):
            gone += _split(node, len(sizes), taken, rewriter)
    return gone


def _sizes(node: ir.Node, facts: Facts) -> list[int] | None:
    """The length of each piece, given as such in an operand of int64; None where that is not proven."""
    given = facts[node.inputs[1]] if len(node.inputs) > 1 else None
    found = None if given is None or given.rank != 1 or given.dtype != ir.DataType.INT64 else given.integers()
    return None if found is None or not all(isinstance(n, int) for n in found) else [int(n) for n in found]  # type: ignore[arg-type]


def _elements(node: ir.Node, facts: Facts) -> dict[ir.Node, int] | None:
    """Who reads the sequence, and which element; None where somebody reads it otherwise or from another graph."""
    sequence, found = node.outputs[0], dict[ir.Node, int]()
    for user, position in sequence.uses():
        takes_one = user.op_type == "SequenceAt" and position == 0 and len(user.inputs) == 2
        index = facts[user.inputs[1]].integers() if takes_one else None
        if user.graph is not node.graph or user.domain not in ("", "ai.onnx") or not index:
            return None
        if not isinstance(index[0], int):
            return None
        found[user] = index[0]
    return None if sequence.is_graph_output() or not found else found


def _split(node: ir.Node, count: int, taken: dict[ir.Node, int], rewriter: Rewriter) -> list[ir.Node]:
    """Put a Split before `node`, and its pieces in the place of what was taken out; return what is to go."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    axis = ir.AttrInt64("axis", int(attribute(node, "axis", 0)))
    split = ir.Node("", "Split", node.inputs[:2], [axis], num_outputs=count, name=node.name)
    for index, output in enumerate(split.outputs):
        output.name = rewriter.names.unique(f"{node.outputs[0].name}_{index}")
    graph.insert_before(node, split)
    free = set(split.outputs)
    for user, index in taken.items():
        piece = split.outputs[index]
        if piece not in free:
            piece = rewriter.copy_before(user, piece, user.outputs[0].name)
        free.discard(piece)
        rewriter.take_over(user.outputs[0], piece)
    return [*taken, node]

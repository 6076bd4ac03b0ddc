"""A tensor that is split into a sequence, of which each element is taken out by its number, is only split.

torch exports ``x.split([4, 5], dim=1)`` and ``x.split(4, dim=1)`` so: SplitToSequence and a SequenceAt for each piece,
which are one Split. No map passes a sequence, which is one value of several pieces.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.facts import Facts
from renorm_onnx.fusion.rewriter import Rewriter
from renorm_onnx.model_walk import nodes_of

# From this opset on, Split takes its sizes as an operand.
OLDEST_OPSET = 13
# A number may stand for more pieces than anybody takes out one by one.
MAX_PIECES = 1 << 10


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
        if node.op_type != "SplitToSequence" or node.domain != "":
            continue
        sizes, taken = _sizes(node, facts), _elements(node, facts)
        if sizes is not None and taken is not None and all(-len(sizes) <= i < len(sizes) for i in taken.values()):
            gone += _split(node, sizes, taken, rewriter)
    return gone


def _sizes(node: ir.Node, facts: Facts) -> list[int] | None:
    """The length of each piece; None where it is not proven.

    Given are the lengths, or one length, which all pieces have but the last, for which the rest is left.
    """
    given = facts[node.inputs[1]] if len(node.inputs) > 1 else None
    sizes = None if given is None or given.dtype != ir.DataType.INT64 else given.fixed_integers()
    if given is None or sizes is None or given.rank == 1:
        return sizes
    dims, axis = facts[node.inputs[0]].dims, int(attribute(node, "axis", 0))
    whole = dims[axis] if dims is not None and -len(dims) <= axis < len(dims) else None
    if not isinstance(whole, int) or not sizes[0] > 0 or whole > sizes[0] * MAX_PIECES:
        return None
    return [min(sizes[0], whole - start) for start in range(0, whole, sizes[0])]


def _elements(node: ir.Node, facts: Facts) -> dict[ir.Node, int] | None:
    """Who reads the sequence, and which element; None where somebody reads it otherwise or from another graph."""
    sequence, found = node.outputs[0], dict[ir.Node, int]()
    for user, position in sequence.uses():
        takes_one = user.op_type == "SequenceAt" and position == 0 and len(user.inputs) == 2
        index = facts[user.inputs[1]].integers() if takes_one else None
        if user.graph is not node.graph or user.domain != "" or not index:
            return None
        if not isinstance(index[0], int):
            return None
        found[user] = index[0]
    return None if sequence.is_graph_output() or not found else found


def _split(node: ir.Node, sizes: list[int], taken: dict[ir.Node, int], rewriter: Rewriter) -> list[ir.Node]:
    """Put a Split before `node`, and its pieces in the place of what was taken out; return what is to go."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    axis = ir.AttrInt64("axis", int(attribute(node, "axis", 0)))
    given = ir.node("Constant", [], {"value": ir.tensor(np.array(sizes, np.int64))}, name=f"{node.name}_sizes")
    given.outputs[0].name = rewriter.names.unique(f"{node.outputs[0].name}_sizes")
    graph.insert_before(node, given)
    split = ir.Node("", "Split", [node.inputs[0], given.outputs[0]], [axis], num_outputs=len(sizes), name=node.name)
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

"""Walking over a model: its scopes, the graphs inside them, and their nodes, without recursion."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def scopes_of(model: ir.Model) -> list[ir.Graph | ir.Function]:
    """Return the main graph and the functions: everything that has nodes and opset imports of its own."""
    return [model.graph, *model.functions.values()]


def graphs_of(scope: ir.Graph | ir.Function) -> Iterator[ir.Graph]:
    """The scope's own graph and every graph inside it, outer before inner."""
    graphs = [scope.graph if isinstance(scope, ir.Function) else scope]
    for graph in graphs:  # grows while it runs
        yield graph
        for node in graph:
            if node.attributes.data:
                graphs.extend(bodies_of(node))


def nodes_of(scope: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """The nodes of the scope's own graph and of every graph inside it, graph by graph as `graphs_of` has them."""
    graphs = [scope.graph if isinstance(scope, ir.Function) else scope]
    for graph in graphs:  # grows while it runs
        for node in graph:
            yield node
            # The dictionary itself: its wrapper takes most of the time on a graph of many nodes.
            if node.attributes.data:
                graphs.extend(bodies_of(node))


def graphs_with_nodes(scope: ir.Graph | ir.Function) -> Iterator[tuple[ir.Graph, list[ir.Node]]]:
    """The graphs as `graphs_of` has them, each with its nodes: one walk for who needs both."""
    graphs = [scope.graph if isinstance(scope, ir.Function) else scope]
    for graph in graphs:  # grows while it runs
        nodes = list(graph)
        yield graph, nodes
        graphs.extend(body for node in nodes if node.attributes.data for body in bodies_of(node))


def in_order(graph: ir.Graph) -> list[ir.Node]:
    """The nodes of a graph and of every graph inside it, those inside right before the node that holds them."""
    found: list[ir.Node] = []
    left = [reversed(graph)]
    while left:
        node = next(left[-1], None)
        if node is None:
            left.pop()
            continue
        found.append(node)
        if node.attributes.data:
            left.extend(reversed(body) for body in bodies_of(node))
    return found[::-1]


def bodies_of(node: ir.Node) -> list[ir.Graph]:
    """The graphs that a node holds, without those inside them."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.data.values():
        if attribute.type in _GRAPHS and not attribute.is_ref():
            one = attribute.type == ir.AttributeType.GRAPH
            found += [attribute.as_graph()] if one else attribute.as_graphs()
    return found

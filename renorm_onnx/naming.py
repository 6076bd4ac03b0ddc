"""Names in a model: which it bears, new ones that nothing in it bears, and what goes with a name to another value."""

from collections import Counter

import onnx_ir as ir

from renorm_onnx.model_walk import graphs_with_nodes, scopes_of


class Names:
    """Hands out names that nothing in the model bears."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = taken
        self._next: Counter[str] = Counter()

    def unique(self, name: str) -> str:
        """Return `name`, or `name` with the next free number."""
        candidate = name
        while candidate in self._taken:
            self._next[name] += 1
            candidate = f"{name}_{self._next[name]}"
        self._taken.add(candidate)
        return candidate


def names_in(model: ir.Model) -> set[str]:
    """Return every name of a value or node in the graph, its subgraphs and the functions."""
    names = {""}
    for scope in scopes_of(model):
        for graph, nodes in graphs_with_nodes(scope):
            names.update(v.name for v in graph.inputs if v.name)
            names.update(graph.initializers)
            for node in nodes:
                names.add(node.name or "")
                names.update(value.name or "" for value in node.outputs)
    return names


def take_name(new: ir.Value, old: ir.Value) -> None:
    """Let `new` bear the name of `old` and, in place, all that the file says of that name beside type and shape."""
    new.name, new.doc_string = old.name, old.doc_string
    for own, given in ((new.metadata_props, old.metadata_props), (new.meta, old.meta)):
        own.clear()
        own.update(given)


def give_name(value: ir.Value, name: str) -> None:
    """Let `value`, which changed, bear another name, in place; what the file says of the old one is not true of it."""
    value.name, value.doc_string = name, None
    value.metadata_props.clear()
    value.meta.clear()

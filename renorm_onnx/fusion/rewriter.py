"""Changes of a model's graphs that keep its interface, and what each name in it means.

Nodes and constants that nobody needs any more are taken out together, in `clean`: onnx-ir looks at all outputs of a
graph for each removal, and finds an output among them by counting.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from renorm_onnx.fusion.operands import fingerprint, is_read_once, set_content, sharing, store, store_expanded
from renorm_onnx.fusion.parameters import Parameter
from renorm_onnx.model_walk import bodies_of, graphs_of
from renorm_onnx.naming import Names, give_name, names_in, take_name


class Rewriter:
    """Changes the graphs of one model, in place.

    Args:
        model: The model.
        opset: Its version of the default operator set.

    Attributes:
        names: Hands out names that nothing in the model bears, or ever bore when `learn` was called.
    """

    def __init__(self, model: ir.Model, opset: int) -> None:
        self._model = model
        self._opset = opset
        self._taken: set[str] = set()
        self.names = Names(self._taken)
        self._output_places: dict[ir.Graph, dict[ir.Value, list[int]]] = {}
        self._gone: dict[ir.Node, ir.Graph] = {}
        self._unread: dict[ir.Value, None] = {}

    def learn(self) -> None:
        """Look at the model's names and outputs, before any change and after others changed it."""
        self._taken |= names_in(self._model)
        self.names = Names(self._taken)
        self._output_places.clear()

    def fresh(self, hint: str) -> str:
        """A name that nothing in the model bears, recognizable as what `hint` became."""
        return self.names.unique(hint.partition("__fused")[0] + "__fused")

    def rename(self, value: ir.Value) -> None:
        """Give `value`, which holds something else from now on, a name that is recognizable as what it became."""
        give_name(value, self.fresh(value.name or "value"))

    def is_deleted(self, node: ir.Node) -> bool:
        """Whether `node` is among those that `clean` will take out."""
        return node in self._gone

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let `new` stand where `old` stood and bear its name, since it holds the same."""
        self.redirect(old, new)
        take_name(new, old)
        # What the file declares about `old` is its interface; a shape declared for `new` alone may be stale.
        new.type, new.shape = old.type or new.type, old.shape

    def take_over(self, old: ir.Value, new: ir.Value) -> None:
        """As `replace`, where `new` is what it was before, so that a shape declared for it alone holds within too."""
        shape = new.shape if old.shape is None and not old.is_graph_output() else old.shape
        self.replace(old, new)
        new.shape, old.name = shape, None

    def copy_before(self, node: ir.Node, value: ir.Value, hint: str | None) -> ir.Value:
        """A copy of `value`, made by an Identity before `node`."""
        assert isinstance(node.graph, ir.Graph)
        copy = ir.Node("", "Identity", [value], num_outputs=1, name=self.names.unique(f"{hint}/copy"))
        node.graph.insert_before(node, copy)
        return copy.outputs[0]

    def redirect(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of `old`, and every graph output that it is, take `new` instead."""
        graph = old.graph
        if old.is_graph_output() and isinstance(graph, ir.Graph):
            if graph not in self._output_places:
                self._output_places[graph] = {}
                for index, value in enumerate(graph.outputs):
                    self._output_places[graph].setdefault(value, []).append(index)
            places = self._output_places[graph]
            moved = places.pop(old)
            for index in moved:
                graph.outputs[index] = new
            places.setdefault(new, []).extend(moved)
        old.replace_all_uses_with(new)

    def home(self, graph: ir.Graph) -> tuple[ir.Graph, bool]:
        """Where a constant that is read in `graph` is stored, and whether it is listed as an input there.

        Before IR version 4 every constant was (IR specification, Graphs); a body has no inputs but those it is given.
        """
        return (self._model.graph, True) if self._model.ir_version < 4 else (graph, False)

    def add_behind(self, node: ir.Node, parameter: Parameter) -> ir.Node:
        """Insert ``Add(output, constant)`` behind a node and let it take over the output's readers and name."""
        value, graph = node.outputs[0], node.graph
        assert isinstance(graph, ir.Graph)
        name = self.names.unique(f"{node.name or value.name}_bias")
        total = ir.Value(type=value.type, shape=value.shape)
        self.redirect(value, total)
        take_name(total, value)
        self.rename(value)
        broadcast = [ir.AttrInt64("broadcast", 1)] if self._opset < 7 else []
        home, as_input = self.home(graph)
        shift = store(home, parameter, name, as_input=as_input)
        added = ir.Node("", "Add", [value, shift], attributes=broadcast, outputs=[total], name=name)
        graph.insert_after(node, added)
        return added

    def delete(self, nodes: Iterable[ir.Node]) -> None:
        """Make nodes, and the graphs in them, read nothing; `clean` takes them out, and what only they read."""
        for node in nodes:
            assert isinstance(node.graph, ir.Graph)
            self._gone[node] = node.graph
            self._blind(node)
            for graph in (g for body in bodies_of(node) for g in graphs_of(body)):
                graph.outputs.clear()
                for inner in graph:
                    self._gone[inner] = graph
                    self._blind(inner)

    def _blind(self, node: ir.Node) -> None:
        for value in node.inputs:
            if value is not None:
                self._unread[value] = None
        node.resize_inputs(0)

    def clean(self) -> list[ir.Node]:
        """Remove deleted nodes, constants that nobody reads any more, and operators that computed nothing else.

        Returns:
            The nodes that were removed, and those within them.
        """
        dropped: dict[ir.Graph, set[ir.Value]] = {}
        while self._unread:
            value = self._unread.popitem()[0]
            if value.uses() or value.is_graph_output():
                continue
            node, graph = value.producer(), value.graph
            if node is not None:
                unread = not any(o.uses() or o.is_graph_output() for o in node.outputs)
                self.delete([node] if unread and node not in self._gone and node.graph is not None else [])
            elif value.is_initializer() and isinstance(graph, ir.Graph) and not self._is_interface(value):
                del graph.initializers[value.name or ""]
                if value.is_graph_input():
                    dropped.setdefault(graph, set()).add(value)
        for graph, values in dropped.items():
            graph.inputs[:] = [v for v in graph.inputs if v not in values]
        removed: dict[ir.Graph, list[ir.Node]] = {}
        for node, graph in self._gone.items():
            removed.setdefault(graph, []).append(node)
        for graph, nodes in removed.items():
            graph.remove(nodes, safe=True)
        gone = list(self._gone)
        self._gone.clear()
        return gone

    def write(self, operands: Mapping[tuple[ir.Node, int], Parameter]) -> None:
        """Give every changed operand its new constant, each number rounded once; leaves those before to `clean`.

        Operators that shared a constant share what it became, where that is the same for them.
        """
        alive = {place: given for place, given in operands.items() if isinstance(place[0].graph, ir.Graph)}
        together = sharing(alive)
        written: dict[tuple[object, ...], ir.Value] = {}
        for (node, index), parameter in alive.items():
            graph = node.graph
            assert isinstance(graph, ir.Graph)
            home, as_input = self.home(graph)
            old = node.inputs[index] if index < len(node.inputs) else None
            key = (home, *fingerprint(parameter)) if node in together else ()
            value = written.get(key)
            if value is None:
                hint = old.name if old is not None and old.name else f"{node.name or node.outputs[0].name}_operand"
                name = self.fresh(hint)
                if old is not None and old.graph is graph and is_read_once(old):
                    set_content(old, parameter, name)
                    old.name = name
                    continue
                value = store_expanded(node, home, parameter, name, self.names, self._opset, as_input=as_input)
            if value is None:
                value = store(home, parameter, name, as_input=as_input)
                if key:
                    written[key] = value
            if index >= len(node.inputs):
                node.resize_inputs(index + 1)
            node.replace_input_with(index, value)
            if old is not None:
                self._unread[old] = None

    def _is_interface(self, value: ir.Value) -> bool:
        return value.is_graph_input() and self._model.ir_version >= 4

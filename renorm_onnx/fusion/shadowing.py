"""Inner values that bear the name of one around them get a name of their own, before anything is folded.

Before: ``h = Conv(x)``, and a branch of an If, or a body of a Loop or Scan, that defines an ``h`` too.
After: the inner one is ``h_1``; names of the outer graph stay, and so do inner ones that stand in two branches side by
side. ONNX forbids such names (IR specification, Name Scopes), and onnxruntime takes some of them, by rules that depend
on what else reads the outer value, and on whether it is stored or computed: what a fold changes.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from renorm_onnx.model_walk import bodies_of, scopes_of
from renorm_onnx.naming import Names, names_in


def rename_shadowing(model: ir.Model) -> int:
    """Rename, in place, every value that has a namesake in a graph around its own; return how many there were."""
    count = 0
    names: Names | None = None
    pending: list[tuple[ir.Graph, tuple[frozenset[str | None], ...]]] = []
    pending += [(scope.graph if isinstance(scope, ir.Function) else scope, ()) for scope in scopes_of(model)]
    while pending:
        graph, around = pending.pop()
        bodies = [body for node in graph if node.attributes.data for body in bodies_of(node)]
        defined = _defined_in(graph) if around else ()
        for value in [v for v in defined if v.name and any(v.name in outer for outer in around)]:
            names = names or Names(names_in(model))
            value.name = names.unique(value.name or "")
            count += 1
        if bodies:
            seen = frozenset(value.name for value in _defined_in(graph))
            pending += [(body, (*around, seen)) for body in bodies]
    return count


def _defined_in(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from dict.fromkeys((*graph.inputs, *graph.initializers.values()))
    for node in graph:
        yield from node.outputs

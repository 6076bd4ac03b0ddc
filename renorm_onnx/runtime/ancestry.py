"""What an output is computed from: of all values and operators before it, the one with the largest number."""

import functools
from collections.abc import Callable, Iterable

import onnx_ir as ir

from renorm_onnx.model_walk import bodies_of, nodes_of


def largest_before(model: ir.Model, of: Callable[[ir.Value | ir.Node], float]) -> dict[str, float]:
    """Return for each output of a model the largest number among its own and those of all that it depends on.

    What an operator holds, as a body or as the function it calls, counts for all of its outputs.

    Args:
        model: Its nodes in topological order.
        of: The number of one value, or of one node; not negative.
    """
    known: dict[ir.Value, float] = {}

    def value(one: ir.Value) -> float:
        return max(of(one), known.get(one, 0.0))

    @functools.cache
    def function(called: ir.OperatorIdentifier) -> float:
        found = model.functions.get(called)
        return 0.0 if found is None else nodes(nodes_of(found))

    def nodes(these: Iterable[ir.Node]) -> float:
        return max((node(one) for one in these), default=0.0)

    def node(one: ir.Node) -> float:
        values = [v for v in (*one.inputs, *one.outputs) if v is not None]
        return max(of(one), function(one.op_identifier()), *map(value, values), 0.0)

    for one in model.graph:
        known |= dict.fromkeys(one.outputs, nodes((one, *(n for body in bodies_of(one) for n in nodes_of(body)))))
    return {output.name or "": value(output) for output in model.graph.outputs}

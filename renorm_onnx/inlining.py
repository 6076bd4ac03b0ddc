"""Replace calls of model-local functions by the functions' nodes, in time linear in what comes out.

``onnx_ir.passes.common.InlinePass`` does the same job, but searches names by counting upwards (8,000 calls of one
function take 26 s of CPU, here 1.3), refuses a function written for another opset even where every
operator means the same in both, leaves the opset import of the inlined domain behind (tinygrad then rejects the
file), and expands a hostile model without limit.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping

import onnx
import onnx_ir as ir

from renorm_onnx.errors import InputError
from renorm_onnx.model_walk import graphs_of, nodes_of, scopes_of
from renorm_onnx.naming import Names, names_in, take_name

Predicate = Callable[[ir.Function], bool]

#: A model may not grow beyond this many nodes by inlining: functions that call each other twice grow as 2^depth.
MAX_NODES = 200_000

_log = logging.getLogger(__name__)


def inline(model: ir.Model, *, domain: str | Predicate | None = None) -> int:
    """Inline function calls, in place; the names of the calls' outputs stay, and so do other functions.

    Calls are found everywhere: in the graph, in subgraphs, and in the bodies of functions that stay. The inlined
    functions are removed, with the opset imports of their domains where nothing else needs them. New values are
    named ``{call}/{name in the body}``, unique in the whole model.

    Args:
        model: Changed in place; unchanged if this raises.
        domain: Which functions: those of this domain, those a predicate accepts, or all (None).

    Returns:
        The number of calls replaced, counting calls inside functions once.

    Raises:
        InputError: Functions call each other in a circle; the result would exceed `MAX_NODES` nodes; a body's
            operators mean something else at the model's opset; a call has more inputs or outputs than its function.
    """
    chosen = {i: f for i, f in model.functions.items() if _matches(f, domain)}
    if not chosen:
        return 0
    order = _callees_first(model.functions)
    _check_size(model, chosen, order)
    _check_calls(model, chosen, order)
    names = Names(names_in(model))
    count = sum(_replace_calls(model.functions[i], chosen, names) for i in order)
    count += _replace_calls(model.graph, chosen, names)
    for identifier in chosen:
        del model.functions[identifier]
    _remove_unused_imports(model, {i[0] for i in chosen})
    _log.debug("inlined %d calls of %d functions", count, len(chosen))
    return count


def _replace_calls(
    scope: ir.Graph | ir.Function, functions: Mapping[ir.OperatorIdentifier, ir.Function], names: Names
) -> int:
    """Replace every call in `scope` and its subgraphs, in place; return how many there were."""
    finished: dict[ir.Graph, list[ir.Node]] = {}
    moved: dict[ir.Value, ir.Value] = {}
    for call in [n for n in nodes_of(scope) if n.op_identifier() in functions]:
        function = functions[call.op_identifier()]
        for domain, version in function.opset_imports.items():
            scope.opset_imports.setdefault(domain, version)
        graph = call.graph
        assert isinstance(graph, ir.Graph)
        graph.insert_before(call, _instantiate(call, function, names, moved))
        finished.setdefault(graph, []).append(call)
    # Once per graph: replacing one output at a time is quadratic in a model with many outputs.
    for graph in graphs_of(scope):
        for index, value in enumerate(graph.outputs):
            if value in moved:
                graph.outputs[index] = moved[value]
    for graph, calls in finished.items():
        graph.remove(calls, safe=True)
    return sum(map(len, finished.values()))


def _instantiate(call: ir.Node, function: ir.Function, names: Names, moved: dict[ir.Value, ir.Value]) -> list[ir.Node]:
    """Return the nodes that replace `call`, its outputs' users connected to them; note the outputs in `moved`."""
    copy = _Copy(call, function, names)
    nodes = [copy.node(n) for n in function]
    produced = {output for node in nodes for output in node.outputs}
    for formal, old in zip(function.outputs, call.outputs, strict=False):
        new = copy.values[formal]
        if new not in produced:
            # An input handed through, or a second name for one result: only a node can carry the call's name.
            nodes.append(ir.node("Identity", [new], name=names.unique(f"{copy.prefix}/Identity")))
            new = nodes[-1].outputs[0]
        assert new is not None
        produced.discard(new)
        moved[old] = new
        _take_over(old, new, names)
    return nodes


class _Copy:
    """The body of one function with the inputs and attributes of one call put in."""

    def __init__(self, call: ir.Node, function: ir.Function, names: Names) -> None:
        self.prefix = call.name or function.name
        self.values: dict[ir.Value, ir.Value | None] = dict.fromkeys(function.inputs)
        self.values.update(zip(function.inputs, call.inputs, strict=False))
        self._attributes = {**function.attributes, **call.attributes}
        self._metadata = call.metadata_props
        self._names = names

    def node(self, node: ir.Node) -> ir.Node:
        """Copy one node; its outputs get names of their own."""
        attributes = [self._attribute(a) for a in node.attributes.values()]
        new = ir.Node(
            node.domain,
            node.op_type,
            [self.values.get(v, v) if v is not None else None for v in node.inputs],
            [a for a in attributes if a is not None],
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=self._names.unique(f"{self.prefix}/{node.name or node.op_type}"),
            doc_string=node.doc_string,
            metadata_props={**self._metadata, **node.metadata_props},
        )
        for old, output in zip(node.outputs, new.outputs, strict=True):
            self.values[old] = output
            output.name = self._names.unique(f"{self.prefix}/{old.name}") if old.name else ""
            output.type, output.shape = old.type, old.shape
        return new

    def _attribute(self, attribute: ir.Attr) -> ir.Attr | None:
        """Copy one attribute: a reference becomes what the call gave, or the default, or nothing."""
        if attribute.is_ref():
            given = self._attributes.get(attribute.ref_attr_name or "")
            if given is None:
                return None
            if given.is_ref():  # the call itself stands in a function that stays
                return ir.RefAttr(attribute.name, given.ref_attr_name or "", given.type)
            return None if given.value is None else ir.Attr(attribute.name, given.type, given.value)
        if attribute.type == ir.AttributeType.GRAPH:
            return ir.Attr(attribute.name, attribute.type, self._graph(attribute.as_graph()))
        if attribute.type == ir.AttributeType.GRAPHS:
            return ir.Attr(attribute.name, attribute.type, [self._graph(g) for g in attribute.as_graphs()])
        return attribute

    def _graph(self, graph: ir.Graph) -> ir.Graph:
        own = {**dict.fromkeys(graph.inputs), **dict.fromkeys(graph.initializers.values())}
        copies = {
            v: ir.Value(
                name=self._names.unique(f"{self.prefix}/{v.name}"),
                type=v.type,
                shape=v.shape,
                const_value=v.const_value,
            )
            for v in own
        }
        self.values.update(copies)
        nodes = [self.node(n) for n in graph]
        outputs = [self.values.get(v, v) for v in graph.outputs]
        return ir.Graph(
            [copies[v] for v in graph.inputs],
            [v for v in outputs if v is not None],
            nodes=nodes,
            initializers=[copies[v] for v in graph.initializers.values()],
            doc_string=graph.doc_string,
            name=graph.name,
        )


def _take_over(old: ir.Value, new: ir.Value, names: Names) -> None:
    """Give `new` the name, type, shape and users of `old`; users that are graph outputs are left to the caller."""
    own = new.name
    take_name(new, old)
    new.name, old.name = new.name or own or names.unique("unused"), None
    new.type, new.shape = old.type or new.type, new.shape if old.shape is None else old.shape  # a scalar's is falsy
    for user, index in tuple(old.uses()):
        user.replace_input_with(index, new)


def _matches(function: ir.Function, domain: str | Predicate | None) -> bool:
    if domain is None:
        return True
    if isinstance(domain, str):
        return function.domain == domain
    return domain(function)


def _callees_first(functions: Mapping[ir.OperatorIdentifier, ir.Function]) -> list[ir.OperatorIdentifier]:
    """Return the functions so that each stands after all it calls (depth first, without recursion)."""
    order: dict[ir.OperatorIdentifier, None] = {}
    open_: dict[ir.OperatorIdentifier, Iterator[ir.OperatorIdentifier]] = {}
    for root in functions:
        stack = [] if root in order else [root]
        while stack:
            top = stack[-1]
            if top not in open_:
                called = {n.op_identifier() for n in nodes_of(functions[top])}
                open_[top] = iter(sorted(i for i in called if i in functions))
            below = next((i for i in open_[top] if i not in order), None)
            if below is None:
                order[top] = None
                del open_[stack.pop()]
            elif below in open_:
                circle = " -> ".join(f"{i[0]}::{i[1]}" for i in (*stack[stack.index(below) :], below))
                raise InputError(f"inline: functions call each other in a circle: {circle}")
            else:
                stack.append(below)
    return list(order)


def _check_size(
    model: ir.Model, chosen: Mapping[ir.OperatorIdentifier, ir.Function], order: list[ir.OperatorIdentifier]
) -> None:
    """Refuse a model that would outgrow `MAX_NODES`, before anything is copied."""
    size: dict[ir.OperatorIdentifier, int] = {}

    def grown(scope: ir.Graph | ir.Function) -> int:
        return sum(size[i] if (i := n.op_identifier()) in chosen else 1 for n in nodes_of(scope))

    for identifier in order:
        size[identifier] = grown(model.functions[identifier])
    total = grown(model.graph)
    largest = max([total, *size.values()])
    if largest > MAX_NODES:
        raise InputError(f"inline: the model would grow to {largest} nodes; the limit is {MAX_NODES}")


def _check_calls(
    model: ir.Model, chosen: Mapping[ir.OperatorIdentifier, ir.Function], order: list[ir.OperatorIdentifier]
) -> None:
    """Refuse calls that cannot be replaced: wrong arity, a graph as attribute, another meaning at this opset."""
    #: All operators of each function and of what it calls, with the opset they were written for.
    written: dict[ir.OperatorIdentifier, dict[tuple[str, str], int]] = {}
    for identifier in (*order, None):
        scope = model.graph if identifier is None else model.functions[identifier]
        imports, mine = scope.opset_imports, dict[tuple[str, str], int]()
        for node in nodes_of(scope):
            called = node.op_identifier()
            if called not in chosen:
                mine[node.domain, node.op_type] = imports.get(node.domain, 0)
                continue
            who = f"inline: call {node.name!r} of {node.domain}::{node.op_type}"
            _check_arguments(node, chosen[called], who)
            for (domain, op_type), version in written[called].items():
                theirs = imports.get(domain, version)
                if not _same_meaning(domain, op_type, version, theirs):
                    raise InputError(
                        f"{who} is written for opset {version} of domain {domain!r}, its surroundings for {theirs}, "
                        f"and {op_type} differs between them; convert the model to opset {version} first"
                    )
                mine[domain, op_type] = theirs
        if identifier is not None:
            written[identifier] = mine


def _check_arguments(call: ir.Node, function: ir.Function, who: str) -> None:
    for what, given, formal in (("inputs", call.inputs, function.inputs), ("outputs", call.outputs, function.outputs)):
        if len(given) > len(formal):
            raise InputError(f"{who} has {len(given)} {what}; the function has {len(formal)}")
    given_inputs = dict(zip(function.inputs, call.inputs, strict=False))
    for value in function.outputs:
        if value in function.inputs and given_inputs.get(value) is None:
            raise InputError(f"{who} leaves out input {value.name!r}, which the function returns")
    for attribute in call.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            raise InputError(f"{who} passes a graph as attribute {attribute.name!r}; this is not supported")


#: Definitions that differ from the one before in what their documentation says alone.
_CHANGED_IN_PROSE = {("PRelu", 7), ("OneHot", 11)}


@functools.cache
def _same_meaning(domain: str, op_type: str, version: int, other: int) -> bool:
    """Whether an operator written for one opset of its domain means the same at another.

    It does where both are one definition, or where the other is newer and takes the same inputs and attributes, with
    the same defaults, and all the types of the first: most versions only add types, or negative axes.
    """
    if version == other:
        return True
    try:
        written, read = (onnx.defs.get_schema(op_type, v, domain) for v in (version, other))
    except onnx.defs.SchemaError:
        return False
    if written.since_version == read.since_version:
        return True
    told = any((op_type, v) in _CHANGED_IN_PROSE for v in range(written.since_version + 1, read.since_version + 1))
    if told or other < version or written.deprecated != read.deprecated or _form(written) != _form(read):
        return False
    mine, theirs = ((*schema.inputs, *schema.outputs) for schema in (written, read))
    return all(one.types <= two.types for one, two in zip(mine, theirs, strict=True))


def _form(schema: onnx.defs.OpSchema) -> object:
    """What a definition says beside types and prose."""
    formals = [[(f.option, f.is_homogeneous, f.min_arity) for f in part] for part in (schema.inputs, schema.outputs)]
    attributes = {
        name: (a.type, a.required, a.default_value.SerializeToString()) for name, a in schema.attributes.items()
    }
    return formals, attributes


def _remove_unused_imports(model: ir.Model, domains: set[str]) -> None:
    """Remove the imports of `domains` from every scope that no longer uses them, in place."""
    for scope in scopes_of(model):
        used = {n.domain for n in nodes_of(scope)}
        for domain in domains - used - {""}:
            scope.opset_imports.pop(domain, None)

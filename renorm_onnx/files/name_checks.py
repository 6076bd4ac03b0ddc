"""Does every name in a model mean exactly one thing? Scopes, definitions, uses, cycles and function calls.

Source: the ONNX IR specification, sections Graphs (static single assignment, topological order), Name scopes and
Functions. Nodes out of order are accepted, as onnxruntime does, and reported; a cycle is refused. Nothing recurses.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Final

import onnx
from onnx import FunctionProto, GraphProto, NodeProto

from renorm_onnx.errors import ModelFileError
from renorm_onnx.files.tensor_checks import quoted

MAX_NODES: Final = 200_000
# onnxruntime crashes somewhere beyond: it follows calls on the stack.
MAX_CALL_DEPTH: Final = 100

_FunctionId = tuple[str, str, str]


@dataclasses.dataclass(eq=False, slots=True)
class Scope:
    """A graph or function body, with the names it defines and those it takes from the graphs around it."""

    proto: GraphProto | FunctionProto
    label: str
    parent: "Scope | None" = None
    depth: int = 0
    nodes: list[NodeProto] = dataclasses.field(default_factory=list)
    inner: dict[int, list["Scope"]] = dataclasses.field(default_factory=dict)
    names: set[str] = dataclasses.field(default_factory=set)
    # Those of them that no node computes.
    given: set[str] = dataclasses.field(default_factory=set)
    # name -> the node that uses it
    captured: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def root(self) -> "Scope":
        """The main graph or the function that it lies in, or is."""
        found = self
        while found.parent is not None:
            found = found.parent
        return found


def define(scope: Scope) -> None:
    """Collect the names that `scope` defines; raises ModelFileError for one that is missing or defined twice."""
    proto = scope.proto
    names = scope.names
    if isinstance(proto, FunctionProto):
        for name in proto.input:
            _add(names, name, f"an input of {scope.label}")
    else:
        for info in proto.input:
            _add(names, info.name, f"an input of {scope.label}")
        stored = [tensor.name for tensor in proto.initializer]
        initializers = set(stored)
        if len(initializers) < len(stored) or "" in initializers or any(isinstance(name, bytes) for name in stored):
            initializers.clear()
            for name in stored:  # up to the one that is wrong
                _add(initializers, name, f"an initializer of {scope.label}")
        # An initializer may give an input its default value (the rule up to IR version 3, optional since).
        names |= initializers
    scope.given = names.copy()
    for node in scope.nodes:
        for name in node.output:
            if name:
                if name in names or isinstance(name, bytes):
                    _add(names, name, f"an output of {title(node)} in {scope.label}")
                names.add(name)


def _add(names: set[str], name: str, what: str) -> None:
    if not name or isinstance(name, bytes):
        raise ModelFileError(f"{what} is named {quoted(name)}; expected a name in UTF-8")
    if name in names:
        raise ModelFileError(f"{quoted(name)} is defined twice, once as {what}; expected every name once")
    names.add(name)


def resolve(scope: Scope) -> bool:
    """Find where every name used in `scope` comes from; say whether one is used before it is defined.

    The graphs inside `scope` have been resolved before; what they capture counts as used by the node that holds them.
    """
    proto, names, captured = scope.proto, scope.names, scope.captured
    defined = scope.given.copy()
    too_early: list[str] = []
    for index, node in enumerate(scope.nodes):
        for name in node.input:
            if name and name not in defined:
                if name in names:
                    too_early.append(name)
                elif name not in captured:
                    captured[name] = f"{title(node)} in {scope.label}"
        for inner in scope.inner.get(index, ()):
            for name, user in inner.captured.items():
                if name in names:
                    if name not in defined:
                        too_early.append(name)
                else:
                    captured.setdefault(name, user)
        defined.update(node.output)
    outputs = proto.output if isinstance(proto, FunctionProto) else (info.name for info in proto.output)
    for name in outputs:
        if name not in names:
            raise ModelFileError(f"{scope.label} has output {quoted(name)}, which nothing in it defines")
    if scope.parent is None:
        for name, user in captured.items():
            raise ModelFileError(f"{quoted(name)}, used by {user}, is defined nowhere; the file is damaged")
    for name in too_early:
        outer = scope.parent
        while outer is not None:
            if name in outer.names:
                raise ModelFileError(
                    f"{quoted(name)} is used in {scope.label} before it is defined there, and is also defined in "
                    f"{outer.label}; expected different names"
                )
            outer = outer.parent
    if too_early:
        _check_acyclic(scope)
    return bool(too_early)


def _used(scope: Scope, index: int) -> Iterator[str]:
    yield from scope.nodes[index].input
    for inner in scope.inner.get(index, ()):
        yield from inner.captured


def _check_acyclic(scope: Scope) -> None:
    """Refuse a cycle among the nodes of `scope`, naming a node on it (Kahn 1962)."""
    producer = {name: index for index, node in enumerate(scope.nodes) for name in node.output if name}
    needs = [{producer[name] for name in _used(scope, i) if name in producer} for i in range(len(scope.nodes))]
    users: list[list[int]] = [[] for _ in needs]
    for index, sources in enumerate(needs):
        for source in sources:
            users[source].append(index)
    waiting = [len(sources) for sources in needs]
    ready = [index for index, count in enumerate(waiting) if not count]
    while ready:
        for user in users[ready.pop()]:
            waiting[user] -= 1
            if not waiting[user]:
                ready.append(user)
    stuck = [index for index, count in enumerate(waiting) if count]
    if not stuck:
        return
    seen: set[int] = set()
    node = stuck[0]
    while node not in seen:
        seen.add(node)
        node = next(source for source in needs[node] if waiting[source])
    raise ModelFileError(f"{scope.label} has a cycle: {title(scope.nodes[node])} needs its own output")


def check_calls(model: onnx.ModelProto, scopes: list[Scope]) -> None:
    """Refuse functions that are defined twice, called wrongly, call themselves, or expand beyond the limits."""
    functions: dict[_FunctionId, FunctionProto] = {}
    for function in model.functions:
        if not function.name or bytes in map(type, _function_id(function)):
            raise ModelFileError(
                f"a function has domain {quoted(function.domain)} and name {quoted(function.name)}; expected UTF-8"
            )
        names = [*function.attribute, *(attribute.name for attribute in function.attribute_proto)]
        if len(set(names)) != len(names):
            raise ModelFileError(f"function {_call_name(_function_id(function))} declares an attribute twice")
        if functions.setdefault(_function_id(function), function) is not function:
            raise ModelFileError(f"function {_call_name(_function_id(function))} is defined twice; expected it once")
    if not functions:
        return
    bodies: dict[_FunctionId | None, list[Scope]] = {None: [], **{key: [] for key in functions}}
    for scope in scopes:
        root = scope.root.proto
        bodies[_function_id(root) if isinstance(root, FunctionProto) else None].append(scope)
    calls = {
        key: collections.Counter(
            _called(node, functions, scope) for scope in body for node in scope.nodes if _id(node) in functions
        )
        for key, body in bodies.items()
    }
    _check_expansion(calls, {key: sum(len(scope.nodes) for scope in body) for key, body in bodies.items()})


def _called(node: NodeProto, functions: dict[_FunctionId, FunctionProto], scope: Scope) -> _FunctionId:
    function = functions[_id(node)]
    if len(node.input) > len(function.input) or len(node.output) > len(function.output):
        raise ModelFileError(
            f"{title(node)} in {scope.label} has {len(node.input)} inputs and {len(node.output)} outputs; "
            f"the function it calls has {len(function.input)} and {len(function.output)}"
        )
    return _id(node)


def _check_expansion(
    calls: Mapping[_FunctionId | None, Mapping[_FunctionId, int]], sizes: Mapping[_FunctionId | None, int]
) -> None:
    """Bound the depth of calls and the number of nodes with every call replaced by its body.

    Args:
        calls: For each function, and for the graph under None, how often it calls which.
        sizes: The number of nodes in each.
    """
    depth: dict[_FunctionId | None, int] = {}
    expanded: dict[_FunctionId | None, int] = {}
    for start in calls:
        # The calls that led here from `start`, each with the callees not looked at yet.
        path = {start: iter(calls[start])} if start not in depth else {}
        while path:
            key, remaining = next(reversed(path.items()))
            following = next((called for called in remaining if called not in depth), None)
            if following in path and following is not None:
                raise ModelFileError(f"function {_call_name(following)} calls itself; expected no recursion")
            if following is not None:
                path[following] = iter(calls[following])
                continue
            del path[key]
            who = "the graph" if key is None else f"function {_call_name(key)}"
            depth[key] = 1 + max((depth[called] for called in calls[key]), default=-1)
            expanded[key] = sizes[key] + sum(count * expanded[called] for called, count in calls[key].items())
            if depth[key] > MAX_CALL_DEPTH:
                raise ModelFileError(f"{who} calls functions {depth[key]} deep; expected at most {MAX_CALL_DEPTH}")
            if expanded[key] > MAX_NODES:
                raise ModelFileError(
                    f"{who} grows beyond {MAX_NODES:,} nodes when its function calls are replaced by their bodies"
                )


def _function_id(function: FunctionProto) -> _FunctionId:
    return plain_domain(function.domain), function.name, function.overload


def _id(node: NodeProto) -> _FunctionId:
    return plain_domain(node.domain), node.op_type, node.overload


def plain_domain(domain: str) -> str:
    """The one spelling of a domain: the default domain has two."""
    return "" if domain == "ai.onnx" else domain


def _call_name(key: _FunctionId | None) -> str:
    return quoted("::".join(part for part in key or () if part))


def title(node: NodeProto) -> str:
    """A node as it is named in messages."""
    return f"node {quoted(node.name)} ({quoted(node.op_type)[1:-1]})"

"""Evaluate any model that the package accepts in float64: the truth that `parity` measures errors against.

Every floating-point tensor, constant and cast is promoted to float64 (`operators.call`): the result is what the model
means, before any rounding of its own type. A Cast to a narrower float therefore does not round; a Cast to an integer
truncates, integers keep their arithmetic, and QuantizeLinear rounds, for there rounding is the operator's meaning.
Sizes computed from shapes and constants become integers as in float32 (`shape_arithmetic`), or they would be others.

``onnx.reference`` alone is no such truth. In onnx 1.23 it blends batch statistics into BatchNormalization at opsets
9 to 13, refuses it at 7 and 8, is wrong for grouped ConvTranspose, LRN and softmax before opset 13, and takes 15 s for
one image of Inception-v3. Here operators are our own, tested one by one at every version against onnxruntime
(``runtime_tests/reference_opsets_test.py``), those of ``com.microsoft`` among them; rare ones that pass the same tests
are borrowed from it (`operators.borrowed`). What neither covers is refused, never guessed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx.errors import InputError
from renorm_onnx.model_walk import bodies_of
from renorm_onnx.runtime.operators import registry
from renorm_onnx.runtime.operators.call import Call, UnusableError, promote, promoted_type
from renorm_onnx.runtime.shape_arithmetic import Origin, Origins, rounded_as_stored, stored_in

OLDEST_OPSET = 6
"""Lowest opset of the ONNX domain that is evaluated."""

UNUSABLE = "(reference unusable)"
"""How a `ReferenceUnusableError` ends."""

_MAX_DEPTH = 120  # function calls and bodies inside one another; deeper would overflow Python's stack

_HINTS = {
    "com.microsoft.nchwc": ", onnxruntime wrote it for one kind of processor: save at its level 'extended' instead"
}

_Step = tuple[ir.Node, tuple[ir.Value, ...]]  # a node, and the values that nobody reads after it


class ReferenceUnusableError(InputError):
    """A model cannot be evaluated, whatever it is fed, so nothing can be judged by it."""


def evaluate(
    model: ir.Model, feeds: Mapping[str, npt.NDArray[Any]], *, keep: Sequence[str] = ()
) -> dict[str, npt.NDArray[Any]]:
    """Evaluate `model` in float64, one node after the other, forgetting values when nobody reads them any more.

    Args:
        model: At ONNX opset 6 or later. Not changed.
        feeds: One array per graph input without an initializer; inputs with one may be overridden. Floating arrays of
            any width are taken as they are; integer arrays must have the input's type.
        keep: Names of values of the main graph that are returned besides its outputs.

    Returns:
        The graph's outputs and `keep`, by name; floating tensors as float64. A sequence is a list, an absent
        optional None. Arrays that share memory with the model or with `feeds` are read-only.

    Raises:
        InputError: `feeds` or `keep` do not fit the model, or an operator fails on these values.
        ReferenceUnusableError: The model holds an operator that cannot be evaluated; its name, domain and opset are in
            the message.
    """
    return _Evaluation(model).run(feeds, keep)


class _Frame:
    """Where a node stands: the opsets imported there, the attributes of the surrounding function call, the depth."""

    __slots__ = ("attributes", "depth", "opsets")

    def __init__(self, opsets: Mapping[str, int], attributes: Mapping[str, Any], depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise InputError(f"evaluate: functions and bodies are nested more than {_MAX_DEPTH} deep")
        self.opsets = opsets
        self.attributes = attributes
        self.depth = depth


class _Evaluation:
    """One evaluation: every live value, keyed by the `ir.Value` itself, so that names may repeat in inner scopes."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._values: dict[ir.Value, Any] = {}
        self._schedules: dict[int, list[_Step]] = {}
        self._kept: frozenset[ir.Value] = frozenset()
        self._origins = Origins()

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], keep: Sequence[str]) -> dict[str, Any]:
        graph = self._model.graph
        wanted = {output.name or "": output for output in graph.outputs}
        if missing := set(keep) - set(wanted):
            wanted |= _values_named(graph, missing)
        self._kept = frozenset(wanted.values())
        self._feed(feeds)
        frame = _Frame(self._model.opset_imports, {}, 0)
        with np.errstate(all="ignore"):
            self._run_steps(graph, frame, owns_initializers=True)
            return {name: self._read(value) for name, value in wanted.items()}

    def _feed(self, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        inputs = {value.name or "": value for value in self._model.graph.inputs}
        if unknown := sorted(set(feeds) - set(inputs)):
            raise InputError(f"evaluate: no graph input is named {unknown[0]!r}; the inputs are {sorted(inputs)}")
        for name, value in inputs.items():
            if name in feeds:
                self._values[value] = _checked(name, value, feeds[name])
            elif not value.is_initializer():
                raise InputError(f"evaluate: graph input {name!r} has no value in `feeds` (given: {sorted(feeds)})")

    def _run_steps(self, graph: ir.Graph | ir.Function, frame: _Frame, *, owns_initializers: bool = False) -> None:
        schedule = self._schedules.get(id(graph))
        if schedule is None:
            schedule = self._schedules[id(graph)] = _schedule(graph, self._kept, owns_initializers)
        for node, dead in schedule:
            self._run_node(node, frame)
            for value in dead:
                self._values.pop(value, None)

    def _run_node(self, node: ir.Node, frame: _Frame) -> None:
        inputs = [None if value is None else self._read(value) for value in node.inputs]
        attributes = {
            name: value for name, attr in node.attributes.items() if (value := _plain(attr, frame)) is not None
        }
        function = self._model.functions.get(node.op_identifier())
        if function is not None:
            self._origins.pass_on(node.inputs, function.inputs)
            results: Sequence[Any] = self._run_function(function, inputs, attributes, frame)
            self._origins.pass_on(function.outputs, node.outputs)
        else:
            results = self._run_operator(node, inputs, attributes, frame)
        for output, result in zip(node.outputs, results, strict=False):
            self._values[output] = np.asarray(result) if isinstance(result, np.generic) else result

    def _run_function(
        self, function: ir.Function, inputs: Sequence[Any], attributes: Mapping[str, Any], frame: _Frame
    ) -> list[Any]:
        defaults = {name: _plain(attr, frame) for name, attr in function.attributes.items() if attr.value is not None}
        inner = _Frame(function.opset_imports, {**defaults, **attributes}, frame.depth + 1)
        for position, value in enumerate(function.inputs):
            self._values[value] = inputs[position] if position < len(inputs) else None
        return self._run_graph(function, inner)

    def _run_operator(
        self, node: ir.Node, inputs: Sequence[Any], attributes: Mapping[str, Any], frame: _Frame
    ) -> Sequence[Any]:
        def run_body(graph: ir.Graph, values: Sequence[Any]) -> list[Any]:
            inner = _Frame(frame.opsets, frame.attributes, frame.depth + 1)
            if len(values) != len(graph.inputs):
                raise InputError(f"the body takes {len(graph.inputs)} inputs and is given {len(values)}")
            self._values.update(zip(graph.inputs, values, strict=True))
            return self._run_graph(graph, inner)

        domain, opset = _domain_and_opset(node, frame)
        kernel = registry.find(domain, node.op_type, opset)
        names = [output.name or "" for output in node.outputs]
        try:
            if kernel is None:
                raise UnusableError("not covered by the float64 reference" + _HINTS.get(domain, ""))
            call = Call(node.op_type, opset, inputs, names, attributes, run_body)
            of_data = self._origins.note(node) is Origin.DATA
            result = kernel(call) if of_data else rounded_as_stored(kernel, call)
            if domain == "" and node.op_type in ("Cast", "CastLike") and self._is_constant(node.inputs[0]):
                like = node.outputs[0].dtype or (node.inputs[-1].dtype if node.inputs[-1] is not None else None)
                result = stored_in(np.asarray(result), call.integer("to", 0) if node.op_type == "Cast" else like)
        except UnusableError as error:
            raise ReferenceUnusableError(f"{_who(node, domain, opset)}: {error} {UNUSABLE}") from error
        except InputError as error:
            inner = str(error).startswith("evaluate: node")  # a node of a body has said so already
            raise error if inner else InputError(f"{_who(node, domain, opset)}: {error}") from error
        except (ValueError, TypeError, IndexError, KeyError, ArithmeticError, AttributeError, MemoryError) as error:
            shapes = [getattr(value, "shape", None) for value in inputs]
            raise InputError(f"{_who(node, domain, opset)} failed on inputs of shapes {shapes}: {error}") from error
        return result if isinstance(result, tuple) else (result,)

    def _is_constant(self, value: ir.Value | None) -> bool:
        return value is not None and self._origins.is_fixed(value)

    def _run_graph(self, graph: ir.Graph | ir.Function, frame: _Frame) -> list[Any]:
        """The outputs of a body or function; nothing of it stays behind."""
        self._run_steps(graph, frame)
        results = [self._read(value) for value in graph.outputs]
        for value in graph.outputs:
            producer = value.producer()
            if producer is not None and producer.graph is graph:
                self._values.pop(value, None)
        return results

    def _read(self, value: ir.Value) -> Any:
        if value in self._values:
            return self._values[value]
        if not value.is_initializer() or value.const_value is None:
            raise InputError(f"evaluate: value {value.name!r} is read before it is computed")
        try:
            self._values[value] = result = promote(value.const_value.numpy())
        except OSError as error:
            raise InputError(f"evaluate: initializer {value.name!r} cannot be read: {error}") from error
        return result


def _schedule(graph: ir.Graph | ir.Function, kept: frozenset[ir.Value], owns_initializers: bool) -> list[_Step]:
    """Each node with the values that may be forgotten after it.

    A body leaves its initializers and the values it captures alone, since it may run again.
    """
    nodes = list(graph)
    owned = {*graph.inputs, *(output for node in nodes for output in node.outputs)}
    if owns_initializers and isinstance(graph, ir.Graph):
        owned.update(graph.initializers.values())
    owned -= kept
    owned.difference_update(graph.outputs)
    last: dict[ir.Value, int] = {}
    for position, node in enumerate(nodes):
        last.update((value, position) for value in (*_reads(node), *node.outputs) if value in owned)
    dead: list[list[ir.Value]] = [[] for _ in nodes]
    for value, position in last.items():
        dead[position].append(value)
    return [(node, tuple(values)) for node, values in zip(nodes, dead, strict=True)]


def _reads(node: ir.Node) -> list[ir.Value]:
    """The values that `node` reads, also from inside its bodies."""
    values: list[ir.Value] = []
    pending = [node]
    while pending:
        current = pending.pop()
        values.extend(value for value in current.inputs if value is not None)
        for body in bodies_of(current):
            values.extend(body.outputs)
            pending.extend(body)
    return values


def _who(node: ir.Node, domain: str, opset: int) -> str:
    return f"evaluate: node {node.name!r}, operator {node.op_type!r} of domain {domain!r} at opset {opset}"


def _domain_and_opset(node: ir.Node, frame: _Frame) -> tuple[str, int]:
    """The domain of `node`, and the version of it that is imported there."""
    domain = node.domain
    opset = frame.opsets.get(domain)
    if opset is None:
        raise InputError(f"evaluate: node {node.name!r} is of domain {domain!r}, of which no version is imported there")
    if domain == "" and opset < OLDEST_OPSET:
        raise InputError(f"evaluate: node {node.name!r} is of ONNX opset {opset!r}, expected {OLDEST_OPSET} or later")
    return domain, opset


def _values_named(graph: ir.Graph, names: set[str]) -> dict[str, ir.Value]:
    found = {value.name: value for node in graph for value in node.outputs if value.name in names}
    found |= {value.name: value for value in (*graph.inputs, *graph.initializers.values()) if value.name in names}
    if absent := sorted(names - set(found)):
        raise InputError(f"evaluate: keep: the main graph holds no value named {absent[0]!r}")
    return {name: value for name, value in found.items() if name is not None}


def _plain(attr: ir.Attr, frame: _Frame) -> Any:
    """An attribute's value, references to the surrounding function resolved, floats as the file stores them."""
    if attr.is_ref():
        return frame.attributes.get(attr.ref_attr_name or "")
    if attr.type == ir.AttributeType.FLOAT:
        return float(np.float32(attr.value))
    if attr.type == ir.AttributeType.FLOATS:
        return tuple(float(np.float32(value)) for value in attr.value)
    return attr.value


def _checked(name: str, value: ir.Value, feed: Any) -> Any:
    """`feed` promoted, if its type, rank and fixed dimensions are those of the graph input."""
    if not isinstance(value.type, ir.TensorType) or value.dtype is None:
        return feed  # a sequence or an optional
    feed = np.asarray(feed)
    expected = promoted_type(value.dtype.numpy())
    if promoted_type(feed.dtype) != expected:
        raise InputError(f"evaluate: input {name!r} has type {feed.dtype}, expected {value.dtype.name}")
    dims: tuple[Any, ...] = feed.shape if value.shape is None else tuple(value.shape)
    fits = len(dims) == feed.ndim and all(
        want == got for want, got in zip(dims, feed.shape, strict=True) if isinstance(want, int)
    )
    if not fits:
        raise InputError(f"evaluate: input {name!r} has shape {feed.shape}, expected {tuple(map(str, dims))}")
    return promote(feed)

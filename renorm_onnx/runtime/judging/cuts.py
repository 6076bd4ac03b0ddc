"""Pieces of a model between named values, cut out so that they can be run by themselves."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx.fusion.fact_rounding import UNIT_ROUNDOFF
from renorm_onnx.model_walk import bodies_of
from renorm_onnx.runtime.estimate import Cost, constant_shape, estimate
from renorm_onnx.runtime.reference import evaluate

Array = npt.NDArray[Any]

_MEAN = 3  # input of BatchNormalization
_LARGEST_CUT = 400  # nodes
_LARGEST_WEIGHTS = 30_000_000  # elements, in float64 240 MB

# Evaluated on absolute values, these bound what they compute on signed ones.
_MONOTONE = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sum", "Mul", "Div", "Concat", "Identity", "Relu", "Pad"),
        *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Split", "Slice", "Gather", "Expand", "Tile"),
        *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Dropout", "Constant", "DequantizeLinear"),
        *("DepthToSpace", "SpaceToDepth", "Einsum", "Where", "ReduceSum", "ReduceMean", "Cast", "Shape"),
        "BatchNormalization",
    }
)

QUANTIZING = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"})
"""What rounds to few bits while it runs; behind DequantizeLinear, stored codes are a weight like any other."""


class GraphByNames:
    """The main graph of a model, by names.

    Args:
        model: Not changed.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.produced = {v.name: v for node in model.graph for v in node.outputs if v.name}
        self.fed = {v.name for v in model.graph.inputs if v.name and v.name not in model.graph.initializers}
        self._order = {node: position for position, node in enumerate(model.graph)}
        self._data = data_names(model, self.fed)

    def cut(self, name: str, common: set[str]) -> "Cut":
        """Return the nodes between a value and the nearest other common ones.

        Args:
            name: A value that a node of the main graph computes.
            common: Names at which to stop; those that depend on shapes alone are no place to stop.
        """
        nodes: set[ir.Node] = set()
        inputs: dict[str, ir.Value] = {}
        weights: dict[str, ir.Value] = {}
        pending = [self.produced[name].producer()]
        while pending and len(nodes) <= _LARGEST_CUT:
            node = pending.pop()
            if node is None or node in nodes:
                continue
            nodes.add(node)
            for value in node.inputs:
                if value is None or not value.name:
                    continue
                if value.name in self.model.graph.initializers and value.name not in self.fed:
                    weights[value.name] = value
                elif value.producer() is None or (value.name in common and value.name in self._data):
                    inputs[value.name] = value
                else:
                    pending.append(value.producer())
        ordered = sorted(nodes, key=lambda node: self._order[node])
        return Cut(self.model, self.produced[name], ordered, inputs, weights)


def data_names(model: ir.Model, fed: set[str]) -> set[str]:
    """Return the values that depend on what is fed by more than its shape: only they can take any numbers.

    Args:
        model: Not changed.
        fed: Names of the inputs that are fed.
    """
    data = set(fed)
    for node in model.graph:
        reads = any(value is not None and value.name in data for value in node.inputs)
        if bodies_of(node) or (reads and node.op_type not in ("Shape", "Size")):
            data |= {value.name for value in node.outputs if value.name}
    return data


@dataclass(frozen=True)
class Cut:
    """A piece of a model that computes one value.

    Attributes:
        model: Where it is from.
        output: The value.
        nodes: In graph order.
        inputs: Values that come from outside the piece.
        weights: Initializers that it reads.
    """

    model: ir.Model
    output: ir.Value
    nodes: list[ir.Node]
    inputs: Mapping[str, ir.Value]
    weights: Mapping[str, ir.Value]

    @property
    def operators(self) -> tuple[str, ...]:
        """The operators in it, without constants."""
        return tuple(node.op_type for node in self.nodes if node.op_type != "Constant")

    def signature(self) -> tuple[Any, ...]:
        """Return a value that is equal for equal pieces."""
        weights = {value: ("weight", *_fingerprint(value)) for value in self.weights.values()}
        inner = {v: ("inner", p, i) for p, node in enumerate(self.nodes) for i, v in enumerate(node.outputs)}
        parts = []
        for node in self.nodes:
            inputs = tuple(
                None if v is None else inner.get(v) or weights.get(v) or ("name", v.name) for v in node.inputs
            )
            attributes = tuple(sorted((name, _attribute(attr)) for name, attr in node.attributes.items()))
            parts.append((node.op_identifier(), inputs, attributes, len(node.outputs)))
        return (*parts, inner[self.output])

    def obstacle(self) -> str:
        """Return why the piece cannot be run by itself, or nothing."""
        if len(self.nodes) > _LARGEST_CUT:
            return f"more than {_LARGEST_CUT} nodes lie between it and the next common value"
        for node in self.nodes:
            if bodies_of(node):
                return f"{node.op_type} holds a subgraph"
            if node.op_type in QUANTIZING:
                return f"{node.op_type} rounds on purpose, whole steps may flip"
        weights = sum(math.prod(constant_shape(value)) for value in self.weights.values())
        return f"its weights have {weights:,} elements" if weights > _LARGEST_WEIGHTS else ""

    def monotone(self) -> bool:
        """Tell whether evaluating it on absolute values bounds what it computes on signed ones."""
        return all(node.op_type in _MONOTONE or _subtracts_floats(node) for node in self.nodes)

    def element_type(self) -> ir.DataType:
        """Return the coarsest float type among the weights."""
        types = {value.dtype for value in self.weights.values()}
        return max(UNIT_ROUNDOFF.keys() & types, key=UNIT_ROUNDOFF.__getitem__, default=ir.DataType.FLOAT)

    def fan_in(self) -> int:
        """Return how many products its largest weight sums up for one output."""
        shapes = [constant_shape(value) for value in self.weights.values()]
        return max((math.prod(shape) // max(1, min(shape[:2])) for shape in shapes if len(shape) > 1), default=1)

    def run(self, feeds: Mapping[str, Array], *, absolute: bool = False) -> Array:
        """Evaluate it in float64.

        Args:
            feeds: At least its inputs.
            absolute: Take absolute values of its weights; of integers as soon as they become floats.

        Raises:
            InputError: It cannot be evaluated on these.
        """
        model = self._alone({})
        graph = model.graph
        if absolute:
            for value in graph.initializers.values():
                value.const_value = _absolute(value.const_value)
            for node in tuple(graph):
                _make_absolute(graph, node)
                if _makes_floats(node):
                    _append_absolute(graph, node)
        name = self.output.name or ""
        result = np.asarray(evaluate(model, {k: v for k, v in feeds.items() if k in self.inputs})[name])
        return np.abs(result) if absolute else result

    def cost(self, shapes: Mapping[str, tuple[int, ...]]) -> Cost:
        """Return what one run takes where its inputs have these shapes."""
        return estimate(self._alone(shapes))

    def _alone(self, shapes: Mapping[str, tuple[int, ...]]) -> ir.Model:
        """Return a copy as a model, whose inputs have these shapes, or any, whatever the file declares."""
        view = ir.GraphView(
            list(self.inputs.values()),
            [self.output],
            nodes=self.nodes,
            initializers=list(self.weights.values()),
            opset_imports=self.model.graph.opset_imports,
            name="place",
        )
        graph = view.clone()
        for value in graph.inputs:
            known = shapes.get(value.name or "")
            value.shape = None if known is None else ir.Shape(known)
        return ir.Model(graph, ir_version=self.model.ir_version, functions=list(self.model.functions.values()))


def _attribute(attr: ir.Attr) -> str:
    if attr.type is ir.AttributeType.TENSOR:
        return repr(digest(attr.as_tensor().numpy()))
    graphs = {ir.AttributeType.GRAPH: lambda: [attr.as_graph()], ir.AttributeType.GRAPHS: attr.as_graphs}.get(attr.type)
    if graphs is None:
        return repr(attr.value)
    # A body may read weights of the graphs around it, which are not in its own bytes.
    read = [value for graph in graphs() for node in graph.all_nodes() for value in node.inputs if value is not None]
    weights = {value.name: _fingerprint(value) for value in read if value.is_initializer()}
    return repr((ir.to_proto(attr).SerializeToString(deterministic=True), sorted(weights.items(), key=str)))


def _fingerprint(value: ir.Value) -> tuple[Any, ...]:
    tensor = value.const_value
    return ("absent",) if tensor is None else digest(tensor.numpy())


def digest(array: Array) -> tuple[Any, ...]:
    """Return what is equal for equal arrays, of one type and shape, and for no others."""
    flat = np.ascontiguousarray(array).reshape(-1)
    content = repr(flat.tolist()).encode() if flat.dtype.hasobject else flat.view(np.uint8).data
    return array.shape, str(array.dtype), hashlib.blake2b(content).digest()


def _absolute(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
    if tensor is None or not tensor.dtype.is_floating_point():
        return tensor
    return ir.tensor(np.abs(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)


def _makes_floats(node: ir.Node) -> bool:
    """Tell whether a node makes floats of integers, whose sign is kept until then: sizes may be -1."""
    if node.op_type == "DequantizeLinear":
        return True
    return node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()).is_floating_point()


def _subtracts_floats(node: ir.Node) -> bool:
    """Tell whether a node subtracts a weight, or from one; sizes are subtracted too, and keep their sign."""
    weights = [v.dtype for v in node.inputs if v is not None and v.is_initializer()]
    return node.op_type == "Sub" and any(dtype is not None and dtype.is_floating_point() for dtype in weights)


def _append_absolute(graph: ir.Graph, node: ir.Node) -> None:
    """Let all that read the result of a node read its absolute value: of |w - zero point|, for one, not of |w|."""
    (signed,) = node.outputs
    users = tuple(signed.uses())
    absolute = ir.Node("", "Abs", [signed])
    graph.insert_after(node, absolute)
    for user, position in users:
        user.replace_input_with(position, absolute.outputs[0])


def _make_absolute(graph: ir.Graph, node: ir.Node) -> None:
    """Take the absolute value of constants and factors of a node, and let it add where it subtracts, in place."""
    if _subtracts_floats(node):
        node.op_type = "Add"
    elif node.op_type == "BatchNormalization":
        opposite = ir.Node("", "Neg", [node.inputs[_MEAN]])
        graph.insert_before(node, opposite)
        node.replace_input_with(_MEAN, opposite.outputs[0])
    for name, attr in list(node.attributes.items()):
        if attr.type is ir.AttributeType.FLOAT and name in ("alpha", "beta", "value_float"):
            node.attributes[name] = ir.AttrFloat32(name, abs(attr.as_float()))
        elif attr.type is ir.AttributeType.FLOATS and name == "value_floats":
            node.attributes[name] = ir.AttrFloat32s(name, [abs(value) for value in attr.as_floats()])
        elif attr.type is ir.AttributeType.TENSOR and name == "value":
            absolute = _absolute(attr.as_tensor())
            if absolute is not None:
                node.attributes[name] = ir.AttrTensor(name, absolute)

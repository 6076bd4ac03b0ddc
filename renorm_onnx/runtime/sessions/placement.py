"""Where the nodes of a session really run, and whether that is what was asked for."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# What a graph computes sizes with. The CUDA provider leaves these on the CPU on purpose, since sizes are needed there.
_SIZE_OPERATORS = frozenset(
    {
        *("Shape", "Size", "Constant", "ConstantOfShape", "Gather", "GatherElements", "GatherND", "Slice", "Split"),
        *("Concat", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose", "Cast", "Range", "Identity", "Add"),
        *("Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Floor", "Ceil", "Round", "Sqrt", "Min", "Max", "Equal", "Greater"),
        *("GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Where", "Expand", "Tile", "CumSum", "Pad"),
        *("ReduceProd", "ReduceMin", "ReduceMax", "ReduceSum", "ScatterND", "ScatterElements", "NonZero", "OneHot"),
    }
)


@dataclass(frozen=True)
class Placed:
    """One node of the graph that onnxruntime runs.

    Attributes:
        provider: Full name of its execution provider.
        op_type: Its operator.
        name: Its name; empty for nodes that came out of a function.
    """

    provider: str
    op_type: str
    name: str

    def __str__(self) -> str:
        return f"{self.op_type} {self.name!r}" if self.name else self.op_type


def placement_of(session: Any) -> tuple[Placed, ...]:
    """Return the node list of an `onnxruntime.InferenceSession` created with the assignment recorded."""
    return tuple(
        Placed(part.ep_name, node.op_type, node.name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    )


def compute_nodes(nodes: Iterable[Placed], model: bytes | None) -> list[Placed]:
    """Return those of `nodes` that do more than compute sizes.

    A node computes sizes if its operator is one that does and everything it gives is integer, boolean or at most
    one-dimensional (the scales of a Resize are). A node whose types cannot be found is judged by its operator.

    Args:
        nodes: Nodes that the provider left to the CPU.
        model: The model that the session was created from, serialized; None: judge by operators alone.
    """
    suspects = [node for node in nodes if node.op_type not in _SIZE_OPERATORS]
    sizes = [node for node in nodes if node.op_type in _SIZE_OPERATORS]
    if sizes and model is not None:
        small = _small_nodes(model)
        suspects += [node for node in sizes if not small.get(node.name, True)]
    return suspects


def _small_nodes(model: bytes) -> dict[str, bool]:
    import onnx

    proto = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    large = {
        info.name
        for info in [*proto.graph.value_info, *proto.graph.output]
        if info.type.tensor_type.elem_type in floats and len(info.type.tensor_type.shape.dim) > 1
    }
    return {node.name: not large.intersection(node.output) for node in proto.graph.node if node.name}

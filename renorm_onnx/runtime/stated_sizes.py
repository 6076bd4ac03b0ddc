"""Open sizes of an input that a weight settles: what a convolution of 3 channels reads has 3 of them on axis 1."""

from collections.abc import Sequence

import onnx_ir as ir

_SAME_AXES = frozenset(
    {"Abs", "Cast", "Clip", "Dropout", "Identity", "LeakyRelu", "Neg", "Relu", "Sigmoid", "Sqrt", "Tanh"}
)
_BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div"})
_NORMS = frozenset({"BatchNormalization", "BatchRenormalization", "InstanceNormalization"})
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_DOMAINS = frozenset({"", "renorm_onnx"})


def stated_sizes(value: ir.Value, rank: int) -> dict[int, int]:
    """Return the sizes that constant operands of its readers ask of `value`; behind a broadcast 1 would do as well.

    Args:
        value: Input of a graph; followed through what keeps its axes or permutes them.
        rank: Of the value.

    Returns:
        Axis -> size.
    """
    found: dict[int, int] = {}
    pending, seen = [(value, tuple(range(rank)))], set()
    while pending:
        current, axes = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        for node, position in current.uses():
            if node.domain not in _DOMAINS:
                continue
            stated = _stated(node, position, len(axes))
            if stated is not None and stated[0] < len(axes):
                found.setdefault(axes[stated[0]], stated[1])
            passed = _passed(node, position, axes)
            if passed is not None and node.outputs:
                pending.append((node.outputs[0], passed))
    return found


def _stated(node: ir.Node, position: int, rank: int) -> tuple[int, int] | None:
    """Which axis of its first operand an operator settles by a constant second one, and the size."""
    weight = _sizes(node.inputs[1]) if len(node.inputs) > 1 else None
    if position != 0 or not weight:
        return None
    kind, number = node.op_type, len(weight)
    if kind in _NORMS:
        return 1, weight[0]
    if kind == "Conv" and number > 1:
        return 1, weight[1] * node.attributes.get_int("group", 1)
    if kind == "ConvTranspose":
        return 1, weight[0]
    if kind == "Gemm" and number == 2:
        axis = 0 if node.attributes.get_int("transA", 0) else 1
        return axis, weight[1 if node.attributes.get_int("transB", 0) else 0]
    if kind == "MatMul":
        return rank - 1, weight[max(number - 2, 0)]
    return (2, weight[2]) if kind in _RECURRENT and number == 3 else None


def _passed(node: ir.Node, position: int, axes: Sequence[int]) -> tuple[int, ...] | None:
    """Which axis of the input each axis of an operator's result is; None where that is not plain."""
    if position == 0 and (node.op_type in _SAME_AXES or node.op_type in _NORMS):
        return tuple(axes)
    if node.op_type in _BROADCASTING and len(node.inputs) == 2:
        other = _sizes(node.inputs[1 - position])
        return tuple(axes) if other is not None and len(other) <= len(axes) else None
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", range(len(axes))[::-1])
        return tuple(axes[axis] for axis in order) if sorted(order) == list(range(len(axes))) else None
    return None


def _sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tuple(tensor.shape.numpy())

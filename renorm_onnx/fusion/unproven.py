"""Chains that would be a norm if only more were known of what they read: named, so that they do not stay unseen.

A constant of several numbers is a map of channels only where x is proven to have as many. Behind an operator of unknown
shape nothing is; what multiplies and adds several numbers there is a norm all the same, to whoever looks for the reason
why it stays.
"""

from __future__ import annotations

import onnx_ir as ir

from renorm_onnx.fusion.carrier import BROADCASTING, Desk, refuse
from renorm_onnx.fusion.report import Reason, Refusal

# A run that is none is looked at from each of its nodes, and may be as long as the model.
LONGEST = 64


def unproven_chain(first: ir.Node, desk: Desk) -> tuple[tuple[ir.Node, ...], ir.Value, Refusal] | None:
    """A run of constant operators from `first` on that multiplies and adds as many numbers as there may be channels.

    Returns:
        Its nodes, what it reads, and what is not proven; None where it is no such run.
    """
    read = _operands(first, desk)
    if read is None or completes_product(read[0], desk) or _is_divided(read[0], desk):
        return None
    data, nodes, lengths, wide = read[0], [first], {first.op_type: read[1]}, 1
    while len(nodes) < LONGEST and (following := only_reader(nodes[-1].outputs[0])) is not None:
        read = _operands(following, desk)
        if read is None or read[0] is not nodes[-1].outputs[0]:
            break
        nodes.append(following)
        lengths[following.op_type] = max(read[1], lengths.get(following.op_type, 1))
        wide = len(nodes) if read[1] > 1 else wide
    times, plus = (max(lengths.get(o, 1) for o in pair) for pair in (("Mul", "Div"), ("Add", "Sub")))
    if times == 1 or times != plus:
        return None
    why = f"is not proven to have {times} channels{desk.hidden_shape(first)}"
    # A number behind them is a map of its own, whatever the shape.
    return tuple(nodes[:wide]), data, refuse(Reason.SHAPE, first, why)


def _operands(node: ir.Node, desk: Desk) -> tuple[ir.Value, int] | None:
    """What is not constant of two operands, and of unknown shape, and how many numbers the other has along its axis."""
    if node.op_type not in BROADCASTING or len(node.inputs) != 2 or None in node.inputs:
        return None
    constant = [desk.is_constant(node, i) for i in range(2)]
    if sum(constant) != 1 or (node.op_type == "Div" and constant[0]):
        return None
    position = constant.index(True)
    data, parameter = node.inputs[1 - position], desk.parameter(node, position)
    if data is None or parameter is None:
        return None
    wide = [n for n in parameter.shape if n != 1]
    if len(wide) > 1 or desk.dims(data) is not None:
        return None
    return data, wide[0] if wide else 1


def _is_divided(data: ir.Value, desk: Desk) -> bool:
    """Whether `data` is divided by what was computed of it: a scale and a bias behind are of a layer normalization."""
    maker = data.producer()
    return maker is not None and maker.op_type in ("Div", "Mul") and not any(map(desk.facts.is_constant, maker.inputs))


def completes_product(data: ir.Value, desk: Desk) -> bool:
    """Whether an Add to `data` completes a product with a constant to a linear layer: nothing to fold."""
    producer = data.producer()
    if producer is None or producer.op_type not in ("MatMul", "Einsum") or len(data.uses()) != 1:
        return False
    return any(desk.facts.is_constant(i) for i in producer.inputs)


def only_reader(value: ir.Value) -> ir.Node | None:
    """The operator of ONNX that alone reads `value`, in the graph that computes it."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    reader = next(iter(uses)).node
    producer = value.producer()
    same_graph = producer is not None and reader.graph is producer.graph
    return reader if same_graph and reader.domain == "" else None

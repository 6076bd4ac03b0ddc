"""Changed operands as values of the graph: each an initializer, or what computes it where that is far smaller."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.parameters import Parameter
from renorm_onnx.naming import Names

# Computed operands of more elements are written without what repeats itself: 4 MB as float32.
WRITTEN_WHOLE = 1 << 20
# Before this opset there is no Expand; from the second on it takes bfloat16 too.
EXPAND, EXPAND_BFLOAT16 = 8, 13


def is_read_once(value: ir.Value) -> bool:
    """Whether `value` is stored for one operand alone, and nothing is said of it that may cease to hold."""
    own = value.is_initializer() and not value.is_graph_input() and not value.is_graph_output()
    return own and len(value.uses()) == 1 and not (value.meta or value.metadata_props or value.doc_string)


def sharing(operands: Collection[tuple[ir.Node, int]]) -> set[ir.Node]:
    """The operators of which a changed operand, as it is stored, is read elsewhere too: what it becomes may be as well.

    A tower or a head that is applied to several inputs has one weight for all of them.
    """
    found = set()
    for node, index in operands:
        old = node.inputs[index] if index < len(node.inputs) else None
        if old is not None and len(old.uses()) > 1:
            found.add(node)
    return found


def fingerprint(parameter: Parameter) -> tuple[object, ...]:
    """What is the same only for operands that hold the same elements, told by how they are made."""
    arrays = [np.ascontiguousarray(a) for a in (parameter.base, *parameter.factors) if isinstance(a, np.ndarray)]
    made = [(a.shape, hashlib.sha256(a.data).digest()) for a in arrays]
    stored = None if isinstance(parameter.base, np.ndarray) else id(parameter.base)
    return stored, parameter.dtype, parameter.shape, *made


def set_content(value: ir.Value, parameter: Parameter, name: str) -> None:
    """Let `value` hold `parameter`, in place, in a tensor of that name."""
    value.const_value = parameter.tensor(name)
    value.type = ir.TensorType(parameter.dtype)
    if value.shape is None or value.shape.dims != parameter.shape:
        value.shape = ir.Shape(parameter.shape)


def store(graph: ir.Graph, parameter: Parameter, name: str, *, as_input: bool) -> ir.Value:
    """Add an initializer to `graph`, in place.

    Args:
        graph: Where it is read.
        parameter: What it holds.
        name: Borne by nothing else.
        as_input: List it as an input too, as IR versions before 4 want.
    """
    value = ir.Value(name=name)
    set_content(value, parameter, name)
    return _registered(graph, value, as_input=as_input)


def store_expanded(
    reader: ir.Node, home: ir.Graph, parameter: Parameter, name: str, names: Names, opset: int, *, as_input: bool
) -> ir.Value | None:
    """Add, in place, a large computed operand of `reader` as the Expand of what does not repeat itself, kept in `home`.

    A model of a few bytes may compute constants of a hundred megabytes, and must not become as large as they are.

    Returns:
        The value, or None where nothing is gained: the operand is stored or small, or does not repeat itself.
    """
    oldest = EXPAND_BFLOAT16 if parameter.dtype == ir.DataType.BFLOAT16 else EXPAND
    graph = reader.graph
    if not isinstance(parameter.base, np.ndarray) or not isinstance(graph, ir.Graph) or opset < oldest:
        return None
    if math.prod(parameter.shape) <= WRITTEN_WHOLE or (narrow := parameter.narrowed()).shape == parameter.shape:
        return None
    data = store(home, narrow, names.unique(f"{name}_data"), as_input=as_input)
    shape = ir.tensor(parameter.shape, ir.DataType.INT64, name=names.unique(f"{name}_shape"))
    sizes = ir.Value(
        name=shape.name, type=ir.TensorType(shape.dtype), shape=ir.Shape(shape.shape.numpy()), const_value=shape
    )
    _registered(home, sizes, as_input=as_input)
    value = ir.Value(name=name, type=ir.TensorType(parameter.dtype), shape=ir.Shape(parameter.shape))
    graph.insert_before(reader, ir.Node("", "Expand", [data, sizes], outputs=[value], name=name))
    return value


def _registered(graph: ir.Graph, value: ir.Value, *, as_input: bool) -> ir.Value:
    graph.register_initializer(value)
    if as_input:
        graph.inputs.append(value)
    return value

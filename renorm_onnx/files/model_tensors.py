"""Every tensor of a model: walking over them, and copies of the model in which they are replaced.

A copy made here shares the data of tensors, never the tensors themselves: in onnx-ir, to rename a value is to rename
the tensor behind it, also where another model holds that tensor.
"""

import copy
from collections.abc import Callable, Iterable, Iterator

import onnx_ir as ir

from renorm_onnx.model_walk import graphs_with_nodes, nodes_of, scopes_of

Replacement = Callable[[ir.TensorProtocol], ir.TensorProtocol]


def all_tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Give every tensor of `model`: of initializers and attributes, in inner graphs and functions too."""
    for scope in scopes_of(model):
        for graph, nodes in graphs_with_nodes(scope):
            yield from _constants(graph)
            for node in nodes:
                # The dictionary itself: its wrapper takes most of the time on a graph of many nodes.
                for attribute in node.attributes.data.values():
                    if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                        yield attribute.value


def external_among(tensors: Iterable[ir.TensorProtocol]) -> list[ir.ExternalTensor]:
    """Those of some tensors whose values lie in a data file."""
    # Most are in the message, and are told by their own type at once; to deny another takes onnx-ir ten times as long.
    others = (tensor for tensor in tensors if not isinstance(tensor, ir.serde.TensorProtoTensor))
    return [tensor for tensor in others if isinstance(tensor, ir.ExternalTensor)]


def _constants(graph: ir.Graph) -> list[ir.TensorProtocol]:
    return [value.const_value for value in graph.initializers.data.values() if value.const_value is not None]


def with_tensors(model: ir.Model, replace: Replacement) -> ir.Model:
    """A copy of `model` in which `replace` has been applied to the tensor of every initializer and attribute."""
    fresh = model.clone()
    for graph in fresh.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = replace(value.const_value)
    for scope in scopes_of(fresh):
        for node in nodes_of(scope):
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    replaced = replace(attribute.value)
                    node.attributes[name] = ir.AttrTensor(name, replaced, doc_string=attribute.doc_string)
    return fresh


def with_inner_tensors(model: ir.Model, replace: Replacement) -> ir.Model:
    """The model, or a copy where external tensors in inner graphs and attributes are replaced: onnx-ir writes those."""
    top = set(map(id, _constants(model.graph)))
    if any(id(tensor) not in top for tensor in external_among(all_tensors(model))):
        return with_tensors(model, lambda tensor: tensor if id(tensor) in top else replace(tensor))
    return model


def renamable(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A tensor with the data of `tensor` and a name of its own."""
    return _lazy(tensor) if isinstance(tensor, ir.serde.TensorProtoTensor) else copy.copy(tensor)


def in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A tensor that onnx-ir writes by value, even if `tensor` is external."""
    return _lazy(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor


def _lazy(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: tensor,
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )

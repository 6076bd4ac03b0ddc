"""Is a message the model it claims to be? Judges an `onnx.ModelProto` before anything is built from it.

Every rule is one that onnxruntime or the ONNX specification has too; what they leave open is accepted. Nothing here
recurses: a message may be built to be deeper than the stack. Time and memory are linear in the size of the message.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, Final

import onnx
from google.protobuf import unknown_fields  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, NodeProto, StringStringEntryProto, TensorProto, ValueInfoProto

from renorm_onnx.errors import ModelFileError
from renorm_onnx.files.name_checks import MAX_NODES, Scope, check_calls, define, plain_domain, resolve, title
from renorm_onnx.files.tensor_checks import check_tensor, densified, quoted

MAX_ENTRIES: Final = 2_000_000
# protobuf reads messages at most 100 deep, three per graph: no file can hold more than 31 graphs in one another.
MAX_NESTING: Final = 32
MAX_DENSIFIED_BYTES: Final = 2**28
MAX_PARSED_BYTES: Final = 2**30
# What protobuf takes for an empty message of onnx.proto with its place in an array, and more than it takes for a string
# (33), so that the count itself ends soon.
_MESSAGE_BYTES: Final = 200
_STRING_BYTES: Final = 100
_TOO_LARGE: Final = f"it has more than {MAX_NODES:,} nodes or {MAX_ENTRIES:,} values; larger models are not supported"


@dataclasses.dataclass(slots=True)
class Findings:
    """What whoever builds the model must know: tensors kept in data files, and whether nodes stand out of order."""

    external: list[TensorProto] = dataclasses.field(default_factory=list)
    unsorted: bool = False


def check_model(model: onnx.ModelProto) -> Findings:
    """Judge a model; make its sparse tensors dense, its sizes no less than 0 and its comments readable in place.

    Args:
        model: Changed in four ways only: sparse initializers become ordinary ones; sizes below 0 become open ones;
            imports of ONNX's own domain, which has two names, bear the empty one, as onnx-ir gives it to nodes; and of
            comments, which are what no value and no operator is called by, whatever is not UTF-8 becomes U+FFFD, since
            runtimes read such files.

    Raises:
        ModelFileError: It is no model, or breaks a rule of ONNX, or exceeds a limit.
    """
    _check_header(model)
    findings = Findings()
    roots = [Scope(model.graph, f"graph {quoted(model.graph.name)}")]
    roots += [Scope(f, f"function {quoted(f'{f.domain}::{f.name}')}") for f in model.functions]
    scopes = _collect(roots, findings)
    for scope in scopes:
        define(scope)
    for scope in reversed(scopes):
        findings.unsorted |= resolve(scope)
    check_calls(model, scopes)
    return findings


def check_size(data: bytes) -> None:
    """Refuse a file of which protobuf would make more objects than of any model: two bytes may become 200.

    Source: the protobuf encoding guide. Damage is not judged here: the count ends there, and protobuf says it better.

    Raises:
        ModelFileError: The objects would take more than `MAX_PARSED_BYTES`, not counting strings and tensors.
    """
    if _parsed_bytes(data, exact_from=4096) > MAX_PARSED_BYTES and _parsed_bytes(data) > MAX_PARSED_BYTES:
        raise ModelFileError(
            f"its {len(data):,} bytes would become more than {MAX_PARSED_BYTES:,} in memory; larger models are not "
            "supported"
        )


def _parsed_bytes(data: bytes, exact_from: int = 0) -> int:
    """Bound the memory of everything but contents; a message shorter than `exact_from` is taken for the worst."""
    pending = [(onnx.ModelProto.DESCRIPTOR, 0, len(data))]
    total = 0
    while pending and total <= MAX_PARSED_BYTES:
        kind, start, end = pending.pop()
        inner = _messages_in(kind)
        for number, first, last in _fields(data, start, end):
            if number not in inner:
                total += _STRING_BYTES
            elif last - first < exact_from:
                total += _MESSAGE_BYTES * (1 + (last - first) // 2)
            else:
                total += _MESSAGE_BYTES
                if last > first:
                    pending.append((inner[number], first, last))
            if total > MAX_PARSED_BYTES:
                break
    return total


@functools.cache
def _messages_in(kind: Any) -> dict[int, Any]:
    """The fields of a message that hold messages: number -> their descriptor."""
    return {field.number: field.message_type for field in kind.fields if field.message_type is not None}


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The number of each length-delimited field in a message, and where its content starts and ends."""
    while at < end:
        # Nearly every key and length is one byte: a call for each would double the time.
        key, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at, end)
        kind = key & 7
        if kind == 2:
            length, at = (data[at], at + 1) if at < end and data[at] < 128 else _varint(data, at, end)
            yield key >> 3, at, min(at + length, end)
            at += length
        elif kind == 0:
            _, at = _varint(data, at, end)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            return


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The number that starts at `at`, and where it ends."""
    number = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
    return number, at


def _check_header(model: onnx.ModelProto) -> None:
    if not model.HasField("graph"):
        raise ModelFileError("it has no graph, so it is not an ONNX model")
    if model.ir_version < 1:
        raise ModelFileError(f"ir_version is {model.ir_version}; expected 1 or more; the file is damaged")
    if model.training_info:
        raise ModelFileError(
            "it has training_info, which would be lost; remove it first (del model.training_info[:] in Python)"
        )
    _check_unknown(model, "the model")
    _decode(model, "producer_name", "producer_version", "domain")
    for opset in (*model.opset_import, *(opset for function in model.functions for opset in function.opset_import)):
        if isinstance(opset.domain, bytes):
            raise ModelFileError(f"an opset is of domain {quoted(opset.domain)}; expected a name in UTF-8")
        opset.domain = plain_domain(opset.domain)
    _check_map(((opset.domain, opset.version) for opset in model.opset_import), "opset")
    _check_map(((entry.key, entry.value) for entry in model.metadata_props), "metadata entry")


def _decode(message: Any, *fields: str) -> None:
    """Make comments of a message readable, in place: protobuf gives text that is not UTF-8 as bytes."""
    # Once for each tensor and node: a loop over what is nearly always empty would take three times as long.
    if type(message.doc_string) is bytes:
        message.doc_string = message.doc_string.decode("utf-8", "replace")
    for name in fields:
        if type(text := getattr(message, name)) is bytes:
            setattr(message, name, text.decode("utf-8", "replace"))
    if type(message) is not AttributeProto and len(message.metadata_props):
        _decode_entries(message.metadata_props)


def _decode_entries(entries: Iterable[StringStringEntryProto]) -> None:
    for entry in entries:
        for part in ("key", "value"):
            if type(text := getattr(entry, part)) is bytes:
                setattr(entry, part, text.decode("utf-8", "replace"))


def _check_map(entries: Iterable[tuple[str, object]], what: str) -> None:
    seen: dict[str, object] = {}
    for key, value in entries:
        if seen.setdefault(key, value) != value:
            raise ModelFileError(
                f"{what} {quoted(key)} is given twice, as {quoted(seen[key])} and {quoted(value)}; expected one value"
            )


def _check_unknown(message: object, what: str, name: str | None = None) -> None:
    unknown = unknown_fields.UnknownFieldSet(message)
    if len(unknown):
        who = what if name is None else f"{what} {quoted(name)}"
        raise ModelFileError(
            f"{who} has a field (number {unknown[0].field_number}) that onnx {onnx.__version__} does not know and "
            "would lose; the file is damaged or needs a newer onnx"
        )


def _collect(roots: list[Scope], findings: Findings) -> list[Scope]:
    """Every graph and function body, outer ones first; their tensors and attributes are judged on the way."""
    scopes = list(roots)
    nodes = entries = 0
    budget = MAX_DENSIFIED_BYTES
    for scope in scopes:  # grows while it runs
        proto = scope.proto
        nodes += len(proto.node)
        entries += len(proto.input) + len(proto.output) + len(proto.value_info)
        if isinstance(proto, GraphProto):
            entries += len(proto.initializer)
        if nodes > MAX_NODES or entries > MAX_ENTRIES:
            raise ModelFileError(_TOO_LARGE)
        scope.nodes = list(proto.node)
        if scope.depth > MAX_NESTING:
            raise ModelFileError(f"{scope.label} lies {scope.depth} graphs deep; expected at most {MAX_NESTING}")
        _check_unknown(proto, scope.label)
        _decode(proto, *(("name",) if isinstance(proto, GraphProto) else ()))
        for value in (*proto.value_info, *([*proto.input, *proto.output] if isinstance(proto, GraphProto) else ())):
            _decode(value)
            _check_type(value)
        if isinstance(proto, GraphProto):
            for annotation in proto.quantization_annotation:
                _decode_entries(annotation.quant_parameter_tensor_names)
            for sparse in proto.sparse_initializer:
                dense = densified(sparse, budget=budget)
                budget -= len(dense.raw_data)
                proto.initializer.append(dense)
            proto.ClearField("sparse_initializer")
            for tensor in proto.initializer:
                _note_tensor(tensor, findings)
        for index, node in enumerate(scope.nodes):
            _check_unknown(node, scope.label)
            _decode(node, "name")
            if not node.op_type:
                raise ModelFileError(f"{title(node)} in {scope.label} has no operator type")
            names = node.op_type, node.domain, node.overload
            if bytes in map(type, names):
                wrong = next(name for name in names if isinstance(name, bytes))
                raise ModelFileError(
                    f"{title(node)} in {scope.label}: operator, domain or overload is {quoted(wrong)}; expected a name "
                    "in UTF-8"
                )
            if node.attribute:
                budget = _check_attributes(node, scope, findings, budget)
                graphs = [
                    Scope(graph, f"graph {quoted(graph.name)}", scope, scope.depth + 1) for graph in _graphs(node)
                ]
                if graphs:
                    scope.inner[index] = graphs
                    scopes += graphs
    return scopes


def _check_type(value: ValueInfoProto) -> None:
    """Refuse a map; make sizes below 0, by which some converters say "any" as runtimes hear it, open, in place."""
    kind = value.type
    for name in ("sequence_type", "optional_type"):
        while kind.HasField(name):
            kind = getattr(kind, name).elem_type
    for dim in kind.tensor_type.shape.dim if kind.HasField("tensor_type") else ():
        if dim.dim_value < 0:
            dim.ClearField("dim_value")
    if kind.HasField("map_type"):
        raise ModelFileError(
            f"{quoted(value.name)} is a map, which is not supported here; let the model hand out tensors instead "
            "(skl2onnx: options={'zipmap': False})"
        )


def _note_tensor(tensor: TensorProto, findings: Findings) -> None:
    _check_unknown(tensor, "a tensor")
    _decode(tensor)
    if tensor.data_location == TensorProto.EXTERNAL:
        findings.external.append(tensor)
    else:
        check_tensor(tensor)


def _graphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH and not attribute.ref_attr_name:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS and not attribute.ref_attr_name:
            yield from attribute.graphs


def _check_reference(attribute: AttributeProto, node: NodeProto, scope: Scope) -> None:
    """Refuse an attribute that takes its value from the function's caller where there is none, or if it is a graph."""
    is_graph = attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS)
    if is_graph or isinstance(scope.root.proto, GraphProto) or attribute.type == AttributeProto.UNDEFINED:
        raise ModelFileError(
            f"{title(node)} in {scope.label}: attribute {quoted(attribute.name)} of type "
            f"{AttributeProto.AttributeType.Name(attribute.type)} refers to {quoted(attribute.ref_attr_name)}; "
            "expected that only in a function, with a type, and not for graphs"
        )


def _check_attributes(node: NodeProto, scope: Scope, findings: Findings, budget: int) -> int:
    """Judge a node's attributes, make a Constant's sparse value dense in place, return what is left of `budget`."""
    seen = set()
    for attribute in node.attribute:
        name, kind = attribute.name, attribute.type
        _check_unknown(attribute, "attribute", name)
        _decode(attribute)
        if name in seen or not name or isinstance(name, bytes):
            raise ModelFileError(
                f"{title(node)} in {scope.label} has "
                + (f"attribute {quoted(name)} twice" if name in seen else f"an attribute named {quoted(name)}")
                + "; expected each by its own name"
            )
        seen.add(name)
        if attribute.ref_attr_name:
            _check_reference(attribute, node, scope)
            continue
        if kind == AttributeProto.SPARSE_TENSOR and node.op_type == "Constant" and name == "sparse_value":
            dense = densified(attribute.sparse_tensor, budget=budget)
            budget -= len(dense.raw_data)
            attribute.CopyFrom(AttributeProto(name="value", type=AttributeProto.TENSOR, t=dense))
        elif kind == AttributeProto.TENSOR:
            _note_tensor(attribute.t, findings)
        elif kind == AttributeProto.TENSORS:
            for tensor in attribute.tensors:
                if tensor.data_location == TensorProto.EXTERNAL:
                    raise ModelFileError(
                        f"{title(node)} in {scope.label}: attribute {quoted(name)} keeps tensors in a data file, "
                        "which is not supported here"
                    )
                check_tensor(tensor)
        elif kind in (AttributeProto.UNDEFINED, AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS):
            raise ModelFileError(
                f"{title(node)} in {scope.label}: attribute {quoted(name)} has type "
                f"{AttributeProto.AttributeType.Name(kind)}, which is not supported here"
            )
    return budget

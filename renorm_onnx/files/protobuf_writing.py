"""A model as protobuf, written tensor by tensor, so that weights are never held in memory twice.

Source: the protobuf encoding guide (a message is a row of fields; a field is a key, ``number << 3 | wire type``, a
length and its bytes; fields may come in any order) and onnx.proto for the numbers below.

onnx-ir serializes everything but the main graph's initializers. Those are written here: unchanged ones as they were
read, others as a small header and the bytes that their ``tofile`` gives. This also avoids the value_info that onnx-ir
adds for every initializer, which repeats its type and shape.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import onnx
import onnx_ir as ir
from onnx import TensorProto

from renorm_onnx.errors import ModelFileError, root_of
from renorm_onnx.files.external_data import blocks
from renorm_onnx.files.tensor_checks import quoted

# What protobuf readers accept in one message.
PROTOBUF_LIMIT: Final = 2**31 - 1
_GRAPH: Final = 7  # of ModelProto
_INITIALIZER: Final = 5  # of GraphProto
_RAW_DATA: Final = 9  # of TensorProto
# Up to here a tensor is serialized as it is: once to know its size, and once to be written.
_SMALL_BYTES: Final = 1 << 16

Placement = Callable[[ir.TensorProtocol], ir.ExternalTensor | None]


class Writer(Protocol):
    """What a model is written to: a file, or anything else that takes bytes."""

    def write(self, data: bytes, /) -> object:
        """Take the next bytes."""


class _WithoutInitializers:
    """A graph that seems to have no initializers, for onnx-ir's serializer."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self.initializers: dict[str, ir.Value] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)

    def __iter__(self) -> Iterator[ir.Node]:
        return iter(self._graph)

    def __len__(self) -> int:
        return len(self._graph)


class _WithGraph:
    """A model with another graph, for onnx-ir's serializer."""

    def __init__(self, model: ir.Model, graph: Any) -> None:
        self._model = model
        self.graph = graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def write_tensor(tensor: ir.TensorProtocol, writer: Writer) -> None:
    """Write a tensor's values as `raw_data` and data files hold them, in blocks where the tensor can give blocks.

    Args:
        tensor: Not of strings. If it has ``tofile``, that is given `writer` and may call ``write`` once per block.
        writer: Takes the bytes.

    Raises:
        ModelFileError: An external tensor has become unreadable.
    """
    if isinstance(tensor, ir.ExternalTensor):
        for block in blocks(tensor):
            writer.write(block)
    elif hasattr(tensor, "tofile"):
        tensor.tofile(writer)
    else:
        writer.write(tensor.tobytes())


def write_model(model: ir.Model, writer: Writer, *, place: Placement = lambda tensor: None) -> None:
    """Write a model as one protobuf message.

    Args:
        model: Its tensors are written by value, external ones too.
        writer: Takes the bytes.
        place: Says for an initializer where in a data file its values lie, if they are not to be written here.

    Raises:
        ModelFileError: The message would exceed 2 GB, or something in it is not text.
    """
    rest, graph = _without_initializers(model)
    # Of initializers and of what is noted about them the dictionary itself: its wrapper takes most of the time.
    initializers = model.graph.initializers.data.values()
    parts = [_part(value, place) for value in initializers if value.const_value is not None]
    length = len(graph) + sum(len(_key(_INITIALIZER, part.size)) + part.size for part in parts)
    total = len(rest) + len(_key(_GRAPH, length)) + length
    if total > PROTOBUF_LIMIT:
        raise ModelFileError(
            f"the model takes {total:,} bytes; one protobuf message holds at most {PROTOBUF_LIMIT:,}; "
            "keep its weights in a data file (renorm_onnx.fuse_file writes a fused model so) and use the path"
        )
    writer.write(rest)
    writer.write(_key(_GRAPH, length))
    writer.write(graph)
    for part in parts:
        writer.write(_key(_INITIALIZER, part.size))
        part.write(writer)


def _without_initializers(model: ir.Model) -> tuple[bytes, bytes]:
    """The model without its graph, and the graph without its initializers, both serialized."""
    try:
        proto = ir.serde.serialize_model(_WithGraph(model, _WithoutInitializers(model.graph)))  # type: ignore[arg-type]
    except ir.serde.SerdeError as error:
        cause = root_of(error)
        if isinstance(cause, UnicodeError):
            raise ModelFileError("the model cannot be written: it holds text that is not UTF-8") from error
        raise ModelFileError(
            f"the model cannot be written: {(str(cause) or type(cause).__name__).splitlines()[0]}"
        ) from error
    extra = onnx.GraphProto()
    inputs = {value.name for value in model.graph.inputs}
    for value in model.graph.initializers.data.values():
        if annotation := value.meta.data.get("quant_parameter_tensor_names"):
            entry = extra.quantization_annotation.add(tensor_name=value.name)
            for key in sorted(annotation):
                entry.quant_parameter_tensor_names.add(key=key, value=annotation[key])
        if value.name not in inputs and (value.doc_string or value.metadata_props):
            ir.serde.serialize_value_into(extra.value_info.add(), value)
    graph = proto.graph.SerializeToString() + extra.SerializeToString()
    proto.ClearField("graph")
    return proto.SerializeToString(), graph


class _Part:
    """One initializer: its header, and the tensor whose values follow it, if they are not in the header."""

    def __init__(self, header: TensorProto, tensor: ir.TensorProtocol | None = None) -> None:
        self._header = header
        self._tensor = tensor
        self._bytes = tensor.nbytes if tensor is not None else 0
        self._key = _key(_RAW_DATA, self._bytes) if tensor is not None else b""
        self.size = header.ByteSize() + len(self._key) + self._bytes

    def write(self, writer: Writer) -> None:
        """Write the initializer without its own key and length."""
        writer.write(self._header.SerializeToString())
        if self._tensor is not None:
            writer.write(self._key)
            counter = _Counter(writer)
            write_tensor(self._tensor, counter)
            if counter.count != self._bytes:
                raise ModelFileError(
                    f"tensor {quoted(self._tensor.name)} gave {counter.count:,} bytes; expected {self._bytes:,}"
                )


class _Counter:
    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.count = 0

    def write(self, data: bytes) -> int:
        self._writer.write(data)
        size = memoryview(data).nbytes
        self.count += size
        return size


def _part(value: ir.Value, place: Placement) -> _Part:
    tensor = value.const_value
    assert tensor is not None
    if (placed := place(tensor)) is not None:
        proto = ir.serde.serialize_tensor(placed)
        proto.name = value.name or ""
        return _Part(proto)
    if (
        isinstance(tensor, ir.serde.TensorProtoTensor)
        and tensor.raw.name == value.name
        and len(tensor.raw.raw_data) <= _SMALL_BYTES
        and not tensor.metadata_props
    ):
        return _Part(tensor.raw)
    if tensor.dtype == ir.DataType.STRING:
        proto = ir.serde.serialize_tensor(tensor)
        proto.name = value.name or ""
        return _Part(proto)
    return _Part(_header(tensor, value.name or ""), tensor)


def _header(tensor: ir.TensorProtocol, name: str) -> TensorProto:
    """Everything about a tensor but its values."""
    proto = TensorProto(name=name, data_type=tensor.dtype.value, dims=tensor.shape.numpy())
    if tensor.doc_string:
        proto.doc_string = tensor.doc_string
    for key in sorted(tensor.metadata_props):
        proto.metadata_props.add(key=key, value=tensor.metadata_props[key])
    return proto


def _key(field: int, length: int) -> bytes:
    """The key of a length-delimited field (wire type 2) and its length, both as varints."""
    encoded = bytearray()
    for number in (field << 3 | 2, length):
        while number > 127:
            encoded.append(number & 127 | 128)
            number >>= 7
        encoded.append(number)
    return bytes(encoded)

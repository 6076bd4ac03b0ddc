"""Models in and out: the only place where a path becomes a model and a model becomes a file.

Reading takes a path, an `onnx.ModelProto` or an `onnx_ir.Model` and always gives a fresh model that nobody else holds.
The protobuf is judged before onnx-ir sees it, since onnx-ir lets the last of two equal names win, drops sparse
initializers, and follows ``../`` out of the folder. External tensors stay on the disk until somebody reads them.

Writing is all or nothing: the `.onnx` is replaced last, and its data file, if it has one, is named after its content,
so the pair that a reader finds on the disk always belongs together. No existing data file is ever changed or deleted.
"""

import contextlib
import copy
import gc
import os
import stat
from collections.abc import Callable, Iterator
from typing import Final

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from renorm_onnx.errors import ModelFileError
from renorm_onnx.file_writing import NewFile, check_output, explain

__all__ = ["check_output", "collection_paused", "copy_file", "load", "model_bytes", "save", "to_proto"]

# What protobuf can hold in one message, less room for everything that is not a tensor.
PROTOBUF_LIMIT: Final = 2**31 - 1
# Above this, weights go to a data file: protobuf needs the message twice in memory to write it.
EXTERNAL_ABOVE: Final = 1_500_000_000
# Smaller tensors stay in the .onnx, where shape inference can see them (the threshold of onnx and onnxruntime).
EXTERNAL_TENSOR_ABOVE: Final = 1024
# A data file's tensors start at page borders, so that runtimes can map them.
_ALIGNMENT: Final = 4096
_KEEP_EXTERNAL: Final = "renorm_onnx.external_data"


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Pause garbage collection while a big graph is built: its objects are all alive, and looking at them is slow."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load(source: str | os.PathLike[str] | onnx.ModelProto | ir.Model, *, allow_symlinks: bool = False) -> ir.Model:
    """Read a model, judge it, and give a fresh copy that may be changed freely.

    Args:
        source: A path, or a model in memory, which is left untouched (its tensors' data may be shared).
        allow_symlinks: Follow links from the model's folder to data files elsewhere, as caches built of links need it.

    Returns:
        A model of its own. External tensors are not read yet.

    Raises:
        ModelFileError: The file is absent, not a file, not ONNX, damaged, too large, or asks for what no model needs:
            a name defined twice, a value never defined, a cycle, a tensor that does not fit its bytes, data elsewhere.
    """
    with collection_paused():
        if isinstance(source, ir.Model):
            return _copied(source)
        if isinstance(source, onnx.ModelProto):
            proto = onnx.ModelProto()
            proto.CopyFrom(source)
            return ir.serde.deserialize_model(proto)
        return _load_path(os.fspath(source))


def _load_path(path: str) -> ir.Model:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(_read(path))
    except DecodeError as error:
        raise ModelFileError(
            f"{path!r} is not an ONNX model, or a damaged one: protobuf cannot read it; export or download it again"
        ) from error
    model = ir.serde.deserialize_model(proto)
    ir.external_data.set_base_dir(model.graph, os.path.dirname(os.path.abspath(path)))
    return model


def _read(path: str) -> bytes:
    """The bytes of a model file, read once."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ModelFileError(f"{path!r} is a folder; expected an ONNX model file")
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path!r} is a pipe or a device; expected an ONNX model file; save it to one first")
        if status.st_size > PROTOBUF_LIMIT:
            raise ModelFileError(
                f"{path!r} has {status.st_size:,} bytes; a protobuf file holds at most {PROTOBUF_LIMIT:,}; "
                "save the model with its weights as external data"
            )
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise ModelFileError(f"{path!r} does not exist; expected an ONNX model file") from error
    except OSError as error:
        raise ModelFileError(f"cannot read {path!r}: {explain(error)}") from error
    if not data:
        raise ModelFileError(f"{path!r} is empty; expected an ONNX model file; export or download it again")
    return data


def _copied(model: ir.Model) -> ir.Model:
    """A copy of `model` whose tensors share only their data: renaming a value must not rename the original's tensor."""
    fresh = _with_tensors(model, _renamable)
    if model.meta.get(_KEEP_EXTERNAL):
        fresh.meta[_KEEP_EXTERNAL] = True
    return fresh


def _renamable(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if isinstance(tensor, ir.serde.TensorProtoTensor):
        return ir.LazyTensor(
            lambda: tensor,
            dtype=tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )
    return copy.copy(tensor)


def _with_tensors(model: ir.Model, replace: Callable[[ir.TensorProtocol], ir.TensorProtocol]) -> ir.Model:
    """A copy of `model` in which `replace` has been applied to the tensor of every initializer and attribute."""
    fresh = model.clone()
    for graph in fresh.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = replace(value.const_value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                    node.attributes[name] = ir.AttrTensor(
                        name, replace(attribute.as_tensor()), doc_string=attribute.doc_string
                    )
    return fresh


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)
        for node in graph:
            for attribute in node.attributes.values():
                if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()


def _has_external(model: ir.Model) -> bool:
    return any(isinstance(tensor, ir.ExternalTensor) for tensor in _tensors(model))


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Give the model as one protobuf message, external tensors read into it.

    Args:
        model: Left as it is.

    Raises:
        ModelFileError: The tensors need more than the 2 GB that a protobuf can hold.
    """
    size = sum(tensor.nbytes for tensor in _tensors(model) if tensor.dtype != ir.DataType.STRING)
    if size > PROTOBUF_LIMIT:
        raise ModelFileError(
            f"the model's tensors need {size:,} bytes; one protobuf holds at most {PROTOBUF_LIMIT:,}; "
            "write the model to a file and pass its path"
        )
    with collection_paused():
        if _has_external(model):
            model = _with_tensors(model, _in_memory)
        return ir.serde.serialize_model(model)


def _in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.LazyTensor(lambda: tensor, dtype=tensor.dtype, shape=tensor.shape, name=tensor.name or "")


def model_bytes(model: ir.Model) -> bytes:
    """Give the model as the bytes of an `.onnx` file without external data, for a session in memory.

    Raises:
        ModelFileError: As `to_proto`.
    """
    content: bytes = to_proto(model).SerializeToString()
    return content


def save(model: ir.Model, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write the model to a file, whole or not at all.

    The weights go to a data file beside it when the model came with one, or when they exceed 1.5 GB. They are streamed:
    each tensor's ``tofile(file)`` is given an object with a ``write`` method, and may call it once per block.

    Args:
        model: Left as it is.
        path: The `.onnx` file.
        force: Replace an existing file.

    Raises:
        ModelFileError: As `check_output`, or the disk is full, or the weights exceed what the file can hold.
    """
    path = os.fspath(path)
    check_output(path, force=force)
    size = sum(tensor.nbytes for tensor in _tensors(model) if tensor.dtype != ir.DataType.STRING)
    if size > EXTERNAL_ABOVE or model.meta.get(_KEEP_EXTERNAL) or _has_external(model):
        _save_with_data(model, path, force=force)
        return
    content = model_bytes(model)
    with NewFile(path) as file:
        file.write(content)
        file.sync()
        check_output(path, force=force)
        file.publish()


def _save_with_data(model: ir.Model, path: str, *, force: bool) -> None:
    folder, name = os.path.split(path)
    with NewFile(path + ".data") as data:
        offsets: dict[int, int] = {}
        for tensor in _tensors(model):
            if (
                tensor.dtype != ir.DataType.STRING
                and tensor.nbytes > EXTERNAL_TENSOR_ABOVE
                and id(tensor) not in offsets
            ):
                data.write(bytes(-data.size % _ALIGNMENT))
                offsets[id(tensor)] = data.size
                tensor.tofile(data)  # type: ignore[attr-defined]
        data.sync()
        location = f"{os.path.splitext(name)[0]}.{data.content_hash}.data"

        def stub(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
            if id(tensor) not in offsets:
                return _in_memory(tensor)
            return ir.ExternalTensor(
                location,
                offsets[id(tensor)],
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=tensor.name or "",
                base_dir=folder,
            )

        with collection_paused():
            content = ir.serde.serialize_model(_with_tensors(model, stub)).SerializeToString()
        with NewFile(path) as file:
            file.write(content)
            file.sync()
            check_output(path, force=force)
            data.publish(location)
            file.publish()


def copy_file(source: str | os.PathLike[str], target: str | os.PathLike[str], *, force: bool = False) -> None:
    """Copy a model file byte for byte.

    Raises:
        ModelFileError: As `check_output`, or `source` cannot be read.
    """
    check_output(target, inputs=[source], force=force)
    content = _read(os.fspath(source))
    with NewFile(target) as file:
        file.write(content)
        file.publish()

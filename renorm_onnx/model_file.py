"""Models in and out: where a path becomes a model, and a model a file.

Reading takes a path, an `onnx.ModelProto` or an `onnx_ir.Model` and always gives a fresh model that nobody else holds.
The message is judged before onnx-ir sees it, since onnx-ir lets the last of two equal names win, drops sparse
initializers, and follows ``../`` out of the folder. External tensors stay on the disk until somebody reads them.

Writing is all or nothing: the `.onnx` is replaced last, and its data file, if it has one, is named after its content,
so the pair that a reader finds on the disk always belongs together. No existing data file is ever changed or deleted.
"""

import contextlib
import filecmp
import gc
import io
import logging
import os
import stat
from collections.abc import Iterator
from typing import Final

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from renorm_onnx.errors import ModelFileError, root_of
from renorm_onnx.files.external_data import BLOCK_BYTES, check_external, set_folder
from renorm_onnx.files.file_writing import NewFile, check_output, explain
from renorm_onnx.files.model_checks import check_model, check_size
from renorm_onnx.files.model_tensors import (
    all_tensors,
    external_among,
    in_memory,
    renamable,
    with_inner_tensors,
    with_tensors,
)
from renorm_onnx.files.protobuf_writing import PROTOBUF_LIMIT, write_model, write_tensor
from renorm_onnx.files.tensor_checks import quoted, tensor_bytes
from renorm_onnx.model_walk import graphs_with_nodes, scopes_of

__all__ = ["check_output", "collection_paused", "copy_file", "load", "model_bytes", "save", "to_proto"]

logger = logging.getLogger(__name__)

# Above this, weights go to a data file: readers of protobuf need the message twice in memory.
EXTERNAL_ABOVE: Final = 1_500_000_000
# Smaller tensors stay in the .onnx, where shape inference can see them (the threshold of onnx and onnxruntime).
EXTERNAL_TENSOR_ABOVE: Final = 1024
# In a data file, large tensors start at page borders, so that runtimes can map them; all are aligned for any element.
_PAGE: Final = 4096
_ELEMENT: Final = 16
KEEP_EXTERNAL: Final = "renorm_onnx.external_data"
# How onnx-ir ends what it says of features that it lacks.
_PLEA: Final = " Please contribute by creating a PR at https://github.com/onnx/onnx-ir."
# What people pass instead of a model, by the file's first bytes.
_SIGNATURES: Final = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes; export the model to ONNX first"),
    (b"\x89HDF", "an HDF5 file, as Keras writes; convert the model to ONNX first"),
    (b"<ir_version", "ONNX in its text form; give it to onnx.parser.parse_model, and save what comes out"),
    (b"ir_version:", "protobuf in its text form; read it with onnx.load(path, format='textproto'), and save it"),
    (b"<", "a web page or XML; download the file itself"),
    (b"{", "JSON; expected the binary ONNX format"),
)


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
        A model of its own, its nodes in topological order. External tensors are not read yet.

    Raises:
        ModelFileError: The file is absent, not a file, not ONNX, damaged or too large, or the model breaks a rule of
            ONNX: a name defined twice or never, a cycle, a tensor that does not fit its bytes, data outside its folder.
    """
    with collection_paused():
        if isinstance(source, ir.Model):
            _check_data(source, allow_symlinks=allow_symlinks)
            return _copied(source)
        if isinstance(source, onnx.ModelProto):
            proto = onnx.ModelProto()
            proto.CopyFrom(source)
            return _judged(proto, "the model", folder=None, allow_symlinks=allow_symlinks)
        path = os.fspath(source)
        folder = os.path.dirname(os.path.abspath(path))
        return _judged(_parsed(_read(path), path), repr(path), folder=folder, allow_symlinks=allow_symlinks)


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
                f"{path!r} has {status.st_size:,} bytes; an .onnx file holds at most {PROTOBUF_LIMIT:,}; "
                "save the model with its weights as external data"
            )
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise ModelFileError(f"{path!r} does not exist; expected an ONNX model file") from error
    except OSError as error:
        raise ModelFileError(f"cannot read {path!r}: {explain(error)}") from error
    except ModelFileError:  # a ValueError too, but one that says already what is wrong
        raise
    except ValueError as error:
        raise ModelFileError(f"{path!r} is not a path: {error}") from error
    if not data:
        raise ModelFileError(f"{path!r} is empty; expected an ONNX model file; export or download it again")
    return data


def _parsed(data: bytes, path: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        check_size(data)
        proto.ParseFromString(data)
    except ModelFileError as error:
        raise ModelFileError(f"{path!r}: {error}") from None
    except DecodeError as error:
        squeezed = b"".join(data[:100].split())  # of text forms, whose spaces are anybody's
        kinds = (
            kind for signature, kind in _SIGNATURES if data.startswith(signature) or squeezed.startswith(signature)
        )
        kind = next(kinds, None)
        if kind is None and "depth" in str(error).lower():
            kind = "nested deeper than the 100 messages that protobuf reads"
        kind = kind or "no ONNX model, or a damaged or truncated one; export or download it again"
        raise ModelFileError(f"{path!r} cannot be read as protobuf: it is {kind}") from error
    return proto


def _judged(proto: onnx.ModelProto, who: str, *, folder: str | None, allow_symlinks: bool) -> ir.Model:
    """Build a model from a message of our own, which becomes part of it."""
    try:
        findings = check_model(proto)
        if findings.external and folder is None:
            raise ModelFileError(
                f"tensor {quoted(findings.external[0].name)} lies in a data file, and a model in memory has no folder "
                "to find it in; pass the model's path instead"
            )
        check_external(findings.external, folder or "", follow_links=allow_symlinks)
        model = ir.serde.deserialize_model(proto)
        if findings.unsorted:
            model.graph.sort()
            for function in model.functions.values():
                function.sort()
    except ModelFileError as error:
        raise ModelFileError(f"{who}: {error}") from None
    except (ir.serde.SerdeError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{who} cannot be represented: {_reason(error)}") from error
    if findings.external:
        model.meta[KEEP_EXTERNAL] = True
        for tensor in external_among(all_tensors(model)):
            set_folder(tensor, folder or "")
    return model


def _reason(error: BaseException) -> str:
    """The first line of what was wrong at the root of a chain of exceptions."""
    error = root_of(error)
    text = (str(error).strip() or type(error).__name__).splitlines()[0].removesuffix(_PLEA)
    return text if len(text) <= 200 else text[:197] + "..."


def _check_data(model: ir.Model, *, allow_symlinks: bool) -> None:
    """Judge where the external tensors of a model in memory lie; onnx-ir checks nothing if it knows no folder."""
    folders: dict[str, list[onnx.TensorProto]] = {}
    for tensor in external_among(all_tensors(model)):
        # A location is absolute only where somebody meant it: `load` followed a link, or the caller built the tensor.
        if not os.path.isabs(tensor.location):
            folders.setdefault(os.fspath(tensor.base_dir), []).append(ir.serde.serialize_tensor(tensor))
    for folder, tensors in folders.items():
        try:
            check_external(tensors, folder or ".", follow_links=allow_symlinks)
        except ModelFileError as error:
            raise ModelFileError(f"the model: {error}") from None


def _copied(model: ir.Model) -> ir.Model:
    """A copy of `model` that shares only its tensors' data: to rename a value is to rename its tensor."""
    try:
        fresh = with_tensors(model, renamable)
    except (RuntimeError, ValueError) as error:
        raise ModelFileError(f"the model cannot be copied: {_reason(error)}") from error
    # Imports and sizes become what `check_model` makes of those in a file.
    for scope in scopes_of(fresh):
        if (version := scope.opset_imports.pop("ai.onnx", None)) is not None:
            scope.opset_imports.setdefault("", version)
    for graph, nodes in (found for scope in scopes_of(fresh) for found in graphs_with_nodes(scope)):
        for value in (*graph.inputs, *(output for node in nodes for output in node.outputs)):
            if value.shape is not None and any(isinstance(size, int) and size < 0 for size in value.shape):
                value.shape = ir.Shape([None if isinstance(n, int) and n < 0 else n for n in value.shape])
    if model.meta.get(KEEP_EXTERNAL):
        fresh.meta[KEEP_EXTERNAL] = True
    return fresh


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Give the model as one protobuf message, external tensors read into it.

    Args:
        model: Left as it is.

    Raises:
        ModelFileError: The message would exceed 2 GB.
    """
    proto = onnx.ModelProto()
    proto.ParseFromString(model_bytes(model))
    return proto


def model_bytes(model: ir.Model) -> bytes:
    """Give the model as the bytes of an `.onnx` file without external data, for a session in memory.

    Raises:
        ModelFileError: As `to_proto`.
    """
    buffer = io.BytesIO()
    with collection_paused():
        write_model(with_inner_tensors(model, in_memory), buffer)
    return buffer.getvalue()


def save(model: ir.Model, path: str | os.PathLike[str], *, force: bool = False) -> int:
    """Write the model to a file, whole or not at all.

    The weights go to a data file beside it when the model came with one, or when they exceed 1.5 GB. They are streamed:
    each tensor's ``tofile`` is given an object with a ``write`` method, and may call it once per block.

    Args:
        model: Left as it is.
        path: The `.onnx` file. Its data file is named after it and after its own content.
        force: Replace an existing file. Data files that it used stay: another model may use them too.

    Returns:
        The size of the file in bytes, its data file included.

    Raises:
        ModelFileError: As `check_output`, or the disk is full, or the weights exceed what the file can hold.
    """
    path = os.fspath(path)
    tensors = list(all_tensors(model))
    external = external_among(tensors)
    check_output(path, inputs={tensor.path for tensor in external}, force=force)
    with collection_paused(), contextlib.ExitStack() as files:
        place, data = None, None
        if external or model.meta.get(KEEP_EXTERNAL) or sum(map(_size, tensors)) > EXTERNAL_ABOVE:
            data = files.enter_context(NewFile(path, hashed=True))
            # Inner graphs and attributes keep their tensors, unless those were in a data file before.
            top = {id(value.const_value) for value in model.graph.initializers.values()}
            numbers = [tensor for tensor in tensors if tensor.dtype != ir.DataType.STRING]
            movable = [tensor for tensor in numbers if id(tensor) in top or isinstance(tensor, ir.ExternalTensor)]
            place = _write_data(movable, data, os.path.splitext(os.path.basename(path))[0])
        file = files.enter_context(NewFile(path))
        if place is None:
            write_model(model, file)
        else:
            placed = place
            inner = with_inner_tensors(model, lambda tensor: placed.get(id(tensor)) or in_memory(tensor))
            write_model(inner, file, place=lambda tensor: placed.get(id(tensor)))
        file.sync()
        check_output(path, inputs={tensor.path for tensor in external}, force=force)
        if data is not None and place:
            data.publish(os.fspath(next(iter(place.values())).location))
        file.publish()
    logger.info("wrote %s: %d tensors, %d of them in a data file", path, len(tensors), len(place or ()))
    return file.size + (data.size if data is not None and place else 0)


def _size(tensor: ir.TensorProtocol) -> int:
    """The number of bytes that a tensor's values take; 0 for strings."""
    # onnx-ir builds a shape to tell the size of a tensor in a message, which for 40,000 tensors takes half a second.
    if isinstance(tensor, ir.serde.TensorProtoTensor):
        return tensor_bytes(tensor.raw)
    return 0 if tensor.dtype == ir.DataType.STRING else tensor.nbytes


def _write_data(tensors: list[ir.TensorProtocol], data: NewFile, stem: str) -> dict[int, ir.ExternalTensor]:
    """Write the large tensors to `data`, equal ranges of an input once; say by id where each lies."""
    offsets: dict[int, int] = {}
    written: dict[object, int] = {}
    for tensor in tensors:
        if tensor.nbytes <= EXTERNAL_TENSOR_ABOVE or id(tensor) in offsets:
            continue
        key: object = id(tensor)
        if isinstance(tensor, ir.ExternalTensor):
            key = tensor.path, tensor.offset or 0, tensor.nbytes
        if key not in written:
            data.write(bytes(-data.size % (_PAGE if tensor.nbytes >= 16 * _PAGE else _ELEMENT)))
            written[key] = data.size
            write_tensor(tensor, data)
            if data.size - written[key] != tensor.nbytes:
                raise ModelFileError(
                    f"tensor {tensor.name!r} gave {data.size - written[key]:,} bytes; expected {tensor.nbytes:,}"
                )
        offsets[id(tensor)] = written[key]
    data.sync()
    location = f"{stem[:200]}.{data.content_hash}.data"
    return {
        id(tensor): ir.ExternalTensor(
            location,
            offsets[id(tensor)],
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )
        for tensor in tensors
        if id(tensor) in offsets
    }


def copy_file(source: str | os.PathLike[str], target: str | os.PathLike[str], *, force: bool = False) -> None:
    """Copy a model byte for byte, and its data files with it when the copy is in another folder.

    Args:
        source: The model's path.
        target: The copy's path.
        force: Replace an existing file. A data file that is in the way is never replaced.

    Raises:
        ModelFileError: As `load` and `check_output`, or a data file of that name and other content is in the way.
    """
    source, target = os.fspath(source), os.fspath(target)
    check_output(target, inputs=[source], force=force)
    content = _read(source)
    folder, new_folder = os.path.dirname(os.path.abspath(source)), os.path.dirname(os.path.abspath(target))
    proto = _parsed(content, source)
    try:
        findings = check_model(proto)
        locations = check_external(findings.external, folder, follow_links=True)
    except ModelFileError as error:
        raise ModelFileError(f"{source!r}: {error}") from None
    with contextlib.ExitStack() as files:
        copies = []
        for location, path in locations.items() if not os.path.samefile(folder, new_folder) else ():
            target_data = os.path.join(new_folder, location)
            if not _is_copied(path, target_data):
                copies.append(files.enter_context(NewFile(target_data)))
                with open(path, "rb") as data:
                    while block := data.read(BLOCK_BYTES):
                        copies[-1].write(block)
                copies[-1].sync()
        file = files.enter_context(NewFile(target))
        file.write(content)
        file.sync()
        check_output(target, inputs=[source], force=force)
        for copied in copies:
            copied.publish()
        file.publish()


def _is_copied(source: str, target: str) -> bool:
    """Whether `target` is there already, with the content of `source`."""
    if not os.path.lexists(target):
        return False
    if os.path.isfile(target) and filecmp.cmp(source, target, shallow=False):
        return True
    raise ModelFileError(f"the data file {target!r} exists with other content; copy the model to another folder")

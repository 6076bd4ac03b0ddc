"""Tensors whose bytes lie in a data file beside the model: where they lie, and reading them in blocks.

Source: onnx.proto, message TensorProto, field `external_data`, and the ONNX document ExternalData.md: `location` is a
path relative to the model's folder, `offset` and `length` are decimal numbers of bytes.

A location is refused when it leaves the folder, by ``..``, as an absolute path or through a symbolic link; when it is a
hard link, which may be a file of any other folder; and when the bytes named are not all there. Links are followed on
request, for caches that are built of them.
"""

import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto

from renorm_onnx.errors import ModelFileError
from renorm_onnx.files.file_writing import explain
from renorm_onnx.files.tensor_checks import quoted, tensor_bytes

# Blocks of this size stay in the processor's cache between reading, hashing and writing.
BLOCK_BYTES: Final = 1 << 18
_KEYS: Final = frozenset({"location", "offset", "length", "checksum", "basepath"})


class _DataFile(NamedTuple):
    """A data file that may be read: its true path, whether a link led there, its size in bytes."""

    path: str
    linked: bool
    size: int


def check_external(tensors: Iterable[TensorProto], folder: str, *, follow_links: bool) -> dict[str, str]:
    """Judge where the bytes of external tensors lie, without reading them.

    Entries that nobody needs are removed in place, and locations that are links are replaced by where they lead.

    Args:
        tensors: Messages whose `data_location` is EXTERNAL.
        folder: The model's folder.
        follow_links: Accept data files that are links.

    Returns:
        For each location that is used, the path of the file that it leads to.

    Raises:
        ModelFileError: A location is missing, outside of `folder`, no file, or holds fewer bytes than needed; two
            tensors overlap without being the same.
    """
    files: dict[str, _DataFile] = {}
    ranges: list[tuple[str, int, int, str]] = []
    for tensor in tensors:
        who = f"external tensor {quoted(tensor.name)}"
        entries = _entries(tensor, who)
        location = entries.get("location", "")
        if location not in files:
            files[location] = _find(location, folder, who, follow_links=follow_links)
        file = files[location]
        needed = tensor_bytes(tensor)
        if tensor.data_type == TensorProto.STRING:
            raise ModelFileError(f"{who} has type STRING; strings cannot be kept in a data file")
        offset = _number(entries, "offset", who, default=0)
        length = _number(entries, "length", who, default=needed)
        if length != needed:
            raise ModelFileError(
                f"{who} of type {ir.DataType(tensor.data_type).name} and shape {tuple(tensor.dims)} has length "
                f"{length:,}; expected {needed:,} bytes"
            )
        if offset + length > file.size:
            raise ModelFileError(
                f"{who} takes bytes {offset:,} to {offset + length:,} of {location!r}, which has {file.size:,}; "
                "the data file is truncated or belongs to another model"
            )
        if length:
            ranges.append((file.path, offset, offset + length, tensor.name))
        del tensor.external_data[:]
        for key, value in (
            ("location", file.path if file.linked else location),
            ("offset", offset),
            ("length", length),
        ):
            tensor.external_data.add(key=key, value=str(value))
    _check_overlaps(ranges)
    return {location: file.path for location, file in files.items()}


def _entries(tensor: TensorProto, who: str) -> dict[str, str]:
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key in entries:
            raise ModelFileError(f"{who} gives its {entry.key} twice; expected it once")
        if entry.key in _KEYS:
            entries[entry.key] = entry.value
    return entries


def _number(entries: dict[str, str], key: str, who: str, *, default: int) -> int:
    text = entries.get(key, str(default))
    if not (isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 20):
        raise ModelFileError(f"{who} has {key} {quoted(text)}; expected a number of bytes, 0 or more")
    return int(text)


def _find(location: str, folder: str, who: str, *, follow_links: bool) -> _DataFile:
    """The data file at `location`, judged before it is opened."""
    shown = quoted(location)
    if not location or not isinstance(location, str) or "\0" in location:
        raise ModelFileError(f"{who} has location {shown}; expected the name of a file in the model's folder")
    if os.path.isabs(location) or ".." in location.replace("\\", "/").split("/"):
        raise ModelFileError(
            f"{who} lies at {shown}, outside the model's folder; expected a path inside it, without '..'"
        )
    path = os.path.join(folder, location)
    try:
        status = os.stat(path)
        true_path = os.path.realpath(path)
    except FileNotFoundError:
        raise ModelFileError(f"{who} lies in {shown}, which is not in {folder!r}; put the data file there") from None
    except (OSError, ValueError) as error:
        reason = explain(error) if isinstance(error, OSError) else str(error)
        raise ModelFileError(f"{who} lies in {shown}, which cannot be read: {reason}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelFileError(f"{who} lies in {shown}, which is not a regular file")
    outside = os.path.commonpath([os.path.realpath(folder), true_path]) != os.path.realpath(folder)
    if not follow_links and (outside or status.st_nlink > 1):
        kind = f"a symbolic link to {true_path!r}, outside the model's folder" if outside else "a hard link"
        raise ModelFileError(
            f"{who} lies in {shown}, which is {kind}; copy the file there, or, if you trust the model, allow links "
            "(--allow-symlinks)"
        )
    return _DataFile(true_path, outside or status.st_nlink > 1, status.st_size)


def _check_overlaps(ranges: list[tuple[str, int, int, str]]) -> None:
    """Refuse tensors that share some of their bytes; the same bytes for two tensors are a tied weight, and allowed."""
    ranges.sort()
    for (path, start, end, name), (next_path, next_start, next_end, next_name) in itertools.pairwise(ranges):
        if path == next_path and next_start < end and (start, end) != (next_start, next_end):
            raise ModelFileError(
                f"external tensors {quoted(name)} and {quoted(next_name)} overlap in {os.path.basename(path)!r}: bytes "
                f"{start:,} to {end:,} and {next_start:,} to {next_end:,}"
            )


def set_folder(tensor: ir.ExternalTensor, folder: str) -> None:
    """Tell a tensor, in place, the folder that its location is relative to; a link's location is absolute by now."""
    tensor.base_dir = "" if os.path.isabs(tensor.location) else folder


def blocks(tensor: ir.ExternalTensor, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Read bytes `start` to `stop` of an external tensor in blocks, without mapping the file into memory.

    Args:
        tensor: Its data file has been judged by `check_external`.
        start: The first byte, counted from the tensor's own first.
        stop: The byte after the last; by default the tensor's end.

    Raises:
        ModelFileError: The file has become unreadable or shorter since the model was loaded.
    """
    stop = tensor.nbytes if stop is None else stop
    try:
        with open(tensor.path, "rb", buffering=0) as file:
            file.seek((tensor.offset or 0) + start)
            left = stop - start
            while left > 0:
                block = file.read(min(BLOCK_BYTES, left))
                if not block:
                    raise ModelFileError(
                        f"{tensor.path!r} has become {left:,} bytes too short for tensor {quoted(tensor.name)}; "
                        "was it replaced meanwhile?"
                    )
                left -= len(block)
                yield block
    except OSError as error:
        raise ModelFileError(f"cannot read {tensor.path!r}: {explain(error)}") from error


def read_rows(tensor: ir.TensorProtocol, start: int, stop: int) -> NDArray[np.generic]:
    """Read some rows of a tensor, from the disk alone where it is external: what a fold needs to work in blocks.

    Args:
        tensor: Shape (rows, *rest).
        start: The first row.
        stop: The row after the last.

    Returns:
        The rows, shape (stop - start, *rest), in the tensor's own type. Not to be written to.

    Raises:
        ModelFileError: As `blocks`.
    """
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth % 8:
        return tensor.numpy()[start:stop]
    rows, *rest = tensor.shape.numpy()
    row_bytes = tensor.nbytes // rows if rows else 0
    data = b"".join(blocks(tensor, start * row_bytes, stop * row_bytes))
    return np.frombuffer(data, tensor.dtype.numpy().newbyteorder("<")).reshape(stop - start, *rest)

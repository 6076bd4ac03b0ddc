"""New files that appear whole or not at all.

A `NewFile` is written under a temporary name in the folder of its target, forced to the disk and only then renamed,
so whoever opens the target, at any moment and after any crash, finds the old file or the new one. Nothing is left
behind when writing fails; a process that is killed leaves at most a file
``.NAME.XXXX.tmp``, which may be deleted.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterable
from types import TracebackType
from typing import BinaryIO, Final, Self

from renorm_onnx.errors import ModelFileError

# Small writes are collected up to this many bytes.
_BUFFERED: Final = 1 << 18
_ADVICE: Final = {
    errno.ENOSPC: "the disk is full; free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EFBIG: "the file would pass the size limit of this process (ulimit -f) or of the file system",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.ENAMETOOLONG: "the file name is too long; choose a shorter one",
}


def explain(error: OSError) -> str:
    """Say in a few words what an operating system error means for the person who chose the path."""
    return _ADVICE.get(error.errno or 0, (error.strerror or str(error)).lower())


def check_output(path: str | os.PathLike[str], *, inputs: Iterable[str | os.PathLike[str]] = (), force: bool) -> None:
    """Refuse an output path before any work is done for it.

    Args:
        path: Where a file is to be written.
        inputs: Files that are read for it. None of them may be the output, by whatever name.
        force: Allow an existing file to be replaced. To replace an input, leave it out of `inputs` as well.

    Raises:
        ModelFileError: The folder is missing or read-only; `path` is a folder, a link or something else that is not a
            regular file, one of `inputs`, or exists while `force` is off.
    """
    path = os.fspath(path)
    folder = os.path.dirname(path) or "."
    if not path:
        raise ModelFileError("output '' is empty; expected the name of a file to write")
    if not os.path.basename(path) or os.path.isdir(path):
        raise ModelFileError(f"output {path!r} is a folder; expected the name of a file to write")
    if not os.path.isdir(folder):
        raise ModelFileError(f"output {path!r}: the folder {folder!r} does not exist; create it first")
    for source in inputs:
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise ModelFileError(
                f"output {path!r} is the same file as the input {os.fspath(source)!r}; choose another output"
            )
    if os.path.islink(path):
        raise ModelFileError(
            f"output {path!r} is a symbolic link to {os.readlink(path)!r}; name the file itself or another output"
        )
    if os.path.exists(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ModelFileError(f"output {path!r} is not a regular file; choose another output")
        if not force:
            raise ModelFileError(f"output {path!r} exists; choose another name, or allow it to be replaced (--force)")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ModelFileError(f"output {path!r}: the folder {folder!r} is read-only; write elsewhere")


class NewFile:
    """A file under a temporary name, as a context manager: renamed by `publish`, removed if that never happens.

    Args:
        path: The target, used for the folder, the temporary name and messages. `publish` may choose another name.
        hashed: Keep a hash of the content.
    """

    def __init__(self, path: str | os.PathLike[str], *, hashed: bool = False) -> None:
        self.path = os.fspath(path)
        self.size = 0
        self._digest = hashlib.sha256() if hashed else None
        self._temporary = ""
        self._file: BinaryIO

    def __enter__(self) -> Self:
        folder, name = os.path.split(self.path)
        self._temporary = os.path.join(folder, f".{name[:200]}.{secrets.token_hex(4)}.tmp")
        try:
            self._file = open(self._temporary, "xb", _BUFFERED)
        except OSError as error:
            raise self._failure(error) from error
        return self

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append `data` and return its length in bytes; raises ModelFileError when the disk refuses."""
        if self._digest is not None:
            self._digest.update(memoryview(data).cast("B"))  # torch gives arrays of several dimensions
        try:
            size = self._file.write(data)
        except OSError as error:
            raise self._failure(error) from error
        self.size += size
        return size

    @property
    def content_hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of everything written so far; needs ``hashed=True``."""
        assert self._digest is not None
        return self._digest.hexdigest()[:16]

    def sync(self) -> None:
        """Force the content to the disk; raises ModelFileError when that fails (a full disk may show only now)."""
        if self._file.closed:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._failure(error) from error

    def publish(self, name: str | None = None) -> None:
        """Rename the finished file to its target, atomically, replacing what is there.

        Args:
            name: A name in the same folder to use instead of the target's.

        Raises:
            ModelFileError: The rename was refused; the target is as it was.
        """
        self.sync()
        target = self.path if name is None else os.path.join(os.path.dirname(self.path), name)
        try:
            with contextlib.suppress(FileNotFoundError):
                # A replaced file keeps its permissions: a private model must not become readable by others.
                os.chmod(self._temporary, stat.S_IMODE(os.stat(target).st_mode))
            os.replace(self._temporary, target)
        except OSError as error:
            raise self._failure(error) from error
        self._temporary = ""
        _sync_folder(os.path.dirname(target) or ".")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        if self._temporary:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)

    def _failure(self, error: OSError) -> ModelFileError:
        return ModelFileError(f"cannot write {self.path!r}: {explain(error)}; nothing was changed")


def _sync_folder(folder: str) -> None:
    """Make a rename in `folder` durable, where the system can (not on Windows, not on every network file system)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

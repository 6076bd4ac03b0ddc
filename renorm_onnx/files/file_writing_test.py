"""Output paths that are refused, and files that appear whole or not at all."""

import ctypes
import os
import resource
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from renorm_onnx.errors import ModelFileError
from renorm_onnx.files.file_writing import NewFile, check_output


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.onnx"
    path.write_bytes(b"old")
    return path


def replace(path: Path, *chunks: bytes, error: type[BaseException] | None = None) -> None:
    with NewFile(path) as file:
        for chunk in chunks:
            file.write(chunk)
        if error is not None:
            raise error
        file.publish()


def test_a_new_name_in_a_folder_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output(tmp_path / "new.onnx", force=False)
    monkeypatch.chdir(tmp_path)
    check_output("new.onnx", force=False)


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_cannot_be_a_file_is_refused(tmp_path: Path, old: Path, force: bool) -> None:
    for path, message in [
        (tmp_path, r"output '.*' is a folder; expected the name of a file to write"),
        (f"{tmp_path}/", r"is a folder"),
        (tmp_path / "no" / "new.onnx", r"output '.*new\.onnx': the folder '.*no' does not exist; create it first"),
        (old / "new.onnx", r"the folder '.*old\.onnx' does not exist; create it first"),
        ("", r"output '' is empty; expected the name of a file to write"),
    ]:
        with pytest.raises(ModelFileError, match=message):
            check_output(path, force=force)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match=r"output '.*pipe' is not a regular file; choose another output"):
        check_output(tmp_path / "pipe", force=force)


def test_an_existing_output_needs_force(old: Path) -> None:
    with pytest.raises(ModelFileError, match=r"exists; choose another name, or allow it to be replaced \(--force\)"):
        check_output(old, force=False)
    check_output(old, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_the_input_is_refused_as_output_by_whatever_name(tmp_path: Path, old: Path, force: bool) -> None:
    (tmp_path / "symbolic.onnx").symlink_to("old.onnx")
    (tmp_path / "hard.onnx").hardlink_to(old)
    (tmp_path / "sub").mkdir()
    for name in ("old.onnx", "symbolic.onnx", "hard.onnx", "sub/../old.onnx"):
        with pytest.raises(ModelFileError, match=r"is the same file as the input '.*old\.onnx'; choose another output"):
            check_output(tmp_path / name, inputs=[old], force=force)


def test_nothing_is_written_through_a_symbolic_link(tmp_path: Path, old: Path) -> None:
    (tmp_path / "link.onnx").symlink_to("old.onnx")
    (tmp_path / "dangling.onnx").symlink_to("absent.onnx")
    with pytest.raises(ModelFileError, match=r"is a symbolic link to 'old\.onnx'; name the file itself or another"):
        check_output(tmp_path / "link.onnx", force=True)
    with pytest.raises(ModelFileError, match=r"is a symbolic link to 'absent\.onnx'"):
        check_output(tmp_path / "dangling.onnx", force=False)


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whoever runs the tests may be root, whom permissions do not stop.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ModelFileError, match=r"the folder '.*' is read-only; write elsewhere"):
        check_output(tmp_path / "new.onnx", force=False)


def test_a_file_is_its_writes_in_order(tmp_path: Path) -> None:
    chunks = [b"a", bytearray(b"b" * 300_000), memoryview(b"c" * 10), b"", b"d" * (1 << 18)]
    with NewFile(tmp_path / "new", hashed=True) as file:
        assert [file.write(chunk) for chunk in chunks] == [len(chunk) for chunk in chunks]
        assert file.size == sum(map(len, chunks))
        first = file.content_hash
        file.publish()
    assert (tmp_path / "new").read_bytes() == b"".join(chunks)
    with NewFile(tmp_path / "other", hashed=True) as file:
        file.write(b"".join(chunks))
        assert file.content_hash == first
    assert os.listdir(tmp_path) == ["new"]


def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path: Path, old: Path) -> None:
    umask = os.umask(0o027)
    try:
        with NewFile(tmp_path / "new.onnx") as file:
            file.publish()
        assert stat.S_IMODE((tmp_path / "new.onnx").stat().st_mode) == 0o640
        old.chmod(0o600)
        with NewFile(old) as file:
            file.publish()
        assert stat.S_IMODE(old.stat().st_mode) == 0o600
    finally:
        os.umask(umask)


@pytest.fixture
def size_limit() -> Iterator[int]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    yield 500_000
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("chunks", [(250_000, 250_000, 250_000), (600_000,), (1,) * 10 + (400_000, 150_000)])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(old: Path, size_limit: int, chunks: tuple[int, ...]) -> None:
    assert sum(chunks) > size_limit
    with pytest.raises(ModelFileError, match=r"cannot write '.*old\.onnx': the file would pass the size limit of this"):
        replace(old, *map(bytes, chunks))
    assert old.read_bytes() == b"old"
    assert os.listdir(old.parent) == ["old.onnx"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_an_interruption_leaves_the_old_file_and_nothing_else(old: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        replace(old, b"new", error=error)
    assert old.read_bytes() == b"old"
    assert os.listdir(old.parent) == ["old.onnx"]


@pytest.mark.parametrize("step", ["builtins.open", "os.fsync", "os.replace"])
def test_a_failure_at_any_step_leaves_the_old_file_and_nothing_else(
    old: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, fail)
    with pytest.raises(
        ModelFileError, match=r"cannot write '.*old\.onnx': the disk is full; free some space .*; nothing"
    ):
        replace(old, b"new")
    monkeypatch.undo()
    assert old.read_bytes() == b"old"
    assert os.listdir(old.parent) == ["old.onnx"]


def test_an_array_of_several_dimensions_is_written_as_its_bytes(tmp_path: Path) -> None:
    rows = ((ctypes.c_ubyte * 3) * 2)((1, 2, 3), (4, 5, 6))  # the form in which torch gives tensors
    with NewFile(tmp_path / "new", hashed=True) as file:
        assert file.write(rows) == file.size == 6
        file.publish()
    assert (tmp_path / "new").read_bytes() == bytes(range(1, 7))


def test_of_two_writers_at_once_one_wins_whole(tmp_path: Path) -> None:
    contents = [bytes([i]) * 400_000 for i in range(4)]

    def write(content: bytes) -> None:
        for _ in range(5):
            with NewFile(tmp_path / "new") as file:
                file.write(content)
                file.publish()

    threads = [threading.Thread(target=write, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "new").exists():
            assert (tmp_path / "new").read_bytes() in contents
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == ["new"]

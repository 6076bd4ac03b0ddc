"""What a shell can do to the command: broken pipes, closed streams, full disks, interrupts, names in no encoding."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest

from renorm_onnx import cli
from renorm_onnx.cli_test import small_model

COMMAND = [sys.executable, "-m", "renorm_onnx"]


@pytest.fixture
def folder(tmp_path) -> Path:
    onnx.save(small_model(), tmp_path / "model.onnx")
    return tmp_path


def started(folder, *arguments, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | options.pop("env", {})
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([*COMMAND, *map(os.fsdecode, arguments)], cwd=folder, env=environment, **streams)


def finished(folder, *arguments, **options) -> tuple[int, str, str]:
    process = started(folder, *arguments, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, (out or b"").decode(errors="surrogateescape"), (err or b"").decode()


FINE = [["fuse"], ["verify"], ["inspect"], ["inline"], ["bench", "--rounds", "1"]]


@pytest.mark.parametrize("command", FINE, ids=lambda c: c[0])
def test_a_file_name_in_no_encoding_is_a_file_name(folder, command):
    os.rename(folder / "model.onnx", os.fsencode(folder) + b"/a b \xff.onnx")
    status, out, err = finished(folder, *command, "--json", b"a b \xff.onnx", env={"LC_ALL": "C", "PYTHONUTF8": "0"})
    assert (status, err) == (cli.YES, "")
    assert json.loads(out)["schema_version"] == 1
    assert finished(folder, "inspect", b"a b \xff.onnx", env={"LC_ALL": "C", "PYTHONUTF8": "0"})[::2] == (cli.YES, "")


@pytest.mark.parametrize("arguments", [["inspect", "model.onnx"], ["fuse", "model.onnx"]], ids=lambda a: a[0])
def test_a_reader_that_goes_away_changes_nothing(folder, arguments):
    read, write = os.pipe()
    os.close(read)
    assert finished(folder, *arguments, stdout=write) == (cli.YES, "", "")
    os.close(write)


def test_a_reader_that_goes_away_does_not_turn_a_no_into_a_yes(folder):
    onnx.save(small_model(scale=0.7001), folder / "wrong.onnx")
    read, write = os.pipe()
    os.close(read)
    assert finished(folder, "verify", "model.onnx", "wrong.onnx", stdout=write) == (cli.NO, "", "")
    os.close(write)


def test_a_result_that_cannot_be_printed_is_one_line(folder):
    with open("/dev/full", "w") as full:
        status, _, err = finished(folder, "inspect", "model.onnx", stdout=full)
    assert (status, err) == (cli.BAD_INPUT, "renorm-onnx inspect: cannot print the result: no space left on device\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_process_without_its_standard_streams_does_its_work(folder, closed):
    words = " ".join(COMMAND)
    done = subprocess.run(f"{words} fuse model.onnx {closed}", shell=True, cwd=folder, timeout=120)
    assert done.returncode == cli.YES
    assert onnx.load(folder / "model.fused.onnx").graph.node[0].op_type == "Conv"


def test_an_error_never_goes_to_stdout(folder):
    command = f"{' '.join(COMMAND)} inspect absent.onnx --json 2>&-"
    done = subprocess.run(command, shell=True, cwd=folder, timeout=120, stdout=subprocess.PIPE)
    assert done.returncode == cli.BAD_INPUT
    assert json.loads(done.stdout)["error"]["type"] == "ModelFileError"


@pytest.mark.parametrize(
    ("arguments", "status", "kind"),
    [
        (["fuse", "model.onnx"], cli.YES, None),
        (["fuse", "model.onnx", "--check"], cli.NO, None),
        (["verify", "model.onnx", "wrong.onnx"], cli.NO, None),
        (["fuse", "absent.onnx"], cli.BAD_INPUT, "ModelFileError"),
        (["bench", "model.onnx", "--rounds", "1", "--plot", "absent/x.png"], cli.BAD_INPUT, "ModelFileError"),
        (["verify", "model.onnx", "--ep", "gpu9000"], cli.BAD_INPUT, "InputError"),
        (["inline"], cli.BAD_INPUT, "UsageError"),
        (["absent"], cli.BAD_INPUT, "UsageError"),
        (["inspect", "model.onnx", "--absent"], cli.BAD_INPUT, "UsageError"),
    ],
    ids=str,
)
def test_json_is_one_document_at_every_exit_status(folder, capsys, monkeypatch, arguments, status, kind):
    monkeypatch.chdir(folder)
    onnx.save(small_model(scale=0.7001), "wrong.onnx")
    assert cli.main([*arguments, "--json"]) == status
    said = json.loads(capsys.readouterr().out)
    assert said.get("error", {}).get("type") == kind
    assert kind is None or (said["ok"], said["exit_status"]) == (False, status)


def test_a_machine_without_memory_is_exit_3(folder, capsys, monkeypatch):
    from renorm_onnx import inspection

    def hungry(*_, **__):
        raise MemoryError

    monkeypatch.setattr(inspection, "inspect_model", hungry)
    assert cli.main(["inspect", str(folder / "model.onnx"), "--json"]) == cli.BAD_MACHINE
    said = capsys.readouterr()
    assert said.err == "renorm-onnx inspect: out of memory\n"
    assert json.loads(said.out)["error"] == {"type": "MemoryError", "message": "out of memory"}


@pytest.fixture
def broken(folder, monkeypatch):
    """A model, and an `inspect` that has a fault of its own."""
    from renorm_onnx import inspection

    def faulty(*_, **__):
        return {}["nobody\nknows"]

    monkeypatch.setattr(inspection, "inspect_model", faulty)
    return str(folder / "model.onnx")


def test_a_fault_of_our_own_is_one_line_and_a_status_that_is_no_verdict(broken, capsys):
    assert cli.main(["inspect", broken]) == cli.INTERNAL
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "renorm-onnx inspect: internal error: KeyError: 'nobody\\nknows'; please report it with what --traceback adds\n"
    )
    assert cli.INTERNAL not in (cli.YES, cli.NO, cli.BAD_INPUT, cli.BAD_MACHINE, cli.INTERRUPTED)


def test_a_fault_of_our_own_shows_where_it_arose_on_request(broken, capsys):
    assert cli.main(["inspect", broken, "--traceback"]) == cli.INTERNAL
    said = capsys.readouterr().err
    assert "in faulty" in said
    assert said.endswith("internal error: KeyError: 'nobody\\nknows'; please report it\n")


def test_a_fault_of_our_own_is_json_too(broken, capsys):
    assert cli.main(["inspect", broken, "--json", "--traceback"]) == cli.INTERNAL
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["exit_status"], said["error"]["type"]) == (False, cli.INTERNAL, "KeyError")
    assert said["error"]["message"].startswith("internal error: KeyError")


def test_an_interrupt_is_json_too(folder, capsys, monkeypatch):
    from renorm_onnx import inspection

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "inspect_model", interrupted)
    assert cli.main(["inspect", str(folder / "model.onnx"), "--json"]) == cli.INTERRUPTED
    said = capsys.readouterr()
    assert said.err == "renorm-onnx: interrupted\n"
    document = json.loads(said.out)
    assert document["exit_status"] == cli.INTERRUPTED
    assert document["error"] == {"type": "KeyboardInterrupt", "message": "interrupted"}


def test_a_result_that_is_no_json_is_a_fault_of_our_own(folder, capsys, monkeypatch):
    from renorm_onnx.inspection import Inspection

    monkeypatch.setattr(Inspection, "to_dict", lambda self: {"value": float("nan")})
    assert cli.main(["inspect", str(folder / "model.onnx"), "--json"]) == cli.INTERNAL
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "ValueError"


def test_a_name_that_the_terminal_cannot_show_is_escaped(folder):
    model = small_model()
    model.graph.input[0].name = model.graph.node[0].input[0] = "größe"
    onnx.save(model, folder / "model.onnx")
    status, out, err = finished(folder, "inspect", "model.onnx", env={"PYTHONIOENCODING": "ascii:strict"})
    assert (status, err) == (cli.YES, "")
    assert "gr\\xf6\\xdfe" in out


def small_files() -> None:
    """In a child: no file may grow beyond 300 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))


@pytest.mark.parametrize("command", ["fuse", "inline"])
def test_a_disk_that_takes_no_more_leaves_nothing_behind(folder, command):
    before = sorted(os.listdir(folder))
    status, out, err = finished(folder, command, "model.onnx", preexec_fn=small_files)
    assert (status, out) == (cli.BAD_INPUT, "")
    assert "would pass the size limit of this process" in err
    assert err.count("\n") == 1
    assert sorted(os.listdir(folder)) == before


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    "command",
    [["fuse", "--ep", "cpu"], ["verify", "--inputs", "500"], ["bench", "--rounds", "100000"]],
    ids=lambda c: c[0],
)
def test_an_interrupt_is_one_line_and_leaves_nothing_behind(folder, command):
    before = sorted(os.listdir(folder))
    interrupted = 0
    began = time.monotonic()
    assert finished(folder, "--version")[0] == cli.YES
    entered = 1.5 * (time.monotonic() - began)  # before that, Python itself has the signal
    for delay in (0.2, 0.6, 1.4):
        process = started(folder, *command, "model.onnx")
        time.sleep(entered + delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        # The signal itself ends Python where it comes inside `exec`, as of a named tuple, or after all is done, when
        # nobody handles it any more: to a shell that is the same status.
        by_signal = process.returncode == -signal.SIGINT
        status = cli.INTERRUPTED if by_signal else process.returncode
        assert status in (cli.INTERRUPTED, cli.YES), err
        if status == cli.INTERRUPTED:
            interrupted += 1
            assert err.decode() == "renorm-onnx: interrupted\n" or (by_signal and not err)
        (folder / "model.fused.onnx").unlink(missing_ok=True)
        assert sorted(os.listdir(folder)) == before
    assert interrupted

"""The command `renorm-onnx`: it runs what `arguments` understood, and prints, nothing else.

Results go to stdout, everything else to stderr. Exit status: 0 yes, 1 the verdict is no, 2 wrong usage or bad input,
3 this machine lacks what was asked for, 4 an internal error, 130 interrupted. Nothing heavy is imported before it is
needed, torch never.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from renorm_onnx.arguments import UsageError, parse
from renorm_onnx.deferral import defer_imports
from renorm_onnx.interrupts import interrupts_held

YES, NO, BAD_INPUT, BAD_MACHINE, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 4, 130

# What a command gives back: its exit status, and a result with `to_dict` and a readable form.
_Outcome = tuple[int, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments without the program's name; None: those of the process, which is about to end then: it
            looks for no garbage, and leaves its memory to the system.

    Returns:
        The exit status.
    """
    _open_standard_streams()
    if argv is not None:
        return _run(argv)
    gc.disable()
    defer_imports()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a name is no reason to fail
    status = _run(sys.argv[1:])
    gc.freeze()  # or Python would search all of it once more on its way out
    return status


def _open_standard_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr an empty one.

    Its first model file would else be opened in its place, and be written to by whatever library prints.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while os.open(os.devnull, os.O_RDWR) < 2:
            pass
        sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (as long-lived as the process)
        sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _run(argv: Sequence[str]) -> int:
    try:
        return _run_command(argv)
    except KeyboardInterrupt as error:
        return _fail(error, "renorm-onnx: interrupted", INTERRUPTED, json_too="--json" in argv)


def _run_command(argv: Sequence[str]) -> int:
    try:
        arguments = parse(argv)
    except UsageError as error:
        return _fail(error, str(error), BAD_INPUT, json_too="--json" in argv)
    from renorm_onnx.errors import MachineError, RenormError, VerificationError

    who = f"renorm-onnx {arguments.command}"
    try:
        if arguments.command != "doctor":
            with interrupts_held():
                importlib.import_module("onnx")
        status, result = _COMMANDS[arguments.command](arguments)
        text = json.dumps(result.to_dict(), allow_nan=False, default=str) if arguments.json else str(result)
    except RenormError as error:
        statuses = {MachineError: BAD_MACHINE, VerificationError: NO}
        status = next((status for kind, status in statuses.items() if isinstance(error, kind)), BAD_INPUT)
        said = str(error).removeprefix(f"{arguments.command}: ")  # the function of that name speaks as itself
        return _fail(error, f"{who}: {said}", status, json_too=arguments.json)
    except MemoryError as error:
        return _fail(error, f"{who}: out of memory", BAD_MACHINE, json_too=arguments.json)
    except Exception as error:  # whatever it is, it is ours, and no verdict: Python's own status for it would be 1
        if arguments.traceback:
            traceback.print_exc()
        said = f"internal error: {type(error).__name__}: {error}"
        text = f"{who}: {said}; please report it" + ("" if arguments.traceback else " with what --traceback adds")
        return _fail(error, text, INTERNAL, json_too=arguments.json)
    return _say(text, who, status)


def _fail(error: BaseException, text: str, status: int, *, json_too: bool) -> int:
    """Say what was wrong, in one line, and return `status`."""
    text = " ".join(text.split())
    print(text, file=sys.stderr)
    if not json_too:
        return status
    said = {"type": type(error).__name__, "message": text.partition(": ")[2]}
    document = {"schema_version": 1, "ok": False, "exit_status": status, "error": said}
    return _say(json.dumps(document), "renorm-onnx", status)


def _say(text: str, who: str, status: int) -> int:
    """Print a result to stdout and return `status`, which holds even if the reader went away before the end."""
    try:
        print(text)
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"{who}: cannot print the result: {(error.strerror or str(error)).lower()}", file=sys.stderr)
            return BAD_INPUT
    return status


def _fuse(arguments: argparse.Namespace) -> _Outcome:
    from renorm_onnx.delivery import fuse_file
    from renorm_onnx.fusion.engine import FuseOptions

    options = FuseOptions(
        target=arguments.target,
        allow_cancellation=arguments.allow_cancellation,
        merge_branches=not arguments.no_merge_branches,
        assume_constant_initializers=arguments.assume_constant_initializers,
    )
    result = fuse_file(
        arguments.model,
        arguments.output,
        options=options,
        force=arguments.force,
        in_place=arguments.in_place,
        dry_run=arguments.check,
        verify="never" if arguments.no_verify else "require" if arguments.require_verify else "auto",
        providers=arguments.ep,
        seed=arguments.seed,
        allow_symlinks=arguments.allow_symlinks,
    )
    if not result.ok:
        said, hint = "could not be judged", ""
        if result.only_rounds_worse:
            said, hint = "rounds worse", "; every rewritten place holds by itself (--no-verify writes it)"
        elif result.verdict is not None and result.verdict.outcome == "no":
            said = "is not right"
        print(f"renorm-onnx fuse: the fused model {said}, so {result.target!r} was not written{hint}", file=sys.stderr)
    return NO if not result.ok or (arguments.check and result.report.changed) else YES, result


def _verify(arguments: argparse.Namespace) -> _Outcome:
    from renorm_onnx.runtime.parity import verify

    verdict = verify(
        arguments.reference,
        arguments.fused,
        providers=arguments.ep,
        inputs=arguments.inputs,
        seed=arguments.seed,
        layers=arguments.layers,
        allow_symlinks=arguments.allow_symlinks,
    )
    return YES if verdict.ok else NO, verdict


def _inspect(arguments: argparse.Namespace) -> _Outcome:
    from renorm_onnx.inspection import inspect_model

    links = arguments.allow_symlinks
    return YES, inspect_model(arguments.model, explain=arguments.explain, allow_symlinks=links)


def _bench(arguments: argparse.Namespace) -> _Outcome:
    from renorm_onnx.errors import InputError
    from renorm_onnx.files.file_writing import check_output
    from renorm_onnx.runtime.bench import bench, plot

    if arguments.compare and len(arguments.models) < 2:
        raise InputError("--compare needs two models or more, since it compares the others with the first")
    if arguments.plot:  # before minutes of timing, not after
        check_output(arguments.plot, inputs=arguments.models, force=True)
    report = bench(
        arguments.models,
        providers=arguments.ep,
        batches=arguments.batch,
        threads=arguments.threads,
        optimize=arguments.opt,
        rounds=arguments.rounds,
        allow_symlinks=arguments.allow_symlinks,
    )
    if arguments.plot:
        plot(report, arguments.plot)
    return NO if arguments.compare and report.regressions() else YES, report


def _inline(arguments: argparse.Namespace) -> _Outcome:
    from renorm_onnx.delivery import inline_file

    links = arguments.allow_symlinks
    return YES, inline_file(arguments.model, arguments.output, force=arguments.force, allow_symlinks=links)


def _doctor(arguments: argparse.Namespace) -> _Outcome:
    from renorm_onnx.runtime.doctor import diagnose

    diagnosis = diagnose(arguments.ep)
    return YES if diagnosis.ok else BAD_MACHINE, diagnosis


_COMMANDS = {
    "fuse": _fuse,
    "verify": _verify,
    "inspect": _inspect,
    "bench": _bench,
    "inline": _inline,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())

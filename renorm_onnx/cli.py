"""The command `renorm-onnx`: argument parsing and printing, nothing else.

Results go to stdout, everything else to stderr. Exit status: 0 yes, 1 the verdict is no, 2 wrong usage or bad input,
3 this machine lacks what was asked for, 130 interrupted. Nothing heavy is imported before it is needed, torch never.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from renorm_onnx import __version__
from renorm_onnx.interrupts import interrupts_held

YES, NO, BAD_INPUT, BAD_MACHINE, INTERRUPTED = 0, 1, 2, 3, 130


# What a command gives back: its exit status, and a result with `to_dict` and a readable form.
_Outcome = tuple[int, Any]


class _UsageError(Exception):
    """The arguments are not those of any command."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{self.prog}: {message}; see {self.prog} --help")


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
    except KeyboardInterrupt:
        print("renorm-onnx: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run_command(argv: Sequence[str]) -> int:
    try:
        arguments = _parser().parse_args(argv)
    except _UsageError as error:
        return _fail(error, str(error), BAD_INPUT, json_too="--json" in argv)
    from renorm_onnx.errors import MachineError, RenormError, VerificationError

    who = f"renorm-onnx {arguments.command}"
    try:
        if arguments.command != "doctor":
            with interrupts_held():
                importlib.import_module("onnx")
        status, result = arguments.run(arguments)
        text = json.dumps(result.to_dict(), allow_nan=False, default=str) if arguments.json else str(result)
    except RenormError as error:
        statuses = {MachineError: BAD_MACHINE, VerificationError: NO}
        status = next((status for kind, status in statuses.items() if isinstance(error, kind)), BAD_INPUT)
        return _fail(error, f"{who}: {error}", status, json_too=arguments.json)
    except MemoryError as error:
        return _fail(error, f"{who}: out of memory", BAD_MACHINE, json_too=arguments.json)
    return _say(text, who, status)


def _fail(error: BaseException, text: str, status: int, *, json_too: bool) -> int:
    """Say what was wrong, in one line, and return `status`."""
    text = " ".join(text.split())
    print(text, file=sys.stderr)
    if not json_too:
        return status
    said = {"type": type(error).__name__.strip("_"), "message": text.partition(": ")[2]}
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="renorm-onnx",
        description="Fold the norms of an ONNX model that fold exactly, say why the rest stays, and prove the result.",
        epilog="Exit status: 0 yes, 1 the verdict is no, 2 bad usage or input, 3 this machine cannot, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"renorm-onnx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (_add_fuse, _add_verify, _add_inspect, _add_bench, _add_inline, _add_doctor):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], _Outcome], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout instead of text")
    parser.set_defaults(run=run)
    return parser


def _add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "-o", "--output", metavar="OUT", help=f"file to write (default: MODEL without .onnx, plus .{what}.onnx)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def _add_links(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-symlinks",
        action="store_true",
        help="accept data files that are links to somewhere outside the model's folder",
    )


def _add_providers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ep",
        type=_names,
        default=("cpu",),
        metavar="NAMES",
        help="where to run: cpu, cuda or cpu,cuda (default: cpu)",
    )


def _add_fuse(commands: Any) -> None:
    parser = _command(commands, "fuse", _fuse, "Fold the norms of MODEL, check the result, and write it.")
    parser.add_argument("model", metavar="MODEL", help="an ONNX file")
    _add_output(parser, "fused")
    parser.add_argument("--in-place", action="store_true", help="write the result over MODEL itself")
    check = "write nothing; exit 1 means that a norm could be folded (or a branch or constant operator), 0 that none"
    parser.add_argument("--check", action="store_true", help=check)
    parser.add_argument(
        "--target",
        choices=("fp32", "tf32", "fp16"),
        default="fp32",
        help="the arithmetic it will be run in; narrow ones fold less (default: fp32)",
    )
    parser.add_argument(
        "--allow-cancellation",
        action="store_true",
        help="fold a norm into the operator behind it even where that costs precision",
    )
    parser.add_argument(
        "--no-merge-branches",
        action="store_true",
        help="do not merge parallel linear branches (RepVGG) into one operator",
    )
    parser.add_argument(
        "--assume-constant-initializers",
        action="store_true",
        help="fold weights that are inputs too, so that a caller may give others",
    )
    _add_links(parser)
    checks = parser.add_mutually_exclusive_group()
    checks.add_argument("--no-verify", action="store_true", help="do not check the result")
    checks.add_argument("--require-verify", action="store_true", help="fail unless the result was checked end to end")
    _add_providers(parser)
    parser.add_argument(
        "--seed", type=_seed, metavar="N", default=0, help="of the random inputs of the check (default: 0)"
    )


def _add_verify(commands: Any) -> None:
    text = "Judge whether FUSED computes what REFERENCE does, both measured against an evaluation in float64."
    parser = _command(commands, "verify", _verify, text)
    parser.add_argument("reference", metavar="REFERENCE", help="the original ONNX file")
    parser.add_argument(
        "fused", metavar="FUSED", nargs="?", help="what was made of it (default: REFERENCE is fused now, in memory)"
    )
    _add_providers(parser)
    parser.add_argument(
        "--inputs",
        type=_inputs,
        metavar="N|FILE|DIR",
        help="how many random inputs, an .npz or .npy file with your own, or a folder of such",
    )
    parser.add_argument("--seed", type=_seed, metavar="N", default=0, help="of the random inputs (default: 0)")
    parser.add_argument(
        "--layers",
        action="store_true",
        help="also compare every intermediate value that both models name, and show where an error begins",
    )
    _add_links(parser)


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        _inspect,
        "Show what is in MODEL: inputs, outputs, operators, norms, and the layers with their statistics.",
    )
    parser.add_argument("model", metavar="MODEL", help="an ONNX file")
    parser.add_argument("--explain", action="store_true", help="say of each norm where it would go, or why it stays")
    _add_links(parser)


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        _bench,
        "Time models against each other in onnxruntime, in turns, so that all meet the same machine.",
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="ONNX files with the same inputs")
    _add_providers(parser)
    parser.add_argument(
        "--batch", type=_numbers, default=(1,), metavar="LIST", help="batch sizes, with commas (default: 1)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", default=1, help="threads within an operator; 0: one per core (default: 1)"
    )
    parser.add_argument(
        "--opt",
        type=_names,
        default=("all",),
        metavar="LIST",
        help="onnxruntime's optimizations: off, basic, extended, all (default: all)",
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", default=30, help="how often each model is timed (default: 30)"
    )
    parser.add_argument("--compare", action="store_true", help="exit 1 if another MODEL is slower than the first")
    parser.add_argument("--plot", metavar="PNG", help="draw the times into this file; needs matplotlib")
    _add_links(parser)


def _add_inline(commands: Any) -> None:
    parser = _command(
        commands,
        "inline",
        _inline,
        "Replace the BatchRenormalization functions in MODEL by plain ONNX operators, for runtimes without functions.",
    )
    parser.add_argument("model", metavar="MODEL", help="an ONNX file")
    _add_output(parser, "inlined")
    _add_links(parser)


def _add_doctor(commands: Any) -> None:
    parser = _command(commands, "doctor", _doctor, "Say what this machine can run, and what to install.")
    parser.add_argument("--ep", metavar="NAME", help="exit 3 unless this one works: cpu, cuda or cuda:N")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected whole numbers with commas, such as 1,32") from None


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a whole number, 0 or more")
    return int(text)


def _inputs(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


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
        print(f"renorm-onnx fuse: the fused model is not right, so {result.target!r} was not written", file=sys.stderr)
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


if __name__ == "__main__":
    sys.exit(main())

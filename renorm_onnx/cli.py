"""The command `renorm-onnx`: argument parsing and printing, nothing else.

Results go to stdout, everything else to stderr. Exit status: 0 yes, 1 the verdict is no, 2 wrong usage or bad input,
3 this machine lacks what was asked for. Nothing heavy is imported before a command needs it, and torch never.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from renorm_onnx import __version__

YES, NO, BAD_INPUT, BAD_MACHINE = 0, 1, 2, 3


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments without the program's name; None: those of the process, which is about to end then: it
            looks for no garbage, and leaves its memory to the system.

    Returns:
        The exit status.
    """
    arguments = _parser().parse_args(argv)
    if argv is not None:
        return _run(arguments)
    gc.disable()
    status = _run(arguments)
    gc.freeze()  # or Python would search all of it once more on its way out
    return status


def _run(arguments: argparse.Namespace) -> int:
    from renorm_onnx.errors import MachineError, RenormError, VerificationError

    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except RenormError as error:
        statuses = {MachineError: BAD_MACHINE, VerificationError: NO}
        status = next((status for kind, status in statuses.items() if isinstance(error, kind)), BAD_INPUT)
        _fail(arguments, error, status)
    except KeyboardInterrupt:
        status = 130
        print(f"renorm-onnx {arguments.command}: interrupted", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = YES
    return status


def _fail(arguments: argparse.Namespace, error: Exception, status: int) -> None:
    message = " ".join(str(error).split())
    print(f"renorm-onnx {arguments.command}: {message}", file=sys.stderr)
    if getattr(arguments, "json", False):
        said = {"type": type(error).__name__, "message": message}
        print(json.dumps({"schema_version": 1, "ok": False, "exit_status": status, "error": said}))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="renorm-onnx",
        description="Fold the norms of an ONNX model that fold exactly, say why the rest stays, and prove the result.",
        epilog="Exit status: 0 yes, 1 the verdict is no, 2 wrong usage or bad input, 3 this machine cannot.",
    )
    parser.add_argument("--version", action="version", version=f"renorm-onnx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (_add_fuse, _add_verify, _add_inspect, _add_bench, _add_inline, _add_doctor):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout instead of text")
    parser.set_defaults(run=run)
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="OUT", help="file to write (default: beside MODEL)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def _add_links(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow-symlinks", action="store_true", help="follow links to data outside a model's folder")


def _add_providers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ep",
        type=_names,
        default=("cpu",),
        metavar="NAMES",
        help="execution providers: cpu, cuda or both with a comma",
    )


def _add_fuse(commands: Any) -> None:
    parser = _command(commands, "fuse", _fuse, "Fold the norms of MODEL, check the result, and write it.")
    parser.add_argument("model", metavar="MODEL", help="an ONNX file")
    _add_output(parser)
    parser.add_argument("--in-place", action="store_true", help="replace MODEL itself")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a norm could be folded")
    parser.add_argument(
        "--target", choices=("fp32", "tf32", "fp16"), default="fp32", help="arithmetic that will run it (default: fp32)"
    )
    parser.add_argument("--allow-cancellation", action="store_true", help="fold forward at any cost in precision")
    parser.add_argument("--no-merge-branches", action="store_true", help="keep parallel linear branches apart")
    parser.add_argument(
        "--assume-constant-initializers", action="store_true", help="fold weights that a caller may override"
    )
    _add_links(parser)
    checks = parser.add_mutually_exclusive_group()
    checks.add_argument("--no-verify", action="store_true", help="do not check the result")
    checks.add_argument("--require-verify", action="store_true", help="fail if the result cannot be checked whole")
    _add_providers(parser)
    parser.add_argument("--seed", type=_seed, default=0, help="of the inputs for the check (default: 0)")


def _add_verify(commands: Any) -> None:
    text = "Judge FUSED (default: REFERENCE, fused) against a float64 evaluation of REFERENCE."
    parser = _command(commands, "verify", _verify, text)
    parser.add_argument("reference", metavar="REFERENCE", help="the original ONNX file")
    parser.add_argument("fused", metavar="FUSED", nargs="?", help="the rewritten ONNX file")
    _add_providers(parser)
    parser.add_argument(
        "--inputs", type=_inputs, metavar="N|FILE|DIR", help="how many generated inputs, or .npz/.npy data"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of generated inputs (default: 0)")
    parser.add_argument("--layers", action="store_true", help="compare every value that both models name")
    _add_links(parser)


def _add_inspect(commands: Any) -> None:
    parser = _command(commands, "inspect", _inspect, "Show what is in MODEL: operators, norms, layers.")
    parser.add_argument("model", metavar="MODEL", help="an ONNX file")
    parser.add_argument("--explain", action="store_true", help="say of each norm where it would go, or why it stays")
    _add_links(parser)


def _add_bench(commands: Any) -> None:
    parser = _command(commands, "bench", _bench, "Time MODELS against each other in onnxruntime, interleaved.")
    parser.add_argument("models", metavar="MODEL", nargs="+", help="ONNX files with the same inputs")
    _add_providers(parser)
    parser.add_argument("--batch", type=_numbers, default=(1,), metavar="LIST", help="batch sizes (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads within an operator (default: 1)")
    parser.add_argument("--opt", type=_names, default=("all",), metavar="LIST", help="off,basic,extended,all")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds (default: 30)")
    parser.add_argument("--compare", action="store_true", help="exit 1 if a later MODEL is slower than the first")
    parser.add_argument("--plot", metavar="PNG", help="write a plot")
    _add_links(parser)


def _add_inline(commands: Any) -> None:
    parser = _command(commands, "inline", _inline, "Replace the renorm functions of MODEL by plain ONNX operators.")
    parser.add_argument("model", metavar="MODEL", help="an ONNX file")
    _add_output(parser)
    _add_links(parser)


def _add_doctor(commands: Any) -> None:
    parser = _command(commands, "doctor", _doctor, "Say what this machine can run, and what to install.")
    parser.add_argument("--ep", choices=("cpu", "cuda"), help="exit 3 unless this execution provider works")


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


def _say(arguments: argparse.Namespace, result: Any) -> None:
    """Print a result that has `to_dict` and a readable form."""
    print(json.dumps(result.to_dict(), allow_nan=False, default=str) if arguments.json else result)


def _fuse(arguments: argparse.Namespace) -> int:
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
    _say(arguments, result)
    if not result.ok:
        print(f"renorm-onnx fuse: the fused model is not right, so {result.target!r} was not written", file=sys.stderr)
    return NO if not result.ok or (arguments.check and result.report.changed) else YES


def _verify(arguments: argparse.Namespace) -> int:
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
    _say(arguments, verdict)
    return YES if verdict.ok else NO


def _inspect(arguments: argparse.Namespace) -> int:
    from renorm_onnx.inspection import inspect_model

    _say(arguments, inspect_model(arguments.model, explain=arguments.explain, allow_symlinks=arguments.allow_symlinks))
    return YES


def _bench(arguments: argparse.Namespace) -> int:
    from renorm_onnx.file_writing import check_output
    from renorm_onnx.runtime.bench import bench, plot

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
    _say(arguments, report)
    if arguments.plot:
        plot(report, arguments.plot)
    return NO if arguments.compare and report.regressions() else YES


def _inline(arguments: argparse.Namespace) -> int:
    from renorm_onnx.delivery import inline_file

    links = arguments.allow_symlinks
    _say(arguments, inline_file(arguments.model, arguments.output, force=arguments.force, allow_symlinks=links))
    return YES


def _doctor(arguments: argparse.Namespace) -> int:
    from renorm_onnx.runtime.doctor import diagnose

    diagnosis = diagnose(arguments.ep)
    _say(arguments, diagnosis)
    return YES if diagnosis.ok else BAD_MACHINE


if __name__ == "__main__":
    sys.exit(main())

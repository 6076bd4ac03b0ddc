"""The arguments of the command `renorm-onnx`: which there are, what they mean, and what is no argument."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from renorm_onnx.version import __version__


class UsageError(Exception):
    """The arguments are not those of any command."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see {self.prog} --help")


class _CommandParser(_Parser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # handed on, they would be refused in the name of the program, with the help of all commands
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return what was asked for: `command`, `json`, `traceback`, and the options of the command.

    Args:
        argv: The arguments without the program's name.

    Raises:
        UsageError: They are not those of any command.
        SystemExit: All that was asked for was the help or the version, which are printed.
    """
    return _parser().parse_args(argv)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="renorm-onnx",
        description="Fold the norms of an ONNX model that fold exactly, say why the rest stays, and prove the result.",
        epilog="Exit status: 0 yes, 1 the verdict is no, 2 bad usage or input, 3 this machine cannot, "
        "4 internal error, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"renorm-onnx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser)
    for add in (_add_fuse, _add_verify, _add_inspect, _add_bench, _add_inline, _add_doctor):
        add(commands)
    return parser


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout instead of text")
    parser.add_argument("--traceback", action="store_true", help="print where an internal error arose, for your report")
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
    parser = _command(commands, "fuse", "Fold the norms of MODEL, check the result, and write it.")
    parser.add_argument("model", metavar="MODEL", help="an ONNX file")
    _add_output(parser, "fused")
    help_in_place = "write the result over MODEL itself; over a write-protected one only with --force"
    parser.add_argument("--in-place", action="store_true", help=help_in_place)
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
    parser = _command(commands, "verify", text)
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
        "Show what is in MODEL: inputs, outputs, operators, norms, and the layers with their statistics.",
    )
    parser.add_argument("model", metavar="MODEL", help="an ONNX file")
    parser.add_argument("--explain", action="store_true", help="say of each norm where it would go, or why it stays")
    _add_links(parser)


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
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
        "Replace the BatchRenormalization functions in MODEL by plain ONNX operators, for runtimes without functions.",
    )
    parser.add_argument("model", metavar="MODEL", help="an ONNX file")
    _add_output(parser, "inlined")
    _add_links(parser)


def _add_doctor(commands: Any) -> None:
    parser = _command(commands, "doctor", "Say what this machine can run, and what to install.")
    parser.add_argument("--ep", metavar="NAME", help="exit 3 unless this one works: cpu, cuda or cuda:N")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a name, or several with commas")
    return names


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

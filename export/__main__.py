"""`python -m export`: write every network of `models/` as ONNX, with its functions, fused, and for training.

For each network NAME: NAME.onnx, NAME.fused.onnx, NAME.training.onnx, and one manifest.json for all. Exit code 0 if
everything written is as right as the original, 1 if not, 2 for wrong arguments, 3 if onnxruntime is missing here.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.deploy import INPUT, OUTPUT, Deployment, deploy, provider_states, sha256
from export.progress import Stages
from export.versions import versions
from models import MODELS
from models.calibration import calibrated
from renorm_onnx import model_file
from renorm_onnx.errors import InputError, MachineError, RenormError
from renorm_onnx.exporter import to_onnx
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from renorm_onnx.runtime.session import Session
from renorm_onnx.runtime.table import text_table

SCHEMA_VERSION = 1

_SUFFIXES = {"inference": "", "fused": ".fused", "training": ".training"}
_STAGES = 5  # per network, as announced
_TRAINING_LIMIT = 1e-4  # RMS error of one training step in onnxruntime, relative to float64
_SMALL_TRAINING_BATCH = 8  # the last maps of a small network have one pixel, too few to take statistics of alone


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with code 2 and a message where it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS), help="which (all)")
    parser.add_argument("--out", type=Path, default=Path("build/models"), help="folder for the files (build/models)")
    parser.add_argument("--small", action="store_true", help="small networks of the same structure")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (0)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write everything that was asked for and return the exit code."""
    options = arguments(argv)
    try:
        return run(options)
    except RenormError as error:
        print(f"export: {error}", file=sys.stderr)
        return 3 if isinstance(error, MachineError) else 2
    except KeyboardInterrupt:
        print("export: interrupted", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Write the files and the manifest, print a table, and return the exit code.

    Raises:
        InputError: The folder cannot be written.
        MachineError: onnxruntime is missing.
    """
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {str(options.out)!r}: cannot be made ({error.strerror}); name another") from error
    providers = [status.name for status in provider_states() if status.creatable]
    entries = {}
    with Stages(_STAGES * len(options.models)) as announce:
        for name in options.models:
            entries[name] = _written(name, options, providers, partial(_announced, announce, name))
    manifest = {"schema_version": SCHEMA_VERSION, "versions": versions(), "providers": providers, "models": entries}
    (options.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    print("\n".join(_table(entries)))
    print(f"wrote {sum(len(e['files']) for e in entries.values())} models and manifest.json to {options.out}")
    return 0 if all(entry["ok"] for entry in entries.values()) else 1


def _written(
    name: str, options: argparse.Namespace, providers: Sequence[str], announce: Callable[[str], None]
) -> dict[str, Any]:
    """Write the three files of one network and return its entry of the manifest."""
    announce("train briefly")
    network, inputs = calibrated(MODELS[name], small=options.small, seed=options.seed)
    files = {kind: options.out / f"{name}{suffix}.onnx" for kind, suffix in _SUFFIXES.items()}
    done = deploy(
        network, inputs, files["inference"], files["fused"], providers=providers, announce=announce
    )  # fmt: skip
    announce("export for training")
    for module in network.modules():
        module.training = isinstance(module, (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d))
    batch = inputs
    if options.small:
        batch = MODELS[name].example_inputs(_SMALL_TRAINING_BATCH, seed=options.seed, **MODELS[name].small_inputs)
    to_onnx(
        network, batch, files["training"], mode="train",
        dynamic_shapes=({0: "batch"},), input_names=[INPUT], output_names=[OUTPUT],
    )  # fmt: skip
    announce("check a training step")
    error = training_error(network, batch, files["training"])
    return {
        "ok": done.ok and error <= _TRAINING_LIMIT,
        "options": dict(MODELS[name].small) if options.small else {},
        "input_shape": list(inputs[0].shape),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "norms_before": len(done.fusion.norms),
        "norms_after": len(done.fusion.kept),
        "branches_merged": done.fusion.branches_merged,
        "kept": {norm.name: f"{norm.reason.value if norm.reason else ''}: {norm.detail}" for norm in done.fusion.kept},
        "parity": _parity(done),
        "training_step_error": error,
        "files": {path.name: _described(kind, path) for kind, path in files.items() if path.exists()},
    }


def training_error(network: nn.Module, inputs: tuple[Tensor, ...], model: Path) -> float:
    """Run one training step in onnxruntime and return its largest error against torch in float64.

    Args:
        network: With its norm layers in training mode and all else in inference mode; unchanged.
        inputs: Of the step.
        model: The exported training model; output `NAME.updated` is the new value of the buffer NAME.

    Returns:
        The largest RMS error of an output relative to the RMS of that output in float64.
    """
    twin = copy.deepcopy(network).double()
    with torch.no_grad():
        want = {OUTPUT: twin(*(x.double() for x in inputs))}
    want |= {f"{name}.updated": value.double() for name, value in twin.named_buffers()}
    session = Session(str(model), "cpu", optimize="off", threads=1)
    got = session.run({INPUT: inputs[0].numpy()})
    if set(got) != set(want):
        return float("inf")
    return max(_relative(want[name].numpy(), got[name]) for name in want)


def _relative(want: NDArray[np.float64], got: NDArray[Any]) -> float:
    error = np.linalg.norm(got.astype(np.float64) - want) / max(float(np.linalg.norm(want)), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


def _announced(announce: Callable[[str], None], name: str, stage: str) -> None:
    announce(f"{name}: {stage}")


def _parity(done: Deployment) -> list[dict[str, Any]]:
    verdict = done.verdicts.get("generated")
    if verdict is None:
        return []
    rows = [row for row in verdict.rows if row.decides and "pooled" in row.inputs]
    return [
        {
            "provider": row.provider,
            "outcome": verdict.outcome,
            "error_unfused": row.unfused,
            "error_fused": row.fused,
            "elements": row.elements,
        }
        for row in rows
    ]


def _described(kind: str, path: Path) -> dict[str, Any]:
    model = model_file.load(path)
    return {
        "kind": kind,
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "opset": model.opset_imports.get("", None),
        "ir_version": model.ir_version,
        "functions": [f"{domain}::{function}" for domain, function, _ in model.functions],
    }


def _table(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    header = ("", "parameters", "norms", "fused", "error", "error fused", "training step", "")
    rows = []
    for name, entry in entries.items():
        first = next(iter(entry["parity"]), None)
        errors = (f"{first[key]:.1e}" for key in ("error_unfused", "error_fused")) if first else ("", "")
        counts = f"{entry['parameters']:,}", str(entry["norms_before"]), str(entry["norms_after"])
        step = f"{entry['training_step_error']:.1e}"
        rows.append((name, *counts, *errors, step, "ok" if entry["ok"] else "WRONG"))
    return text_table(header, rows, numbers=(1, 2, 3, 4, 5, 6))


if __name__ == "__main__":
    sys.exit(main())

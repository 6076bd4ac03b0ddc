"""`make demo`: train with BatchNorm and with BatchRenorm, export, fuse, verify, evaluate, time, and report.

Leaves checkpoint.pt, model.onnx, model.fused.onnx, curves.png and report.json in `--out`. Exit code 0 if the fused
model is as right as the model, 1 if not, 2 for wrong arguments or data, 3 if this machine lacks what was asked for.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from export.data import DATA_SETS, ImageSet, load
from export.demo_report import SCHEMA_VERSION, table
from export.deploy import INPUT, Deployment, accuracy, deploy, provider_states, sha256
from export.plot import save_curves
from export.progress import Stages
from export.train import Curves, Recipe, choose_device, predict, train
from export.versions import versions
from models.parts import NormFactory
from models.wide_resnet import wide_resnet
from renorm_onnx.errors import InputError, MachineError, RenormError
from renorm_onnx.layers.modules import BatchRenorm2d
from renorm_onnx.layers.schedules import stretched
from renorm_onnx.runtime.bench import bench

# Share of the steps after which r_max and d_max are fully relaxed: the paper's 40,000 of 50,000 steps.
RELAXED_AFTER = 0.8

# Below so many pixels x squared width per step, torch's threads wait for each other longer than they work.
_WORTH_THREADS = 2**14

_JUDGED_PIXELS = 2**14  # of test images in the float64 comparison, which is slow
_TIMED_BATCHES = (1, 64)
_TIMING_SECONDS = 5.0  # for each of the two files, roughly


@dataclass(frozen=True)
class Trained:
    """One trained network.

    Attributes:
        network: In inference mode, on the training device.
        curves: What was seen on the way.
        seconds: Wall time of the training.
        test_accuracy: Share of right answers on the whole test split, in torch.
    """

    network: nn.Module
    curves: Curves
    seconds: float
    test_accuracy: float

    def to_dict(self) -> dict[str, Any]:
        """Everything but the network, as plain data for JSON."""
        return {
            "test_accuracy": self.test_accuracy,
            "seconds": round(self.seconds, 1),
            "curves": self.curves.to_dict(),
        }


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with code 2 and a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m export.demo",
        description="Train the same wide residual network with BatchNorm and with BatchRenorm on small batches, "
        "export the latter, fuse, verify, evaluate and time it.",
        epilog="The reference experiment's network is --width 4: make demo ARGS='--width 4'. On CIFAR-10: "
        "make demo ARGS='--width 4 --data cifar10 --root DIR --steps 20000'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--depth", type=int, default=16, help="d of WRN-d-k, 6 N + 4")
    parser.add_argument("--width", type=int, default=1, help="k of WRN-d-k")
    parser.add_argument("--steps", type=int, default=2500, help="updates of the weights, for each of the two trainings")
    parser.add_argument("--batch-size", type=int, default=2, help="images per step")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="at the start; falls along a cosine")
    parser.add_argument("--data", choices=DATA_SETS, default="digits", help="what to train on")
    parser.add_argument("--root", type=Path, help="folder of CIFAR-10's python version")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the results")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    try:
        return run(arguments(argv))
    except MachineError as error:
        print(f"export.demo: {error}", file=sys.stderr)
        return 3
    except RenormError as error:
        print(f"export.demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("export.demo: interrupted", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Do the whole job as the options say, print the table, and return the exit code.

    Raises:
        InputError: An option or the data cannot be used.
        MachineError: The device asked for does not work here.
    """
    started = time.perf_counter()
    recipe = Recipe(options.steps, options.batch_size, options.learning_rate, seed=options.seed)
    wide_resnet(options.depth, options.width)  # refuses impossible sizes before any work
    device, device_name = choose_device(options.device)
    data = load(options.data, options.root)
    out = _folder(options.out)
    name = f"WRN-{options.depth}-{options.width}"
    print(f"{name} on {data.source} of {data.size}x{data.size} pixels, {recipe.batch_size} per batch, on {device_name}")
    batch_norm, renorm = _train_both(options, data, recipe, device)
    save_curves(
        out / "curves.png",
        batch_norm.curves,
        renorm.curves,
        title=f"The same {name}, {recipe.batch_size} images per batch",
        subtitle=f"{data.source} of {data.size}x{data.size} pixels; {recipe.steps:,} steps",
    )
    torch.save({"options": _plain(options), "model": renorm.network.state_dict()}, out / "checkpoint.pt")
    done, providers, warnings = _deployed(renorm.network.cpu(), data, out)
    report = {
        "schema_version": SCHEMA_VERSION,
        "network": {"name": name, "parameters": sum(p.numel() for p in renorm.network.parameters())},
        "data": {"name": data.name, "source": data.source, "pixels": [data.size, data.size]}
        | {"train_images": len(data.train_images), "test_images": len(data.test_images)},
        "options": _plain(options),
        "recipe": asdict(recipe) | {"r_and_d_fully_relaxed_at_step": RELAXED_AFTER * recipe.steps},
        "device": device_name,
        "training": {"BatchNorm": batch_norm.to_dict(), "BatchRenorm": renorm.to_dict()},
        "fusion": done.fusion.to_dict(),
        "verdicts": {kind: verdict.to_dict() for kind, verdict in done.verdicts.items()},
        "providers": providers,
        "latency_warnings": warnings,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in _results(out)},
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(report)}\n\nfiles in {out}: {', '.join(path.name for path in _results(out))}")
    return 0 if done.ok else 1


def _train_both(
    options: argparse.Namespace, data: ImageSet, recipe: Recipe, device: torch.device
) -> tuple[Trained, Trained]:
    """Train the same network, from the same weights, with BatchNorm and with BatchRenorm."""
    norms: dict[str, NormFactory] = {
        "BatchNorm": partial(nn.BatchNorm2d, momentum=0.01),
        "BatchRenorm": partial(BatchRenorm2d, momentum=0.01, schedule=stretched(RELAXED_AFTER * recipe.steps)),
    }
    trained, threads = [], torch.get_num_threads()
    if recipe.batch_size * (data.size * options.width) ** 2 < _WORTH_THREADS:
        torch.set_num_threads(1)
    for label, norm in norms.items():
        torch.manual_seed(recipe.seed)
        network = wide_resnet(options.depth, options.width, data.num_classes, data.channels, norm)
        started = time.perf_counter()
        curves = train(network, data, recipe, device, label=f"{label:11}")
        seconds = time.perf_counter() - started
        answers = predict(network, data.test_images, device).argmax(1).numpy()
        trained.append(Trained(network, curves, seconds, float((answers == data.test_labels).mean())))
    torch.set_num_threads(threads)
    return trained[0], trained[1]


def _deployed(network: nn.Module, data: ImageSet, out: Path) -> tuple[Deployment, list[dict[str, Any]], list[str]]:
    """Write both models; evaluate and time them on every execution provider that can be created.

    Returns:
        What was written; per provider its state, accuracies and latencies; warnings about the latencies.
    """
    states = provider_states()
    usable = [status.name for status in states if status.creatable]
    with Stages(4 + len(usable)) as announce:
        done = deploy(
            network,
            (torch.from_numpy(data.test_images[:2]),),
            out / "model.onnx",
            out / "model.fused.onnx",
            providers=usable,
            data={INPUT: data.test_images[: max(16, _JUDGED_PIXELS // data.size**2)]},
            announce=announce,
        )
        files = {"model": done.model} | ({"fused": done.fused} if done.fused else {})
        measured, started = [], time.perf_counter()
        for status in states:
            found = status.to_dict()
            if status.creatable:
                announce(f"evaluate on {status.name}")
                images, labels = data.test_images, data.test_labels
                found["accuracy"] = {key: accuracy(path, images, labels, status.name) for key, path in files.items()}
            measured.append(found)
        announce("time")
        per_image = (time.perf_counter() - started) / (len(usable) * len(files) * len(data.test_images))
        rounds = min(20, max(3, int(_TIMING_SECONDS / (2 * sum(_TIMED_BATCHES) * per_image))))
        timings = bench(files, providers=usable, batches=_TIMED_BATCHES, rounds=rounds)
    for found in measured:
        found["latency"] = [asdict(timing) for timing in timings.timings if timing.provider == found["name"]]
    return done, measured, list(timings.warnings)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"--out {str(path)!r}: cannot write into it ({error.strerror}); name another folder"
        ) from error
    return path


def _results(out: Path) -> list[Path]:
    names = ("checkpoint.pt", "model.onnx", "model.fused.onnx", "curves.png", "report.json")
    return [out / name for name in names if (out / name).exists()]


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    """Options as JSON values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}


if __name__ == "__main__":
    sys.exit(main())

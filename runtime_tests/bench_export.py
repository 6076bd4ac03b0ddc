"""How much longer `to_onnx` takes than plain `torch.onnx.export`, over ten architectures.

    python -m runtime_tests.bench_export                 about 4 minutes on two cores
    python -m runtime_tests.bench_export --only mlp --repeats 5

Both export the same network with BatchRenorm layers and write a file; `to_onnx` without its verification, which the
plain exporter has not. The two take turns, and what counts is CPU time, which other load on the machine disturbs least.
Exit status 1 if the median ratio exceeds 1.1.
"""

import argparse
import contextlib
import gc
import io
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import MODELS
from models.calibration import NORMS
from renorm_onnx.exporter import to_onnx

LIMIT = 1.1

#: Row of the table -> entry of `models.MODELS`, and options of its constructor and of its example inputs.
ARCHITECTURES: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "WRN-16-4": ("wide_resnet", {"depth": 16, "width": 4}, {}),
    "WRN-28-2": ("wide_resnet", {"depth": 28, "width": 2}, {}),
    "WRN-40-1": ("wide_resnet", {"depth": 40, "width": 1}, {}),
    "MobileNetV2": ("mobilenet_v2", {}, {"size": 64}),
    "MobileNetV2 x0.5": ("mobilenet_v2", {"width": 0.5}, {"size": 64}),
    "DenseNet-22": ("densenet", {"depth": 22, "growth": 12}, {}),
    "DenseNet-40": ("densenet", {"depth": 40, "growth": 12}, {}),
    "RepVGG": ("repvgg", dict(MODELS["repvgg"].small), dict(MODELS["repvgg"].small_inputs)),
    "U-Net 3-D": ("unet3d", dict(MODELS["unet3d"].small), dict(MODELS["unet3d"].small_inputs)),
    "MLP": ("mlp", {}, {}),
}


def network(row: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return one of `ARCHITECTURES`, ready to export, and its example inputs."""
    name, options, inputs = ARCHITECTURES[row]
    entry = MODELS[name]
    torch.manual_seed(0)
    net = entry.build(norm=NORMS[entry.spatial_dims], **options).eval()
    for m in net.modules():
        if isinstance(m, tuple(NORMS.values())):
            m.num_batches_tracked.fill_(1)
    return net, entry.example_inputs(batch=1, **inputs)


def plain(net: nn.Module, args: tuple[torch.Tensor, ...], path: Path) -> None:
    """Export with torch alone, as its documentation shows."""
    torch.onnx.export(net, args, path, dynamo=True, verbose=False)


def ours(net: nn.Module, args: tuple[torch.Tensor, ...], path: Path) -> None:
    """Export with one function call per layer."""
    to_onnx(net, args, path, verify=False)


def seconds(export: Callable[..., None], net: nn.Module, args: tuple[torch.Tensor, ...], folder: str) -> float:
    """Return the CPU time of one export."""
    gc.collect()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.process_time()
        export(net, args, Path(folder) / f"{export.__name__}.onnx")
        return time.process_time() - start


def measure(row: str, repeats: int) -> tuple[float, float]:
    """Return the median CPU seconds of the plain export and of ours, taken in turns."""
    net, args = network(row)
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats):
            for export in (plain, ours) if turn % 2 == 0 else (ours, plain):
                times[export.__name__].append(seconds(export, net, args, folder))
    return statistics.median(times["plain"]), statistics.median(times["ours"])


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="exports of each kind per architecture (default 3)")
    parser.add_argument("--only", default="", help="part of the names of the architectures to take")
    options = parser.parse_args(arguments)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    rows = [row for row in ARCHITECTURES if options.only.lower() in row.lower()]
    if not rows or options.repeats < 1:
        parser.error(f"nothing to measure: --only {options.only!r}, --repeats {options.repeats}")
    with tempfile.TemporaryDirectory() as folder:  # the first export imports the exporter
        seconds(plain, *network("MLP"), folder)
    ratios = []
    print(f"{'architecture':<18} {'plain s':>8} {'to_onnx s':>9} {'ratio':>6}")
    for row in rows:
        without, with_functions = measure(row, options.repeats)
        ratios.append(with_functions / without)
        print(f"{row:<18} {without:8.2f} {with_functions:9.2f} {ratios[-1]:6.2f}", flush=True)
    median = statistics.median(ratios)
    print(f"{'median':<18} {'':>8} {'':>9} {median:6.2f}   limit {LIMIT}, CPU seconds, {options.repeats} exports each")
    return 0 if median <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())

"""Write the models of this release that every later release must still read: `models/frozen/VERSION/`.

    python -m runtime_tests.write_frozen

Run once per release, after the version number changed. An existing folder is never touched: what matters is that the
bytes were written by the release whose name they bear. Beside each ``NAME.onnx`` lies ``NAME.npz`` with inputs, and the
outputs that torch computed for them in float64; `runtime_tests/frozen_test.py` compares.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import renorm_onnx
from models import mlp, repvgg
from renorm_onnx.exporter import to_onnx
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d
from renorm_onnx.layers.schedules import linear

FOLDER = Path(__file__).parent.parent / "models" / "frozen"
STEPS = 3


def calibrated(net: nn.Module) -> nn.Module:
    """Give every layer parameters and statistics away from trivial ones."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for m in net.modules():
            if getattr(m, "running_mean", None) is not None:
                m.running_mean.copy_(torch.randn(m.num_features, generator=generator) * 0.3)
                m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
                m.num_batches_tracked.fill_(12)
                m.weight.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
                m.bias.copy_(torch.randn(m.num_features, generator=generator) * 0.2)
    return net


def networks() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...], str]]:
    """Return name -> network, example inputs, mode; of sizes of their own, which no change of `MODELS` moves."""
    torch.manual_seed(0)
    stem = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), BatchRenorm2d(4, r_max=2.0, momentum=0.1, schedule=linear(10, 20), stat="var")
    )
    two_sets = nn.Sequential(BatchRenorm1d(5, r_max=2.0, momentum=0.1, renorm_momentum=0.02, schedule=linear(10, 20)))
    return {
        "mlp": (
            calibrated(mlp.mlp(17, (32, 32), 6, norm=BatchRenorm1d)).eval(),
            mlp.example_inputs(batch=4, in_features=17),
            "eval",
        ),
        "repvgg": (
            calibrated(repvgg.repvgg((1, 2), (8, 16), 10, norm=BatchRenorm2d)).eval(),
            repvgg.example_inputs(batch=2, size=16),
            "eval",
        ),
        "training_step": (calibrated(stem).train(), (torch.randn(4, 3, 6, 6),), "train"),
        "training_two_sets": (calibrated(two_sets).train(), (torch.randn(8, 5),), "train"),
    }


def expected(net: nn.Module, args: tuple[torch.Tensor, ...]) -> dict[str, np.ndarray]:
    """Return the inputs, and the outputs of `STEPS` calls of a float64 copy: they differ only in training mode."""
    twin = copy.deepcopy(net).double()
    values = {f"input_{i}": a.numpy() for i, a in enumerate(args)}
    with torch.no_grad():
        for step in range(STEPS):
            values[f"step_{step}"] = twin(*(a.double() for a in args)).numpy()
    return values


def main() -> int:
    """Write the folder of this version, or say that it exists."""
    folder = FOLDER / renorm_onnx.__version__
    if folder.exists():
        print(f"{folder} exists; frozen files are never rewritten", file=sys.stderr)
        return 2
    folder.mkdir(parents=True)
    for name, (net, args, mode) in networks().items():
        to_onnx(net, args, folder / f"{name}.onnx", mode=mode, metadata=False)
        np.savez_compressed(folder / f"{name}.npz", **expected(net, args))
        print(f"{folder / name}.onnx: {(folder / f'{name}.onnx').stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

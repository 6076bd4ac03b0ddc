"""From a trained network to two checked files: the model with its functions, and the fused one.

This is what a user does after training: `to_onnx`, then what `renorm-onnx fuse` runs, then `verify` on real data.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from renorm_onnx.delivery import fuse_file
from renorm_onnx.exporter import to_onnx
from renorm_onnx.fusion.report import FusionReport
from renorm_onnx.runtime.judging.report import Verdict
from renorm_onnx.runtime.parity import verify
from renorm_onnx.runtime.providers import PROVIDERS, ProviderStatus, provider_status
from renorm_onnx.runtime.session import Session

INPUT, OUTPUT = "input", "output"
"""Names of the one input and the one output of every model written here."""


@dataclass(frozen=True)
class Deployment:
    """What `deploy` did.

    Attributes:
        model: The file in which every renormalization layer is one function call.
        fused: The file without the norms that could be folded; None if it would be wrong, then it is not there.
        fusion: What was folded into what, and what stays and why.
        verdicts: Whether the fused model is as right as the model, by the kind of inputs: "generated", "data".
    """

    model: Path
    fused: Path | None
    fusion: FusionReport
    verdicts: Mapping[str, Verdict]

    @property
    def ok(self) -> bool:
        """Whether the fused model was written and every verdict is yes."""
        return self.fused is not None and all(verdict.ok for verdict in self.verdicts.values())


def provider_states() -> tuple[ProviderStatus, ...]:
    """Say for each known execution provider whether this machine can create it."""
    return tuple(provider_status(name) for name in PROVIDERS)


def deploy(
    network: nn.Module,
    inputs: tuple[Tensor, ...],
    model: Path,
    fused: Path,
    *,
    providers: Sequence[str] = ("cpu",),
    data: Mapping[str, NDArray[Any]] | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Deployment:
    """Export a network for any batch size, fuse the file, and judge the result.

    Args:
        network: In inference mode, on the CPU; from one tensor to one tensor.
        inputs: Example inputs, at least two along the first axis.
        model: Where the model with functions goes; replaced if it exists.
        fused: Where the fused model goes; replaced if it exists, removed if the verdict is no.
        providers: Execution providers to judge on.
        data: Real inputs by name, to judge on besides generated ones.
        announce: Told what comes next.

    Returns:
        Both files, the report and the verdicts.

    Raises:
        InputError: The network is in training mode, or cannot be exported.
        ModelFileError: A file cannot be written.
        MachineError: A provider is missing.
    """
    fused.unlink(missing_ok=True)
    announce("export")
    to_onnx(network, inputs, model, dynamic_shapes=({0: "batch"},), input_names=[INPUT], output_names=[OUTPUT])
    announce("fuse and verify")
    done = fuse_file(model, fused, force=True, verify="require", providers=providers)
    verdicts = {"generated": done.verdict} if done.verdict is not None else {}
    if data is not None and done.written:
        announce("verify on test images")
        verdicts["data"] = verify(model, fused, providers=providers, inputs=data)
    return Deployment(model, fused if done.written else None, done.report, verdicts)


def accuracy(model: Path, images: NDArray[np.float32], labels: NDArray[np.int64], provider: str) -> float:
    """Run a classifier over images as deployed, with onnxruntime's own optimizations, and count right answers.

    Args:
        model: The file; its input and output are named `INPUT` and `OUTPUT`.
        images: Shape (N, C, H, W).
        labels: Shape (N,).
        provider: "cpu" or "cuda".

    Returns:
        The share of right answers, from 0 to 1.
    """
    session = Session(str(model), provider)
    right = 0
    for start in range(0, len(images), 500):
        logits = session.run({INPUT: images[start : start + 500]})[OUTPUT]
        right += int((logits.argmax(axis=1) == labels[start : start + 500]).sum())
    return right / len(images)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

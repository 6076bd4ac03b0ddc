"""What a training step of batch renormalization costs, as ratios to torch's batch norm in one interleaved run.

    python -m runtime_tests.bench_layers [--device cuda] [--rounds 21] [--json FILE] [--shape 64x64x32x32:cl ...]

Every round runs all layers on the same input in a new random order; a cell is min / median / max over the rounds of the
ratio to `nn.BatchNorm` of the same round. Time is process CPU time with one thread, on CUDA the time between events.
Rows: forward and backward with r and d acting, during warm-up, and evaluation. Packages of peers are used if installed.
"""

import argparse
import gc
import importlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d
from renorm_onnx.layers.schedules import stretched

SHAPES = [
    "256x256",
    "64x64x32x32",
    "64x64x32x32:cl",
    "32x256x14x14",
    "32x256x14x14:cl",
    "8x64x112x112",
    "8x64x112x112:cl",
]
MODES = ("train", "warm-up", "eval")
REFERENCE = "nn.BatchNorm"
# The paper's, so long that no run leaves its first eighth.
ENDLESS_WARM_UP = stretched(1e15)
# Work per timing, so that one timing takes tens of milliseconds on either device.
_ELEMENTS = {"cpu": 8_000_000, "cuda": 400_000_000}


@dataclass(frozen=True)
class Cell:
    """Ratios of one layer to `nn.BatchNorm` on one input, over the rounds."""

    mode: str
    shape: str
    layer: str
    low: float
    median: float
    high: float
    reference_us: float
    saved_per_input: float | None  # bytes kept for the backward pass, over those of x


class Composite(nn.Module):
    """Algorithm 1 in plain tensor operations, for scale."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("sigma", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x of shape (N, C, *)."""
        shape = [1, -1] + [1] * (x.dim() - 2)  # (C,) -> (1, C, 1, ...)
        mean, sigma = self.mean, self.sigma
        if self.training:
            var, mu = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
            sigma_b = torch.sqrt(var + 1e-5)
            r = (sigma_b.detach() / self.sigma).clamp(1 / 3, 3)
            d = ((mu.detach() - self.mean) / self.sigma).clamp(-5, 5)
            x_hat = (x - mu.view(shape)) / sigma_b.view(shape) * r.view(shape) + d.view(shape)
            self.mean.lerp_(mu.detach(), 0.01)
            self.sigma.lerp_(sigma_b.detach(), 0.01)
        else:
            x_hat = (x - mean.view(shape)) / sigma.view(shape)
        return x_hat * self.weight.view(shape) + self.bias.view(shape)


def layers_for(x: Tensor, mode: str) -> dict[str, nn.Module]:
    """Every layer that takes x and has the mode, on its device; the reference first."""
    features, flat = x.size(1), x.dim() == 2
    ours = BatchRenorm1d if flat else BatchRenorm2d
    found: dict[str, nn.Module] = {
        REFERENCE: (nn.BatchNorm1d if flat else nn.BatchNorm2d)(features),
        "renorm_onnx": ours(features, schedule=ENDLESS_WARM_UP if mode == "warm-up" else None),
    }
    if mode != "warm-up":
        found["composite"] = Composite(features)
        for name, module, make in PEERS:
            try:
                found[name] = make(importlib.import_module(module), features)
            except ImportError:
                continue
            if name == "sb3-contrib" and not flat:
                del found[name]
    return {name: layer.to(x.device).train(mode != "eval") for name, layer in found.items()}


PEERS: list[tuple[str, str, Callable[..., nn.Module]]] = [
    ("torchrl", "torchrl.modules.models.batchrenorm", lambda m, c: m.BatchRenorm1d(c, warmup_steps=1)),
    ("sb3-contrib", "sb3_contrib.common.torch_layers", lambda m, c: m.BatchRenorm1d(c, warmup_steps=0)),
]


def saved_bytes(layer: nn.Module, x: Tensor) -> float:
    """Return the bytes of distinct storages that one forward keeps for its backward, over those of x."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x.detach().requires_grad_())
    for value in vars(y.grad_fn).values() if hasattr(y.grad_fn, "__dict__") else ():
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor):  # what a backward function in Python keeps by itself
                pack(tensor)
    return sum(kept.values()) / (x.numel() * x.element_size())


def stopwatch(device: torch.device) -> Callable[[Callable[[], None]], float]:
    """Return a function that runs its argument and returns seconds: process CPU time, or the device's own."""

    def on_cpu(work: Callable[[], None]) -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    def on_cuda(work: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return on_cuda if device.type == "cuda" else on_cpu


def measure(mode: str, shape: str, device: torch.device, rounds: int, seed: int = 0) -> list[Cell]:
    """Time every layer on one input and return its ratios."""
    sizes, _, layout = shape.partition(":")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn([int(size) for size in sizes.split("x")], generator=generator).mul_(2).add_(0.5).to(device)
    if layout == "cl":
        x = x.contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(x)
    x.requires_grad_(mode != "eval")
    layers, timer, shuffle = layers_for(x, mode), stopwatch(device), random.Random(seed)
    calls = max(2, _ELEMENTS[device.type] // x.numel() // (1 if mode == "eval" else 3))

    def run(layer: nn.Module, times: int = calls) -> None:
        for _ in range(times):
            if mode == "eval":
                with torch.no_grad():
                    layer(x)
            else:
                layer(x).backward(upstream)
                x.grad = None
                layer.zero_grad(set_to_none=True)

    for layer in layers.values():
        run(layer, 3)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    gc.disable()
    for _ in range(rounds):
        order = list(layers)
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(timer(lambda name=name: run(layers[name])))
    gc.enable()
    cells = []
    for name, layer in layers.items():
        ratios = [mine / theirs for mine, theirs in zip(seconds[name], seconds[REFERENCE], strict=True)]
        best = min(seconds[REFERENCE]) / calls * 1e6
        saved = None if mode == "eval" else saved_bytes(layer, x)
        cells.append(Cell(mode, shape, name, min(ratios), statistics.median(ratios), max(ratios), best, saved))
    return cells


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark as the command line asks."""
    parser = argparse.ArgumentParser(prog="python -m runtime_tests.bench_layers", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="NxC[xHxW][:cl]")
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every cell to FILE")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench_layers: --device cuda, but torch sees no CUDA device", file=sys.stderr)
        return 3
    torch.set_num_threads(1)
    cells: list[Cell] = []
    print(f"{'mode':8}{'shape':18}{'layer':14}{'min':>7}{'median':>8}{'max':>7}   saved/x   {REFERENCE} (best)")
    for mode in options.mode:
        for shape in options.shape:
            for cell in measure(mode, shape, torch.device(options.device), options.rounds):
                cells.append(cell)
                if cell.layer == REFERENCE:
                    continue
                saved = "" if cell.saved_per_input is None else f"{cell.saved_per_input:.2f}"
                print(
                    f"{cell.mode:8}{cell.shape:18}{cell.layer:14}{cell.low:7.2f}{cell.median:8.2f}{cell.high:7.2f}"
                    f"   {saved:>7}   {cell.reference_us:.0f} us",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

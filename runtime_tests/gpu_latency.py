"""Latency of one network as torch runs it and as onnxruntime runs it, on one device, in one interleaved run.

Rows: torch eager and compiled; onnxruntime with function calls, with BatchNormalization nodes ("unfused") and fused,
each with all tensors on the device, and the fused one as a CUDA graph too. float32, float32 with products rounded to
TF32 (CUDA only), float16. Every call ends with a synchronization: what is measured is one answer, not throughput.
"""

import contextlib
import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from models import MODELS
from models.calibration import calibrated
from renorm_onnx.exporter import to_onnx
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.runtime.session import Session
from renorm_onnx.runtime.table import text_table

PRECISIONS = ("float32", "tf32", "float16")
BATCHES = (1, 4, 16, 64, 256)
NETWORKS = ("wide_resnet", "mobilenet_v2", "densenet", "mlp")
_SHORTEST_SAMPLE = 2e-3  # seconds

Call = Callable[[], Any]


@dataclass(frozen=True)
class Latency:
    """One variant under one setting.

    Attributes:
        model: Network.
        precision: One of `PRECISIONS`.
        batch: Size of the first axis.
        variant: What ran.
        min_ms: Shortest time of a call.
        median_ms: Median.
        p90_ms: 90th percentile.
        samples: How many times were measured.
        difference: RMS difference of the output from torch eager's in float32 without TF32, relative.
        note: Why there is no time.
    """

    model: str
    precision: str
    batch: int
    variant: str
    min_ms: float = 0.0
    median_ms: float = 0.0
    p90_ms: float = 0.0
    samples: int = 0
    difference: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        device: "cpu" or "cuda".
        networks: Names in `MODELS`.
        batches: Sizes of the first axis.
        precisions: Of `PRECISIONS`; on the CPU "tf32" does not exist and float16 says nothing.
        small: Take the small networks.
        compiled: Also measure `torch.compile`, which takes a minute per network.
        rounds: Samples of each variant.
    """

    device: str
    networks: Sequence[str] = NETWORKS
    batches: Sequence[int] = BATCHES
    precisions: Sequence[str] = PRECISIONS
    small: bool = False
    compiled: bool = True
    rounds: int = 30


def measure(plan: Plan) -> Iterator[Latency]:
    """Yield a row for every network, precision, batch and variant; what fails becomes a row with a note."""
    for name in plan.networks:
        network, inputs = calibrated(MODELS[name], small=plan.small, seed=0)
        plain = _exported(network, inputs)
        half = _exported(copy.deepcopy(network).half(), tuple(x.half() for x in inputs))
        for precision in plan.precisions:
            files = half if precision == "float16" else plain
            yield from _measure_precision(plan, name, precision, network, files)


def _exported(network: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, onnx.ModelProto]:
    options: dict[str, Any] = {"dynamic_shapes": ({0: "batch"},), "verify": False}
    function = to_onnx(network, inputs, **options)
    return {
        "function": function,
        "unfused": to_onnx(network, inputs, functions=False, **options),
        "fused": fuse(function)[0],
    }


def _measure_precision(
    plan: Plan, name: str, precision: str, network: nn.Module, files: dict[str, onnx.ModelProto]
) -> Iterator[Latency]:
    device = torch.device(plan.device)
    kind = torch.float16 if precision == "float16" else torch.float32
    module = copy.deepcopy(network).to(device, kind)
    compiled = torch.compile(module) if plan.compiled else None
    for batch in plan.batches:
        sizes = MODELS[name].small_inputs if plan.small else {}
        (x,) = MODELS[name].example_inputs(batch, seed=1, **sizes)
        with torch.no_grad():
            want = network(x)
        makers = _torch_variants(module, compiled, x.to(device, kind))
        makers |= _onnx_variants(files, plan.device, x.to(kind), tf32=precision == "tf32")
        with _tf32(precision == "tf32"):
            yield from _interleaved(makers, want, plan, (name, precision, batch))


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    """Choose for torch whether products of float32 may be rounded to TF32; as it was, afterwards.

    By the older two switches: after the newer ones, one for each kind of operation, torch's own reading of the older
    fails (2.11, 2.13), and its compiler reads them.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _torch_variants(module: nn.Module, compiled: Any, x: Tensor) -> dict[str, Callable[[], Call]]:
    def calling(function: Any) -> Callable[[], Call]:
        def call() -> Tensor:
            with torch.no_grad():
                y = function(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            return y

        return lambda: call

    found = {"torch eager": calling(module)}
    return found | ({"torch compiled": calling(compiled)} if compiled is not None else {})


def _onnx_variants(
    files: dict[str, onnx.ModelProto], device: str, x: Tensor, *, tf32: bool
) -> dict[str, Callable[[], Call]]:
    def opened(model: onnx.ModelProto, *, graph: bool = False) -> Session:
        return Session(model, device, threads=torch.get_num_threads(), tf32=tf32, cuda_graph=graph)

    def bound(model: onnx.ModelProto) -> Call:
        session = opened(model)
        binding = session.bind({session.inputs[0].name: x.numpy()})

        def call() -> Any:
            session.run_bound(binding)
            return binding

        return call

    def captured(model: onnx.ModelProto) -> Call:
        fixed = _with_batch(model, x.shape[0])
        session, here = opened(fixed, graph=True), x.cuda()
        answer = session(here)

        def call() -> Any:
            session.replay()
            return answer

        return call

    variants = {f"onnxruntime {form}": (lambda model=model: bound(model)) for form, model in files.items()}
    if device == "cuda":
        variants["onnxruntime fused, CUDA graph"] = lambda: captured(files["fused"])
    return variants


def _with_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Return a copy whose inputs and outputs have a fixed first size, as a CUDA graph needs."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return fixed


def _interleaved(
    makers: dict[str, Callable[[], Call]], want: Tensor, plan: Plan, setting: tuple[str, str, int]
) -> Iterator[Latency]:
    calls: dict[str, Call] = {}
    repeats: dict[str, int] = {}
    difference: dict[str, float] = {}
    for variant, make in makers.items():
        try:
            call = make()
            difference[variant] = _difference(want, call())
            repeats[variant] = max(1, round(_SHORTEST_SAMPLE / max(min(_timed(call) for _ in range(3)), 1e-7)))
        except Exception as error:  # whatever breaks in a compiler or driver costs one row, not all that follow
            note = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
            yield Latency(*setting, variant, note=note)
            continue
        calls[variant] = call
    samples: dict[str, list[float]] = {variant: [] for variant in calls}
    order = random.Random(0)
    for _ in range(plan.rounds):
        for variant in order.sample(list(calls), len(calls)):
            call, count = calls[variant], repeats[variant]
            call()
            samples[variant].append(_timed(call, count))
    for variant, found in samples.items():
        found = sorted(1e3 * value for value in found)
        high = found[min(len(found) - 1, round(0.9 * len(found)))]
        times = found[0], statistics.median(found), high
        yield Latency(*setting, variant, *times, samples=len(found), difference=difference[variant])


def _timed(call: Call, count: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def _difference(want: Tensor, answer: Any) -> float:
    """Return the RMS difference of an answer, relative to the RMS of what was expected."""
    got = answer if isinstance(answer, Tensor) else torch.from_numpy(answer.copy_outputs_to_cpu()[0])
    want, got = want.double(), got.double().cpu()
    return float((got - want).norm() / want.norm())


def table(rows: Sequence[Latency]) -> list[str]:
    """Return one line per row; the last column is the speed relative to torch eager in the same setting."""
    eager = {(r.model, r.precision, r.batch): r.median_ms for r in rows if r.variant == "torch eager"}
    lines = []
    for r in rows:
        base = eager.get((r.model, r.precision, r.batch), 0.0)
        if r.note:
            cells = ("", "", "", "", "", r.note)
        else:
            speed = f"{base / r.median_ms:.2f}" if base else ""
            times = (f"{value:.4g}" for value in (r.min_ms, r.median_ms, r.p90_ms))
            cells = (*times, speed, f"{r.difference:.1e}", "")
        lines.append((r.model, r.precision, str(r.batch), r.variant, *cells))
    header = ("model", "precision", "batch", "variant", "min ms", "median", "p90", "x eager", "difference", "")
    return text_table(header, lines, numbers=(2, 4, 5, 6, 7, 8))


def to_json(rows: Sequence[Latency]) -> list[dict[str, Any]]:
    """Return the rows as JSON values."""
    return [asdict(row) for row in rows]

"""Time models against each other, so that the difference is theirs and not the machine's.

Traps met and avoided: one model after the other measures the machine's mood, so samples are interleaved in shuffled
rounds; waiting threads of several live sessions spin and disturb each other (a median of 38 ms instead of 3), so
spinning is off; microsecond models measure the clock, so calls are repeated until a sample lasts 2 ms; zeros are
faster than data; the first call after another model ran finds cold caches, so one call precedes each sample.
"""

import math
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx import model_file
from renorm_onnx.errors import InputError, MachineError
from renorm_onnx.runtime.inputs import InputSpec, input_specs, make_trial, size_plans
from renorm_onnx.runtime.providers import onnxruntime
from renorm_onnx.runtime.session import LEVELS, Session
from renorm_onnx.runtime.sessions.sources import runnable
from renorm_onnx.runtime.timing_report import BenchReport, Timing, plot

__all__ = ["BenchReport", "Timing", "bench", "plot"]

Array = npt.NDArray[Any]

_SHORTEST_SAMPLE = 2e-3  # seconds
_WARM_UP = 5e-2  # seconds
_LOADS = 3


def bench(
    models: Any,
    *,
    providers: Sequence[str] = ("cpu",),
    batches: Sequence[int] = (1,),
    threads: int | Sequence[int] = 1,
    optimize: Sequence[str] = ("all",),
    rounds: int = 30,
    tf32: bool = False,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    allow_symlinks: bool = False,
) -> BenchReport:
    """Time models with the same inputs under every combination of the options.

    On CUDA each model is timed three ways: numpy in and out; with all tensors on the device; as one CUDA graph.

    Args:
        models: Paths, protobufs or `onnx_ir.Model`s; or a mapping from names to them. The first is the yardstick.
        providers: Execution providers, "cpu" and "cuda".
        batches: Sizes of the first axis, where it varies.
        threads: Threads inside an operator, one number or several.
        optimize: onnxruntime's graph optimizations: "off", "basic", "extended", "all".
        rounds: Samples per model and setting.
        tf32: Let CUDA round the operands of convolutions and matrix products to 10 bits.
        sizes: Values for other sizes that vary, by name.
        seed: Of the inputs and of the order.
        allow_symlinks: Follow links to data files outside a model's folder.

    Returns:
        The timings; `regressions()` says where a later model is slower than the first.

    Raises:
        InputError: No model, models with different inputs, or an option that does not fit them.
        ModelFileError: A model cannot be read.
        MachineError: A provider cannot be created here.
    """
    counts = (threads,) if isinstance(threads, int) else tuple(threads)
    options = {"models": models, "providers": providers, "batches": batches, "threads": counts, "optimize": optimize}
    for name, value in options.items():
        if not value:
            raise InputError(f"bench: {name} is empty, so there is nothing to time")
    if wrong := [level for level in optimize if level not in LEVELS]:
        raise InputError(f"bench: optimize={wrong[0]!r}, expected some of {', '.join(LEVELS)}")
    for name, values, least in (("rounds", (rounds,), 1), ("batches", batches, 1), ("threads", counts, 0)):
        if min(values) < least:
            raise InputError(f"bench: {name}={min(values)!r}, expected at least {least}")
    if max(counts) > (most := 8 * (os.cpu_count() or 1)):  # starting thousands takes minutes, or all memory
        raise InputError(f"bench: threads={max(counts)}, expected at most {most}, 8 per core of this machine")
    before = _load()
    loaded = {name: runnable(model, allow_symlinks=allow_symlinks) for name, model in _named(models).items()}
    specs = _common_inputs(loaded)
    runs: list[_Run] = []
    remarks: list[str] = []
    chosen: dict[str, int] = {}
    for batch in batches:
        fitting = _sizes(next(iter(loaded.values())), specs, batch, dict(sizes or {}), len(batches) == 1)
        chosen |= {name: size for name, size in fitting.items() if not _is_batch(specs, name)}
        feeds = make_trial(specs, "normal", fitting, seed).feeds
        for provider in providers:
            for count in counts:
                for level in optimize:
                    for name, model in loaded.items():
                        runs += _open(name, model, _Setting(provider, count, level, tf32), feeds, remarks)
    order = random.Random(seed)
    for run in runs:
        run.warm_up()
    for _ in range(rounds):
        for run in order.sample(runs, len(runs)):
            run.sample()
    return BenchReport(
        tuple(run.timing() for run in runs), chosen, _environment(tf32), (*_warnings(before, runs), *remarks)
    )


@dataclass(frozen=True)
class _Setting:
    provider: str
    threads: int
    optimize: str
    tf32: bool

    def open(self, model: Any, *, graph: bool = False) -> Session:
        return Session(
            model,
            self.provider,
            optimize=self.optimize,
            threads=self.threads,
            tf32=self.tf32,
            cuda_graph=graph,
        )


@dataclass
class _Run:
    """One line of the report while it is measured."""

    name: str
    setting: _Setting
    mode: str
    batch: int
    call: Callable[[], Any]
    load: float
    size: int
    on_cpu: int
    repeats: int = 1
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """Call until caches are warm, and find how many calls make a sample long enough to measure."""
        spent, calls, fastest = 0.0, 0, math.inf
        while calls < 2 or (spent < _WARM_UP and calls < 1000):
            started = time.perf_counter()
            self.call()
            took = time.perf_counter() - started
            spent, calls, fastest = spent + took, calls + 1, min(fastest, took)
        self.repeats = max(1, math.ceil(_SHORTEST_SAMPLE / max(fastest, 1e-7)))

    def sample(self) -> None:
        call = self.call
        call()
        processor, started = time.process_time(), time.perf_counter()
        for _ in range(self.repeats):
            call()
        wall = time.perf_counter() - started
        self.wall.append(wall / self.repeats)
        self.processor.append((time.process_time() - processor) / self.repeats)

    def timing(self) -> Timing:
        low, middle, high = (1e3 * float(np.quantile(self.wall, q)) for q in (0.0, 0.5, 0.9))
        return Timing(
            model=self.name,
            provider=self.setting.provider,
            batch=self.batch,
            threads=self.setting.threads,
            optimize=self.setting.optimize,
            mode=self.mode,
            min_ms=low,
            median_ms=middle,
            p90_ms=high,
            cpu_ms=1e3 * float(np.median(self.processor)),
            samples=len(self.wall),
            repeats=self.repeats,
            load_ms=1e3 * self.load,
            bytes=self.size,
            on_cpu=self.on_cpu,
        )


def _open(name: str, model: ir.Model, setting: _Setting, feeds: Mapping[str, Array], remarks: list[str]) -> list[_Run]:
    data = model_file.model_bytes(model)
    loads = []
    for _ in range(_LOADS):
        started = time.perf_counter()
        session = setting.open(data)
        loads.append(time.perf_counter() - started)
    batch = next((array.shape[0] for array in feeds.values() if array.ndim), 1)

    def run_of(mode: str, call: Callable[[], Any]) -> _Run:
        return _Run(name, setting, mode, batch, call, min(loads), len(data), len(session.on_cpu))

    runs = [run_of("run", lambda: session.run(feeds))]
    if session.provider == "cuda":
        binding = session.bind(feeds)
        runs.append(run_of("binding", lambda: session.run_bound(binding)))
        shapes = {key: array.shape for key, array in session.run(feeds).items()}
        fixed = _with_fixed_shapes(model, {**{key: array.shape for key, array in feeds.items()}, **shapes})
        try:
            captured = setting.open(fixed, graph=True)
        except MachineError as error:  # control flow, sizes computed on the CPU: the other rows stand
            remarks.append(f"{name} as a CUDA graph: {error}")
        else:
            captured(**feeds)
            runs.append(run_of("graph", captured.replay))
    return runs


def _with_fixed_shapes(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """Return a copy of a model whose inputs and outputs have these shapes; a CUDA graph needs them."""
    copy = model.clone()
    for value in (*copy.graph.inputs, *copy.graph.outputs):
        if value.name and value.name in shapes:
            value.shape = ir.Shape(shapes[value.name])
    return copy


def _named(models: Any) -> dict[str, Any]:
    if isinstance(models, Mapping):
        return {str(name): model for name, model in models.items()}
    if isinstance(models, str | os.PathLike) or not isinstance(models, Sequence):
        models = [models]
    names = [
        os.path.basename(os.fspath(model)) if isinstance(model, str | os.PathLike) else f"model {number}"
        for number, model in enumerate(models, 1)
    ]
    if len(set(names)) != len(names):
        # Same file name in several folders: the whole path tells them apart, a number if even that is the same.
        names = [f"{number}: {os.fspath(model)}" for number, model in enumerate(models, 1)]
    return dict(zip(names, models, strict=True))


def _common_inputs(models: Mapping[str, ir.Model]) -> tuple[InputSpec, ...]:
    found = {name: input_specs(model) for name, model in models.items()}
    first, specs = next(iter(found.items()))
    for name, others in found.items():
        if not _take_the_same(others, specs):
            raise InputError(
                f"bench: {name!r} has inputs {_described(others)}, expected those of {first!r}: {_described(specs)}"
            )
    return specs


def _take_the_same(some: Sequence[InputSpec], others: Sequence[InputSpec]) -> bool:
    """Whether both have the same names, types, ranks and, where neither varies, sizes."""
    here, there = ({spec.name: spec for spec in side} for side in (some, others))
    return here.keys() == there.keys() and all(
        (spec.dtype, len(spec.shape)) == (there[name].dtype, len(there[name].shape))
        and all(a == b for a, b in zip(spec.shape, there[name].shape, strict=True) if {type(a), type(b)} == {int})
        for name, spec in here.items()
    )


def _described(specs: Sequence[InputSpec]) -> str:
    return ", ".join(f"{spec.name}: {spec.dtype}{list(spec.shape)}" for spec in specs) or "none"


def _sizes(
    model: ir.Model, specs: Sequence[InputSpec], batch: int, given: Mapping[str, int], only: bool
) -> dict[str, int]:
    """Return sizes of varying axes that the model accepts, with this batch."""
    fixed = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)}
    varies = any(_is_batch(specs, size) for spec in specs for size in spec.shape if isinstance(size, str))
    if not varies and fixed and batch not in fixed and not (only and batch == 1):
        raise InputError(f"bench: batch {batch} is not possible, the first axis is fixed at {sorted(fixed)}")
    session, last = Session(model, "cpu", optimize="off", threads=1, cuda_graph=False), ""
    for plan in size_plans(specs, batch, given):
        plan = {name: batch if _is_batch(specs, name) and name not in given else size for name, size in plan.items()}
        try:
            session.run(make_trial(specs, "normal", plan, 0).feeds)
        except InputError as error:
            last = str(error)
            continue
        return plan
    raise InputError(f"bench: the model accepts no generated inputs ({last}); pass sizes=")


def _is_batch(specs: Sequence[InputSpec], name: str) -> bool:
    return any(spec.shape and spec.shape[0] == name for spec in specs)


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _warnings(load: float, runs: Sequence[_Run]) -> tuple[str, ...]:
    found = []
    if load > _cores():
        found.append(f"the load average was {load:.1f} on {_cores()} cores before the start: trust the minimum only")
    noisy = sorted({run.name for run in runs if np.median(run.wall) > 1.5 * min(run.wall)})
    if noisy:
        found.append(f"the median is over 1.5 x the shortest time for {', '.join(noisy)}: the machine was busy")
    return tuple(found)


def _environment(tf32: bool) -> dict[str, Any]:
    return {
        "onnxruntime": onnxruntime().__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": _cores(),
        "spinning": "off",
        "tf32": "on" if tf32 else "off",
    }

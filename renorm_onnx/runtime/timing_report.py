"""What `bench` measured, for people, machines and eyes."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from renorm_onnx.errors import InputError, MachineError
from renorm_onnx.runtime.table import text_table

SCHEMA_VERSION = 1

_LOGARITHMIC = 30  # ratio of times from which bars of one height per unit hide the short ones

REGRESSION = 1.05
"""A model counts as slower from this ratio on, in its best and in its typical time."""


@dataclass(frozen=True)
class Timing:
    """One model under one set of options.

    Attributes:
        model: Its name.
        provider: Execution provider.
        batch: Size of the first axis.
        threads: Threads inside an operator.
        optimize: onnxruntime's graph optimizations.
        mode: "run": numpy in and out; "binding": all tensors stay on the device; "graph": one CUDA graph.
        min_ms: Shortest time of a call, wall clock.
        median_ms: Median.
        p90_ms: 90th percentile.
        cpu_ms: Median processor time of the process per call.
        samples: How many times were measured.
        repeats: Calls per sample.
        load_ms: Shortest time to create the session.
        bytes: Size of the model with its weights.
        on_cpu: Nodes that another provider left to the CPU.
    """

    model: str
    provider: str
    batch: int
    threads: int
    optimize: str
    mode: str
    min_ms: float
    median_ms: float
    p90_ms: float
    cpu_ms: float
    samples: int
    repeats: int
    load_ms: float
    bytes: int
    on_cpu: int

    @property
    def setting(self) -> tuple[str, int, int, str, str]:
        """Everything but the model: timings are comparable where this is equal."""
        return self.provider, self.batch, self.threads, self.optimize, self.mode


@dataclass(frozen=True)
class BenchReport:
    """All timings of one call of `bench`.

    Attributes:
        timings: One per model and setting.
        sizes: Sizes chosen for axes that vary, other than the batch.
        environment: Versions, processor, options.
        warnings: What makes the numbers less trustworthy.
    """

    timings: tuple[Timing, ...]
    sizes: dict[str, int] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def pairs(self) -> Iterator[tuple[Timing, Timing]]:
        """Yield each timing of a later model with that of the first model under the same setting."""
        if not self.timings:
            return
        first = {t.setting: t for t in self.timings if t.model == self.timings[0].model}
        for timing in self.timings:
            base = first.get(timing.setting)
            if base is not None and base is not timing:
                yield base, timing

    def regressions(self, threshold: float = REGRESSION) -> list[str]:
        """Say where a later model is slower than the first, one sentence each.

        Args:
            threshold: Ratio that both the shortest and the median time must exceed; one alone is noise.
        """
        return [
            f"{new.model!r} takes {new.median_ms / old.median_ms:.2f} x the time of {old.model!r} "
            f"({new.median_ms:.4g} ms, {old.median_ms:.4g} ms; {_setting(new)})"
            for old, new in self.pairs()
            if new.median_ms > threshold * old.median_ms and new.min_ms > threshold * old.min_ms
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        ratios = {id(new): old.median_ms / new.median_ms for old, new in self.pairs()}
        rows = [{**asdict(timing), "speedup": ratios.get(id(timing))} for timing in self.timings]
        return {
            "schema_version": SCHEMA_VERSION,
            "timings": rows,
            "sizes": self.sizes,
            "environment": self.environment,
            "warnings": list(self.warnings),
            "regressions": self.regressions(),
        }

    def __str__(self) -> str:
        speedup = {id(new): (old.min_ms / new.min_ms, old.median_ms / new.median_ms) for old, new in self.pairs()}
        cells = []
        for timing in self.timings:
            low, middle = speedup.get(id(timing), (1.0, 1.0))
            cells.append(
                (
                    timing.model,
                    timing.provider,
                    str(timing.batch),
                    str(timing.threads),
                    timing.optimize,
                    timing.mode,
                    *(f"{ms:.4g}" for ms in (timing.min_ms, timing.median_ms, timing.p90_ms, timing.cpu_ms)),
                    f"{low:.2f} / {middle:.2f}" if id(timing) in speedup else "",
                    f"{timing.load_ms:.3g}",
                    f"{timing.bytes / 1024:.1f}",
                )
            )
        header = (
            *("model", "provider", "batch", "threads", "opt", "mode", "min ms", "median", "p90", "cpu ms"),
            *("speed-up min / median", "load ms", "KiB"),
        )
        lines = text_table(header, cells, numbers=(2, 3, 6, 7, 8, 9, 10, 11, 12))
        lines += [f"slower: {text}" for text in self.regressions()]
        lines += [f"warning: {text}" for text in self.warnings]
        lines.append(", ".join(f"{key} {value}" for key, value in self.environment.items()))
        return "\n".join(lines)


def _setting(timing: Timing) -> str:
    return (
        f"{timing.provider}, batch {timing.batch}, {timing.threads} thread(s), optimizations {timing.optimize}, "
        f"{timing.mode}"
    )


def plot(report: BenchReport, path: str | os.PathLike[str]) -> None:
    """Draw the median time of each model, with bars from the shortest to the 90th percentile.

    Args:
        report: At least one timing.
        path: Image to write; its suffix says which kind.

    Raises:
        InputError: There is nothing to draw, or `path` cannot be written.
        MachineError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MachineError("plot: matplotlib is not installed; run: pip install matplotlib") from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not report.timings:
        raise InputError("plot: the report holds no timings")
    settings = list(dict.fromkeys(timing.setting for timing in report.timings))
    models = list(dict.fromkeys(timing.model for timing in report.timings))
    figure = Figure(figsize=(1.8 + 1.4 * len(settings), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        own = [timing for timing in report.timings if timing.model == model]
        middle = [timing.median_ms for timing in own]
        spread = [[t.median_ms - t.min_ms for t in own], [t.p90_ms - t.median_ms for t in own]]
        places = [settings.index(timing.setting) + (number - (len(models) - 1) / 2) * width for timing in own]
        axes.bar(places, middle, 0.9 * width, yerr=spread, capsize=3, label=model)
    axes.set_xticks(range(len(settings)), [f"{s[0]}, batch {s[1]}\nopt {s[3]}, {s[4]}" for s in settings], fontsize=8)
    axes.set_ylabel("ms per call (whiskers: shortest, 90th percentile)", fontsize=9)
    version = report.environment.get("onnxruntime", "")
    axes.set_title(f"Median time in onnxruntime {version}, {settings[0][2]} thread(s)", fontsize=9)
    if max(t.median_ms for t in report.timings) > _LOGARITHMIC * min(t.median_ms for t in report.timings):
        axes.set_yscale("log")
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(os.fspath(path), dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(
            f"plot: {os.fspath(path)!r} cannot be written: {error} (matplotlib {matplotlib.__version__})"
        ) from error

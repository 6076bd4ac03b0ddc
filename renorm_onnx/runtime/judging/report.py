"""What `verify` answers, for people and for machines."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from renorm_onnx.runtime.comparison import json_value
from renorm_onnx.runtime.estimate import Cost
from renorm_onnx.runtime.judging.layerwise import LayerReport
from renorm_onnx.runtime.judging.sites import SiteReport
from renorm_onnx.runtime.judging.verdict import POOLED, Row
from renorm_onnx.runtime.table import text_table

SCHEMA_VERSION = 1

_EXPLANATION = (
    "unfused, fused: RMS error against float64, relative; rms, worst: RMS and largest error of the fused model in",
    "units of its yardstick, the errors of the unfused model or what its type rounds, whichever is larger",
)


@dataclass(frozen=True)
class Repeat:
    """Whether the candidate gives the same twice, in two fresh sessions.

    Attributes:
        provider: Execution provider.
        largest: Largest difference between the two runs.
        inputs: On which inputs.
    """

    provider: str
    largest: float
    inputs: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"provider": self.provider, "largest_difference": json_value(self.largest), "inputs": self.inputs}

    def __str__(self) -> str:
        same = "bit for bit" if self.largest == 0 else f"to {self.largest:.1e}"
        return f"repeatable on {self.provider}: two fresh sessions agree {same} ({self.inputs})"


@dataclass(frozen=True)
class Verdict:
    """The answer of `verify`.

    Attributes:
        outcome: "yes"; "no"; "unusable": there is nothing right to compare with; "skipped": the models were too large
            to run and only what is listed was checked.
        reason: One sentence.
        rows: The comparison, one row per provider, output and set of inputs; see `verdict`.
        problems: What differs before any value is looked at.
        skipped: What was not checked, and why.
        remarks: What else a reader should know: data that were cast, limits that came from neighbours, models that part
            when onnxruntime optimizes them.
        repeats: Repeatability, per provider.
        sites: The check of each rewritten place by itself (`sites.SiteReport`), if made.
        layers: The comparisons layer by layer (`layerwise.LayerReport`), one per provider, if asked for.
        cost: Estimate of one run of the reference.
        precision: The coarsest type in the reference; that before an output sets the limits of the output.
        seed: Of the generated inputs.
        environment: Versions, the options of the sessions, and where the candidate's nodes ran.
        seconds: Wall time spent.
        fusion: What was folded, if `verify` fused the candidate itself.
    """

    outcome: str
    reason: str
    rows: tuple[Row, ...] = ()
    problems: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    repeats: tuple[Repeat, ...] = ()
    sites: SiteReport | None = None
    layers: tuple[LayerReport, ...] = ()
    cost: Cost | None = None
    precision: str = ""
    seed: int = 0
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    fusion: Any = None

    @property
    def ok(self) -> bool:
        """Whether the answer is yes."""
        return self.outcome == "yes"

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            "outcome": self.outcome,
            "reason": self.reason,
            "problems": list(self.problems),
            "rows": [row.to_dict() for row in self.rows],
            "repeatability": [repeat.to_dict() for repeat in self.repeats],
            "sites": self.sites.to_dict() if self.sites is not None else None,
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": list(self.skipped),
            "remarks": list(self.remarks),
            "cost": {"flops": self.cost.flops, "bytes": self.cost.bytes, "complete": self.cost.complete}
            if self.cost is not None
            else None,
            "precision": self.precision,
            "seed": self.seed,
            "environment": self.environment,
            "seconds": round(self.seconds, 3),
            "fusion": self.fusion.to_dict() if self.fusion is not None else None,
        }

    def __str__(self) -> str:
        lines = [f"verdict: {self.outcome}{self._proviso()}. {self.reason}"]
        lines += [f"  {problem}" for problem in self.problems]
        if self.rows:
            lines += ["", *_table(_shown(self.rows)), ""]
            for row in _furthest(self.rows):
                lines.append(f"worst element on {row.provider}: {_worst(row)}")
                lines += [f"  there: {row.spread}"] if row.spread is not None else []
        lines += [str(repeat) for repeat in self.repeats]
        placed = self.environment.get("placement", {}).items()
        lines += [f"nodes on {name}: {', '.join(f'{n} on {ep}' for ep, n in nodes.items())}" for name, nodes in placed]
        lines += [str(self.sites)] if self.sites is not None else []
        lines += [f"\n{layer}" for layer in self.layers]
        lines += self.left_out()
        lines += self.notes()
        if self.rows:
            lines.append(
                f"seed {self.seed}, {self.precision}, {self.environment.get('onnxruntime', '')}, {self.seconds:.2f} s"
            )
        return "\n".join(lines)

    def left_out(self) -> list[str]:
        """Return a line for each thing that was not checked and that `reason` does not name."""
        return [f"not checked: {text}" for text in self.skipped if text not in self.reason]

    def notes(self) -> list[str]:
        """Return a line for each thing that a reader should know besides."""
        return [f"note: {text}" for text in self.remarks]

    def _proviso(self) -> str:
        """What a yes leaves open: such a place was only run with the whole, where a dead Relu may hide it."""
        if self.ok and self.fusion is not None and not self.fusion.changed:
            return ", but nothing folds here, so the model was compared with itself"
        if self.sites is None or not self.sites.unchecked or self.outcome == "no":
            return ""
        count = len(self.sites.unchecked)
        return f", but {count} of {count + len(self.sites.sites)} rewritten places could not be checked alone"


def _shown(rows: Sequence[Row]) -> list[Row]:
    """Leave out ordinary sets of inputs that hold: their pooled row says it."""
    return [row for row in rows if row.note or not row.ordinary or row.inputs == POOLED or row.optimize != "off"]


def _table(rows: Sequence[Row]) -> list[str]:
    header = ("", "provider", "opt", "output", "inputs", "elements", "unfused", "fused", "rms", "worst", "note")
    cells = [
        (
            "--" if row.ok is None else "ok" if row.ok else "FAIL",
            row.provider,
            row.optimize,
            row.output,
            row.inputs if row.sets == 1 else f"{row.inputs}: worst of {row.sets}",
            str(row.elements),
            f"{row.unfused:.1e}",
            f"{row.fused:.1e}",
            f"{row.typical:.2f}x",
            f"{row.worst:.2f}x",
            row.note,
        )
        for row in rows
    ]
    return [*_EXPLANATION, *text_table(header, cells, numbers=(5, 6, 7, 8, 9))]


def _furthest(rows: Sequence[Row]) -> list[Row]:
    best: dict[str, Row] = {}
    for row in rows:
        if row.decides and row.elements and (row.provider not in best or _rank(row) > _rank(best[row.provider])):
            best[row.provider] = row
    return list(best.values())


def _rank(row: Row) -> tuple[bool, float]:
    return (not row.ok, row.worst)


def _worst(row: Row) -> str:
    want, unfused, fused = row.values
    return f"{row.output!r}{list(row.index)} ({row.inputs}): reference {want!r}, unfused {unfused!r}, fused {fused!r}"

"""Where two models part: every value whose name is in both, compared in the order in which it is computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx.runtime.inputs import Trial
from renorm_onnx.runtime.judging.deviation import errors_of
from renorm_onnx.runtime.judging.verdict import POOLED, Judge, Precision, Row
from renorm_onnx.runtime.reference import evaluate
from renorm_onnx.runtime.session import open_session
from renorm_onnx.runtime.table import text_table

Array = npt.NDArray[Any]

_SHOWN_AFTER = 3


@dataclass(frozen=True)
class LayerReport:
    """The comparison layer by layer; it explains a verdict and decides nothing.

    Attributes:
        provider: Execution provider.
        inputs: On which inputs.
        rows: One per common value, in the reference's order.
        operators: Which operator computes it in the reference, by name.
        uncommon: How many values of the reference have no namesake in the candidate.
    """

    provider: str
    inputs: str
    rows: tuple[Row, ...]
    operators: Mapping[str, str]
    uncommon: int

    @property
    def first(self) -> str:
        """Name of the first value that diverges, or an empty string."""
        return next((row.output for row in self.rows if row.ok is False), "")

    @property
    def ok(self) -> bool:
        """Whether there were values to compare and none diverges."""
        return bool(self.rows) and not self.first

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        rows = [{**row.to_dict(), "operator": self.operators[row.output]} for row in self.rows]
        return {
            "ok": self.ok,
            "first_divergent": self.first or None,
            "provider": self.provider,
            "inputs": self.inputs,
            "uncommon": self.uncommon,
            "layers": rows,
        }

    def __str__(self) -> str:
        if not self.rows:
            return f"layers on {self.provider}: no value has a name that is in both models"
        first = next((n for n, row in enumerate(self.rows) if row.ok is False), None)
        head = f"layers on {self.provider} ({self.inputs}): {len(self.rows)} common values, "
        head += f"{self.uncommon} only in the reference; "
        head += "none diverges" if first is None else f"the first that diverges is {self.first!r}"
        shown = self.rows if first is None else self.rows[: first + 1 + _SHOWN_AFTER]
        cells = [
            (
                "--" if row.ok is None else "ok" if row.ok else "DIVERGES",
                row.output,
                self.operators[row.output],
                f"{row.unfused:.1e}",
                f"{row.fused:.1e}",
                f"{row.typical:.2f}x",
                f"{row.worst:.2f}x",
                row.note,
            )
            for row in shown
        ]
        header = ("", "value", "operator", "unfused", "fused", "rms", "worst", "note")
        return "\n".join([head, *text_table(header, cells, numbers=(3, 4, 5, 6))])


def compare_layers(
    reference: ir.Model, candidate: ir.Model, provider: str, trial: Trial, precision: Precision
) -> LayerReport:
    """Compare every value of the main graphs that has the same name in both models.

    Args:
        reference: The original. Not changed.
        candidate: The rewritten model. Not changed.
        provider: Execution provider.
        trial: The inputs.
        precision: What the type of the reference allows to expect.

    Raises:
        InputError: A model fails on these inputs.
        MachineError: The provider cannot run them.
    """
    produced = {v.name: node.op_type for node in reference.graph for v in node.outputs if v.name and _is_tensor(v)}
    others = {v.name for node in candidate.graph for v in node.outputs if v.name and _is_tensor(v)}
    names = [name for name in produced if name in others]
    want = evaluate(reference, trial.feeds, keep=names)
    unfused, fused = (
        open_session(_exposing(model, names), provider).run(trial.feeds, names) for model in (reference, candidate)
    )
    judge = Judge(provider, precision)
    for name in names:
        if all(isinstance(side[name], np.ndarray) for side in (want, unfused, fused)):
            judge.add(trial, name, errors_of(want[name], unfused[name], fused[name]))
    rows = [row for row in judge.rows() if row.inputs != POOLED]
    return LayerReport(provider, trial.label, tuple(rows), produced, len(produced) - len(names))


def _is_tensor(value: ir.Value) -> bool:
    return value.type is None or isinstance(value.type, ir.TensorType)


def _exposing(model: ir.Model, names: list[str]) -> ir.Model:
    """Return a copy of a model that also gives these values."""
    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    given = {value.name for value in copy.graph.outputs}
    copy.graph.outputs.extend(values[name] for name in names if name not in given)
    return copy

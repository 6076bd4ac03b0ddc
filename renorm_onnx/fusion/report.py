"""What was folded into what; what was kept, and why.

A refusal is a value with a stable code, the name of the obstacle and a sentence. `FusionReport` keeps one entry for
each normalization of the input model, in graph order.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 1

METADATA_KEY = "renorm_onnx.fused"
"""Where a fused file says what was folded; in such a file a name means the same value as in the original."""


class Reason(enum.StrEnum):
    """Why a norm stays. The values are stable: scripts may test for them."""

    TRAINING = "training-mode"
    OUTPUTS = "extra-outputs-used"
    OPSET = "opset-too-old"
    UNKNOWN_OPSET = "opset-unknown"
    NOT_CONSTANT = "parameters-not-constant"
    OVERRIDABLE = "parameters-overridable"
    NEGATIVE_VARIANCE = "negative-variance"
    NON_FINITE = "non-finite-parameters"
    OVERFLOW = "overflow"
    UNDERFLOW = "underflow"
    CANCELLATION = "cancellation"
    OPERATOR = "no-rule-for-operator"
    WEIGHT = "weight-not-constant"
    CONSUMER = "other-consumer"
    GRAPH_INPUT = "graph-input"
    GRAPH_OUTPUT = "graph-output"
    SUBGRAPH = "crosses-subgraph"
    CONFLICT = "conflicting-demands"
    SIGN = "negative-scale"
    SHIFT = "shift-cannot-pass"
    PADDING = "padding-sees-shift"
    SCALE = "scale-cannot-pass"
    SHAPE = "shape-not-proven"
    AXIS = "not-a-channel-axis"
    DTYPE = "element-type"
    MALFORMED = "malformed-operator"


@dataclass(frozen=True)
class Refusal:
    """Why a map cannot take a step.

    Args:
        reason: The stable code.
        obstacle: Name of the node or value in the way.
        detail: One sentence for a person.
        structural: Whether any other map would be refused at that node as well.
    """

    reason: Reason
    obstacle: str
    detail: str
    structural: bool = False

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}"


@dataclass
class NormReport:
    """What became of one normalization.

    Args:
        name: Name of its output value in the input model (a value name is unique, a node name need not be).
        kind: "norm", or "affine" for a constant Mul, Add, Sub, Div or Neg that is no normalization by itself.
        form: How the model spells it: "BatchNormalization", "chain", or a function's "domain::name".
        module: The path of the torch module it came from, where the exporter left it; else empty.
        nodes: Names of its nodes, or of their outputs where they have none.
        outcome: "folded" or "kept".
        into: Names of the operators that took it up.
        way: "backward" (into what computes its input), "forward" (into what reads its output), "branches" (merged with
            its sisters), or "unreachable" (in a branch of an If that is never taken, and gone with it).
        refusals: For a kept norm: what stood in the way backward, then forward.
    """

    name: str
    kind: str
    form: str
    nodes: tuple[str, ...] = ()
    module: str = ""
    outcome: str = "kept"
    into: tuple[str, ...] = ()
    way: str = ""
    refusals: tuple[Refusal, ...] = ()

    def fold(self, way: str, into: Iterable[str]) -> None:
        """Note, in place, that the norm is gone: by which way, and into which operators."""
        self.outcome, self.way, self.into, self.refusals = "folded", way, tuple(into), ()

    @property
    def is_unreachable(self) -> bool:
        """Whether it is gone without having been folded: no input ever came to it."""
        return self.way == "unreachable"

    @property
    def label(self) -> str:
        """What a person calls it: its module, or the name of its output."""
        return self.module or self.name

    @property
    def reason(self) -> Reason | None:
        """The code of the first refusal of a kept norm; None for a folded one."""
        return self.refusals[0].reason if self.refusals else None

    @property
    def obstacle(self) -> str:
        """The node or value that stood in the way, or an empty string."""
        return self.refusals[0].obstacle if self.refusals else ""

    @property
    def detail(self) -> str:
        """Why a norm was kept, or where a folded one went, as one sentence."""
        if self.outcome == "kept":
            return "; ".join(dict.fromkeys(r.detail for r in self.refusals))
        if self.is_unreachable:
            return "stands in a branch of an If that is never taken"
        return f"{self.way} into {', '.join(self.into)}" if self.into else self.way

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain data for JSON."""
        entry: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "form": self.form,
            "module": self.module,
            "nodes": list(self.nodes),
            "outcome": self.outcome,
        }
        if self.outcome == "folded":
            entry |= {"into": list(self.into), "way": self.way}
        else:
            entry |= {
                "reason": self.reason.value if self.reason else "",
                "refusals": [
                    {"reason": r.reason.value, "obstacle": r.obstacle, "detail": r.detail} for r in self.refusals
                ],
            }
        return entry


@dataclass
class FusionReport:
    """One entry for each normalization and each constant affine operator of the input model.

    Args:
        entries: In graph order.
        branches_merged: Parallel linear branches that became one operator.
        training_layers: Layers that take a step of training, which is no map that could be folded.
        remarks: What else a person should know, one sentence each.
        operators_before, operators_after: How many nodes of each operator the model has.
    """

    entries: list[NormReport] = field(default_factory=list)
    branches_merged: int = 0
    training_layers: int = 0
    remarks: list[str] = field(default_factory=list)
    operators_before: Counter[str] = field(default_factory=Counter)
    operators_after: Counter[str] = field(default_factory=Counter)

    @property
    def norms(self) -> tuple[NormReport, ...]:
        """The entries that are normalizations."""
        return tuple(e for e in self.entries if e.kind == "norm")

    @property
    def folded(self) -> tuple[NormReport, ...]:
        """The normalizations that are gone."""
        return tuple(e for e in self.norms if e.outcome == "folded")

    @property
    def kept(self) -> tuple[NormReport, ...]:
        """The normalizations that stay, each with its reason."""
        return tuple(e for e in self.norms if e.outcome == "kept")

    @property
    def unreachable(self) -> tuple[NormReport, ...]:
        """The normalizations that are gone with a branch that is never taken."""
        return tuple(e for e in self.folded if e.is_unreachable)

    @property
    def affines_folded(self) -> int:
        """How many constant affine operators that are no norm were folded too."""
        return sum(e.kind == "affine" and e.outcome == "folded" and not e.is_unreachable for e in self.entries)

    @property
    def changed(self) -> bool:
        """Whether a norm is gone, or anything was folded or merged; inlined functions and opened Ifs alone are none."""
        return bool(self.branches_merged or self.folded or self.affines_folded)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain data for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "norms_before": len(self.norms),
            "norms_after": len(self.kept),
            "affines_folded": self.affines_folded,
            "branches_merged": self.branches_merged,
            "training_layers": self.training_layers,
            "remarks": list(self.remarks),
            "norms": [e.to_dict() for e in self.norms],
            "affines": [e.to_dict() for e in self.entries if e.kind == "affine"],
            "operators_before": dict(self.operators_before),
            "operators_after": dict(self.operators_after),
        }

    def advice_on_training(self) -> str:
        """Why layers in training stay, and what to fuse instead."""
        layers = f"{self.training_layers} norm{'s' if self.training_layers > 1 else ''}"
        return f"a training graph: {layers} in training, which nothing can fold; fuse the export for inference instead"

    def lines(self) -> Iterator[str]:
        """The report for a person: a summary line, then the kept norms grouped by reason."""
        norms, folded = self.norms, self.folded
        if self.training_layers:
            yield self.advice_on_training()
        elif not norms:
            yield "no normalization found"
        if norms:
            gone = len(self.unreachable)
            never = f", {gone} gone with a branch that is never taken" if gone else ""
            yield f"{len(folded) - gone} of {len(norms)} norms folded, {len(self.kept)} kept{never}"
        if self.affines_folded:
            yield f"{self.affines_folded} constant Mul/Add/Sub/Div/Neg folded"
        if self.branches_merged:
            yield f"{self.branches_merged} parallel branches merged"
        yield from self.remarks
        for norm in self.kept:
            codes = ", ".join(dict.fromkeys(r.reason.value for r in norm.refusals))
            yield f"  kept {norm.label!r} [{codes}]: {norm.detail}"

    def __str__(self) -> str:
        return "\n".join(self.lines())

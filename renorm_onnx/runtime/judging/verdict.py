"""Is the candidate as right as the original? The rule, and the form of its answer.

Three runs of the same inputs are set side by side: R, the original evaluated in float64; U, the original ("unfused")
on an execution provider; F, the candidate ("fused") on the same one, both without graph optimizations. With u the
unit roundoff of the coarsest floating type that the original computes an output from, and RMS over all elements of that
output::

    gate       RMS(U - R) <= gate * RMS(R)                                   else: no reference to judge by
    finite     F is finite where R and U are; NaN and infinities are where theirs are
    typical    RMS(F - R) <= 1.5 * max(RMS(U - R), 2u * RMS(R))              pooled over ordinary inputs
    worst      max|F - R| <= 4 * max(max|U - R|, 4u * max|R|)                for every set of inputs
    single     RMS(F - R) <= 3 * max(RMS(U - R), 2u * RMS(R))                for every set of inputs

The factors 1.5 and 4 are calibrated on WRN-16-4, DenseNet-40, MobileNetV2 and an MLP, 30 to 60 batches each: correct
folds reach 1.11 pooled, 1.6 in one batch and 2.1 at the worst element, and so does an unchanged model when
onnxruntime's optimizer reorders it. A single small set of inputs says little about the size of U's rounding error, so
the error relative to R that U showed over all ordinary inputs is a further lower bound on the right-hand side; for
inputs that are not larger than ordinary ones, so is its absolute error there. Sets of one kind with fewer than 64
elements of an output are judged together, and while there are n < 64 of them the last two limits widen by 1 + 2 /
sqrt(n).

Where all positions of a sample are about alike (zeros, a constant, small noise), a pool sums n equal numbers. Their
rounding errors all go one way: they grow as n, where those of ordinary inputs grow as its root, and depend on the
digits of the number summed, which a fold changes. (Measured for GlobalAveragePool over 56x56 to 512x512: up to 70 to
760 times those of random images, and hardly any for other numbers.) In a model that averages, the last two limits widen
by sqrt(n) there, to at most a tenth of the gate.

One run of U is one draw from a distribution that has a long tail where a network is badly conditioned, and says
nothing of the rounding of other weights where a provider computes more exactly than their type. So before the answer is
no, more are drawn: neighbours N of U, the original with its weights rounded otherwise (`neighbours`), on the same
provider. The largest RMS(N - R) and max|N - R| then stand where RMS(U - R) and max|U - R| stood, the gate included, and
3 in the place of 1.5. To keep a wrong fold from hiding behind bad conditioning, neighbours count only if every
rewritten place was checked by itself and holds (`sites`); for a torch module, which has no places, they count alone.

Measured on correct folds: 21 architectures of timm with random weights and the six networks of `models/`, 96 verdicts
on generated inputs: one run of U alone says no once, the rule never. RepVGG-A0 with its branches merged, three draws of
random weights, six seeds each: 14 times of 18, and never (once with 8 neighbours instead of 16). Each of 11 faults in
each of 15 networks, the six in full size and RepVGG-A0 among them, is refused: epsilon dropped, gamma and beta swapped,
one bias moved by 1e-4 at the start, in the middle or at the end, one channel off by 1 % at the start or in the middle,
NaN, an output missing, renamed or of another type (``python -m runtime_tests.faults`` repeats it).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from renorm_onnx.runtime.comparison import json_value, ratio
from renorm_onnx.runtime.inputs import SMALL, Trial
from renorm_onnx.runtime.judging.deviation import Errors, together
from renorm_onnx.runtime.judging.error_spread import Spread

Array = npt.NDArray[Any]

TYPICAL = 1.5
WORST = 4.0
SINGLE = 3.0
POOLED = "ordinary, pooled"

ENOUGH = 64
"""Elements below which a set of inputs is judged together with others of its kind: one element's error is chance."""

# How far the limits of flat inputs may widen, of the gate.
_ROOM = 0.1

# Shares of elements of a discrete output: where the unfused model itself may differ from the reference, and where F may
# differ from both, ties broken otherwise.
_FLIPS_GATE = 1e-2
_FLIPS = 1e-3


@dataclass(frozen=True)
class Precision:
    """What the type of a model allows to expect.

    Attributes:
        name: The coarsest type in the model that rounds.
        u: Its unit roundoff, relative.
        gate: Largest RMS(U - R) / RMS(R) with which the original itself still counts as right.
        floor: Absolute errors below this are no errors: the end of the type's normal range.
    """

    name: str
    u: float
    gate: float
    floor: float


PRECISIONS = {
    # R, and what a fold sums up into a bias, are no more exact than U here: four bits are granted, sqrt(n) roundings
    # for sums of n = 256 products, and the limits grant as many again.
    "float64": Precision("float64", 2.0**-49, 1e-6, 1e-307),
    "float32": Precision("float32", 2.0**-24, 1e-3, float(np.finfo(np.float32).tiny)),
    "float16": Precision("float16", 2.0**-11, 0.1, float(np.finfo(np.float16).smallest_subnormal)),
    "bfloat16": Precision("bfloat16", 2.0**-8, 0.3, float(np.finfo(np.float32).tiny)),
    # Rounding to 8 bits flips by whole steps; how many flips a set of inputs shows is chance.
    "quantized": Precision("quantized", 2.0**-10, 0.1, float(np.finfo(np.float32).tiny)),
}


@dataclass(frozen=True)
class Row:
    """One line of the verdict: one output, over one set of inputs or pooled over the ordinary ones.

    Attributes:
        provider: Execution provider.
        optimize: onnxruntime's optimizations; only rows with "off" decide.
        output: Name of the output.
        inputs: Which inputs.
        sets: How many sets of inputs it stands for, each judged by itself; the figures are those of the worst.
        ordinary: Whether the calibrated limits hold for them.
        elements: How many elements were compared, in all sets.
        unfused: RMS(U - R) / RMS(R).
        fused: RMS(F - R) / RMS(R).
        typical: RMS(F - R) over its yardstick; see the rule.
        worst: max|F - R| over its yardstick.
        index: Index of the element where F is furthest from R.
        values: Values of R, U and F there.
        decides: Whether a failure of this row makes the verdict no.
        note: What is wrong, or why it does not decide.
        spread: How the errors of F are spread; of a pooled row, on the inputs where F is furthest.
        of_size: Whether what is wrong, if anything, is the size of errors alone: F is finite where it should be.
    """

    provider: str
    optimize: str
    output: str
    inputs: str
    ordinary: bool
    elements: int
    unfused: float
    fused: float
    typical: float
    worst: float
    index: tuple[int, ...]
    values: tuple[Any, Any, Any]
    decides: bool
    note: str
    spread: Spread | None = None
    sets: int = 1
    of_size: bool = True

    @property
    def ok(self) -> bool | None:
        """Whether it holds; None where it does not decide."""
        return not self.note if self.decides else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        names = ("provider", "optimize", "output", "inputs", "sets", "ordinary", "elements", "decides", "ok", "note")
        fields: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name in ("unfused", "fused", "typical", "worst"):
            fields[name] = json_value(getattr(self, name))
        want, unfused, fused = (json_value(value) for value in self.values)
        fields["spread"] = None if self.spread is None else {k: json_value(v) for k, v in self.spread.to_dict().items()}
        fields["worst_element"] = {"index": list(self.index), "reference": want, "unfused": unfused, "fused": fused}
        return fields


@dataclass
class Judge:
    """Collects errors of one provider and turns them into rows.

    Attributes:
        provider: Execution provider.
        precision: What the model's type allows to expect.
        found: Trial and errors, by output.
        precisions: What to expect of single outputs, where it is known; those of a sequence have its name.
        averages: Whether the model sums over the positions of a sample.
    """

    provider: str
    precision: Precision
    found: dict[str, list[tuple[Trial, Errors]]] = field(default_factory=dict)
    precisions: Mapping[str, Precision] = field(default_factory=dict)
    averages: bool = False

    def expected_of(self, output: str) -> Precision:
        """Return what the type of an output, and of all that it is computed from, allows to expect of it."""
        return self.precisions.get(output) or self.precisions.get(output.partition("[")[0], self.precision)

    def add(self, trial: Trial, output: str, errors: Errors) -> None:
        """Record the errors of one output on one set of inputs."""
        self.found.setdefault(output, []).append((trial, errors))

    def take_in(self, trial: Trial, output: str, want: Array, neighbour: Array) -> None:
        """Take the errors of one more neighbour of the original into those recorded for one set of inputs."""
        found = self.found[output]
        self.found[output] = [(t, e.beside(want, neighbour) if t is trial else e) for t, e in found]

    def rows(self) -> list[Row]:
        """Return the pooled row, and one row for all trials of one label, for each output."""
        return _grouped(row for output, found in self.found.items() for row in self._rows_of(output, found))

    def empty(self) -> str:
        """Return which output gave nothing to compare on ordinary inputs, or nothing."""
        for output, found in self.found.items():
            ordinary = [e for trial, e in found if trial.ordinary]
            if ordinary and not any(e.problem or e.elements for e in ordinary):
                gave = "nothing that is finite" if any(e.left_out for e in ordinary) else "no elements"
                return f"nothing was compared: output {output!r} on {self.provider} gave {gave}"
        return ""

    def left_out(self) -> list[str]:
        """Return a sentence for each output of which elements were left out, being finite in neither R nor U or F."""
        counts = {
            output: (sum(e.left_out for _, e in found), sum(e.left_out + e.elements for _, e in found))
            for output, found in self.found.items()
        }
        return [
            f"{lost} of {total} elements of {output!r} on {self.provider}: the reference or both models are not finite"
            for output, (lost, total) in counts.items()
            if lost
        ]

    def unusable(self) -> str:
        """Return why the original is no reference to judge by, or nothing."""
        for output, found in self.found.items():
            ordinary = [(trial, e) for trial, e in _merged(found) if trial.ordinary]
            if not ordinary:
                return f"no ordinary input could be run for output {output!r} on {self.provider}"
            precision = self.expected_of(output)
            for trial, e in ordinary:
                if not e.problem and not self._passes_gate(e, precision):
                    limit = _FLIPS_GATE if e.discrete else precision.gate
                    off = ratio(e.own_rms, e.size_rms)
                    who = "itself" if e.unfused_rms >= e.near_rms else "with its weights rounded otherwise"
                    return (
                        f"reference unusable: on {self.provider}, output {output!r}, inputs {trial.label}, the unfused "
                        f"model {who} is off by {off:.1e} (RMS, relative; limit {limit:g} for {precision.name})"
                    )
        return ""

    def _passes_gate(self, e: Errors, precision: Precision) -> bool:
        if e.discrete:  # of few elements a neighbour may change one, which would be more than the gate
            return e.unfused_rms <= _FLIPS_GATE and e.near_rms <= max(_FLIPS_GATE, 1 / max(e.elements, 1))
        return e.own_rms <= max(precision.gate * e.size_rms, precision.floor)

    def _rows_of(self, output: str, found: list[tuple[Trial, Errors]]) -> Iterable[Row]:
        found = _merged(found)
        ordinary = [e for trial, e in found if trial.ordinary and not e.problem and e.elements]
        seen = _Seen(ordinary)
        for trial, e in found:
            yield self._single(output, trial, e, seen)
        if ordinary:
            yield self._pooled(output, ordinary)

    def _yardsticks(self, e: Errors, trial: Trial, seen: "_Seen", p: Precision) -> tuple[float, float]:
        typical = max(e.own_rms, 2 * p.u * e.size_rms, seen.relative_rms * e.size_rms, p.floor)
        worst = max(e.own_max, 4 * p.u * e.size_max, seen.relative_max * e.size_max, p.floor)
        if trial.kind in SMALL:
            typical, worst = max(typical, seen.rms), max(worst, seen.max)
        return typical, worst

    def _single(self, output: str, trial: Trial, e: Errors, seen: "_Seen") -> Row:
        precision = self.expected_of(output)
        typical_scale, worst_scale = self._yardsticks(e, trial, seen, precision)
        typical, worst = e.fused_rms / typical_scale, e.fused_max / worst_scale
        note, decides = e.problem, True
        if not note and e.discrete:
            typical = worst = 0.0
            if e.fused_max > max(_FLIPS, e.near_max):
                note = f"{e.fused_max:.2%} of the elements equal neither the reference nor the unfused model"
        elif not note and not self._passes_gate(e, precision):
            decides, note = False, "set aside: the unfused model itself is off by more than its type explains"
        single, most = (limit * _slack(e.elements) for limit in (SINGLE, WORST))
        if self.averages and trial.alike > 1:
            grown, room = math.sqrt(trial.alike), _ROOM * precision.gate
            single = max(single, min(grown * single, room * e.size_rms / typical_scale))
            most = max(most, min(grown * most, room * e.size_max / worst_scale))
        if decides and not note and typical > single:
            note = f"RMS error is {typical:.3g} x its yardstick, allowed {single:.3g}"
        elif decides and not note and worst > most:
            note = f"largest error is {worst:.3g} x its yardstick, allowed {most:.3g}"
        row = self._row(output, trial, e, e.elements, (typical, worst), decides, note)
        return replace(row, of_size=not (e.problem or e.discrete))

    def _pooled(self, output: str, ordinary: list[Errors]) -> Row:
        p = self.expected_of(output)
        elements = sum(e.elements for e in ordinary)
        scales = [max(e.own_rms, 2 * p.u * e.size_rms, p.floor) for e in ordinary]
        peaks = [max(e.own_max, 4 * p.u * e.size_max, p.floor) for e in ordinary]
        squares = sum(e.elements * (e.fused_rms / scale) ** 2 for e, scale in zip(ordinary, scales, strict=True))
        typical = math.sqrt(squares / elements)
        worst = max(e.fused_max / peak for e, peak in zip(ordinary, peaks, strict=True))
        furthest = max(ordinary, key=lambda e: ratio(e.fused_max, e.size_max))
        relative = (
            _root_mean([ratio(e.unfused_rms, e.size_rms) for e in ordinary]),
            _root_mean([ratio(e.fused_rms, e.size_rms) for e in ordinary]),
        )
        note = ""
        if ordinary[0].discrete:
            typical = worst = 0.0
        elif typical > (limit := SINGLE if any(e.near_rms for e in ordinary) else TYPICAL):
            note = f"RMS error is {typical:.3g} x its yardstick, allowed {limit:g}"
        row = self._row(output, None, furthest, elements, (typical, worst), True, note)
        return replace(row, unfused=relative[0], fused=relative[1])

    def _row(
        self,
        output: str,
        trial: Trial | None,
        e: Errors,
        elements: int,
        ratios: tuple[float, float],
        decides: bool,
        note: str,
    ) -> Row:
        return Row(
            provider=self.provider,
            optimize="off",
            output=output,
            inputs=POOLED if trial is None else trial.label,
            ordinary=trial is None or trial.ordinary,
            elements=elements,
            unfused=ratio(e.unfused_rms, e.size_rms),
            fused=ratio(e.fused_rms, e.size_rms),
            typical=ratios[0],
            worst=ratios[1],
            index=e.index,
            values=e.values,
            decides=decides,
            note=note,
            spread=e.spread,
        )


def _grouped(rows: Iterable[Row]) -> list[Row]:
    """Of rows that differ in their figures alone keep the worst, which then stands for all of them."""
    groups: dict[tuple[str, str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.output, row.inputs, row.decides), []).append(row)
    return [
        replace(max(group, key=_nearness), sets=len(group), elements=sum(row.elements for row in group))
        for group in groups.values()
    ]


def _nearness(row: Row) -> tuple[bool, float]:
    """How near a row is to its limits; beyond them comes last."""
    return bool(row.note), max(row.typical / SINGLE, row.worst / WORST)


def _merged(found: list[tuple[Trial, Errors]]) -> list[tuple[Trial, Errors]]:
    """Put sets of inputs of one kind together until each holds `ENOUGH` elements."""
    result: list[tuple[Trial, Errors]] = []
    small: dict[str, list[tuple[Trial, Errors]]] = {}
    for trial, e in found:
        if e.problem or e.discrete or e.elements >= ENOUGH:
            result.append((trial, e))
        else:
            small.setdefault(trial.kind, []).append((trial, e))
    for kind, group in small.items():
        members = [e for _, e in group]
        worst = max(group, key=lambda pair: ratio(pair[1].fused_max, pair[1].size_max))[0]
        label = worst.label if len(group) == 1 else f"{worst.label} and {len(group) - 1} more"
        result.append((Trial(kind, worst.feeds, label), members[0] if len(members) == 1 else together(members)))
    return result


def _slack(elements: int) -> float:
    """Return by how much the limits widen for a set too small for its error to be typical."""
    return 1.0 if elements >= ENOUGH or elements == 0 else 1.0 + 2.0 / math.sqrt(elements)


class _Seen:
    """What the rounding errors of U, and of its neighbours, were over all ordinary inputs of one output."""

    def __init__(self, ordinary: list[Errors]) -> None:
        sized = [e for e in ordinary if e.size_rms > 0]
        near = max((e.near_rms / e.size_rms for e in sized), default=0.0)
        self.relative_rms = max(near, _root_mean([e.unfused_rms / e.size_rms for e in sized]))
        self.relative_max = max((e.own_max / e.size_max for e in sized), default=0.0)
        self.rms = max(_root_mean([e.unfused_rms for e in ordinary]), *(e.near_rms for e in ordinary), 0.0)
        self.max = max((e.own_max for e in ordinary), default=0.0)


def _root_mean(values: list[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values)) if values else 0.0

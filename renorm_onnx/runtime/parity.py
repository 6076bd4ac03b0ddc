"""`verify`: is a rewritten model as right as the original, on the execution provider that will run it?

Two float32 runs always differ, and no fixed tolerance tells a wrong fold from rounding: the usual ones fail a correct
MobileNetV2 fold, and pass a bias that is off in the fifth digit. So each side is measured against a float64
evaluation of the original, and the candidate may be no further from it than the original is (`verdict`).

Both sides run without onnxruntime's graph optimizations. With them onnxruntime folds the original too, and the test
would compare a thing with itself; optimized runs are reported in rows of their own that decide nothing.
"""

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx import model_file
from renorm_onnx.errors import InputError, MachineError, ModelFileError, RenormError
from renorm_onnx.runtime.comparison import TOLERANCES, Comparison, Tolerance, compare
from renorm_onnx.runtime.deviation import errors_of
from renorm_onnx.runtime.estimate import LIMIT, Cost, estimate
from renorm_onnx.runtime.inputs import Trial, input_specs
from renorm_onnx.runtime.interface import interface_problems
from renorm_onnx.runtime.layerwise import compare_layers
from renorm_onnx.runtime.providers import onnxruntime
from renorm_onnx.runtime.reference import evaluate
from renorm_onnx.runtime.report import Repeat, Verdict
from renorm_onnx.runtime.session import Session, open_session, source_of
from renorm_onnx.runtime.sites import SiteReport, check_sites
from renorm_onnx.runtime.torch_reference import TorchReference, is_torch_module
from renorm_onnx.runtime.trials import ReferenceUnusableError, trials
from renorm_onnx.runtime.verdict import ENOUGH, POOLED, PRECISIONS, Judge, Precision, Row

__all__ = [
    "LIMIT",
    "TOLERANCES",
    "Comparison",
    "Cost",
    "Tolerance",
    "Verdict",
    "compare",
    "estimate",
    "verify",
]

Array = npt.NDArray[Any]

_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul")


def verify(
    reference: Any,
    candidate: Any = None,
    *,
    providers: Sequence[str] = ("cpu",),
    inputs: Any = None,
    seed: int = 0,
    layers: bool = False,
    sizes: Mapping[str, int] | None = None,
    limit: Cost | None = None,
    sites: bool | None = None,
    allow_symlinks: bool = False,
) -> Verdict:
    """Judge whether `candidate` computes what `reference` means, as exactly as `reference` does.

    Args:
        reference: The original: a path, `onnx.ModelProto` or `onnx_ir.Model`; or a torch module in evaluation mode,
            whose inputs are then taken in the order of the candidate's.
        candidate: The rewritten model; None: `reference`, fused.
        providers: Execution providers to judge on, "cpu" and "cuda".
        inputs: None: generated, as many as the size of the model allows; a number of generated sets; or data:
            a mapping from names to arrays, a sequence of such, a `.npz` or `.npy` file, a folder of them.
        seed: Of the generated inputs.
        layers: Compare every value whose name is in both models, and name the first that diverges.
        sizes: Values for named sizes that vary, in generated inputs.
        limit: Skip running the models, and say so, if one run costs more. With a limit, on the CPU and on generated
            inputs, whatever else prevents running them is a skip too: onnxruntime is absent or lacks a kernel, the
            reference evaluation lacks an operator, no generated input fits. None: such things are errors.
        sites: Check every rewritten place by itself too (`check_sites`), which also decides. It takes a candidate in
            which a name means the same value as in the reference; None: if `verify` fused it itself.
        allow_symlinks: Follow links to data files outside a model's folder.

    Returns:
        The verdict; `.ok` only if something was compared and all of it holds.

    Raises:
        ModelFileError: A model cannot be read.
        InputError: `inputs` do not fit, or the model cannot be fed generated ones.
        MachineError: onnxruntime or a provider is missing here, or has no kernel for the reference.
    """
    started = time.perf_counter()
    if not providers:
        raise InputError("verify: providers is empty, so there is nothing to compare on")
    fusion = None
    if candidate is None:
        if is_torch_module(reference):
            raise InputError("verify: a torch reference needs a candidate, the exported model")
        from renorm_onnx.fusion.engine import fuse

        reference = model_file.load(reference, allow_symlinks=allow_symlinks)
        candidate, fusion = fuse(reference)
    if is_torch_module(reference) and (sites or layers):
        raise InputError("verify: sites= and layers= need a reference model, a torch module has no value names")
    sides = _Sides(reference, candidate, allow_symlinks=allow_symlinks)
    comparison = _Comparison(sides, seed, dict(sizes or {}))
    verdict = comparison.run(tuple(dict.fromkeys(providers)), inputs, limit, layers)
    if sites or (sites is None and fusion is not None):
        verdict = _with_sites(verdict, check_sites(sides.model, sides.candidate, seed=seed))
    return replace(verdict, fusion=fusion, seed=seed, seconds=time.perf_counter() - started)


def _with_sites(verdict: Verdict, found: SiteReport) -> Verdict:
    if found.ok:
        return replace(verdict, sites=found)
    wrong = found.wrong[0]
    reason = f"{len(found.wrong)} rewritten place(s) compute something else, the first is {wrong}"
    return replace(verdict, outcome="no", reason=reason, sites=found)


class _Sides:
    """The two models, and how to get R, U and F from them."""

    def __init__(self, reference: Any, candidate: Any, *, allow_symlinks: bool) -> None:
        self.candidate = model_file.load(candidate, allow_symlinks=allow_symlinks)
        self.torch: TorchReference | None = None
        if is_torch_module(reference):
            specs = input_specs(self.candidate)
            outputs = [value.name or "" for value in self.candidate.graph.outputs]
            self.torch = TorchReference(reference, [spec.name for spec in specs], outputs)
            self.model = self.candidate
            self.problems: list[str] = []
        else:
            self.model = model_file.load(reference, allow_symlinks=allow_symlinks)
            self.problems = interface_problems(self.model, self.candidate)

    @functools.cached_property
    def sources(self) -> tuple[bytes | str, bytes | str]:
        """Reference and candidate as sessions take them, serialized once."""
        return source_of(self.model), source_of(self.candidate)

    def evaluate(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self.torch.evaluate(feeds) if self.torch else evaluate(self.model, feeds)

    @property
    def precision(self) -> Precision:
        nodes = list(self.model.graph.all_nodes())
        if any(node.op_type in _QUANTIZED for node in nodes):
            return PRECISIONS["quantized"]
        values = {*self.model.graph.inputs, *self.model.graph.initializers.values(), *self.model.graph.outputs}
        types = {value.dtype.name.lower() for value in values if value.dtype is not None}
        types |= {ir.DataType(n.attributes.get_int("to", 1)).name.lower() for n in nodes if n.op_type == "Cast"}
        names = {"double": "float64", "float": "float32"}
        found = [PRECISIONS[name] for kind in types if (name := names.get(kind, kind)) in PRECISIONS]
        return max(found, key=lambda precision: precision.u, default=PRECISIONS["float32"])


@dataclass
class _Runners:
    """The sessions of one provider."""

    provider: str
    judge: Judge
    unfused: Any
    fused: Session
    failures: list[str] = field(default_factory=list)


@dataclass
class _Range:
    """Which values one output of the reference took; integers, few as they are, may well all be one."""

    low: float = math.inf
    high: float = -math.inf
    elements: int = 0

    def add(self, array: Array) -> None:
        if array.dtype.kind != "f":
            self.low, self.high = -math.inf, math.inf
            return
        finite = array[np.isfinite(array)]
        self.low, self.high = min(self.low, finite.min(initial=math.inf)), max(self.high, finite.max(initial=-math.inf))
        self.elements += finite.size

    @property
    def is_constant(self) -> bool:
        """Whether so many elements were equal that it is no chance."""
        return self.low == self.high and self.elements >= ENOUGH


class _Comparison:
    """One call of `verify`."""

    def __init__(self, sides: _Sides, seed: int, sizes: dict[str, int]) -> None:
        self._sides, self._seed, self._sizes = sides, seed, sizes
        self._skipped: list[str] = []
        self._first: tuple[Trial, Mapping[str, Array]] | None = None
        self._uncovered = False
        self._ranges: dict[str, _Range] = {}

    def run(self, providers: Sequence[str], inputs: Any, limit: Cost | None, layers: bool) -> Verdict:
        sides = self._sides
        base = Verdict("no", "", precision=sides.precision.name)
        if sides.problems:
            return replace(base, reason=f"The interface differs: {sides.problems[0]}", problems=tuple(sides.problems))
        cost = estimate(sides.model, self._sizes)
        base = replace(base, cost=cost)
        if limit is not None and (cost.flops > limit.flops or cost.bytes > limit.bytes):
            return _skipped(base, f"one run takes {cost}, the limit is {limit}")
        try:
            verdict = self._run(base, providers, inputs, cost, layers)
        except RenormError as error:
            asked_for = limit is None or tuple(providers) != ("cpu",) or not isinstance(inputs, int | None)
            if asked_for:
                raise
            return _skipped(base, str(error))
        return _skipped(base, verdict.reason) if limit is not None and self._uncovered else verdict

    def _run(self, base: Verdict, providers: Sequence[str], inputs: Any, cost: Cost, layers: bool) -> Verdict:
        sides, precision = self._sides, self._sides.precision
        base = replace(base, environment=_environment(providers))
        runners = []
        for provider in providers:
            unfused = sides.torch or open_session(sides.sources[0], provider)
            try:
                fused = open_session(sides.sources[1], provider)
            except (ModelFileError, MachineError) as error:
                return replace(base, reason=f"The candidate cannot be run where the reference can: {error}")
            runners.append(_Runners(provider, Judge(provider, precision), unfused, fused))
        try:
            specs = input_specs(sides.model)
            for trial, want in trials(sides.evaluate, specs, inputs, cost, self._seed, self._sizes):
                if trial.ordinary:
                    for name, array in _tensors(want).items():
                        self._ranges.setdefault(name, _Range()).add(array)
                for one in runners:
                    self._run_trial(one, trial, want)
        except ReferenceUnusableError as error:
            self._uncovered = True
            return replace(base, outcome="unusable", reason=str(error))
        verdict = self._conclude(base, runners)
        if layers and self._first is not None:
            first, _ = self._first
            compared = [compare_layers(sides.model, sides.candidate, one.provider, first, precision) for one in runners]
            verdict = replace(verdict, layers=tuple(compared))
        return verdict

    def _run_trial(self, one: _Runners, trial: Trial, want: Mapping[str, Array]) -> None:
        try:
            unfused = one.unfused.run(trial.feeds)
        except InputError as error:
            self._skipped.append(f"{trial.label} on {one.provider}: the unfused model itself fails: {error}")
            return
        try:
            fused = one.fused.run(trial.feeds)
        except InputError as error:
            one.failures.append(f"on {one.provider}, inputs {trial.label}: the candidate fails: {error}")
            return
        if self._first is None and trial.ordinary:
            self._first = trial, want
        parts = [_tensors(outputs) for outputs in (want, unfused, fused)]
        for name, array in parts[1].items():
            missing = f"{name!r} is missing from what the candidate or the reference gives"
            if name in parts[0] and name in parts[2]:
                one.judge.add(trial, name, errors_of(parts[0][name], array, parts[2][name]))
            else:
                one.failures.append(f"on {one.provider}, inputs {trial.label}: {missing}")
        if extra := sorted(parts[2].keys() - parts[1].keys()):
            one.failures.append(f"on {one.provider}, inputs {trial.label}: the candidate also gives {extra}")

    def _conclude(self, base: Verdict, runners: Sequence[_Runners]) -> Verdict:
        rows = [row for one in runners for row in one.judge.rows()]
        failures = [failure for one in runners for failure in one.failures]
        base = replace(base, rows=tuple(rows), skipped=tuple(self._skipped))
        if failures:
            return replace(base, reason=failures[0], problems=tuple(failures))
        wrong = [row for row in rows if row.decides and not row.ok]
        unusable = next((text for one in runners if (text := one.judge.unusable())), "")
        if unusable:
            return replace(base, outcome="unusable", reason=unusable)
        elements = sum(row.elements for row in rows if row.decides and row.inputs != POOLED)
        base = self._with_extras(base, runners)
        if wrong:
            row = wrong[0]
            return replace(base, reason=f"On {row.provider}, output {row.output!r}, inputs {row.inputs}: {row.note}")
        if not elements:
            return replace(base, reason="Nothing was compared: no set of inputs could be run on both sides")
        if self._ranges and all(found.is_constant for found in self._ranges.values()):
            # A dead or saturated output hides whatever is wrong before it.
            self._uncovered = True
            names = ", ".join(map(repr, self._ranges))
            reason = f"reference unusable: {names} had one value on all ordinary inputs; pass inputs= that change it"
            return replace(base, outcome="unusable", reason=reason)
        return replace(base, outcome="yes", reason=_summary(rows, elements))

    def _with_extras(self, base: Verdict, runners: Sequence[_Runners]) -> Verdict:
        """Add what decides nothing: the optimized models, and whether a second session gives the same."""
        if self._first is None:
            return base
        (trial, want), rows, repeats = self._first, [], []
        for one in runners:
            again = _tensors(open_session(self._sides.sources[1], one.provider).run(trial.feeds))
            once = _tensors(one.fused.run(trial.feeds))
            largest = max((_difference(once[name], again[name]) for name in once), default=0.0)
            repeats.append(Repeat(one.provider, largest, trial.label))
            rows += self._optimized(one, trial, want)
        return replace(base, rows=(*base.rows, *rows), repeats=tuple(repeats))

    def _optimized(self, one: _Runners, trial: Trial, want: Mapping[str, Array]) -> list[Row]:
        judge = Judge(one.provider, one.judge.precision)
        try:
            fused = open_session(self._sides.sources[1], one.provider, optimize="all").run(trial.feeds)
            if self._sides.torch:
                unfused = one.unfused.run(trial.feeds)
            else:
                unfused = open_session(self._sides.sources[0], one.provider, optimize="all").run(trial.feeds)
        except (InputError, MachineError) as error:
            self._skipped.append(f"optimized models on {one.provider}: {error}")
            return []
        wanted, given = _tensors(want), _tensors(fused)
        for name, array in _tensors(unfused).items():
            if name in wanted and name in given:
                judge.add(trial, name, errors_of(wanted[name], array, given[name]))
        return [
            replace(row, optimize="all", decides=False, ok=True) for row in judge.rows() if row.inputs == trial.label
        ]


def _skipped(base: Verdict, why: str) -> Verdict:
    return replace(base, outcome="skipped", reason=f"Not run end to end: {why}", skipped=(why,))


def _tensors(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Return the tensors of outputs, those of a sequence as name[0] and so on; absent optionals are left out."""
    found: dict[str, Array] = {}
    for name, value in outputs.items():
        if isinstance(value, list | tuple):
            found |= _tensors({f"{name}[{position}]": part for position, part in enumerate(value)})
        elif value is not None:
            found[name] = np.asarray(value)
    return found


def _difference(once: Array, again: Array) -> float:
    if once.dtype.kind in "SUO":
        return float(np.any(once != again))
    a, b = once.astype(np.float64), again.astype(np.float64)
    different = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    return float(np.max(np.abs(a[different] - b[different]), initial=0.0))


def _environment(providers: Sequence[str]) -> dict[str, Any]:
    return {
        "onnxruntime": f"onnxruntime {onnxruntime().__version__}",
        "providers": list(providers),
        "options": {"optimize": "off", "threads": 1, "tf32": False, "spinning": False},
    }


def _summary(rows: Sequence[Row], elements: int) -> str:
    pooled = [row for row in rows if row.decides]
    worst = max(pooled, key=lambda row: row.typical)
    outputs, providers = {row.output for row in rows}, {row.provider for row in rows}
    return (
        f"{len(outputs)} output(s) on {', '.join(sorted(providers))}, {elements} elements: relative error "
        f"{max(row.fused for row in pooled):.1e}, unfused {max(row.unfused for row in pooled):.1e}; at most "
        f"{worst.typical:.2f} x the unfused model's own"
    )

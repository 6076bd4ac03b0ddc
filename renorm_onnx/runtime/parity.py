"""`verify`: is a rewritten model as right as the original, on the execution provider that will run it?

Two float32 runs always differ, and no fixed tolerance tells a wrong fold from rounding: the usual ones fail a correct
MobileNetV2 fold, and pass a bias that is off in the fifth digit. So each side is measured against a float64
evaluation of the original, and the candidate may be no further from it than the original is (`verdict`).

Both sides run without onnxruntime's graph optimizations. With them onnxruntime folds the original too, and the test
would compare a thing with itself; optimized runs are reported in rows of their own that decide nothing.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt

from renorm_onnx import model_file
from renorm_onnx.errors import InputError, MachineError, ModelFileError, RenormError
from renorm_onnx.runtime.estimate import LIMIT, Cost, estimate
from renorm_onnx.runtime.inputs import Trial, input_specs
from renorm_onnx.runtime.judging.cuts import digest
from renorm_onnx.runtime.judging.deviation import errors_of
from renorm_onnx.runtime.judging.layerwise import compare_layers
from renorm_onnx.runtime.judging.outputs import Variation, largest_difference, tensors_of
from renorm_onnx.runtime.judging.pair import Pair
from renorm_onnx.runtime.judging.report import Repeat, Verdict
from renorm_onnx.runtime.judging.sites import SiteReport, check_sites
from renorm_onnx.runtime.judging.torch_reference import is_torch_module
from renorm_onnx.runtime.judging.trials import trials
from renorm_onnx.runtime.judging.verdict import POOLED, Judge, Row
from renorm_onnx.runtime.providers import onnxruntime
from renorm_onnx.runtime.reference import ReferenceUnusableError
from renorm_onnx.runtime.session import Session, open_session

__all__ = ["LIMIT", "Verdict", "verify"]

Array = npt.NDArray[Any]

_NEIGHBOURS = 16


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
            reference evaluation lacks an operator, no generated input fits, or the reference runs so badly that it is
            no yardstick, and every rewritten place holds by itself. None: such things are errors.
        sites: Check every rewritten place by itself too (`check_sites`), which also decides. It takes a candidate in
            which a name means the same value as in the reference; None: if `verify` fused it itself, or the candidate
            is a file that `renorm-onnx fuse` wrote.
        allow_symlinks: Follow links to data files outside a model's folder.

    Returns:
        The verdict; `.ok` only if something was compared and all of it holds.

    Raises:
        ModelFileError: A model cannot be read.
        InputError: `inputs` do not fit, or the model cannot be fed generated ones, here or on a provider; it has no
            outputs.
        MachineError: onnxruntime or a provider is missing here, or has no kernel for the reference.
    """
    started = time.perf_counter()
    if isinstance(providers, str):
        raise InputError(
            f"verify: providers={providers!r} given, expected a sequence of names: providers=({providers!r},)"
        )
    if not providers:
        raise InputError("verify: providers is empty, so there is nothing to compare on")
    if seed < 0:
        raise InputError(f"verify: seed={seed!r}, expected a whole number, 0 or more")
    fusion = None
    if candidate is None:
        if is_torch_module(reference):
            raise InputError("verify: a torch reference needs a candidate, the exported model")
        from renorm_onnx.fusion.engine import fuse

        reference = model_file.load(reference, allow_symlinks=allow_symlinks)
        candidate, fusion = fuse(reference)
    if is_torch_module(reference) and (sites or layers):
        raise InputError("verify: sites= and layers= need a reference model, a torch module has no value names")
    pair = Pair(reference, candidate, allow_symlinks=allow_symlinks)
    if sites is None:
        sites = fusion is not None or pair.names_agree
    found = check_sites(pair.model, pair.candidate, seed=seed) if sites else None
    comparison = _Comparison(pair, found, seed, dict(sizes or {}))
    verdict = comparison.run(tuple(dict.fromkeys(providers)), inputs, limit, layers)
    if found is not None:
        verdict = _with_sites(verdict, found)
    return replace(verdict, fusion=fusion, seed=seed, seconds=time.perf_counter() - started)


def _with_sites(verdict: Verdict, found: SiteReport) -> Verdict:
    if found.ok:
        return replace(verdict, sites=found)
    wrong = found.wrong[0]
    reason = f"{len(found.wrong)} rewritten place(s) compute something else, the first is {wrong}"
    return replace(verdict, outcome="no", reason=reason, sites=found)


@dataclass
class _Runners:
    """The sessions of one provider."""

    provider: str
    judge: Judge
    unfused: Any
    fused: Session
    failures: list[str] = field(default_factory=list)
    rejected: str = ""  # why the unfused model ran on no inputs, or the last reason


class _Comparison:
    """One call of `verify`."""

    def __init__(self, pair: Pair, sites: SiteReport | None, seed: int, sizes: dict[str, int]) -> None:
        self._pair, self._sites, self._seed, self._sizes = pair, sites, seed, sizes
        self._skipped: list[str] = []
        self._remarks: list[str] = []
        self._trials: list[tuple[Trial, dict[str, Array]]] = []
        self._first: tuple[Trial, Mapping[str, Array]] | None = None
        self._uncovered, self._extent = False, ""
        self._variations: dict[str, Variation] = {}

    def run(self, providers: Sequence[str], inputs: Any, limit: Cost | None, layers: bool) -> Verdict:
        pair = self._pair
        base = Verdict("no", "", precision=pair.precision.name)
        if pair.problems:
            return replace(base, reason=f"The interface differs: {pair.problems[0]}", problems=tuple(pair.problems))
        cost = estimate(pair.model, self._sizes)
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
        pair, precision = self._pair, self._pair.precision
        base = replace(base, environment=_environment(providers))
        runners: list[_Runners] = []
        for provider in providers:
            unfused = pair.torch or open_session(pair.sources[0], provider)
            try:
                fused = open_session(pair.sources[1], provider)
            except (ModelFileError, MachineError) as error:
                return replace(base, reason=f"The candidate cannot be run where the reference can: {error}")
            judge = Judge(provider, precision, precisions=pair.precisions, averages=pair.averages)
            runners.append(_Runners(provider, judge, unfused, fused))
        placement = {one.provider: dict(Counter(node.provider for node in one.fused.placement)) for one in runners}
        base.environment["placement"] = placement
        try:
            specs, fed = input_specs(pair.model), set[Any]()
            for trial, want in trials(pair.evaluate, specs, inputs, cost, self._seed, self._sizes):
                tensors = tensors_of(want)
                if trial.ordinary and (mark := _mark(trial.feeds)) not in fed:
                    fed.add(mark)
                    for name, array in tensors.items():
                        self._variations.setdefault(name, Variation()).add(array)
                self._trials.append((trial, tensors))
                for one in runners:
                    self._run_trial(one, trial, tensors)
        except ReferenceUnusableError as error:
            self._uncovered = True
            return replace(base, outcome="unusable", reason=str(error))
        verdict = self._conclude(base, runners)
        if layers and self._first is not None:
            first, _ = self._first
            compared = [compare_layers(pair.model, pair.candidate, one.provider, first, precision) for one in runners]
            verdict = replace(verdict, layers=tuple(compared))
        return verdict

    def _run_trial(self, one: _Runners, trial: Trial, want: Mapping[str, Array]) -> None:
        try:
            unfused = one.unfused.run(trial.feeds)
        except InputError as error:
            self._skipped.append(f"{trial.label} on {one.provider}: the unfused model itself fails: {error}")
            one.rejected = str(error)
            return
        try:
            fused = one.fused.run(trial.feeds)
        except InputError as error:
            one.failures.append(f"on {one.provider}, inputs {trial.label}: the candidate fails: {error}")
            return
        if self._first is None and trial.ordinary:
            self._first = trial, want
        parts = [want, tensors_of(unfused), tensors_of(fused)]
        for name, array in parts[1].items():
            missing = f"{name!r} is missing from what the candidate or the reference gives"
            if name in parts[0] and name in parts[2]:
                one.judge.add(trial, name, errors_of(parts[0][name], array, parts[2][name]))
            else:
                one.failures.append(f"on {one.provider}, inputs {trial.label}: {missing}")
        if extra := sorted(parts[2].keys() - parts[1].keys()):
            one.failures.append(f"on {one.provider}, inputs {trial.label}: the candidate also gives {extra}")

    def _conclude(self, base: Verdict, runners: Sequence[_Runners]) -> Verdict:
        failures = [failure for one in runners for failure in one.failures]
        if failures:
            return self._answer(base, runners, "no", failures[0], problems=tuple(failures))
        for one in runners:
            if not one.judge.found:
                raise InputError(
                    f"verify: nothing was compared, for {one.provider} runs the reference on none of the inputs "
                    f"({one.rejected}); pass sizes= or inputs= that it takes"
                )
        if reason := _first_of(one.judge.empty() for one in runners):
            self._uncovered = True
            return self._answer(base, runners, "unusable", reason)
        if reason := _first_of(one.judge.unusable() for one in runners):
            # An original that is run so badly says nothing against a candidate whose every place holds.
            # But what is judged, another output or set of inputs, must not be wrong.
            holds = self._sites is not None and self._sites.complete
            self._uncovered = holds and not any(_wrong(one) for one in runners)
            return self._answer(base, runners, "unusable", reason)
        doubtful = [one for one in runners if _wrong(one)]
        if doubtful and self._neighbours_may_count():
            for one in doubtful:
                self._draw_neighbours(one)
            if reason := _first_of(one.judge.unusable() for one in doubtful):
                self._uncovered = True
                return self._answer(base, runners, "unusable", reason)
        base = self._with_extras(base, runners)
        if wrong := [row for one in runners for row in _wrong(one)]:
            row = wrong[0]
            reason = f"On {row.provider}, output {row.output!r}, inputs {row.inputs}: {row.note}"
            return self._answer(base, runners, "no", reason)
        if reason := self._dead_outputs():
            self._uncovered = True
            return self._answer(base, runners, "unusable", reason)
        self._remarks += self._pair.never_ran()
        return self._answer(base, runners, "yes", "")

    def _answer(self, base: Verdict, runners: Sequence[_Runners], outcome: str, reason: str, **more: Any) -> Verdict:
        rows = tuple(row for one in runners for row in one.judge.rows())
        return replace(
            base,
            outcome=outcome,
            reason=reason or _summary(rows, self._extent),
            rows=(*rows, *base.rows),
            skipped=tuple(dict.fromkeys([*self._skipped, *(text for one in runners for text in one.judge.left_out())])),
            remarks=tuple(dict.fromkeys([*(trial.note for trial, _ in self._trials if trial.note), *self._remarks])),
            **more,
        )

    def _draw_neighbours(self, one: _Runners) -> None:
        """Before saying no: measure again what rounding costs, with the original's weights rounded otherwise."""
        for number in range(_NEIGHBOURS):
            try:
                session = self._pair.neighbour(self._seed * _NEIGHBOURS + number, one.provider)
                for trial, want in self._trials:
                    for name, array in tensors_of(session.run(trial.feeds)).items():
                        one.judge.take_in(trial, name, want[name], array)
            except RenormError as error:  # what runs once may not run again: too large to copy, out of memory
                self._remarks.append(f"on {one.provider} no more than {number} neighbours of the original: {error}")
                return
        self._extent = ", neighbours included"
        self._remarks.append(
            f"on {one.provider} the limits are those of {_NEIGHBOURS} neighbours of the original, its weights rounded "
            "otherwise, since one run of it says too little of what rounding costs"
        )

    def _neighbours_may_count(self) -> bool:
        """Tell whether every rewritten place holds by itself; a torch module has none, and neighbours count alone."""
        if self._pair.torch is not None:
            return True
        if self._sites is None:
            self._sites = check_sites(self._pair.model, self._pair.candidate, seed=self._seed)
        return self._sites.complete

    def _dead_outputs(self) -> str:
        """Return why there can be no yes: an output that never changed, and places that were not all checked alone."""
        live = self._pair.live_outputs()
        dead = [name for name, found in self._variations.items() if found.is_dead and name.partition("[")[0] in live]
        if not dead:
            return ""
        names = ", ".join(map(repr, dead))
        self._skipped.append(f"{names} had one value on all ordinary inputs, which hides what is wrong before it")
        some_are_alive = len(dead) < len(self._variations)
        if some_are_alive and self._sites is not None and self._sites.complete:
            return ""
        return f"reference unusable: {names} had one value on all ordinary inputs; pass inputs= that change it"

    def _with_extras(self, base: Verdict, runners: Sequence[_Runners]) -> Verdict:
        """Add what decides nothing: the optimized models, and whether a second session gives the same."""
        if self._first is None:
            return base
        (trial, want), rows, repeats = self._first, list[Row](), []
        for one in runners:
            again = tensors_of(open_session(self._pair.sources[1], one.provider).run(trial.feeds))
            once = tensors_of(one.fused.run(trial.feeds))
            largest = max((largest_difference(once[name], again[name]) for name in once), default=0.0)
            repeats.append(Repeat(one.provider, largest, trial.label))
            rows += self._optimized(one, trial, want)
        return replace(base, rows=tuple(rows), repeats=tuple(repeats))

    def _optimized(self, one: _Runners, trial: Trial, want: Mapping[str, Array]) -> list[Row]:
        judge = replace(one.judge, found={})
        try:
            fused = open_session(self._pair.sources[1], one.provider, optimize="all").run(trial.feeds)
            if self._pair.torch:
                unfused = one.unfused.run(trial.feeds)
            else:
                unfused = open_session(self._pair.sources[0], one.provider, optimize="all").run(trial.feeds)
        except (InputError, MachineError) as error:
            self._skipped.append(f"optimized models on {one.provider}: {error}")
            return []
        given = tensors_of(fused)
        for name, array in tensors_of(unfused).items():
            if name in want and name in given:
                judge.add(trial, name, errors_of(want[name], array, given[name]))
        rows = [row for row in judge.rows() if row.inputs == trial.label]
        self._remarks += [
            f"with all of onnxruntime's optimizations, which a session has by default, the models part on "
            f"{row.provider} in output {row.output!r}: {row.note}; run the fused one without them, or keep the other"
            for row in rows
            if row.ok is False
        ]
        return [replace(row, optimize="all", decides=False) for row in rows]


def _mark(feeds: Mapping[str, Array]) -> tuple[Any, ...]:
    """Return what is equal for equal sets of inputs: what they give cannot differ either."""
    return tuple((name, digest(feeds[name])) for name in sorted(feeds))


def _skipped(base: Verdict, why: str) -> Verdict:
    return replace(base, outcome="skipped", reason=f"Not judged end to end: {why}", skipped=(why,))


def _environment(providers: Sequence[str]) -> dict[str, Any]:
    return {
        "onnxruntime": f"onnxruntime {onnxruntime().__version__}",
        "providers": list(providers),
        "options": {"optimize": "off", "threads": 1, "tf32": False, "spinning": False},
    }


def _wrong(one: _Runners) -> list[Row]:
    return [row for row in one.judge.rows() if row.ok is False]


def _first_of(reasons: Iterable[str]) -> str:
    return next((reason for reason in reasons if reason), "")


def _summary(rows: Sequence[Row], extent: str) -> str:
    """Say how much was compared, and how the output fares that uses most of what it is allowed."""
    elements = sum(row.elements for row in rows if row.decides and row.inputs != POOLED)
    pooled = [row for row in rows if row.inputs == POOLED]
    worst = max(pooled, key=lambda row: (row.typical, row.fused))
    where = "" if len(pooled) == 1 else f" of {worst.output!r} on {worst.provider}"
    outputs, providers = {row.output for row in rows}, {row.provider for row in rows}
    return (
        f"{len(outputs)} output(s) on {', '.join(sorted(providers))}, {elements} elements: relative error{where} "
        f"{worst.fused:.1e}, unfused {worst.unfused:.1e}; {worst.typical:.2f} x its yardstick{extent}"
    )

"""The parity matrix: every network, opset, type, kind of shapes, form, optimization level and execution provider.

    python -m runtime_tests.parity_matrix [--quick] [--models NAME ...] [--providers cpu cuda] [--json FILE]

A row runs one file as one provider would run it, and is judged by errors against the torch module in float64:

    function, inlined   at most 8 times the error of the torch module itself in the same type
    fused               at most what `verify` allows, relative to the errors of the unfused model without optimizations
                        and of its neighbours
    float64             within 1e-12, evaluated by our own reference: onnxruntime has no float64 Conv on the CPU

A row whose provider cannot be created here is skipped by name with the reason, or fails if RENORM_REQUIRE_CUDA=1.
"""

import argparse
import copy
import functools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from models import MODELS
from models.calibration import calibrated
from renorm_onnx import model_file
from renorm_onnx.errors import MachineError
from renorm_onnx.exporter import to_onnx
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.inlining import inline
from renorm_onnx.onnx_function import DOMAIN
from renorm_onnx.runtime.inputs import Trial, input_specs, make_trial
from renorm_onnx.runtime.judging.deviation import Errors, errors_of
from renorm_onnx.runtime.judging.neighbours import neighbour
from renorm_onnx.runtime.judging.sites import check_sites
from renorm_onnx.runtime.judging.torch_reference import TorchReference
from renorm_onnx.runtime.judging.verdict import POOLED, PRECISIONS, Judge
from renorm_onnx.runtime.providers import provider_status
from renorm_onnx.runtime.reference import evaluate
from renorm_onnx.runtime.session import LEVELS, open_session
from renorm_onnx.runtime.table import text_table

Array = npt.NDArray[Any]

OPSETS = (15, 18, 20, 23, 26)
"""From the oldest that `to_onnx` writes to the newest that onnxruntime 1.31 loads; 20 is the default."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "float64": torch.float64}
SHAPES = ("batch", "batch and space", "fixed")
FORMS = ("function", "inlined", "fused")
REFERENCE = "reference"

# onnxruntime and torch round in different orders: their errors differ by small factors, wrong values by thousands.
_OWN_ERROR = 8.0
_WIDE = 1e-12
_NEIGHBOURS = 8
_SPACE = ("height", "width", "depth")


@dataclass(frozen=True)
class Export:
    """One file as the exporter writes it.

    Attributes:
        model: Name in `MODELS`.
        opset: Of the file.
        dtype: Of parameters, inputs and outputs.
        shapes: Which sizes may change.
    """

    model: str
    opset: int = 20
    dtype: str = "float32"
    shapes: str = "batch"

    def __str__(self) -> str:
        return f"{self.model}-opset{self.opset}-{self.dtype}-{self.shapes.replace(' ', '_')}"


@dataclass(frozen=True)
class Case:
    """One row of the matrix.

    Attributes:
        export: The file it comes from.
        form: With function calls, with their bodies instead, or fused.
        level: onnxruntime's graph optimizations.
        provider: Execution provider, or "reference": our float64 evaluation.
    """

    export: Export
    form: str
    level: str
    provider: str

    def __str__(self) -> str:
        return f"{self.export}-{self.form}-{self.level}-{self.provider}"


@dataclass(frozen=True)
class Outcome:
    """What came of one row.

    Attributes:
        case: The row.
        status: "ok", "FAIL" or "skip".
        yardstick: RMS error, relative to the float64 output, of what the row is measured against.
        error: RMS error of the row itself.
        note: Why it failed or was skipped.
    """

    case: Case
    status: str
    yardstick: float = 0.0
    error: float = 0.0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, those of the row among them."""
        fields = asdict(self.case)
        return {**fields.pop("export"), **fields, **{k: v for k, v in asdict(self).items() if k != "case"}}


def exports(*, quick: bool, models: Sequence[str] = tuple(MODELS)) -> list[Export]:
    """List the files of the matrix.

    Args:
        quick: One file per network, with opsets and kinds of shapes in turn, and of the last network one per type;
            else all combinations.
        models: Names in `MODELS`.
    """
    if quick:
        turn = [Export(m, OPSETS[i % 5], shapes=_shapes(m)[i % len(_shapes(m))]) for i, m in enumerate(models)]
        return list(dict.fromkeys([*turn, *(Export(models[-1], dtype=dtype) for dtype in DTYPES)]))
    return [
        Export(model, opset, dtype, shapes)
        for model in models
        for opset in OPSETS
        for dtype in DTYPES
        for shapes in _shapes(model)
    ]


def _shapes(model: str) -> tuple[str, ...]:
    return SHAPES if MODELS[model].spatial_dims else ("batch", "fixed")


def cases(export: Export, providers: Sequence[str]) -> list[Case]:
    """List the rows of one file."""
    if export.dtype == "float64":
        return [Case(export, form, "off", REFERENCE) for form in FORMS]
    return [Case(export, form, level, provider) for provider in providers for form in FORMS for level in LEVELS]


@dataclass
class Built:
    """One file in all its forms, with inputs and what must come out.

    Attributes:
        protos: The model in each of `FORMS`.
        folded: How many norms the fused form lost.
        runs: Inputs, float64 outputs, and outputs of torch in the file's own type.
        unfused: Outputs without optimizations, by provider, one per run.
        near: The same of each neighbour of the unfused model.
    """

    protos: dict[str, onnx.ModelProto]
    folded: int
    runs: list[tuple[Trial, Mapping[str, Array], Mapping[str, Array]]]
    unfused: dict[str, list[Mapping[str, Array]]] = field(default_factory=dict)
    near: dict[str, list[list[Mapping[str, Array]]]] = field(default_factory=dict)

    def unfused_on(self, provider: str) -> list[Mapping[str, Array]]:
        """Run the model as it was exported without optimizations, once per provider."""
        if provider not in self.unfused:
            session = open_session(self.protos["function"], provider)
            self.unfused[provider] = [session.run(trial.feeds) for trial, _, _ in self.runs]
        return self.unfused[provider]

    def near_on(self, provider: str) -> list[list[Mapping[str, Array]]]:
        """Run neighbours of the model as it was exported, once per provider: one list of outputs for each."""
        if provider not in self.near:
            model = model_file.load(self.protos["function"])
            sessions = [open_session(neighbour(model, seed), provider) for seed in range(_NEIGHBOURS)]
            self.near[provider] = [[session.run(trial.feeds) for trial, _, _ in self.runs] for session in sessions]
        return self.near[provider]


@functools.lru_cache(maxsize=16)
def build(export: Export) -> Built:
    """Export a small network of `models/` once, and keep it."""
    network, inputs = calibrated(MODELS[export.model], small=True, seed=0)
    network, kind = copy.deepcopy(network).to(DTYPES[export.dtype]), DTYPES[export.dtype]
    for module in network.modules():
        if hasattr(module, "eps"):
            module.eps = float(np.float32(module.eps))  # as ONNX stores it; small variances feel the difference
    varying = {0: "batch"}
    if export.shapes == "batch and space":
        varying |= {axis + 2: name for axis, name in enumerate(_SPACE[: MODELS[export.model].spatial_dims])}
    original = to_onnx(
        network,
        tuple(x.to(kind) for x in inputs),
        opset=export.opset,
        dynamic_shapes=None if export.shapes == "fixed" else (varying,),
        verify=False,
    )
    plain = model_file.load(original)
    inline(plain, domain=DOMAIN)
    fused, report = fuse(original)
    loaded = model_file.load(original)
    specs = input_specs(loaded)
    reference = TorchReference(network, [s.name for s in specs], [v.name or "" for v in loaded.graph.outputs])
    runs = []
    for number, trial in enumerate(_trials(specs, inputs[0].shape)):
        trial = replace(trial, label=f"{trial.label} #{number}")
        runs.append((trial, reference.evaluate(trial.feeds), reference.run(trial.feeds)))
    return Built(
        {"function": original, "inlined": model_file.to_proto(plain), "fused": fused}, len(report.folded), runs
    )


def _trials(specs: Any, shape: Sequence[int]) -> Iterator[Trial]:
    """Yield inputs at three sizes, the exported one among them; with fixed shapes all are of that size."""
    sizes = {name: shape[axis + 2] for axis, name in enumerate(_SPACE[: len(shape) - 2])}
    names = {size for spec in specs for size in spec.shape if isinstance(size, str)}
    plans = [{"batch": 16, **sizes}, {"batch": 1, **{n: 2 * s for n, s in sizes.items()}}, {"batch": 5, **sizes}]
    for kind in ("normal", "uniform", "image", "normal"):
        for number, plan in enumerate(plans):
            yield make_trial(specs, kind, {n: size for n, size in plan.items() if n in names}, seed=number)


def judge(case: Case, built: Built, *, model: onnx.ModelProto | None = None) -> Outcome:
    """Run one row and judge it.

    Args:
        case: The row.
        built: Its file.
        model: Run this instead of the row's own form; for models that are wrong on purpose.
    """
    model = built.protos[case.form] if model is None else model
    if case.form == "fused" and not built.folded:
        return Outcome(case, "FAIL", note="nothing was folded, so that there is nothing to judge")
    try:
        got = _outputs(case, built, model)
        yardsticks = built.unfused_on(case.provider) if case.form == "fused" and case.provider != REFERENCE else None
    except MachineError as error:
        # The CPU lacks float16 in places, CUDA some operators of the newest opsets.
        if (case.export.dtype == "float16" or case.provider != "cpu") and "no kernel" in str(error):
            return Outcome(case, "skip", note=str(error))
        raise
    found: dict[str, list[tuple[Trial, Errors]]] = {}
    for number, (trial, want, own) in enumerate(built.runs):
        if set(got[number]) != set(want):
            return Outcome(case, "FAIL", note=f"outputs are {sorted(got[number])}, expected {sorted(want)}")
        for name, array in (own if yardsticks is None else yardsticks[number]).items():
            candidate = got[number][name].astype(array.dtype) if case.provider == REFERENCE else got[number][name]
            found.setdefault(name, []).append((trial, errors_of(want[name], array, candidate)))
    return _by_verdict(case, found, built, model) if yardsticks is not None else _by_own_error(case, found)


def _outputs(case: Case, built: Built, model: onnx.ModelProto) -> list[Mapping[str, Array]]:
    if case.provider == REFERENCE:
        loaded = model_file.load(model)
        return [evaluate(loaded, trial.feeds) for trial, _, _ in built.runs]
    session = open_session(model, case.provider, optimize=case.level)
    return [session.run(trial.feeds) for trial, _, _ in built.runs]


def _by_verdict(
    case: Case, found: Mapping[str, list[tuple[Trial, Errors]]], built: Built, model: onnx.ModelProto
) -> Outcome:
    """Apply the rule of `verify`."""
    judge = Judge(case.provider, PRECISIONS[case.export.dtype], dict(found))
    if not _note_of(judge) or not check_sites(*map(model_file.load, (built.protos["function"], model))).complete:
        return _outcome(case, judge)
    for outputs in built.near_on(case.provider):
        for (trial, want, _), given in zip(built.runs, outputs, strict=True):
            for name, array in given.items():
                judge.take_in(trial, name, want[name], array)
    return _outcome(case, judge)


def _note_of(judge: Judge) -> str:
    rows = judge.rows()
    wrong = [f"{row.output!r}, inputs {row.inputs}: {row.note}" for row in rows if row.ok is False]
    nothing = "" if any(row.inputs == POOLED for row in rows) else "nothing was compared"
    return judge.unusable() or next(iter(wrong), "") or nothing


def _outcome(case: Case, judge: Judge) -> Outcome:
    pooled = [row for row in judge.rows() if row.inputs == POOLED]
    # What the rule divided by: the unfused model's own error, or that of its neighbours where they were asked.
    yardstick = max((row.fused / row.typical if row.typical else row.unfused for row in pooled), default=0.0)
    error, note = max((row.fused for row in pooled), default=0.0), _note_of(judge)
    return Outcome(case, "FAIL" if note else "ok", yardstick, error, note)


def _by_own_error(case: Case, found: Mapping[str, list[tuple[Trial, Errors]]]) -> Outcome:
    """Compare with the error of the torch module in the same type."""
    precision = PRECISIONS[case.export.dtype]
    note, own, error = "", 0.0, 0.0
    for name, results in found.items():
        kept = [e for _, e in results]
        note = note or next((f"{name!r}: {e.problem}" for e in kept if e.problem), "")
        size, theirs, ours = (_root(kept, part) for part in ("size_rms", "unfused_rms", "fused_rms"))
        limit = _WIDE * size if case.provider == REFERENCE else _OWN_ERROR * max(theirs, 2 * precision.u * size)
        own, error = max(own, theirs / size), max(error, ours / size)
        if not ours <= limit:
            note = note or f"{name!r}: RMS error is {ours / size:.2g} of the output, allowed {limit / size:.2g}"
    return Outcome(case, "FAIL" if note else "ok", own, error, note)


def _root(errors: Sequence[Errors], part: str) -> float:
    elements = sum(e.elements for e in errors)
    return float(np.sqrt(sum(e.elements * getattr(e, part) ** 2 for e in errors) / elements)) if elements else 0.0


def unavailable(provider: str) -> str:
    """Return why a provider cannot be used here; nothing if it can."""
    if provider == REFERENCE:
        return ""
    status = provider_status(provider)
    return "" if status.creatable else f"{provider} cannot be created here: {status.stage}: {status.detail}"


def run(files: Sequence[Export], providers: Sequence[str]) -> Iterator[Outcome]:
    """Judge every row of these files; rows of a provider that is missing are skipped by name."""
    missing = {provider: unavailable(provider) for provider in providers}
    for export in files:
        for case in cases(export, providers):
            if reason := missing.get(case.provider):
                yield Outcome(case, "skip", note=reason)
                continue
            try:
                yield judge(case, build(export))
            except Exception as error:  # one row must not hide the others, whatever breaks in a runtime
                yield Outcome(case, "FAIL", note=f"{type(error).__name__}: {str(error).splitlines()[0]}")


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """Return one line per network, provider, type and form: rows, failures, skips and the largest errors."""
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        key = (outcome.case.export.model, outcome.case.provider, outcome.case.export.dtype, outcome.case.form)
        groups.setdefault(key, []).append(outcome)
    rows = []
    for key, group in groups.items():
        count = Counter(outcome.status for outcome in group)
        sizes = (f"{max(getattr(o, part) for o in group):.1e}" for part in ("yardstick", "error"))
        rows.append((*key, *(str(count[status]) for status in ("ok", "FAIL", "skip")), *sizes))
    header = ("model", "provider", "type", "form", "ok", "FAIL", "skip", "yardstick", "error")
    return text_table(header, rows, numbers=(4, 5, 6, 7, 8))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix; 0 if every row holds, 1 if one does not, 3 if a required provider is missing."""
    parser = argparse.ArgumentParser(prog="python -m runtime_tests.parity_matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--providers", nargs="+", choices=["cpu", "cuda"], default=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="the part that the tests run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every row to FILE")
    options = parser.parse_args(argv)
    files = exports(quick=options.quick, models=options.models)
    outcomes: list[Outcome] = []
    started = time.perf_counter()
    for number, export in enumerate(files, 1):
        found = list(run([export], options.providers))
        outcomes += found
        for outcome in found:
            if outcome.status == "FAIL":
                print(f"FAIL {outcome.case}: {outcome.note}", flush=True)
        counts = ", ".join(f"{n} {status}" for status, n in Counter(o.status for o in found).items())
        seconds = time.perf_counter() - started
        print(f"{number}/{len(files)} {export}: {counts} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    skipped = Counter(o.note for o in outcomes if o.status == "skip")
    print("\n".join(summary(outcomes)))
    for reason, number in skipped.items():
        print(f"skipped: {number} rows: {reason}")
    if options.json:
        options.json.write_text(json.dumps([outcome.to_dict() for outcome in outcomes], indent=1) + "\n")
    required = os.environ.get("RENORM_REQUIRE_CUDA") == "1"
    if required and (reason := unavailable("cuda")):
        print(f"parity_matrix: RENORM_REQUIRE_CUDA=1, but {reason}", file=sys.stderr)
        return 3
    return int(any(outcome.status == "FAIL" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

"""From a model file to a fused one: read, fold, check, write. What `renorm-onnx fuse` does.

Nothing is written unless the check says yes, and nothing is ever half-written. A file in which nothing folds and
no function is opened is copied byte for byte.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from renorm_onnx import model_file
from renorm_onnx.errors import InputError, MachineError, ModelFileError
from renorm_onnx.files.model_tensors import all_tensors, external_among
from renorm_onnx.fusion.calls import define_calls, hiding_norms
from renorm_onnx.fusion.engine import FuseOptions, fuse_in_place
from renorm_onnx.fusion.report import METADATA_KEY, FusionReport
from renorm_onnx.inlining import inline
from renorm_onnx.onnx_function import DOMAIN
from renorm_onnx.runtime import providers as execution_providers
from renorm_onnx.runtime.table import text_table
from renorm_onnx.version import __version__

if TYPE_CHECKING:
    from renorm_onnx.runtime.parity import Verdict

SCHEMA_VERSION = 1
VERIFY = ("auto", "require", "never")
UNCHANGED = "nothing was changed"


@dataclass(frozen=True)
class FusedFile:
    """What `fuse_file` did.

    Attributes:
        source, target: The paths; `target` is what was or would have been written.
        written: Whether `target` is there now.
        rewritten: Whether the result differs from `source`: something was folded, or functions were opened or defined.
        report: What was folded and what was kept.
        verdict: The check; None if there was none.
        unchecked: Why there was no end-to-end check, or an empty string.
        bytes_before, bytes_after: Sizes with the data files, each counted once; `bytes_after` is 0 if not written.
        left_behind: Data files of a model that was replaced, which it does not use any more; another model may.
    """

    source: str
    target: str
    written: bool
    rewritten: bool
    report: FusionReport
    verdict: Verdict | None
    unchecked: str
    bytes_before: int
    bytes_after: int
    left_behind: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the fused model is not known to be wrong."""
        return self.verdict is None or self.verdict.outcome in ("yes", "skipped")

    @property
    def only_rounds_worse(self) -> bool:
        """Whether the check said no though every rewritten place holds: the same is computed, with larger errors."""
        verdict = self.verdict
        if verdict is None or verdict.outcome != "no" or verdict.problems:
            return False
        return _places_hold(verdict) and all(row.of_size for row in verdict.rows if row.ok is False)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            "source": self.source,
            "target": self.target,
            "written": self.written,
            "rewritten": self.rewritten,
            "fusion": self.report.to_dict(),
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "unchecked": self.unchecked,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "left_behind": list(self.left_behind),
        }

    def __str__(self) -> str:
        before, after = self.report.operators_before, self.report.operators_after
        names = sorted(set(before) | set(after), key=lambda name: (-before[name], name))
        rows = [_row(name, before[name], after[name]) for name in names]
        rows.append(_row("all nodes", sum(before.values()), sum(after.values())))
        if self.bytes_after:
            rows.append(_row("file size (KB)", round(self.bytes_before / 1e3), round(self.bytes_after / 1e3)))
        table = text_table(("", "before", "after", "change"), rows, numbers=(1, 2, 3))
        return "\n".join([str(self.report), "", *table, "", *self._conclusion()])

    def _conclusion(self) -> list[str]:
        lines = []
        if self.verdict is not None:
            lines = str(self.verdict).splitlines()
            if self.verdict.ok:  # the rows interest only who doubts it: `renorm-onnx verify` prints them all
                lines = [lines[0], *self.verdict.left_out(), *self.verdict.notes()]
        elif self.unchecked:
            lines.append(f"not verified: {self.unchecked}")
        if not self.written:
            lines.append("wrote nothing")
        elif self.report.changed:
            lines.append(f"wrote {self.target}")
        elif self.rewritten:
            same = self.report.operators_before == self.report.operators_after
            how = "whose functions alone differ" if same else "with plain operators in place of functions"
            lines.append(f"nothing to fold: wrote {self.target}, {how}")
        elif self.source == self.target:
            lines.append(f"nothing to fold: {self.target} stays as it is")
        else:
            lines.append(f"nothing to fold: {self.target} is a copy of {self.source}")
        lines += [f"left behind: {path}, which another model may use; else delete it" for path in self.left_behind]
        return lines


@dataclass(frozen=True)
class InlinedFile:
    """What `inline_file` did.

    Attributes:
        source, target: The paths.
        calls: How many function calls were replaced.
    """

    source: str
    target: str
    calls: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {"schema_version": SCHEMA_VERSION, "source": self.source, "target": self.target, "calls": self.calls}

    def __str__(self) -> str:
        return f"{self.calls} function calls replaced; wrote {self.target}"


def _row(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, str(before), str(after), f"{after - before:+d}" if after != before else ""


def inline_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    allow_symlinks: bool = False,
) -> InlinedFile:
    """Replace the renorm functions of a model file by plain ONNX operators, for runtimes without functions.

    Calls whose definition the file lacks are replaced too.

    Args:
        source: The model.
        target: Where to write; None: ``model.onnx`` -> ``model.inlined.onnx``.
        force: Replace an existing `target`.
        allow_symlinks: Follow links to data files outside the model's folder.

    Returns:
        What was done.

    Raises:
        ModelFileError: The model cannot be read, or the target must not or cannot be written.
        InputError: The model's opset is too old for a function that it calls and lacks.
    """
    path = os.fspath(target) if target is not None else _beside(source, "inlined")
    if os.path.isfile(source):  # else `load` says what is wrong
        model_file.check_output(path, inputs=[source], force=force)
    model = model_file.load(source, allow_symlinks=allow_symlinks)
    define_calls(model)
    calls = inline(model, domain=DOMAIN)
    model_file.save(model, path, force=force)
    return InlinedFile(os.fspath(source), path, calls)


def default_target(source: str | os.PathLike[str]) -> str:
    """Where the fused model goes when nobody says: ``model.onnx`` -> ``model.fused.onnx``."""
    return _beside(source, "fused")


def _beside(source: str | os.PathLike[str], what: str) -> str:
    return f"{os.fspath(source).removesuffix('.onnx')}.{what}.onnx"


@model_file.collection_paused()
def fuse_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    options: FuseOptions | None = None,
    force: bool = False,
    in_place: bool = False,
    dry_run: bool = False,
    verify: str = "auto",
    providers: Sequence[str] = ("cpu",),
    seed: int = 0,
    allow_symlinks: bool = False,
) -> FusedFile:
    """Fold the norms of a model file and write the result beside it, checked.

    Args:
        source: The model.
        target: Where to write; None: `default_target`, or `source` itself if `in_place`.
        options: What the engine may do.
        force: Replace an existing `target`, and a write-protected `source` where that is to be replaced.
        in_place: Replace `source`. Its data files stay, and those that are not needed any more are named.
        dry_run: Plan and check, write nothing.
        verify: "auto": end to end if one run stays under the limit of `runtime.estimate` and onnxruntime is installed;
            "require": anything short of that is an error; "never".
        providers: Execution providers to check on.
        seed: Of the inputs that the check generates.
        allow_symlinks: Follow links to data files outside the model's folder.

    Returns:
        What was done. If `ok` is false, the check said no and nothing was written.

    Raises:
        ModelFileError: The model cannot be read, or the target must not or cannot be written.
        InputError: An option or a provider is unknown; the model's opset is too old for a function of ours that it
            calls and lacks.
        MachineError: The check was required, or a provider asked for, and this machine lacks what it needs.
    """
    if verify not in VERIFY:
        raise InputError(f"fuse: verify={verify!r} given, expected one of {', '.join(VERIFY)}")
    for name in providers:
        execution_providers.provider_of(name)
    if in_place and target is not None:
        raise InputError(f"fuse: an output ({os.fspath(target)!r}) and in-place were both given; choose one")
    path = os.fspath(source) if in_place else os.fspath(target) if target is not None else default_target(source)
    if not dry_run and os.path.isfile(source):  # else `load` says what is wrong
        model_file.check_output(path, inputs=[] if in_place else [source], force=force or in_place)
        if not force:
            _refuse_protected(path)
    original = model_file.load(source, allow_symlinks=allow_symlinks)
    if verify != "never":
        _require(providers)
    data_files = _data_files(original)
    before = os.path.getsize(source) + sum(map(os.path.getsize, data_files))
    defined = define_calls(original)  # or nothing could run the original, to compare with
    # The check compares with the original; without one, nobody else needs it.
    model = original if verify == "never" else model_file.load(original)
    report, rewritten = _fold(model, options, defined=defined)
    verdict, unchecked = _check(original, model, verify, providers, seed) if rewritten else (None, UNCHANGED)
    if report.branches_merged and verdict is not None and verdict.outcome == "no" and _places_hold(verdict):
        # Merging is exact, but adds weights of several sizes before they are rounded; a badly conditioned network can
        # feel that, rarely more than `verify` grants it. Folding never asks so much, and is worth having alone.
        remark = f"branches kept apart, because merged they cost precision: {verdict.reason}"
        model = model_file.load(original)
        report, rewritten = _fold(model, replace(options or FuseOptions(), merge_branches=False), defined=defined)
        report.remarks.append(remark)
        verdict, unchecked = _check(original, model, verify, providers, seed) if rewritten else (None, UNCHANGED)
    written = not dry_run and (verdict is None or verdict.outcome in ("yes", "skipped"))
    after, left = 0, tuple[str, ...]()
    if written and rewritten:
        model.metadata_props[METADATA_KEY] = metadata(report)
        after = model_file.save(model, path, force=force or in_place)
        left = _unused(data_files, path) if in_place and data_files else ()
    elif written:
        after = before
        if not in_place:
            model_file.copy_file(source, path, force=force)
    return FusedFile(os.fspath(source), path, written, rewritten, report, verdict, unchecked, before, after, left)


def _fold(model: ir.Model, options: FuseOptions | None, *, defined: bool) -> tuple[FusionReport, bool]:
    """Fold in place; say too whether the model is another than its file holds, be it only that norms lie open."""
    hiding = hiding_norms(model)
    report = fuse_in_place(model, options)
    rewritten = report.changed or defined or not model.functions.keys() >= set(hiding)
    if not rewritten:  # functions that were opened in vain stay as they are
        report.operators_after = report.operators_before
    return report, rewritten


def _places_hold(verdict: Verdict) -> bool:
    """Whether only rounding is in doubt: a place that computes something else is a fault, and must be seen."""
    return verdict.sites is not None and verdict.sites.complete


def metadata(report: FusionReport) -> str:
    """What a fused file says about itself: our version, the counts, and each kept norm with its reason."""
    kept = {norm.name: norm.reason.value if norm.reason else "" for norm in report.kept}
    said = {"version": __version__, "folded": len(report.folded), "affines_folded": report.affines_folded}
    return json.dumps({**said, "branches_merged": report.branches_merged, "kept": kept}, sort_keys=True)


def _check(
    original: ir.Model, model: ir.Model, verify: str, providers: Sequence[str], seed: int
) -> tuple[Verdict | None, str]:
    """The verdict, or why there is none."""
    if verify == "never":
        return None, "verification was turned off"
    from renorm_onnx.runtime.parity import LIMIT
    from renorm_onnx.runtime.parity import verify as judge

    try:
        limit = None if verify == "require" else LIMIT
        verdict = judge(original, model, providers=providers, seed=seed, limit=limit, sites=True)
    except MachineError as error:
        if verify == "require" or tuple(providers) != ("cpu",):
            raise
        return None, str(error)
    return verdict, "; ".join(verdict.skipped) if verdict.outcome == "skipped" else ""


def _require(providers: Sequence[str]) -> None:
    """Raise `MachineError` where a provider that was asked for is missing, as a check on it would."""
    for name in providers:
        if execution_providers.provider_of(name)[0] == "cpu":  # that one is also checked without onnxruntime
            continue
        status = execution_providers.provider_status(name)
        if not status.creatable:
            raise MachineError(f"fuse: provider {status}")


def _refuse_protected(path: str) -> None:
    """Raise `ModelFileError` for a file that its owner protects: renaming another over it would not ask its rights."""
    if not os.path.exists(path):
        return
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if not mode & 0o222 or not os.access(path, os.W_OK):  # the superuser may write all, and is asked too
        raise ModelFileError(
            f"{path!r} is write-protected (mode {mode:03o}); make it writable, or allow it to be replaced (--force)"
        )


def _data_files(model: ir.Model) -> set[str]:
    """The data files that a model reads its tensors from."""
    known = all_tensors(model) if model.meta.get(model_file.KEEP_EXTERNAL) else ()
    return {os.path.realpath(tensor.path) for tensor in external_among(known)}


def _unused(data_files: set[str], path: str) -> tuple[str, ...]:
    """Those of `data_files` that the model in `path` does not read, as seen from where `path` is seen from."""
    unused = sorted(data_files - _data_files(model_file.load(path)))
    folder = os.path.dirname(os.path.realpath(path))
    return tuple(os.path.join(os.path.dirname(path), os.path.relpath(file, folder)) for file in unused)

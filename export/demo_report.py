"""The demo's one table, made from its report and from nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SCHEMA_VERSION = 1

_HEADER = ("", "torch", "onnxruntime", "onnxruntime, fused")
_INPUTS = {"generated": "generated inputs", "data": "test images"}
_MODES = {"run": "", "binding": ", on the device", "graph": ", as a CUDA graph"}


def table(report: Mapping[str, Any]) -> str:
    """Lay out a report for people: accuracy, parity, norms and latency, then what stayed and why.

    Args:
        report: What `export.demo` writes to report.json.

    Returns:
        Several lines.
    """
    groups: list[list[Sequence[str]]] = [
        [_HEADER],
        *([_training_row(label, one)] for label, one in report["training"].items()),
    ]
    groups[-1].append(_norm_row(report["fusion"]))
    for provider in report["providers"]:
        if provider["creatable"]:
            groups.append(list(_provider_rows(provider, report["verdicts"])))
    lines = _aligned(groups)
    lines += [_absence(provider) for provider in report["providers"] if not provider["creatable"]]
    lines += [f"latency: {warning}" for warning in report["latency_warnings"]]
    return "\n".join([*lines, *_verdict_lines(report["verdicts"]), *_kept_lines(report["fusion"])])


def _training_row(label: str, one: Mapping[str, Any]) -> Sequence[str]:
    return f"{label}: test accuracy", _percent(one["test_accuracy"]), "", ""


def _norm_row(fusion: Mapping[str, Any]) -> Sequence[str]:
    before, after = str(fusion["norms_before"]), str(fusion["norms_after"])
    return "BatchRenorm: norm layers", before, before, after


def _provider_rows(provider: Mapping[str, Any], verdicts: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    name, accuracy = provider["name"], provider["accuracy"]
    yield f"{name}: test accuracy", "", _percent(accuracy["model"]), _percent(accuracy.get("fused"))
    for kind, verdict in verdicts.items():
        for row in verdict["rows"]:
            if row["provider"] == name and row["decides"] and "pooled" in row["inputs"]:
                numbers = _scientific(row["unfused"]), _scientific(row["fused"])
                yield f"{name}: error against float64, {_INPUTS[kind]}", "", *numbers
    timings = {(t["batch"], t["mode"], t["model"]): t["median_ms"] for t in provider["latency"]}
    for batch, mode in dict.fromkeys((batch, mode) for batch, mode, _ in timings):
        label = f"{name}: latency, {batch} image{'' if batch == 1 else 's'}{_MODES[mode]}"
        yield label, "", *(_milliseconds(timings.get((batch, mode, key))) for key in ("model", "fused"))


def _absence(provider: Mapping[str, Any]) -> str:
    return f"{provider['name']}: not on this machine: {provider['stage']}: {provider['detail']}. {provider['fix']}"


def _verdict_lines(verdicts: Mapping[str, Any]) -> Iterator[str]:
    for kind, verdict in verdicts.items():
        yield f"parity on {_INPUTS[kind]}: {verdict['outcome']}. {verdict['reason']}"


def _kept_lines(fusion: Mapping[str, Any]) -> Iterator[str]:
    """One line for the counts and one for each norm that stays, with what stood in the way."""
    kept = [norm for norm in fusion["norms"] if norm["outcome"] == "kept"]
    yield f"{fusion['norms_before'] - len(kept)} of {fusion['norms_before']} norms folded"
    for norm in kept:
        refusals = "; ".join(dict.fromkeys(refusal["detail"] for refusal in norm["refusals"]))
        yield f"  kept {norm['module'] or norm['name']}: {norm['reason']}: {refusals}"


def _aligned(groups: Sequence[Sequence[Sequence[str]]]) -> list[str]:
    """First column to the left, the others to the right; a rule between groups."""
    rows = [row for group in groups for row in group]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    rule = "  ".join("-" * width for width in widths)
    lines: list[str] = []
    for group in groups:
        for label, *numbers in group:
            cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join([label.ljust(widths[0]), *cells]).rstrip())
        lines.append(rule)
    return lines


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _scientific(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1e}"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f} ms"

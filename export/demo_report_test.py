"""The table says what the report says, in lines that fit a terminal."""

from typing import Any

from export.demo_report import table


def report(*, fused: bool = True, cuda: bool = False) -> dict[str, Any]:
    def timing(model: str, batch: int, mode: str, milliseconds: float) -> dict[str, Any]:
        return {"model": model, "batch": batch, "mode": mode, "median_ms": milliseconds}

    def row(provider: str, inputs: str, numbers: tuple[float, float], *, decides: bool = True) -> dict[str, Any]:
        return dict(zip(("unfused", "fused"), numbers, strict=True)) | {
            "provider": provider,
            "inputs": inputs,
            "decides": decides,
        }

    cpu = {"name": "cpu", "creatable": True, "accuracy": {"model": 0.9431}, "latency": [timing("model", 1, "run", 0.5)]}
    if fused:
        cpu["accuracy"]["fused"] = 0.9432
        cpu["latency"] += [timing("fused", 1, "run", 0.25), timing("model", 64, "run", 2.0)]
    gpu: dict[str, Any] = {"name": "cuda", "creatable": cuda, "stage": "driver missing", "detail": "libcuda.so.1: no"}
    gpu |= {"fix": "Install one"}
    if cuda:
        gpu |= {"accuracy": {"model": 0.5, "fused": 0.5}, "latency": [timing("fused", 1, "graph", 0.01)]}
    rows = [row("cpu", "normal", (9.0, 9.0)), row("cpu", "ordinary, pooled", (1.25e-7, 2.5e-7))]
    rows += [row("cpu", "ordinary, pooled", (7.0, 7.0), decides=False)]
    norms = [
        {"name": "a", "outcome": "folded", "into": ["conv"], "way": "backward"},
        {
            "name": "b",
            "module": "block.norm",
            "outcome": "kept",
            "reason": "other-consumer",
            "refusals": [
                {"reason": "other-consumer", "obstacle": "x", "detail": "x is read twice"},
                {"reason": "no-rule-for-operator", "obstacle": "y", "detail": "Relu 'y' takes no shift"},
            ],
        },
    ]
    return {
        "training": {"BatchNorm": {"test_accuracy": 0.25}, "BatchRenorm": {"test_accuracy": 0.9431}},
        "fusion": {"norms_before": 2, "norms_after": 1, "norms": norms},
        "providers": [cpu, gpu],
        "verdicts": {"generated": {"outcome": "yes" if fused else "no", "reason": "Because.", "rows": rows}},
        "latency_warnings": ["the machine was busy"],
    }


def cells_of(text: str, label: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(label))
    return line.removeprefix(label).split("  ")


def numbers_of(text: str, label: str) -> list[str]:
    return [cell.strip() for cell in cells_of(text, label) if cell.strip()]


def test_accuracies_norms_errors_and_latencies_stand_in_their_columns() -> None:
    text = table(report())
    assert numbers_of(text, "BatchNorm: test accuracy") == ["25.0 %"]
    assert numbers_of(text, "BatchRenorm: norm layers") == ["2", "2", "1"]
    assert numbers_of(text, "cpu: test accuracy") == ["94.3 %", "94.3 %"]
    assert numbers_of(text, "cpu: error against float64, generated inputs") == ["1.2e-07", "2.5e-07"]
    assert numbers_of(text, "cpu: latency, 1 image ") == ["0.500 ms", "0.250 ms"]
    assert numbers_of(text, "cpu: latency, 64 images") == ["2.000 ms"]


def test_columns_are_aligned_and_lines_of_the_table_fit_a_terminal() -> None:
    lines = table(report()).splitlines()
    rules = [line for line in lines if line.startswith("---")]
    assert len(set(rules)) == 1
    assert len(rules[0]) <= 100
    assert all(len(line) <= len(rules[0]) for line in lines[: lines.index(rules[-1])] if line)


def test_every_norm_that_stays_is_named_with_each_reason() -> None:
    text = table(report())
    assert "1 of 2 norms folded" in text
    assert "kept block.norm: other-consumer: x is read twice; Relu 'y' takes no shift" in text
    assert "kept a" not in text


def test_a_provider_that_is_not_there_has_a_line_that_says_why_and_what_to_do() -> None:
    assert "cuda: not on this machine: driver missing: libcuda.so.1: no. Install one" in table(report())


def test_a_gpu_has_its_own_rows() -> None:
    text = table(report(cuda=True))
    assert "not on this machine" not in text
    assert numbers_of(text, "cuda: test accuracy") == ["50.0 %", "50.0 %"]
    assert numbers_of(text, "cuda: latency, 1 image, as a CUDA graph") == ["0.010 ms"]


def test_a_verdict_of_no_is_said_and_the_fused_column_stays_empty() -> None:
    text = table(report(fused=False))
    assert "parity on generated inputs: no. Because." in text
    assert numbers_of(text, "cpu: test accuracy") == ["94.3 %"]


def test_warnings_about_latencies_are_shown() -> None:
    assert "latency: the machine was busy" in table(report())

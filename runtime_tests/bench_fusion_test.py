"""The fusion benchmark measures what it says, and notices a tool that does it wrong."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from runtime_tests import bench_fusion


def test_ours_leaves_no_norm_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_fusion.main(["--sizes", "4", "--external-gb", "0.0001"]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines() if line.startswith(bench_fusion.OURS)]
    assert len(lines) == 2
    assert lines[0][4] == lines[1][4] == "0"
    assert float(lines[0][5]) < 1e-6
    assert "4 norms" in shown
    assert "24 norms" in shown


def test_a_tool_that_changes_the_output_or_fails_or_leaves_a_norm_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = bench_fusion.PROGRAMS[bench_fusion.COPY]
    monkeypatch.setattr(bench_fusion, "PROGRAMS", {bench_fusion.COPY: copy, bench_fusion.OURS: copy})
    assert bench_fusion.main(["--sizes", "2"]) == 1
    broken = {bench_fusion.COPY: copy, bench_fusion.OURS: "raise SystemExit('no such thing')"}
    monkeypatch.setattr(bench_fusion, "PROGRAMS", broken)
    assert bench_fusion.main(["--sizes", "2"]) == 1
    assert "no such thing" in capsys.readouterr().out


def test_the_error_is_that_of_the_outputs(tmp_path: Path) -> None:
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    bench_fusion.write_chain(source, 2)
    model = onnx.load(source)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "b1")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.5), "b1"))
    onnx.save(model, target)
    assert bench_fusion.error_of(source, source) == 0.0
    assert bench_fusion.error_of(source, target) > 0.05


def test_memory_and_time_are_those_of_the_tool(tmp_path: Path) -> None:
    program = "x = bytearray(300_000_000); x[::4096] = b'1' * len(x[::4096]); sum(range(3_000_000))"
    cost = bench_fusion.measure(bench_fusion.Tool("it", sys.executable, program), tmp_path, tmp_path)
    assert cost.failure == ""
    assert 280 < cost.megabytes < 400
    assert cost.seconds > 0.02


def test_what_is_measured_is_what_an_installation_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # else a run compiles this project, as no installed one does
    bench = bench_fusion.Bench(None, 1, bench_fusion.as_installed(tmp_path / "bytecode"))
    bench.warm_up(tmp_path)
    compiled = {file.name.partition(".")[0] for file in (tmp_path / "bytecode").rglob("*.pyc")}
    assert {"delivery", "engine", "conv", "protobuf_writing"} <= compiled


def test_several_rounds_give_medians_of_runs_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "a.onnx"
    bench_fusion.write_chain(source, 2)
    seconds = iter([1.0, 5.0, 2.0, 12.0, 1.0, 3.0])

    def copied(tool: bench_fusion.Tool, source: Path, target: Path, **_: object) -> bench_fusion.Cost:
        target.write_bytes(source.read_bytes())
        return bench_fusion.Cost(next(seconds), 1.0, "")

    monkeypatch.setattr(bench_fusion, "measure", copied)
    bench = bench_fusion.Bench(None, 3, {})
    one, two = bench_fusion.rows(source, bench.tools(), bench)
    assert (one.cost.seconds, one.ratio, one.left) == (1.0, 1.0, 2)
    assert (two.cost.seconds, two.ratio) == (5.0, 5.0)  # of 5, 6 and 3

"""The fusion benchmark measures what it says, and notices a tool that does it wrong."""

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
    cost = bench_fusion.measure(bench_fusion.sys.executable, program, tmp_path, tmp_path, external=False)
    assert cost.failure == ""
    assert 280 < cost.megabytes < 400
    assert cost.seconds > 0.02

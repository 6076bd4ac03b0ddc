"""The GPU command rehearsed on the CPU: what its sections find, and that losing one never loses another."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime_tests import gpu
from runtime_tests.gpu import SECTIONS, Options, Section, main, markdown, run_isolated, run_section
from runtime_tests.gpu_latency import Latency, Plan, _tf32, table
from runtime_tests.parity_matrix import build


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    yield Options(tmp_path_factory.mktemp("gpu"), "cpu", tiny=True, limit=240.0)
    build.cache_clear()


def test_parity_section_judges_every_row(options):
    section = run_section("parity", options)
    assert section.ok, section.lines
    assert {row["status"] for row in section.data} == {"ok"}
    assert {(row["dtype"], row["form"]) for row in section.data} >= {("float16", "fused"), ("float32", "function")}


def test_verdicts_section_holds_whole_verdicts(options):
    section = run_section("verdicts", options)
    assert section.ok, section.lines
    assert section.data["mlp"]["outcome"] == "yes"
    assert section.data["mlp"]["layers"]
    assert section.data["mlp"]["repeatability"]


def test_latency_section_times_torch_and_every_form(options):
    section = run_section("latency", options)
    assert section.ok, section.lines
    variants = {"torch eager", "onnxruntime function", "onnxruntime unfused", "onnxruntime fused"}
    assert {(row["variant"], row["batch"]) for row in section.data} == {(v, b) for v in variants for b in (1, 4)}
    assert all(0 < row["min_ms"] <= row["median_ms"] <= row["p90_ms"] for row in section.data)
    assert all(row["difference"] < 1e-5 for row in section.data)


def test_a_machine_without_a_compiler_has_a_latency_all_the_same(monkeypatch, options):
    from runtime_tests import gpu_latency

    def rows(broken):
        return lambda plan: iter([Latency("mlp", "float32", 1, v, note="x" * (v == broken)) for v in variants])

    variants = ("torch eager", "torch compiled", "onnxruntime fused")
    for broken, ok in (("torch compiled", True), ("onnxruntime fused", False), ("torch eager", False)):
        monkeypatch.setattr(gpu_latency, "measure", rows(broken))
        assert run_section("latency", options).ok is ok, broken


def test_files_whose_packages_are_absent_are_left_out_by_name(tmp_path):
    (tmp_path / "one_test.py").write_text("import json\nimport numpy.linalg\nfrom models import x\n")
    (tmp_path / "two_test.py").write_text("import json\nfrom nosuchpackage.part import x\nimport torch, alsoabsent\n")
    assert gpu._absent_packages(tmp_path / "one_test.py") == []
    assert gpu._absent_packages(tmp_path / "two_test.py") == ["alsoabsent", "nosuchpackage"]


def test_rows_that_were_measured_outlive_the_process(monkeypatch, options):
    section = {"name": "latency", "ok": False, "lines": ["not finished", "row one"], "data": [1], "seconds": 0.0}
    program = (
        f"import json, os; open({str(options.out / 'latency.json')!r}, 'w').write(json.dumps({section!r}))\n"
        "os.kill(os.getpid(), 9)"
    )
    pretend(monkeypatch, program)
    kept = run_isolated("latency", options)
    assert (kept.ok, kept.data) == (False, [1])
    assert kept.lines == ["the process ended with -9", "not finished", "row one"]


def test_latency_is_written_row_by_row(monkeypatch, options):
    from runtime_tests import gpu_latency

    def measured(plan):
        yield Latency("mlp", "float32", 1, "torch eager", 1.0, 2.0, 3.0, 5, 0.0)
        kept = json.loads((options.out / "latency.json").read_text())
        assert (kept["ok"], [row["variant"] for row in kept["data"]]) == (False, ["torch eager"])
        yield Latency("mlp", "float32", 1, "onnxruntime fused", 0.5, 1.0, 1.5, 5, 1e-7)

    monkeypatch.setattr(gpu_latency, "measure", measured)
    section = run_section("latency", options)
    assert (section.ok, len(section.data)) == (True, 2), section.lines


@pytest.mark.parametrize("on", [False, True])
def test_tf32_is_set_so_that_torch_can_read_it_and_compile(on):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    with _tf32(on):
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (on, on)
        assert (matmul.fp32_precision, cudnn.conv.fp32_precision == "tf32") == ("tf32" if on else "ieee", on)
        assert torch.get_float32_matmul_precision() == ("high" if on else "highest")
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before


def test_latency_says_which_variant_could_not_be_measured():
    rows = [
        Latency("mlp", "float32", 1, "torch eager", 1.0, 2.0, 3.0, 5, 0.0),
        Latency("mlp", "float32", 1, "onnxruntime fused", 0.5, 1.0, 1.5, 5, 1e-7),
        Latency("mlp", "float32", 1, "torch compiled", note="RuntimeError: no compiler"),
    ]
    printed = table(rows)
    assert "2.00" in printed[3]
    assert printed[4].endswith("RuntimeError: no compiler")
    assert set(Plan("cuda").batches) >= {1, 256}


def test_the_command_writes_both_reports_and_each_sections_own_file(tmp_path, capfd):
    assert main(["--out", str(tmp_path), "--device", "cpu", "--tiny", "--sections", "machine"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is True
    assert report["sections"]["machine"]["data"]["versions"]["torch"]
    assert report["sections"]["machine"]["data"]["processor"]
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# renorm-onnx on cpu\n\n**A rehearsal on the CPU: none of this was measured on a GPU.**")
    assert "onnxruntime" in text
    assert (tmp_path / "machine.log").exists()
    assert "machine: ok" in capfd.readouterr().out


def pretend(monkeypatch, program):
    """Every section's process runs `program` instead."""
    real = gpu.subprocess.Popen
    monkeypatch.setattr(
        gpu.subprocess, "Popen", lambda command, **more: real([sys.executable, "-c", program, *command[4:]], **more)
    )


def alive(process):
    """Whether a process still runs; one that nobody has waited for does not."""
    state = Path(f"/proc/{process}/stat")
    try:
        return state.read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_a_crash_loses_one_section_and_its_last_words_are_kept(monkeypatch, options):
    program = "import os; print('driver says boo', flush=True); os.kill(os.getpid(), 11)"
    pretend(monkeypatch, program)
    section = run_isolated("layers", options)
    assert not section.ok
    assert section.lines == ["the process ended with -11", "driver says boo"]


def test_a_section_that_hangs_is_ended_with_everything_it_started(monkeypatch, options, tmp_path):
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    pretend(monkeypatch, program)
    section = run_isolated("layers", replace(options, limit=5.0))
    assert (section.ok, section.lines[0]) == (False, "took longer than 5 s and was ended")
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 30
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stale_result_is_never_taken_for_a_new_one(monkeypatch, options):
    (options.out / "layers.json").write_text(json.dumps({"name": "layers", "ok": True, "lines": []}))
    pretend(monkeypatch, "pass")
    section = run_isolated("layers", options)
    assert (section.ok, section.lines) == (False, ["wrote no result"])


def test_the_other_sections_run_after_one_that_failed(monkeypatch, tmp_path, capsys):
    ran = []

    def isolated(name, options):
        ran.append(name)
        return Section(name, name != "tests", ["what happened"])

    monkeypatch.setattr(gpu, "run_isolated", isolated)
    assert main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    assert ran == list(SECTIONS)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [name for name, section in report["sections"].items() if not section["ok"]] == ["tests"]
    assert "tests: FAILED" in capsys.readouterr().out


def test_an_exception_becomes_a_section_that_shows_it(monkeypatch, options):
    def broken(options):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(SECTIONS, "layers", broken)
    section = run_section("layers", options)
    assert not section.ok
    assert section.lines[-1] == "RuntimeError: no kernel image is available"
    assert "FAILED" in markdown([section], options)


def test_without_a_gpu_the_exit_code_is_3_and_a_sentence(monkeypatch, tmp_path, capsys):
    from renorm_onnx.runtime.providers import provider_status

    if provider_status("cuda").creatable:
        pytest.skip("this machine has a GPU")
    ran = []
    monkeypatch.setattr(gpu, "run_isolated", lambda name, options: ran.append(name) or Section(name, False, []))
    assert main(["--out", str(tmp_path)]) == 3
    assert ran == ["machine"]
    assert "gpu: cuda cannot be used: " in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line_and_exit_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "inside")]) == 2
    assert "cannot be made (Not a directory); name another" in capsys.readouterr().err

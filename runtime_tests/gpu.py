"""Everything that needs a GPU, in one command that needs no network: tests, parity, and speed.

    python -m runtime_tests.gpu --out DIR [--quick] [--device cpu] [--sections NAME ...]

Each section runs in a process of its own with a time limit, so that a crash inside a driver loses one section and no
more. DIR/NAME.json and DIR/NAME.log hold what one section found and printed; DIR/report.json and DIR/report.md all of
it. With `--device cpu` the same sections rehearse on a machine without a GPU. Exit code 0 if every section is fine, 1
if one is not, 3 if the device is missing.
"""

import argparse
import ast
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from export.versions import versions
from renorm_onnx.runtime.table import text_table

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Section:
    """What one section found.

    Attributes:
        name: Of the section.
        ok: Whether everything in it is as it should be.
        seconds: Wall time.
        lines: For people.
        data: For machines.
    """

    name: str
    ok: bool
    lines: list[str]
    data: Any = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        out: Folder for everything written.
        device: "cuda", or "cpu" to rehearse.
        quick: Minutes instead of tens of minutes: small networks, few batches and rounds.
        tiny: Seconds: what the tests run.
        sections: Which.
        limit: Seconds that one section may take.
    """

    out: Path
    device: str = "cuda"
    quick: bool = False
    tiny: bool = False
    sections: tuple[str, ...] = field(default_factory=lambda: tuple(SECTIONS))
    limit: float = 1800.0

    @property
    def providers(self) -> list[str]:
        """Execution providers to judge on."""
        return ["cpu"] if self.device == "cpu" else ["cpu", "cuda"]


def machine(options: Options) -> Section:
    """Describe the machine, and run `doctor` on the provider."""
    import torch

    from renorm_onnx.runtime.doctor import diagnose

    found: dict[str, Any] = {
        "versions": versions(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "nvidia-smi": _nvidia_smi(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    diagnosis = diagnose(options.device)
    lines = [f"{key}: {value}" for key, value in found.items() if value]
    return Section("machine", diagnosis.ok, [*lines, "", str(diagnosis)], {**found, "doctor": diagnosis.to_dict()})


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _nvidia_smi() -> str:
    fields = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    return ""


def tests(options: Options) -> Section:
    """Run the tests that are marked as needing a GPU; without one they must skip by name."""
    if importlib.util.find_spec("pytest") is None:
        return Section("tests", False, ["pytest is not installed on this machine: the CUDA tests were not run"])
    found = [path for folder in ("renorm_onnx", "export") for path in sorted((ROOT / folder).rglob("*_test.py"))]
    marked = [path for path in found if "pytest.mark.cuda" in path.read_text()]
    lacking = {path: absent for path in marked if (absent := _absent_packages(path))}
    files = [str(path) for path in marked if path not in lacking]
    left_out = [f"left out: {p.relative_to(ROOT)} needs {', '.join(absent)}" for p, absent in lacking.items()]
    environment = dict(os.environ)
    if options.device == "cuda":
        environment["RENORM_REQUIRE_CUDA"] = "1"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "cuda",
        "-rsfE",
        "--tb=short",
        "--continue-on-collection-errors",
        *("-o", "filterwarnings=default"),  # torch and onnxruntime of other versions may warn of other things
        *files,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()[-60:] + done.stderr.splitlines()[-5:]
    data = {"exit_code": done.returncode, "command": command[1:], "left_out": left_out}
    return Section("tests", done.returncode == 0, [*left_out, *lines], data)


def _absent_packages(path: Path) -> list[str]:
    """Return what a file imports at its top and a bare machine lacks, matplotlib for one."""
    tree = ast.parse(path.read_text())
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    return sorted({name for name in (full.partition(".")[0] for full in names) if not importlib.util.find_spec(name)})


def parity(options: Options) -> Section:
    """Run the parity matrix: the part of `make test`, and every network in float32 and float16."""
    from models import MODELS
    from runtime_tests.parity_matrix import Export, exports, run, summary

    files = [Export("mlp", dtype=dtype) for dtype in ("float32", "float16")]
    if not options.tiny:
        kinds = ("float32",) if options.quick else ("float32", "float16")
        files = list(dict.fromkeys([*exports(quick=True), *(Export(m, dtype=d) for m in MODELS for d in kinds)]))
    outcomes = list(run(files, options.providers))
    wrong = [f"{o.status} {o.case}: {o.note}" for o in outcomes if o.status != "ok"]
    # A kernel that does not exist is reported; a provider that is missing, or has none at all, is a failure here.
    ok = all(o.status == "ok" or (o.status == "skip" and "no kernel" in o.note) for o in outcomes)
    ok = ok and {o.case.provider for o in outcomes if o.status == "ok"} >= set(options.providers)
    return Section("parity", ok, [*summary(outcomes), *wrong], [o.to_dict() for o in outcomes])


def verdicts(options: Options) -> Section:
    """Let `verify` judge the fused networks in full, with its own inputs, layers and repeatability."""
    from models import MODELS
    from renorm_onnx.runtime.parity import verify
    from runtime_tests.parity_matrix import Export, build

    lines, data, ok = [], {}, True
    for name in ["mlp"] if options.tiny else MODELS:
        protos = build(Export(name)).protos
        verdict = verify(protos["function"], protos["fused"], providers=options.providers, layers=True)
        lines += [f"{name}:", *str(verdict).splitlines(), ""]
        data[name], ok = verdict.to_dict(), ok and verdict.ok
    return Section("verdicts", ok, lines, data)


def layers(options: Options) -> Section:
    """Time a training step of the layers against `nn.BatchNorm`."""
    file = options.out / "bench_layers.json"
    command = [sys.executable, "-m", "runtime_tests.bench_layers", "--device", options.device, "--json", str(file)]
    if options.tiny:
        command += ["--rounds", "2", "--shape", "32x16", "--mode", "train", "eval"]
    elif options.quick:
        command += ["--rounds", "7", "--shape", "256x256", "64x64x32x32", "64x64x32x32:cl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    cells = json.loads(file.read_text()) if done.returncode == 0 else None
    lines = done.stdout.splitlines() + done.stderr.splitlines()[-20:]
    return Section("layers", done.returncode == 0, lines, cells)


def latency(options: Options) -> Section:
    """Time inference in torch and onnxruntime."""
    from runtime_tests.gpu_latency import Latency, Plan, measure, table, to_json

    plan = Plan(options.device)
    if options.tiny:
        plan = Plan("cpu", ["mlp"], [1, 4], ["float32"], small=True, compiled=False, rounds=2)
    elif options.quick:
        plan = Plan(options.device, ["wide_resnet", "mlp"], [1, 32, 256], rounds=10)
    if options.device == "cpu":
        plan = Plan("cpu", plan.networks, plan.batches, ["float32"], plan.small, plan.compiled, plan.rounds)
    rows: list[Latency] = []
    for row in measure(plan):
        rows.append(row)
        # What is measured is kept, whatever a later row does to this process.
        save(Section("latency", False, ["not finished", *table(rows)], to_json(rows)), options)
    # A machine without a C compiler cannot compile; its row says so, and the others stand.
    failed = [row for row in rows if row.note and row.variant != "torch compiled"]
    return Section("latency", bool(rows) and not failed, table(rows), to_json(rows))


SECTIONS: dict[str, Callable[[Options], Section]] = {
    function.__name__: function for function in (machine, tests, parity, verdicts, layers, latency)
}


def save(section: Section, options: Options) -> None:
    """Write what a section found to its file, whole or not at all."""
    file = options.out / f"{section.name}.json"
    new = file.with_suffix(".json.new")
    new.write_text(json.dumps(asdict(section)) + "\n")
    new.replace(file)


def run_section(name: str, options: Options) -> Section:
    """Run one section in this process; an exception becomes a section that says so."""
    started = time.perf_counter()
    try:
        section = SECTIONS[name](options)
    except Exception:  # the other sections must still run, whatever breaks in a driver
        section = Section(name, False, traceback.format_exc().splitlines())
    section.seconds = round(time.perf_counter() - started, 1)
    return section


def run_isolated(name: str, options: Options) -> Section:
    """Run one section in a process of its own, which may crash or hang."""
    file, log = options.out / f"{name}.json", options.out / f"{name}.log"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "runtime_tests.gpu", "--out", str(options.out), "--device", options.device]
    command += ["--alone", name] + ["--quick"] * options.quick + ["--tiny"] * options.tiny
    started, state = time.perf_counter(), ""
    with log.open("w") as stream:
        # In a session of its own, so that what it started ends with it.
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)
        try:
            code = process.wait(options.limit)
            state = f"the process ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            state = f"took longer than {options.limit:g} s and was ended"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = round(time.perf_counter() - started, 1)
    if file.exists():
        found = Section(**json.loads(file.read_text()))
        return replace(found, ok=False, lines=[state, *found.lines], seconds=seconds) if state else found
    tail = log.read_text(errors="replace").splitlines()[-20:]
    return Section(name, False, [state or "wrote no result", *tail], seconds=seconds)


def markdown(sections: Sequence[Section], options: Options) -> str:
    """Return all sections as one Markdown document."""
    rows = [(s.name, "ok" if s.ok else "FAILED", f"{s.seconds:.0f} s") for s in sections]
    rehearsal = (
        ["", "**A rehearsal on the CPU: none of this was measured on a GPU.**"] if options.device == "cpu" else []
    )
    text = [f"# renorm-onnx on {options.device}", *rehearsal, "", "```", *text_table(("section", "", ""), rows), "```"]
    for section in sections:
        text += ["", f"## {section.name}", "", "```", *section.lines, "```"]
    return "\n".join(text) + "\n"


def write(sections: Sequence[Section], options: Options) -> None:
    """Write report.json and report.md; called after every section, so that what is done is never lost."""
    report = {
        "schema_version": SCHEMA_VERSION,
        "device": options.device,
        "ok": all(section.ok for section in sections),
        "sections": {section.name: asdict(section) for section in sections},
    }
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "report.md").write_text(markdown(sections, options))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m runtime_tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: rehearse without a GPU")
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of tens of minutes")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--limit", type=float, default=1800.0, metavar="SECONDS", help="for one section (1800)")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--alone", choices=list(SECTIONS), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    out = given.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu: --out {str(given.out)!r} cannot be made ({error.strerror}); name another", file=sys.stderr)
        return 2
    options = Options(out, given.device, given.quick, given.tiny, tuple(given.sections), given.limit)
    if given.alone:
        save(run_section(given.alone, options), options)
        return 0
    return run(options)


def run(options: Options) -> int:
    """Run every section after the other and write the report after each; without the device, only what it lacks."""
    from renorm_onnx.runtime.providers import provider_status

    status = provider_status(options.device)
    sections: list[Section] = []
    for name in options.sections if status.creatable else ["machine"]:
        print(f"{name} ...", flush=True)
        sections.append(run_isolated(name, options))
        write(sections, options)
        print(f"{name}: {'ok' if sections[-1].ok else 'FAILED'}, {sections[-1].seconds:.0f} s", flush=True)
    print(f"wrote {options.out / 'report.md'} and report.json")
    if not status.creatable:
        print(f"gpu: {options.device} cannot be used: {status.stage}: {status.detail}. {status.fix}", file=sys.stderr)
        return 3
    return 0 if all(section.ok for section in sections) else 1


if __name__ == "__main__":
    sys.exit(main())

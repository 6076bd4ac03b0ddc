"""What fusing a large model costs, ours and others' side by side in one run.

    python -m runtime_tests.bench_fusion                                   chains of 500, 2,000 and 8,000 norms
    python -m runtime_tests.bench_fusion --sizes 500 --external-gb 2.5     and 2.5 GB of external weights
    python -m runtime_tests.bench_fusion --peers --python peers/bin/python
    python -m runtime_tests.bench_fusion --sizes "" --light        networks of the onnx package with random weights
    python -m runtime_tests.bench_fusion --sizes "" --models a.onnx b.onnx

    python -m runtime_tests.bench_fusion --sizes 8000 --rounds 7     medians of runs in turn

A chain is N times Conv 16->16 3x3, BatchNormalization, Relu, with an Add after every second. Each tool runs in a
process of its own: start, import, load, fuse and save all count. What is compared is CPU time, since other load on the
machine disturbs it least; the row "load and save" is what the onnx package needs to copy the file. A run on a small
model comes first and is not counted: it leaves the bytecode that an installation has. Peers run with the
interpreter given by --python, so that they need not be installed beside this project; an absent one says so.
Norms left are counted in the file that was written. Small models are also run in float64, before and after: the error
is the root mean square of the difference of the outputs over that of the output.
Exit status 1 if ours failed, left a norm that can be folded, or changed an output.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from renorm_onnx import model_file
from renorm_onnx.errors import InputError
from renorm_onnx.runtime.reference import evaluate
from runtime_tests.light_models import NORMS_LEFT, drawn

CHECKED_NODES = 2_000
# What open axes are given: models that halve images five times refuse the first.
OPEN_SIZES = (4, 64)
MAX_ERROR = 1e-5
CHANNELS = 16
LIMIT_SECONDS = 600

#: Row of the table -> a Python program that reads the model at argv[1] and writes argv[2]. The first two are ours.
OURS = "renorm-onnx"
COPY = "load and save"
_ORT = """
import sys, onnxruntime as ort
o = ort.SessionOptions()
o.intra_op_num_threads = 1
o.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
o.optimized_model_filepath = sys.argv[2]
o.log_severity_level = 4
if len(sys.argv) > 3:
    key = "session.optimized_model_external_initializers_"
    o.add_session_config_entry(key + "file_name", sys.argv[2].rsplit("/", 1)[1] + ".data")
    o.add_session_config_entry(key + "min_size_in_bytes", "1024")
ort.InferenceSession(sys.argv[1], o, providers=["CPUExecutionProvider"])
"""
_SAVE = "onnx.save(m, sys.argv[2], save_as_external_data=len(sys.argv) > 3)"
PROGRAMS: Mapping[str, str] = {
    COPY: f"import sys, onnx; m = onnx.load(sys.argv[1]); {_SAVE}",
    OURS: "import sys; from renorm_onnx.cli import main;"
    "sys.argv[1:] = ['fuse', '--no-verify', sys.argv[1], '-o', sys.argv[2]]; sys.exit(main())",
}
PEERS: Mapping[str, str] = {
    "onnxruntime": _ORT,
    "onnxsim": "import sys, onnx, onnxsim; m, ok = onnxsim.simplify(sys.argv[1]); " + _SAVE,
    "onnxslim": "import sys, onnx, onnxslim; m = onnxslim.slim(sys.argv[1]); " + _SAVE,
    "onnxscript": """
import sys, onnx_ir as ir, onnxscript
from onnxscript import optimizer, rewriter
m = ir.load(sys.argv[1])
optimizer.optimize_ir(m)
rewriter.rewrite(m)
ir.save(m, sys.argv[2], external_data=sys.argv[2].rsplit("/", 1)[1] + ".data" if len(sys.argv) > 3 else None)
""",
    "onnxoptimizer": "import sys, onnx, onnxoptimizer; m = onnxoptimizer.optimize(onnx.load(sys.argv[1]), "
    "['fuse_bn_into_conv', 'fuse_add_bias_into_conv']); " + _SAVE,
}


@dataclass(frozen=True)
class Cost:
    """What one run of one tool took.

    Args:
        seconds: CPU seconds of the process, user and system.
        megabytes: Its largest resident memory.
        failure: The last line it said if it failed, else empty.
    """

    seconds: float
    megabytes: float
    failure: str


class Tool(NamedTuple):
    """A program that reads the model named by its first argument and writes the one named by its second."""

    name: str
    python: str
    program: str


class Row(NamedTuple):
    """What a tool took and did: medians, its ratio to a copy of the same round, the norms it left and its error."""

    name: str
    cost: Cost
    ratio: float
    left: int | None
    error: float | str


@dataclass(frozen=True)
class Bench:
    """Which tools run, how often, and as what.

    Args:
        peers: The interpreter that has the other tools; None to leave them out.
        rounds: How often each tool runs.
        environment: That of each process.
    """

    peers: str | None
    rounds: int
    environment: Mapping[str, str]

    def tools(self) -> list[Tool]:
        """The copy first, then ours, then the others."""
        own = [Tool(name, sys.executable, program) for name, program in PROGRAMS.items()]
        return own + [Tool(name, self.peers, program) for name, program in PEERS.items() if self.peers]

    def warm_up(self, folder: Path) -> None:
        """Run each tool once on a small model, so that none compiles its own source while it is measured."""
        source = folder / "small.onnx"
        write_chain(source, 2)
        for index, tool in enumerate(self.tools()):
            measure(tool, source, folder / f"small.{index}.onnx", environment=self.environment)


def write_chain(path: Path, pairs: int) -> None:
    """Write a model of so many Conv, BatchNormalization and Relu, with an Add after every second."""
    rng = np.random.default_rng(0)
    nodes, tensors, last = [], [], "x"
    for i in range(pairs):
        tensors.append(_tensor(f"w{i}", rng.normal(size=(CHANNELS, CHANNELS, 3, 3)) * 0.1))
        tensors += _statistics(rng, i, CHANNELS)
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], f"conv{i}", pads=[1] * 4))
        nodes.append(_norm(i))
        nodes.append(helper.make_node("Relu", [f"n{i}"], [f"r{i}"], f"relu{i}"))
        last = f"r{i}"
        if i % 2:
            nodes.append(helper.make_node("Add", [last, f"r{i - 1}"], [f"a{i}"], f"add{i}"))
            last = f"a{i}"
    onnx.save(_model(nodes, tensors, last, CHANNELS), path)


def write_external(path: Path, gigabytes: float, *, layers: int = 24) -> None:
    """Write a model of 1x1 Conv, BatchNormalization and Relu whose weights fill a data file of that size."""
    rng = np.random.default_rng(0)
    width = max(16, round((gigabytes * 1e9 / 4 / layers) ** 0.5) // 16 * 16)
    weight = (rng.normal(size=(width, width)) * width**-0.5).astype(np.float32).tobytes()
    nodes, tensors, last = [], [], "x"
    with open(f"{path}.data", "wb") as data:
        for i in range(layers):
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width, 1, 1])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", f"{path.name}.data"), ("offset", data.tell()), ("length", len(weight))):
                tensor.external_data.add(key=key, value=str(value))
            data.write(weight)
            tensors += [tensor, *_statistics(rng, i, width)]
            nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], f"conv{i}"))
            nodes.append(_norm(i))
            nodes.append(helper.make_node("Relu", [f"n{i}"], [f"r{i}"], f"relu{i}"))
            last = f"r{i}"
    onnx.save(_model(nodes, tensors, last, width), path)


def _tensor(name: str, array: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(array.astype(np.float32), name)


def _statistics(rng: np.random.Generator, index: int, channels: int) -> list[TensorProto]:
    values = {"s": rng.normal(size=channels) + 0.5, "b": rng.normal(size=channels), "m": rng.normal(size=channels)}
    return [_tensor(f"{k}{index}", v) for k, v in (values | {"v": rng.uniform(0.5, 2, channels)}).items()]


def _norm(i: int) -> onnx.NodeProto:
    return helper.make_node("BatchNormalization", [f"c{i}", f"s{i}", f"b{i}", f"m{i}", f"v{i}"], [f"n{i}"], f"norm{i}")


def _model(nodes: list[onnx.NodeProto], tensors: list[TensorProto], output: str, channels: int) -> onnx.ModelProto:
    dims = ["n", channels, "h", "w"]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in ("x", output)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# A process inherits the peak memory of the one that started it, so a small one stands between. `timeout` waits for the
# tool, so its own usage includes the tool's.
WATCHER = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
"""


def measure(
    tool: Tool, source: Path, target: Path, *, external: bool = False, environment: Mapping[str, str] = os.environ
) -> Cost:
    """Run `tool` on `source` in a process of its own and say what it took."""
    command = [tool.python, "-c", tool.program, str(source), str(target), *(["external"] if external else [])]
    with tempfile.TemporaryFile("w+") as said:
        limited = ["timeout", str(LIMIT_SECONDS), *command]
        watched = [sys.executable, "-S", "-c", WATCHER, *limited]
        done = subprocess.run(watched, stdout=subprocess.PIPE, stderr=said, env=environment, text=True, check=True)
        status, seconds, megabytes = json.loads(done.stdout)
        said.seek(0)
        lines = said.read().strip().splitlines()
    failure = ""
    if status == 124:
        failure = f"stopped after {LIMIT_SECONDS} s"
    elif status:
        failure = lines[-1] if lines else f"ended with status {status}"
    return Cost(seconds, megabytes, failure)


def norms_left(path: Path) -> int:
    """How many BatchNormalizations a file has, in function bodies too."""
    model = onnx.load(path, load_external_data=False)
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    return sum(node.op_type == "BatchNormalization" for body in bodies for node in body)


def error_of(source: Path, target: Path) -> float:
    """RMS of the difference that a tool made to the outputs, over that of the outputs; both models run in float64."""
    before = model_file.load(source)
    for size in OPEN_SIZES:
        feeds = _feeds(before, size)
        try:
            want = evaluate(before, feeds)
        except InputError:
            if size == OPEN_SIZES[-1]:
                raise
        else:
            break
    got = evaluate(model_file.load(target), feeds)
    if set(want) != set(got) or any(want[name].shape != got[name].shape for name in want):
        return float("inf")
    return max(float(np.sqrt(np.mean((want[n] - got[n]) ** 2) / max(np.mean(want[n] ** 2), 1e-300))) for n in want)


def _feeds(model: ir.Model, size: int) -> dict[str, np.ndarray]:
    """Random inputs: two of them where the number is open, and `size` along every other open axis."""
    rng = np.random.default_rng(1)
    feeds = {}
    for value in model.graph.inputs:
        if not value.is_initializer():
            dims = [d if isinstance(d, int) and d > 0 else size for d in value.shape or ()]
            if dims and not (isinstance(value.shape[0], int) and value.shape[0] > 0):
                dims[0] = 2
            feeds[value.name or ""] = rng.normal(size=dims)
    return feeds


def as_installed(folder: Path) -> dict[str, str]:
    """The environment of a measured process: one thread, and bytecode kept in `folder`, as an installation keeps it."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**known, "OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": str(folder)}


def rows(source: Path, tools: Sequence[Tool], bench: Bench, *, external: bool = False) -> Iterator[Row]:
    """Run every tool on one model, in turn and as often as asked, and say of each what it took and did."""
    small = len(onnx.load(source, load_external_data=False).graph.node) <= CHECKED_NODES and not external
    costs: dict[Tool, list[Cost]] = {tool: [] for tool in tools}
    done: dict[Tool, tuple[int, float | str]] = {}
    for _ in range(bench.rounds):
        for tool in tools:
            if any(cost.failure for cost in costs[tool]):
                continue
            with tempfile.TemporaryDirectory(dir=source.parent) as folder:
                target = Path(folder) / "out.onnx"
                costs[tool].append(measure(tool, source, target, external=external, environment=bench.environment))
                if tool not in done and not costs[tool][-1].failure and target.exists():
                    done[tool] = norms_left(target), _error_or_reason(source, target) if small else "not run"
    for tool, found in costs.items():
        left, error = done.get(tool, (None, ""))
        failure = next((cost.failure for cost in found if cost.failure), "")
        seconds = statistics.median(cost.seconds for cost in found)
        ratio = statistics.median(one.seconds / two.seconds for one, two in zip(found, costs[tools[0]], strict=False))
        yield Row(tool.name, Cost(seconds, max(cost.megabytes for cost in found), failure), ratio, left, error)


def _error_or_reason(source: Path, target: Path) -> float | str:
    try:
        return error_of(source, target)
    except ValueError as reason:
        return f"cannot run: {reason}"


def show(title: str, source: Path, bench: Bench, *, external: bool = False, expected: int | None = 0) -> bool:
    """Print one table; say whether ours is right and left `expected` norms, or any number where that is None."""
    print(f"\n{title}: {norms_left(source)} norms, {sum(f.stat().st_size for f in _files(source)) / 1e6:,.0f} MB")
    print(f"{'':<15}{'CPU s':>8}{'of copy':>9}{'peak MB':>9}{'norms left':>12}  error")
    right = False
    for name, cost, ratio, left, error in rows(source, bench.tools(), bench, external=external):
        if left is None or cost.failure:
            print(f"{name:<15}{cost.seconds:8.2f}{'':>9}{cost.megabytes:9.0f}  {cost.failure[:90] or 'wrote nothing'}")
            continue
        shown = f"{error:.1e}" if isinstance(error, float) else str(error)[:90]
        print(f"{name:<15}{cost.seconds:8.2f}{ratio:8.1f}x{cost.megabytes:9.0f}{left:12d}  {shown}", flush=True)
        if name == OURS:
            exact = error <= MAX_ERROR if isinstance(error, float) else error == "not run"
            right = exact and (expected is None or left == expected)
    return right


def _files(source: Path) -> list[Path]:
    return [file for file in (source, Path(f"{source}.data")) if file.exists()]


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each model and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="500,2000,8000", help="numbers of norms in the chains, with commas")
    parser.add_argument("--external-gb", type=float, default=0.0, help="also a model with so much external data")
    parser.add_argument("--light", action="store_true", help="also the light models that ship in the onnx package")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="also these files")
    parser.add_argument("--peers", action="store_true", help="run the other tools as well")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the other tools")
    parser.add_argument("--rounds", type=int, default=1, help="how often each tool runs, in turn; medians are printed")
    parser.add_argument("--folder", help="where to put the models for the time of the run")
    given = parser.parse_args(arguments)
    right = True
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        bench = Bench(given.python if given.peers else None, given.rounds, as_installed(Path(folder) / "bytecode"))
        bench.warm_up(Path(folder))
        for pairs in (int(size) for size in given.sizes.split(",") if size):
            source = Path(folder) / f"chain{pairs}.onnx"
            write_chain(source, pairs)
            right &= show(f"chain of {pairs:,}", source, bench)
            source.unlink()
        if given.external_gb:
            source = Path(folder) / "external.onnx"
            write_external(source, given.external_gb)
            title = f"external data of {given.external_gb:g} GB"
            right &= show(title, source, bench, external=True)
        for name, left in NORMS_LEFT.items() if given.light else ():
            source = Path(folder) / f"{name}.onnx"
            onnx.save(drawn(name), source)
            right &= show(name, source, bench, expected=left)
        for source in given.models:
            right &= show(str(source), source, bench, expected=None)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

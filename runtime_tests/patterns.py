"""The table of patterns: some 1000 small models, each with the number of norms that must stay and why the first does.

`python -m runtime_tests.patterns` prints what becomes of them, for this package and for every other tool that is
installed (onnxruntime, onnxsim, onnxslim, onnxoptimizer, onnxscript): how many of the foldable models they fold, and
how many models they get wrong.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from renorm_onnx import model_file
from renorm_onnx.errors import RenormError
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.runtime.reference import evaluate
from runtime_tests.pattern_models import Pattern, norms_left
from runtime_tests.patterns_absorbing import absorbing
from runtime_tests.patterns_bodies import bodies
from runtime_tests.patterns_branches import branches
from runtime_tests.patterns_networks import networks
from runtime_tests.patterns_numbers import numbers
from runtime_tests.patterns_passing import passing
from runtime_tests.patterns_quantized import quantized
from runtime_tests.patterns_structure import structure

# Float64 on both sides: what differs is the rounding of parameters, at most a few hundred of them in one sum.
TOLERANCES = {"float32": 2e-5, "float16": 3e-2, "bfloat16": 2e-1, "float64": 1e-11}
Tool = Callable[[onnx.ModelProto], onnx.ModelProto]
Arrays = Mapping[str, npt.NDArray[Any]]


def table() -> Iterator[Pattern]:
    """Every pattern; names are unique."""
    for rows in (absorbing, quantized, passing, branches, structure, bodies, networks, numbers):
        yield from rows()


def feeds_of(model: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
    """Normal numbers for every input that has no initializer; a named size is 2."""
    rng, stored = np.random.default_rng(1), {i.name for i in model.graph.initializer}
    return {
        i.name: rng.normal(size=[d.dim_value if d.HasField("dim_value") else 2 for d in i.type.tensor_type.shape.dim])
        + 0.2
        for i in model.graph.input
        if i.name not in stored
    }


def difference(want: Arrays, got: Arrays, tolerance: float) -> str:
    """How two sets of outputs differ, or an empty string."""
    if list(want) != list(got):
        return f"outputs {list(want)} became {list(got)}"
    for name, array in want.items():
        other = got[name]
        if array.shape != other.shape:
            return f"{name}: shape {array.shape} became {other.shape}"
        finite = np.isfinite(array)
        if not np.array_equal(finite, np.isfinite(other)):
            return f"{name} is finite elsewhere"
        error = np.abs(array[finite] - other[finite]).max(initial=0.0)
        size = np.abs(array[finite]).max(initial=0.0)
        if error > tolerance * max(float(size), 1e-30):
            return f"{name} is off by {error:.3g} of {size:.3g}"
    return ""


def interface(model: onnx.ModelProto) -> tuple[list[bytes], list[bytes]]:
    """Inputs and outputs as they are declared; before IR version 4, weights are listed as inputs and do not count."""
    stored = {i.name for i in model.graph.initializer} if model.ir_version < 4 else set()
    inputs = [i.SerializeToString() for i in model.graph.input if i.name not in stored]
    return inputs, [o.SerializeToString() for o in model.graph.output]


def is_valid(model: onnx.ModelProto) -> bool:
    """Whether the checker accepts the model with full shape inference."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception:
        return False
    return True


def compare(pattern: Pattern, model: onnx.ModelProto, fused: onnx.ModelProto) -> str:
    """What is wrong with `fused`, or an empty string."""
    if interface(model) != interface(fused):
        return "interface changed"
    if is_valid(model) and not is_valid(fused):
        return "invalid"
    feeds = feeds_of(model)
    want = evaluate(model_file.load(model), feeds)
    return difference(want, evaluate(model_file.load(fused), feeds), TOLERANCES[pattern.dtype])


def judge(pattern: Pattern, tool: Tool) -> str:
    """One word or more: "folded", "kept" (fewer folded than could be), "wrong: ..." or "crashed: ..."."""
    model = pattern.build()
    original = onnx.ModelProto.FromString(model.SerializeToString())
    try:
        fused = tool(model)
    except Exception as error:
        return f"crashed: {type(error).__name__}"
    try:
        if why := compare(pattern, original, fused):
            return f"wrong: {why}"
    except RenormError as error:
        return f"wrong: {str(error)[:80]}"
    return "folded" if norms_left(fused) <= pattern.left else "kept"


def tools() -> Iterator[tuple[str, Tool]]:
    """This package and the other tools that can be imported."""
    yield "renorm-onnx", lambda model: fuse(model)[0]
    for name, load in (
        ("onnxruntime", _onnxruntime),
        ("onnxoptimizer", _onnxoptimizer),
        ("onnxsim", _onnxsim),
        ("onnxslim", _onnxslim),
        ("onnxscript", _onnxscript),
    ):
        try:
            yield name, load()
        except ImportError as error:
            print(f"{name}: not installed ({error})")


def _onnxruntime() -> Tool:
    import tempfile

    import onnxruntime

    def tool(model: onnx.ModelProto) -> onnx.ModelProto:
        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            options = onnxruntime.SessionOptions()
            options.optimized_model_filepath, options.log_severity_level = file.name, 4
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return onnx.load(file.name)

    return tool


def _onnxoptimizer() -> Tool:
    import onnxoptimizer

    passes = onnxoptimizer.get_fuse_and_elimination_passes()
    return lambda model: onnxoptimizer.optimize(model, passes)


def _onnxsim() -> Tool:
    import onnxsim

    return lambda model: onnxsim.simplify(model)[0]


def _onnxslim() -> Tool:
    import onnxslim

    return lambda model: onnxslim.slim(model)


def _onnxscript() -> Tool:
    import onnxscript.optimizer
    import onnxscript.rewriter

    return lambda model: onnxscript.rewriter.rewrite(onnxscript.optimizer.optimize(model))


def main() -> int:
    """Print one line for each tool; exit 1 if this package folds less than it should, or wrongly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", action="store_true", help="print every pattern that is not folded rightly")
    parser.add_argument("--tool", action="append", help="only this tool; may be repeated")
    arguments = parser.parse_args()
    rows = [p for p in table() if p.options == Pattern("", (), str).options]
    foldable = [p for p in rows if norms_left(p.build()) > p.left]
    names = {p.name for p in foldable}
    print(f"{len(rows)} models, {len(foldable)} of them foldable")
    failed = False
    for name, tool in tools():
        if arguments.tool and name not in arguments.tool:
            continue
        counts: Counter[str] = Counter()
        for pattern in rows:
            try:
                outcome = judge(pattern, tool)
            except Exception:  # what a tool wrote cannot even be read
                outcome = "wrong: " + traceback.format_exc().strip().splitlines()[-1][:80]
            word = outcome.partition(":")[0]
            counts[word if word in ("wrong", "crashed") or pattern.name in names else "rest"] += 1
            if arguments.each and (word in ("wrong", "crashed") or (word == "kept" and pattern.name in names)):
                print(f"  {name}: {pattern.name}: {outcome}")
        print(f"{name:14} " + ", ".join(f"{word} {counts[word]}" for word in ("folded", "kept", "wrong", "crashed")))
        bad = counts["folded"] < len(foldable) or counts["wrong"] or counts["crashed"]
        failed |= name == "renorm-onnx" and bool(bad)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

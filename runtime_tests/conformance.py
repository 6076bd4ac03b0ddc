"""The conformance cases that ship in the onnx package, passed through `fuse`.

Three forms of each node case, all compared in float64 with the model as it was:

* as shipped: nothing may break;
* with every input but the first stored in the model, as deployed models have them;
* the same between two maps of channels, ``a * op(s * x + t) + b``: each operator meets an affine map at its input and
  one at its output, and must absorb, pass or refuse both.

`python -m runtime_tests.conformance` prints how many cases fold in each form.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from renorm_onnx import model_file
from renorm_onnx.errors import InputError, RenormError
from renorm_onnx.fusion.engine import FuseOptions, fuse
from renorm_onnx.fusion.report import FusionReport
from renorm_onnx.runtime.reference import evaluate

FORMS = ("shipped", "stored", "between maps", "between monotone maps")
# Float64 on both sides: only the rounding of changed parameters to float32 (or their own type) differs.
TOLERANCES = {"float32": 2e-5, "float16": 4e-2, "float64": 1e-11}

Feeds = dict[str, npt.NDArray[Any]]


def node_cases() -> Iterator[Any]:
    """Every node case with at least one set of inputs that are plain arrays."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    for case in cases:
        if case.model is not None and case.data_sets and all(isinstance(i, np.ndarray) for i in case.data_sets[0][0]):
            yield case


def in_form(case: Any, form: str) -> tuple[onnx.ModelProto, Feeds] | None:
    """The case's model in one of `FORMS` with its inputs; None where the form does not apply."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    names = [i.name for i in model.graph.input]
    feeds = dict(zip(names, case.data_sets[0][0], strict=False))
    if form == "shipped":
        return model, feeds
    first = next((n for n in names if n in feeds and feeds[n].dtype in (np.float32, np.float64, np.float16)), None)
    if first is None or any(a.dtype.kind not in "fiub" for a in feeds.values()):
        return None
    for name in names:
        if name != first and name in feeds:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(feeds[name]), name))
    kept = [i for i in model.graph.input if i.name == first]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.ir_version = max(model.ir_version, 4)
    if form == "stored":
        return model, {first: feeds[first]}
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    results = [o.type.tensor_type.elem_type for o in model.graph.output]
    if feeds[first].ndim < 2 or len(results) != 1 or results[0] not in floats:
        return None
    _surround(model, feeds[first], monotone="monotone" in form)
    return model, {first: feeds[first]}


def _surround(model: onnx.ModelProto, example: npt.NDArray[Any], *, monotone: bool) -> None:
    """Put a map of axis 1 before the only input and after the only output, in place."""
    graph = model.graph
    rng = np.random.default_rng(7)
    given, result = graph.input[0].name, graph.output[0]
    dims = result.type.tensor_type.shape.dim
    inner_given, inner_result = "inner_given", "inner_result"
    for node in graph.node:
        node.input[:] = [inner_given if n == given else n for n in node.input]
        node.output[:] = [inner_result if n == result.name else n for n in node.output]
        node.input[:] = [inner_result if n == result.name else n for n in node.input]
    before = _map(graph, rng, given, inner_given, example.dtype, example.ndim, example.shape[1], monotone=monotone)
    channels = dims[1].dim_value if len(dims) > 1 else 1
    kind = helper.tensor_dtype_to_np_dtype(result.type.tensor_type.elem_type)
    after = _map(graph, rng, inner_result, result.name, kind, len(dims), channels or 1, monotone=monotone)
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)


def _map(
    graph: onnx.GraphProto,
    rng: np.random.Generator,
    given: str,
    result: str,
    dtype: Any,
    rank: int,
    channels: int,
    *,
    monotone: bool,
) -> list[onnx.NodeProto]:
    shape = [1, channels, *[1] * (rank - 2)] if rank > 1 else []
    scale = rng.choice([0.5, 2.0, 0.25], shape) * (1 if monotone else rng.choice([-1.0, 1.0], shape))
    shift = np.zeros(shape) if monotone else rng.choice([-1.0, 0.5, 0.25], shape)
    names = [f"{given}_scale_to_{result}", f"{given}_shift_to_{result}"]
    for name, array in zip(names, (scale, shift), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.asarray(array, dtype), name))
    middle = f"{result}_middle"
    multiply = helper.make_node("Mul", [given, names[0]], [middle], name=f"{result}_mul")
    return [multiply, helper.make_node("Add", [middle, names[1]], [result], name=f"{result}_add")]


def judge(model: onnx.ModelProto, feeds: Feeds) -> tuple[str, FusionReport | None]:
    """Fuse a model and compare in float64.

    Returns:
        "same" (nothing folded), "folded", "no reference", or what is wrong; and the report.
    """
    try:
        original = model_file.load(model)
    except InputError as error:
        return f"no reference: {error}", None
    fused, report = fuse(model, FuseOptions(allow_cancellation=True))
    if not report.changed:
        return "same", report
    try:
        want = evaluate(original, feeds)
    except RenormError as error:
        return f"no reference: {error}", report
    got = evaluate(model_file.load(fused), feeds)
    for name, array in want.items():
        other = got[name]
        if array.shape != other.shape or array.dtype != other.dtype:
            return f"{name} changed from {array.shape} to {other.shape}", report
        if array.dtype.kind != "f":
            if not np.array_equal(array, other):
                return f"{name} differs", report
            continue
        finite = np.isfinite(array)
        if not np.array_equal(finite, np.isfinite(other)):
            return f"{name} is finite elsewhere", report
        size = float(np.abs(array[finite]).max(initial=0.0))
        error = float(np.abs(array[finite] - other[finite]).max(initial=0.0))
        kinds = {str(v.dtype) for v in feeds.values()}
        tolerance = max(TOLERANCES.get(k, 0.0) for k in kinds)
        if error > tolerance * max(size, 1e-3):
            return f"{name} is off by {error:.3g} of {size:.3g}", report
    return "folded", report


def main() -> int:
    """Print the counts; exit 1 if any case is wrong."""
    wrong = 0
    cases = list(node_cases())
    for form in FORMS:
        counts: Counter[str] = Counter()
        for case in cases:
            built = in_form(case, form)
            if built is None:
                counts["does not apply"] += 1
                continue
            outcome, _ = judge(*built)
            counts[outcome.split(":")[0] if outcome.startswith("no reference") else outcome] += 1
            if outcome not in ("same", "folded") and not outcome.startswith("no reference"):
                wrong += 1
                print(f"WRONG {form}: {case.name}: {outcome}")
        print(f"{form}: " + ", ".join(f"{n} {what}" for what, n in counts.most_common(6)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

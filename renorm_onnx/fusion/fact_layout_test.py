"""What rearranges elements puts them where onnxruntime does."""

from __future__ import annotations

import itertools

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from renorm_onnx.fusion.fact_rules_test import facts_of
from renorm_onnx.runtime.reference import evaluate

LOWEST, HIGHEST = -(2**63), 2**63 - 1


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("step", [-2, -1, 1, 2])
def test_a_slice_is_what_onnxruntime_cuts_or_unknown(size: int, step: int) -> None:
    """From every start to every end around the axis and far beyond it."""
    ort = pytest.importorskip("onnxruntime")
    given = "float[N] x, int64[1] o, int64[1] e, int64[1] s"
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({given}) => (float[M] y) {{ y = Slice(x, o, e, , s) }}'
    model = onnx.parser.parse_model(text)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    graph = ir.from_proto(model)
    k = np.arange(1, size + 1, dtype=np.float32)
    around = (LOWEST, *range(-size - 2, size + 3), HIGHEST)
    for start, end in itertools.product(around, around):
        bounds = {name: np.array([b]) for name, b in zip("oes", (start, end, step), strict=True)}
        want = session.run(None, {"x": k, **bounds})[0]
        fact = facts_of("y = Slice(k, o, e, , s)", "float[N] x", k=k, **bounds)["y"]
        if fact.content is None:
            assert (step < 0, end) == (True, HIGHEST)
            continue
        np.testing.assert_array_equal(fact.content, want, str((start, end)))
        sized = facts_of("y = Slice(x, o, e, , s)", f"float[{size}] x", **bounds)["y"]
        assert sized.dims == want.shape, (start, end)
        np.testing.assert_array_equal(evaluate(graph, {"x": k, **bounds})["y"], want, str((start, end)))


def test_an_open_size_is_the_same_where_nothing_is_cut_off_or_merged_with_it() -> None:
    bounds = {"o": np.array([0]), "e": np.array([2**31 - 1]), "a": np.array([1])}
    facts = facts_of(
        "i = Identity(x) s = Slice(i, o, e, a) f = Flatten<axis=3>(s) y = Relu(f)", "float[1,N,1,4] x", **bounds
    )
    whole, cut, flat = (facts[name].dims for name in "isf")
    assert cut[1] is whole[1]
    assert flat[0] is whole[1]

"""The float64 reference on the conformance cases that ship with the onnx package."""

import re
import warnings
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from renorm_onnx.errors import InputError
from renorm_onnx.runtime.reference import evaluate

# Cases whose expected values are not what float64 gives, each with its reason.
DIFFERENT = {
    "test_dynamicquantizelinear": "x / scale lies on a half, which float32 rounds to the other side",
    "test_dynamicquantizelinear_expanded": "the same",
    "test_resize_downsample_scales_cubic_align_corners": "divides by the length 2.4 before it is rounded down to 2; "
    "onnxruntime, which we follow, divides by 2",
    "test_resize_downsample_scales_linear_align_corners": "the same",
}

# Operators that the reference refuses: strings, bits of a float, random numbers, training steps, other domains.
REFUSED = {
    "Adagrad", "Adam", "ArrayFeatureExtractor", "Bernoulli", "Binarizer", "BitCast", "Cast", "CausalConvWithState",
    "Dropout", "FlexAttention", "Gradient", "ImageDecoder", "LabelEncoder", "LinearAttention", "Momentum",
    "RandomUniformLike", "RegexFullMatch", "SequenceMap", "StringConcat", "StringNormalizer", "StringSplit",
    "SwiGLU", "TfIdfVectorizer", "TreeEnsemble",
}  # fmt: skip


def _arrays(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _assert_equal(want: Any, got: Any, rtol: float, atol: float) -> None:
    """Compare values of a case with the reference's, floats by the case's tolerance or that of a half type."""
    if isinstance(want, list):
        assert len(want) == len(got)
        for one, other in zip(want, got, strict=True):
            _assert_equal(one, other, rtol, atol)
        return
    if want is None:
        assert got is None
        return
    want, got = np.asarray(_arrays(want)), np.asarray(got)
    assert want.shape == got.shape
    if want.dtype.name in ("float16", "bfloat16"):
        rtol, atol = 2e-2, 1e-2  # the expected value was computed in that type
    if want.dtype.kind in "iubO":
        assert want.dtype == got.dtype
        np.testing.assert_array_equal(got, want)
    else:
        wide = np.complex128 if want.dtype.kind == "c" else np.float64
        np.testing.assert_allclose(got.astype(wide), want.astype(wide), rtol=max(rtol, 1e-5), atol=max(atol, 1e-6))


def _outcome(case: Any) -> str:
    """ "agrees", "refused: <operator>", "old", or what is wrong."""
    try:
        for inputs, outputs in case.data_sets:
            model = ir.serde.deserialize_model(case.model)
            names = [value.name for value in case.model.graph.input]
            got = evaluate(model, {name: _arrays(value) for name, value in zip(names, inputs, strict=False)})
            for value, want in zip(case.model.graph.output, outputs, strict=True):
                _assert_equal(want, got[value.name], case.rtol, case.atol)
    except InputError as error:
        if "expected 6 or later" in str(error):
            return "old"
        refused = re.search(r"operator '(\w+)'.*reference unusable", str(error), re.DOTALL)
        return f"refused: {refused[1]}" if refused else str(error)
    except AssertionError as error:
        return str(error)
    return "agrees"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases overflow on purpose while onnx computes what they expect
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    return {case.name: _outcome(case) for case in cases}


def test_every_case_agrees_or_is_refused_by_name(outcomes):
    wrong = {
        name: outcome
        for name, outcome in outcomes.items()
        if outcome not in ("agrees", "old") and not outcome.startswith("refused: ") and name not in DIFFERENT
    }
    assert wrong == {}


def test_only_known_operators_are_refused(outcomes):
    refused = Counter(outcome.removeprefix("refused: ") for outcome in outcomes.values() if "refused: " in outcome)
    assert set(refused) <= REFUSED


def test_nearly_all_cases_are_evaluated(outcomes):
    agreeing = sum(outcome == "agrees" for outcome in outcomes.values())
    assert len(outcomes) > 1500
    assert agreeing >= 0.93 * len(outcomes)  # 1757 of 1884 with onnx 1.23

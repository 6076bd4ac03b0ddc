"""A value that only a wide type held is not put into a narrower one that cannot hold it, or not exactly enough."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from renorm_onnx.fusion.engine import FuseOptions, fuse
from renorm_onnx.fusion.ranges import Ranges
from renorm_onnx.fusion.report import Reason

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(2, 3, 4, 4)) * 20).astype(np.float16)


def mixed(lines: str, **constants: float) -> onnx.ModelProto:
    """A convolution in float16, and what follows it in float32; each constant has one number for all channels."""
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float16[N,3,4,4] x) => (float[N,4,4,4] y) '
    model = onnx.parser.parse_model(f"{text} {{ h = Conv(x, W) t = Transpose<perm=[0,1,3,2]>(h) {lines} }}")
    weights = {name: np.full(4, value, np.float32) for name, value in constants.items()}
    weights["W"] = RNG.normal(size=(4, 3, 1, 1)).astype(np.float16)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


BN = "c = Cast<to=1>(t) y = BatchNormalization(c, s, b, m, v)"
USUAL = {"s": 1.5, "b": -0.5, "m": 3.0, "v": 400.0}


def run(model: onnx.ModelProto) -> np.ndarray:
    return ReferenceEvaluator(model).run(None, {"x": X})[0]


def error(model: onnx.ModelProto, fused: onnx.ModelProto) -> float:
    return float(np.abs(run(fused).astype(np.float64) - run(model)).max())


@pytest.mark.parametrize(
    ("model", "error_allowed"),
    [
        (mixed(BN, **USUAL), 2e-2),  # as exporters of mixed precision write it
        (mixed(BN, **USUAL | {"s": 900.0}), 10.0),
        (mixed(BN, **USUAL | {"b": 5.0}), 4e-2),
        (mixed("c = Cast<to=1>(t) s = Constant<value_float=0.125>() y = Mul(c, s)"), 2e-2),
        (mixed("c = Cast<to=1>(t) s = Constant<value_float=0.5>() y = Add(c, s)"), 1e-1),
    ],
)
def test_what_the_narrow_type_holds_is_folded(model, error_allowed) -> None:
    fused, report = fuse(model)
    assert not [e for e in report.entries if e.outcome == "kept"], report
    assert error(model, fused) < error_allowed


TOO_MUCH = [
    (mixed(BN, **USUAL | {"s": 3e4}), Reason.OVERFLOW, "may not hold what 'y' computes"),
    (mixed("c = Cast<to=1>(t) l = Constant<value_float=3e3>() y = Mul(c, l)"), Reason.OVERFLOW, "may not hold"),
    (mixed(BN, **USUAL | {"b": 1e4}), Reason.CANCELLATION, "standard deviations from zero, more than 4"),
    (mixed("c = Cast<to=1>(t) s = Constant<value_float=1e4>() y = Add(c, s)"), Reason.CANCELLATION, "1e+04 standard"),
]


@pytest.mark.parametrize(("model", "reason", "text"), TOO_MUCH)
def test_what_it_may_not_hold_stays_behind_the_cast(model, reason, text, monkeypatch) -> None:
    fused, report = fuse(model)
    (entry,) = report.entries
    assert entry.outcome == "kept"
    assert reason in [r.reason for r in entry.refusals], entry.refusals
    assert text in entry.detail
    assert error(model, fused) == 0
    # Control: folded all the same, the numbers are lost.
    monkeypatch.setattr(Ranges, "objection_to_cast", lambda *given: None)
    wrong, report = fuse(model)
    assert report.entries[0].outcome == "folded"
    with np.errstate(all="ignore"):
        assert not error(model, wrong) < 1


@pytest.mark.parametrize("beta", [-10.0, -4.0, 4.0, 10.0])
def test_a_chain_is_judged_as_the_norm_that_it_spells_out(beta) -> None:
    """Which side of zero the mean lies on tells an output near zero from one twice as far away."""
    spelled = "c = Cast<to=1>(t) d = Sub(c, m) e = Mul(d, g) y = Add(e, b)"
    parameters = {"m": 20.0, "b": beta}
    model = mixed(spelled, **parameters, g=0.25)
    for name in "mgb":
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).reshape(4, 1, 1), name))
    same = mixed(BN, **parameters, s=1.0, v=16.0)
    outcomes = [fuse(each)[1].entries[0].outcome for each in (model, same)]
    assert outcomes == ["folded"] * 2  # 10 is less than 4 times sqrt(1 + 5^2)


@pytest.mark.parametrize(
    "constants", [{"s": [1.5, 1.2, 0.8, 2.0], "b": [-0.5, 3, 1, 2]}, {"s": [0.1] * 4, "b": [2.0, 1, 2, 1]}]
)
def test_a_norm_that_scales_first_is_not_judged_by_guesses(constants) -> None:
    """As constant folding leaves a norm: neither its mean nor its deviation is in the file."""
    model = mixed("c = Cast<to=1>(t) d = Mul(c, s) y = Add(d, b)", s=1.0, b=1.0)
    for name, numbers in constants.items():
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.float32(numbers).reshape(4, 1, 1), name))
    (entry,) = fuse(model)[1].entries
    assert (entry.kind, entry.outcome) == ("norm", "folded")


def test_a_norm_whose_scale_is_zero_loses_nothing_in_the_narrow_type() -> None:
    (entry,) = fuse(mixed(BN, **USUAL | {"s": 0.0, "b": 0.1}))[1].entries
    assert entry.outcome == "folded"


def test_cancellation_may_be_allowed_and_overflow_may_not() -> None:
    allowed = FuseOptions(allow_cancellation=True)
    outcomes = [fuse(model, allowed)[1].entries[0].outcome for model, *_ in TOO_MUCH]
    assert outcomes == ["kept", "kept", "folded", "folded"]


@pytest.mark.parametrize(("scale", "outcome"), [(2e-3, "kept"), (2.0, "folded")])
def test_a_sum_in_the_narrow_type_keeps_what_scales_its_elements_down(scale, outcome) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float16[2,4,4096] x) => (float16[2,3] y) '
    model = onnx.parser.parse_model(f"{text} {{ a = Mul(x, s) p = ReduceSum<keepdims=0>(a, k) y = MatMul(p, W) }}")
    given = {"s": np.full((1, 4, 1), scale, np.float16), "W": RNG.normal(size=(4, 3)).astype(np.float16)}
    arrays = given | {"k": np.array([2])}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    fused, report = fuse(model)
    assert [e.outcome for e in report.entries] == [outcome]
    if outcome == "kept":
        assert Reason.OVERFLOW in [r.reason for r in report.entries[0].refusals]
        feeds = {"x": np.full((2, 4, 4096), 100, np.float16)}
        assert np.isfinite(ReferenceEvaluator(fused).run(None, feeds)[0]).all()
        with np.errstate(all="ignore"):  # the control: without the scale the sum leaves the type
            assert np.isinf(feeds["x"].sum(axis=2)).all()

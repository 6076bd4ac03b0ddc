from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from renorm_onnx import model_file
from renorm_onnx.delivery import fuse_file
from renorm_onnx.errors import InputError, ModelFileError
from renorm_onnx.files import protobuf_writing
from renorm_onnx.fusion.conftest import Builder, assert_same, operators
from renorm_onnx.fusion.engine import FuseOptions, fuse
from renorm_onnx.fusion.report import Reason


def statistics_model(**changes) -> onnx.ModelProto:
    b = Builder()
    b.norm(b.conv("x", 4, 6), 6, out="y")
    model = b.model({"x": ["n", 4, "h", "w"]}, ["y"])
    names = dict(zip(("w", "scale", "B", "mean", "var"), model.graph.initializer, strict=True))
    for name, change in changes.items():
        array = numpy_helper.to_array(names[name]).astype(np.float64)
        names[name].CopyFrom(numpy_helper.from_array(change(array).astype(np.float32), names[name].name))
    return model


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"var": lambda v: np.where(np.arange(6) == 2, -1e-3, v)}, Reason.NEGATIVE_VARIANCE),
        ({"mean": lambda m: np.where(np.arange(6) == 2, np.nan, m)}, Reason.NON_FINITE),
        ({"scale": lambda s: np.clip(s * 1e38, -3e38, 3e38), "var": lambda v: v * 1e-3}, Reason.OVERFLOW),
        ({"scale": lambda s: s * 1e-38, "B": lambda b: b}, Reason.UNDERFLOW),
    ],
)
def test_parameters_that_cannot_be_folded_are_refused_by_name(changes, reason):
    model = statistics_model(**changes)
    fused, report = fuse(model)
    assert report.kept[0].reason == reason
    assert operators(fused) == ["Conv", "BatchNormalization"]


def test_a_filter_with_zeros_in_it_loses_its_digits_as_any_other():
    b = Builder()
    weight = b.rng.normal(size=(6, 4, 1, 1))
    weight[:, 0] = 0
    y = b.node("Conv", b.node("Mul", "x", b.constant(np.full((4, 1, 1), 1e-39))), b.constant(weight))
    _, report = fuse(b.model({"x": ["n", 4, "h", "w"]}, [y]))
    assert report.entries[0].refusals[-1].reason == Reason.UNDERFLOW


def forward_model(kappa: float) -> onnx.ModelProto:
    b = Builder()
    stats = [b.constant(v) for v in (np.full(4, 0.7), np.full(4, 0.1), np.full(4, kappa), np.ones(4))]
    y = b.node("Conv", b.node("BatchNormalization", "x", *stats, epsilon=0.0), b.normal(6, 4, 3, 3))
    return b.model({"x": ["n", 4, "h", "w"]}, [y])


def test_a_chain_is_guarded_by_its_first_scale_and_says_so():
    b = Builder()
    mean, scale = (b.constant(v) for v in (np.full((4, 1, 1), 0.5), np.full((4, 1, 1), 10.0)))
    y = b.node("Conv", b.node("Mul", b.node("Sub", "x", mean), scale), b.normal(6, 4, 3, 3))
    _, report = fuse(b.model({"x": ["n", 4, "h", "w"]}, [y]))
    said = report.kept[0].refusals[-1].detail
    assert "has an input 5 standard deviations from zero if its first scale is 1 / sigma, more than 4: folded" in said


@pytest.mark.parametrize(("target", "limit"), [("fp32", 4.0), ("tf32", 1.0), ("fp16", 1.0)])
def test_cancellation_is_guarded_by_the_arithmetic_of_the_target(target, limit):
    _, report = fuse(forward_model(limit * 1.01), FuseOptions(target=target))
    refusal = report.kept[0].refusals[-1]
    assert refusal.reason == Reason.CANCELLATION
    assert "standard deviations from zero, more than" in refusal.detail
    fused, report = fuse(forward_model(limit * 0.99), FuseOptions(target=target))
    assert report.folded[0].way == "forward"
    assert_same(forward_model(limit * 0.99), fused)
    _, report = fuse(forward_model(1e3), FuseOptions(target=target, allow_cancellation=True))
    assert report.folded


def test_an_unknown_target_is_an_error():
    with pytest.raises(InputError, match="target 'fp8' is unknown, expected one of fp32, tf32, fp16"):
        fuse(forward_model(0.0), FuseOptions(target="fp8"))


def test_a_result_beyond_protobuf_is_refused_with_the_way_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = Builder()
    model = b.model({"x": ["n", 32, 5, 5]}, [b.norm(b.conv("x", 32, 32), 32)])
    path = tmp_path / "large.onnx"
    onnx.save(onnx.ModelProto.FromString(model.SerializeToString()), path, save_as_external_data=True, location="data")
    monkeypatch.setattr(protobuf_writing, "PROTOBUF_LIMIT", 20_000)
    with pytest.raises(
        ModelFileError, match=r"holds at most 20,000; .*\(renorm_onnx\.fuse_file writes a fused model so\)"
    ):
        fuse(path)
    fused, report = fuse(model_file.load(path))
    assert len(report.folded) == 1
    assert fused.graph.num_nodes() == 1
    done = fuse_file(path, tmp_path / "fused.onnx", verify="never")
    assert done.written
    assert (tmp_path / "fused.onnx").stat().st_size < 20_000
    assert_same(model, onnx.load(tmp_path / "fused.onnx"))


@pytest.mark.parametrize("newer", [0, 1])
def test_nothing_folds_at_an_opset_that_nobody_here_knows(newer: int) -> None:
    b = Builder()
    branches = [b.norm(b.conv("x", 4, 6, kernel=k, pads=[k // 2] * 4), 6) for k in (1, 3)]
    model = b.model({"x": ["n", 4, "h", "w"]}, [b.node("Add", *branches, out="y")])
    known = onnx.defs.onnx_opset_version()
    model.opset_import[0].version = known + newer
    fused, report = fuse(model)
    if newer:
        assert [norm.reason for norm in report.kept] == [Reason.UNKNOWN_OPSET] * 2
        assert f"is of opset {known + 1}, and the newest that onnx" in report.kept[0].detail
        assert operators(fused) == operators(model)
    else:
        assert not report.kept
        assert report.branches_merged == 1

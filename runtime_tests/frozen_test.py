"""Files written by earlier releases keep loading, agreeing, fusing and restoring."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import renorm_onnx
from renorm_onnx import model_file
from renorm_onnx.exporting.restoring import restore
from renorm_onnx.exporting.training import UPDATED
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.layers.modules import BatchRenorm2d
from renorm_onnx.layers.schedules import linear
from renorm_onnx.onnx_layers import layers_in
from renorm_onnx.runtime.comparison import Tolerance, compare
from renorm_onnx.runtime.reference import evaluate
from renorm_onnx.runtime.session import open_session
from runtime_tests.write_frozen import FOLDER, STEPS, main, networks

FILES = sorted(FOLDER.glob("*/*.onnx"))
INFERENCE = [path for path in FILES if not path.stem.startswith("training")]
FLOAT32 = Tolerance(rms=1e-5, peak=1e-4)  # RepVGG is ten layers deep
DOUBLE = Tolerance(rms=1e-6, peak=1e-5)  # epsilon and momentum are float32 in the file


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def feeds_of(model: ir.Model, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [v.name for v in model.graph.inputs if not v.is_initializer()]
    return {name: values[f"input_{i}"] for i, name in enumerate(names)}


def steps(model: ir.Model, values: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Outputs of consecutive runs, the updated statistics fed back where there are any."""
    state: dict[str, np.ndarray] = {}
    for _ in range(STEPS):
        outputs = evaluate(model, {**feeds_of(model, values), **state})
        state = {k.removesuffix(UPDATED): v for k, v in outputs.items() if k.endswith(UPDATED)}
        yield outputs


def test_this_release_has_its_files_and_they_are_small() -> None:
    assert {p.stem for p in FILES if p.parent.name == renorm_onnx.__version__} == set(networks())
    assert all(p.stat().st_size < 100_000 for p in FOLDER.rglob("*.*"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_values_are_those_of_torch_when_the_file_was_written(path: Path) -> None:
    model, values = model_file.load(path), dict(np.load(path.with_suffix(".npz")))
    for step, outputs in enumerate(steps(model, values)):
        report = compare(values[f"step_{step}"], next(iter(outputs.values())), DOUBLE)
        assert report.ok, report
    wrong = compare(values["step_0"] * 1.00002, values["step_0"], DOUBLE)
    assert not wrong.ok


@pytest.mark.parametrize("path", INFERENCE, ids=name_of)
def test_fused_files_agree_in_onnxruntime(path: Path) -> None:
    model, values = model_file.load(path), dict(np.load(path.with_suffix(".npz")))
    fused, report = fuse(model)
    assert report.folded
    for candidate in (model, fused):
        got = open_session(candidate, "cpu", optimize="off", threads=1).run(feeds_of(model, values))
        verdict = compare(values["step_0"].astype(np.float32), next(iter(got.values())), FLOAT32)
        assert verdict.ok, verdict


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_layer_still_says_what_it_is(path: Path) -> None:
    layers = layers_in(model_file.load(path))
    assert layers
    assert all(info.num_batches_tracked == 12 and info.r_max in (2.0, 3.0) for info in layers)
    assert all(info.running_var is not None and info.running_var.min() >= 0.5 for info in layers)


@pytest.mark.parametrize("path", [p for p in FILES if p.stem == "training_step"], ids=name_of)
def test_a_layer_restored_from_a_training_step_goes_on_with_it(path: Path) -> None:
    values = dict(np.load(path.with_suffix(".npz")))
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), BatchRenorm2d(4, schedule=linear(10, 20)))
    assert restore(net, path) == 1
    kernel = model_file.load(path).graph.initializers["0.weight"].const_value
    assert kernel is not None
    with torch.no_grad():
        net[0].weight.copy_(torch.from_numpy(kernel.numpy().copy()))
        for step in range(STEPS):
            y = net.train()(torch.from_numpy(values["input_0"])).numpy()
            report = compare(values[f"step_{step}"].astype(np.float32), y, FLOAT32)
            assert report.ok, report


def test_frozen_files_are_not_rewritten(capsys) -> None:
    before = {p: p.stat().st_mtime_ns for p in FILES}
    assert main() == 2
    assert "exists; frozen files are never rewritten" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in FILES} == before

"""`python -m export` writes models that do what its manifest says."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export import __main__ as command
from export.deploy import sha256
from models import MODELS
from models.calibration import calibrated
from renorm_onnx.layers.modules import BatchRenorm1d

NAMES = ["mlp", "repvgg"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models")
    assert command.main(["--small", "--models", *NAMES, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def run(path: Path, x: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, {"input": x}), strict=True))


def test_each_network_has_three_files_and_the_manifest_their_hashes_and_opsets(
    folder: Path, manifest: dict[str, Any]
) -> None:
    written = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert written == {f"{name}{kind}.onnx" for name in NAMES for kind in ("", ".fused", ".training")}
    for entry in manifest["models"].values():
        for name, described in entry["files"].items():
            model = onnx.load(folder / name)
            assert described["sha256"] == sha256(folder / name)
            assert described["opset"] == next(o.version for o in model.opset_import if o.domain == "")
            assert described["functions"] == [f"{f.domain}::{f.name}" for f in model.functions]
            onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("name", NAMES)
def test_both_functions_are_called_once_per_norm(folder: Path, manifest: dict[str, Any], name: str) -> None:
    for suffix, function in (("", "BatchRenormalization"), (".training", "BatchRenormalizationTraining")):
        nodes = onnx.load(folder / f"{name}{suffix}.onnx").graph.node
        calls = [node.op_type for node in nodes if node.domain == "renorm_onnx"]
        assert calls == [function] * manifest["models"][name]["norms_before"]


@pytest.mark.parametrize("name", NAMES)
def test_the_files_compute_what_torch_computes(folder: Path, name: str) -> None:
    network, inputs = calibrated(MODELS[name], small=True, seed=0)
    with torch.no_grad():
        want = network(*inputs).numpy()
    for suffix in ("", ".fused"):
        np.testing.assert_allclose(run(folder / f"{name}{suffix}.onnx", inputs[0].numpy())["output"], want, 1e-4, 1e-5)


def test_norms_after_fusing_are_those_that_the_file_has(folder: Path, manifest: dict[str, Any]) -> None:
    for name in NAMES:
        operators = [node.op_type for node in onnx.load(folder / f"{name}.fused.onnx").graph.node]
        entry = manifest["models"][name]
        assert operators.count("BatchNormalization") == entry["norms_after"] == len(entry["kept"]) == 0
    assert manifest["models"]["repvgg"]["branches_merged"] > 0


def test_calibration_moves_every_parameter_and_statistic_from_its_first_value() -> None:
    network, _ = calibrated(MODELS["mlp"], small=True, seed=0)
    again, _ = calibrated(MODELS["mlp"], small=True, seed=0)
    assert not any(module.training for module in network.modules())
    for (name, tensor), other in zip(network.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
        assert not torch.equal(tensor, torch.zeros_like(tensor)), name
        assert not torch.equal(tensor, torch.ones_like(tensor)), name


def test_the_training_error_is_large_for_another_network(folder: Path) -> None:
    network, inputs = calibrated(MODELS["mlp"], small=True, seed=0)
    for module in network.modules():
        module.training = isinstance(module, BatchRenorm1d)
    before = copy.deepcopy(network.state_dict())
    assert command.training_error(network, inputs, folder / "mlp.training.onnx") < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        network[0].bias += 0.1
    assert command.training_error(network, inputs, folder / "mlp.training.onnx") > 1e-3
    assert command.training_error(network, inputs, folder / "mlp.onnx") == float("inf")


def test_an_unknown_model_and_a_folder_that_is_a_file_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--models", "lenet"])
    assert stopped.value.code == 2
    assert "invalid choice: 'lenet'" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert command.main(["--models", "mlp", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be made (File exists); name another" in capsys.readouterr().err

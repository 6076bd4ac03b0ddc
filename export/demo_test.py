"""The whole path on a tiny run: what the demo reports is what its files do."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from matplotlib import image

from export import demo
from export.data import digits
from export.deploy import sha256
from models.wide_resnet import wide_resnet
from renorm_onnx import delivery
from renorm_onnx.layers.modules import BatchRenorm2d

TINY = ["--depth", "16", "--width", "1", "--steps", "30", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    assert demo.main([*TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def report(finished: Path) -> dict[str, Any]:
    return dict(json.loads((finished / "report.json").read_text()))


def logits_of(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["output"], {"input": digits().test_images})[0])


def test_the_demo_leaves_its_five_files_and_their_hashes(finished: Path, report: dict[str, Any]) -> None:
    expected = {"checkpoint.pt", "model.onnx", "model.fused.onnx", "curves.png", "report.json"}
    assert {path.name for path in finished.iterdir()} == expected
    assert set(report["files"]) == expected - {"report.json"}
    for name, entry in report["files"].items():
        assert entry == {"bytes": (finished / name).stat().st_size, "sha256": sha256(finished / name)}
    assert image.imread(finished / "curves.png").shape[1] == 2000


def test_the_checkpoint_reloads_and_is_the_exported_network(finished: Path, report: dict[str, Any]) -> None:
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    network = wide_resnet(16, 1, in_channels=1, norm=BatchRenorm2d)
    network.load_state_dict(checkpoint["model"], strict=True)
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy(digits().test_images)).numpy()
    np.testing.assert_allclose(logits_of(finished / "model.onnx"), logits, rtol=1e-4, atol=1e-4)
    accuracy = float((logits.argmax(1) == digits().test_labels).mean())
    assert report["training"]["BatchRenorm"]["test_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert checkpoint["options"]["steps"] == 30


def test_reported_accuracies_are_those_of_the_files(finished: Path, report: dict[str, Any]) -> None:
    (cpu,) = (provider for provider in report["providers"] if provider["name"] == "cpu")
    for key, name in (("model", "model.onnx"), ("fused", "model.fused.onnx")):
        accuracy = (logits_of(finished / name).argmax(1) == digits().test_labels).mean()
        assert cpu["accuracy"][key] == pytest.approx(accuracy, abs=1e-9)


def test_latency_is_reported_for_both_files_at_both_batch_sizes(report: dict[str, Any]) -> None:
    (cpu,) = (provider for provider in report["providers"] if provider["name"] == "cpu")
    timed = {(timing["model"], timing["batch"]): timing for timing in cpu["latency"]}
    assert set(timed) == {("model", 1), ("model", 64), ("fused", 1), ("fused", 64)}
    for key in ("model", "fused"):
        assert 0 < timed[key, 1]["median_ms"] < timed[key, 64]["median_ms"]


def test_the_model_calls_the_function_and_the_fused_one_keeps_the_norms_that_are_reported(
    finished: Path, report: dict[str, Any]
) -> None:
    model, fused = (onnx.load(finished / name) for name in ("model.onnx", "model.fused.onnx"))
    assert sum(node.domain == "renorm_onnx" for node in model.graph.node) == 13
    assert [function.name for function in model.functions] == ["BatchRenormalization"]
    assert not fused.functions
    left = [node.output[0] for node in fused.graph.node if node.op_type == "BatchNormalization"]
    kept = [norm["name"] for norm in report["fusion"]["norms"] if norm["outcome"] == "kept"]
    assert sorted(left) == sorted(kept)
    assert report["fusion"]["norms_before"] == 13
    assert report["fusion"]["norms_after"] == len(left) < 13


def test_r_and_d_were_relaxed_to_their_ends_and_acted(report: dict[str, Any]) -> None:
    plain, curves = (report["training"][label]["curves"] for label in ("BatchNorm", "BatchRenorm"))
    assert curves["step"][-1] == 30
    assert (curves["r_max"][0], curves["d_max"][0]) == (1.0, 0.0)
    assert (curves["r_max"][-1], curves["d_max"][-1]) == (3.0, 5.0)
    assert curves["r"][-1][0] < 0.99 or curves["r"][-1][2] > 1.01
    assert plain["r_max"] == [1.0] * len(curves["step"])
    # The same weights, images and order: until the bounds open, both networks are the same.
    assert plain["train_loss"][0] == pytest.approx(curves["train_loss"][0], rel=1e-4)


def test_both_verdicts_are_in_the_report_and_name_their_inputs(report: dict[str, Any]) -> None:
    assert {kind: verdict["outcome"] for kind, verdict in report["verdicts"].items()} == {
        "generated": "yes",
        "data": "yes",
    }
    assert report["versions"]["onnx"] == onnx.__version__


def test_a_wrong_fold_makes_the_demo_fail_and_leaves_no_fused_model(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = delivery.fuse_in_place

    def wrong(model: Any, options: Any = None) -> Any:
        done = original(model, options)
        import onnx_ir as ir

        for value in model.graph.initializers.values():
            if value.name and value.const_value is not None and value.const_value.shape.rank() == 4:
                array = value.const_value.numpy().copy()
                array[0] *= 1.01
                value.const_value = ir.tensor(array)
                return done
        raise AssertionError("no convolution weight found")

    monkeypatch.setattr(delivery, "fuse_in_place", wrong)
    (tmp_path / "model.fused.onnx").write_bytes(b"left over from an earlier run")
    assert demo.main([*TINY, "--steps", "2", "--out", str(tmp_path)]) == 1
    assert not (tmp_path / "model.fused.onnx").exists()
    assert json.loads((tmp_path / "report.json").read_text())["verdicts"]["generated"]["outcome"] == "no"
    assert "parity on generated inputs: no" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "15"], "wide_resnet: depth=15, expected 6"),
        (["--steps", "0"], "training: steps=0, expected at least 1"),
        (["--data", "cifar10"], "data 'cifar10': no root given"),
        (["--data", "cifar10", "--root", "/nowhere"], "'/nowhere/data_batch_1' is missing"),
        (["--root", "/nowhere"], "root='/nowhere' is not used"),
        (["--batch-size", "100000"], "batch_size=100000, expected at most 1438 images"),
    ],
)
def test_impossible_options_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("export.demo: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_output_folder_that_is_a_file_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("")
    assert demo.main([*TINY, "--out", str(tmp_path / "out")]) == 2
    assert re.search(r"--out '.*out': cannot write into it \(File exists\)", capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_on_a_machine_without_it_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--device", "cuda", "--out", str(tmp_path)]) == 3
    assert "device 'cuda': a convolution does not run on it" in capsys.readouterr().err


def test_an_interruption_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupt)
    assert demo.main([*TINY, "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "export.demo: interrupted\n"


@pytest.mark.cuda("torch", "onnxruntime")
def test_on_a_gpu_the_demo_trains_there_and_runs_the_cuda_provider(tmp_path: Path) -> None:
    assert demo.main([*TINY, "--device", "cuda", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["device"] != "CPU"
    (cuda,) = (provider for provider in found["providers"] if provider["name"] == "cuda")
    assert cuda["accuracy"]["model"] == pytest.approx(cuda["accuracy"]["fused"], abs=0.01)

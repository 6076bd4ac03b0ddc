"""What cannot be exported is refused before anything is written, in words that name the module."""

import contextlib
import warnings

import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError, ModelFileError
from renorm_onnx.exporter import keep_ops, to_onnx
from renorm_onnx.exporter_checks import check_options, quiet
from renorm_onnx.layers.modules import BatchRenorm2d

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class BatchReNorm(nn.Module):
    """Another library's layer, by its name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def small(*more: nn.Module) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), BatchRenorm2d(3), *more)
    net[1].num_batches_tracked.fill_(1)
    return net.eval()


def with_training(net: nn.Module, name: str) -> nn.Module:
    net.get_submodule(name).train()
    return net


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (small().train(), {}, r"to_onnx\(mode='eval'\): module 'Sequential' is in training mode \(and 2 more\); call"),
        (with_training(small(nn.Dropout()), "2"), {}, r"module '2' is in training mode; call \.eval\(\) first or pass"),
        (small(), {"mode": "train"}, "no batch renorm layer of Sequential is in training mode"),
        (small(nn.BatchNorm2d(3)).train(), {"mode": "train"}, "module '2' is a BatchNorm2d in training mode"),
        (small(), {"mode": "infer"}, "mode='infer' given; expected 'eval' or 'train'"),
        (small(), {"opset": 14}, r"opset=14 given; expected 15 to"),
        (small(), {"opset": 99}, r"opset=99 given; expected 15 to"),
        (small().train(), {"opset": 17, "mode": "train"}, r"opset=17 given; expected 18 to"),
        (small(), {"dynamic_axes": {}, "dynamic_shapes": ()}, "both dynamic_shapes and dynamic_axes given"),
        (small(BatchReNorm()), {}, r"module '2' is a .*BatchReNorm, another library's .* call adopt\(module\) first"),
        (
            nn.Sequential(BatchRenorm2d(3, track_running_stats=False)).eval(),
            {},
            "module '0' has track_running_stats=False",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(net, options, message, tmp_path) -> None:
    with pytest.raises(InputError, match=message):
        to_onnx(net, (X,), tmp_path / "model.onnx", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize("norm", [BatchRenorm2d, nn.BatchNorm2d])
def test_a_program_captured_in_training_mode_is_refused_whatever_its_operators(norm, keep, decomposed) -> None:
    with warnings.catch_warnings(), keep_ops() if keep else contextlib.nullcontext():
        warnings.simplefilter("ignore")
        program = torch.export.export(nn.Sequential(nn.Conv2d(3, 3, 3), norm(3)).train(), (X,))
        if decomposed:
            program = program.run_decompositions()
    with pytest.raises(InputError, match="the program was captured with layer '1' in training mode, and its updated"):
        to_onnx(program, (X,))
    with pytest.raises(InputError, match="an ExportedProgram given; pass the module itself"):
        to_onnx(program, (X,), mode="train")


def test_another_librarys_layer_is_exported_where_no_function_is_asked_for() -> None:
    assert not to_onnx(small(BatchReNorm()), X, functions=False).functions


def test_a_missing_folder_is_noticed_before_the_export(tmp_path) -> None:
    with pytest.raises(ModelFileError, match=r"the folder .*nowhere' does not exist"):
        to_onnx(small(), X, tmp_path / "nowhere" / "model.onnx")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (X[:, :2],),
            r"Sequential itself fails on these args, in layer '0': RuntimeError: .*\nargs: float32\(2, 2, 6, 6\)",
        ),
        ((X, X), r"Sequential itself fails on these args: TypeError: .*takes 2 positional arguments but 3 were given"),
    ],
)
def test_arguments_that_do_not_fit_are_told_apart_from_a_failed_export(args, message, tmp_path) -> None:
    with pytest.raises(InputError, match=message):
        to_onnx(small(), args, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Svd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svd(x)[1]


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Svd(), r"torch could not export Sequential, in layer '2\.0': .*No ONNX function found for .*_linalg_svd"),
        (Branch(), r"torch could not export Sequential, in layer '2\.0': .*data-dependent expression"),
    ],
)
def test_a_failed_export_names_the_layer_and_keeps_torchs_message(layer, message, tmp_path, capfd) -> None:
    with pytest.raises(InputError, match=message) as raised:
        to_onnx(small(nn.Sequential(layer)), X, tmp_path / "model.onnx")
    assert "Exception summary" in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_the_default_opset_is_twenty() -> None:
    assert check_options("eval", None, None, None) == 20


def test_only_the_users_own_warnings_pass() -> None:
    def both() -> None:
        with quiet():
            warnings.warn_explicit("mine", UserWarning, "/home/me/torch/net.py", 1)
            warnings.warn_explicit("theirs", FutureWarning, torch.onnx.__file__, 1)

    with pytest.warns(UserWarning, match="mine") as caught:
        both()
    assert [str(w.message) for w in caught] == ["mine"]


def test_a_quiet_export_prints_nothing(capfd) -> None:
    to_onnx(small(), X)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(InputError, match=r"module is a function; expected a torch\.nn\.Module or torch\.export"):
        to_onnx(lambda x: x, X)  # type: ignore[arg-type]


def test_an_export_without_verification_says_so(caplog) -> None:
    with caplog.at_level("INFO", logger="renorm_onnx.exporter"):
        to_onnx(small(), X, verify=False)
    assert caplog.messages == ["to_onnx: 1 call; opset 20 asked and reached; not verified"]

"""A failed export names the layer, and leaves nothing behind."""

import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError
from renorm_onnx.exporter import to_onnx
from renorm_onnx.exporting.conftest import X, small


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
    assert capfd.readouterr() == ("", "")  # torch prints the graph of a failed capture
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_statistics_of_a_training_module_alone() -> None:
    net = small(Svd()).train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with pytest.raises(InputError, match="torch could not export Sequential, in layer '2'"):
        to_onnx(net, X, mode="train")
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())

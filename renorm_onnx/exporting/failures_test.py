"""A failed export names the layer, and leaves nothing behind."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from renorm_onnx.delivery import fuse_file
from renorm_onnx.errors import InputError
from renorm_onnx.exporter import to_onnx
from renorm_onnx.exporting.conftest import X, small
from renorm_onnx.layers.modules import BatchRenorm1d
from renorm_onnx.runtime import Session


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
    with pytest.raises(InputError, match=message):
        to_onnx(small(), args, dynamic_axes={"input": {0: "n"}})
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


def test_a_program_that_torch_cannot_export_is_refused_with_torchs_message(tmp_path) -> None:
    program = torch.export.export(Svd().eval(), (X,))
    with pytest.raises(
        InputError,
        match=r"^to_onnx: torch could not export the program: (?s:.*)No ONNX function found for .*_linalg_svd",
    ) as raised:
        to_onnx(program, X, tmp_path / "model.onnx")
    assert "\x1b" not in str(raised.value)
    assert not list(tmp_path.iterdir())


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module, length: int = -1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, 1, 1)
        self.norm = BatchRenorm1d(4)
        self.cell = cell
        self.length = length
        self.norm.num_batches_tracked.fill_(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).transpose(1, 2)
        y: torch.Tensor = self.cell(x.reshape(x.size(0), self.length, 4))[0]
        return y


class Failing(nn.GRU):
    """As torch's own fails in some versions and for some options; in which is not for this test to say."""

    def forward(self, x: torch.Tensor) -> Any:
        if torch.compiler.is_exporting():
            raise self.error("sizes differ\n\nWhile executing %gru : call_function")
        return super().forward(x)


@pytest.mark.parametrize(("error", "explained"), [(RuntimeError, True), (TypeError, False)])
def test_a_recurrent_layer_that_fails_on_an_open_number_of_steps_is_explained(error, explained) -> None:
    net = Recurrent(Failing(4, 3, batch_first=True)).eval()
    net.cell.error = error
    with pytest.raises(
        InputError, match=rf"export Recurrent, in layer 'cell': {error.__name__}: sizes differ"
    ) as raised:
        to_onnx(net, torch.randn(2, 4, 12), dynamic_axes={"x": {2: "t"}}, input_names=["x"])
    assert ("unrolls recurrent layers" in str(raised.value)) is explained
    assert ("While executing" in str(raised.value)) is not explained
    assert "\ndynamic_shapes: {'x': {2: 't'}}\ninput_names: ['x']" in str(raised.value)
    assert "opset_version" not in str(raised.value)


@pytest.mark.parametrize(
    ("cell", "axes", "explained"),
    [
        (nn.GRU(4, 3, batch_first=True), {2: "t"}, True),
        (nn.GRU(4, 3, batch_first=True), {2: torch.export.Dim("t")}, True),
        (nn.GRU(4, 3, batch_first=True), {0: "b", 2: torch.export.Dim("t")}, True),
        (nn.Identity(), {2: "t"}, False),
    ],
)
@pytest.mark.filterwarnings("ignore:_check_is_size:FutureWarning")
def test_a_fixed_number_of_steps_is_explained_where_there_is_a_recurrent_layer(cell, axes, explained) -> None:
    with pytest.raises(InputError) as raised:
        to_onnx(Recurrent(cell, 12).eval(), torch.randn(2, 4, 12), dynamic_shapes={"x": axes})
    assert ("unrolls recurrent layers" in str(raised.value)) is explained


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*batch_size other than 1:UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchs_older_exporter_can_what_the_message_says(kind, tmp_path) -> None:
    net, axes = Recurrent(kind(4, 3, 2, batch_first=True, bidirectional=True)).eval(), {"x": {0: "b", 2: "t"}}
    args = (torch.randn(2, 4, 12),)
    torch.onnx.export(net, args, tmp_path / "old.onnx", dynamo=False, input_names=["x"], dynamic_axes=axes)
    fuse_file(tmp_path / "old.onnx", tmp_path / "old.fused.onnx")
    session = Session(tmp_path / "old.fused.onnx", provider="cpu")
    for shape in ((2, 4, 12), (3, 4, 17)):
        x = torch.randn(shape)
        np.testing.assert_allclose(session(x.numpy()), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_failed_export_leaves_the_statistics_of_a_training_module_alone() -> None:
    net = small(Svd()).train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with pytest.raises(InputError, match="torch could not export Sequential, in layer '2'"):
        to_onnx(net, X, mode="train")
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())

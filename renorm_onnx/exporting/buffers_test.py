"""What a module changes besides the statistics of its norms, and a model does not, is refused or said."""

import threading
from collections import OrderedDict

import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError
from renorm_onnx.exporter import keep_ops, to_onnx
from renorm_onnx.layers.modules import BatchRenorm1d

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Averaging(nn.Module):
    """Keeps a moving average of what it is fed, and adds it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.average.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x + self.average


class Replacing(Averaging):
    """The same, with a new tensor each time: torch takes that back without a word when it captures a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.average = self.average * 0.9 + x.mean(0) * 0.1
        return x + self.average


class Counting(nn.Module):
    """Counts its calls in every mode, in a tensor of its own or in a new one each time."""

    def __init__(self, anew: bool) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0), persistent=False)
        self.norm = BatchRenorm1d(4)
        self.norm.num_batches_tracked.fill_(1)
        self.anew = anew

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.anew:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        return self.norm(x)


class Caching(nn.Module):
    """Computes the same table anew in each call, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0).cos())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table = torch.arange(4.0).cos()
        return x * self.table


def test_a_step_may_assign_what_a_buffer_holds_already() -> None:
    net = nn.Sequential(Caching(), BatchRenorm1d(4)).train()
    state = torch.get_rng_state()
    assert len(to_onnx(net, X, mode="train", verify=False).graph.output) == 4
    assert net[1].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("part", "named"),
    [
        (Averaging(), "'0.average'"),
        (Replacing(), "'0.average'"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), r"'0.parametrizations.weight.0._u' \(and 1 more\)"),
    ],
)
def test_a_step_that_changes_more_than_statistics_is_refused(part, named) -> None:
    net = nn.Sequential(part, BatchRenorm1d(4)).train()
    with pytest.raises(InputError, match=rf"to_onnx\(mode='train'\): a step changes the buffer {named}, expected only"):
        to_onnx(net, X, mode="train", verify=False)
    part.eval()
    names = [value.name for value in to_onnx(net, X, mode="train").graph.output]
    assert sorted(names[1:]) == [f"1.{n}.updated" for n in ("num_batches_tracked", "running_mean", "running_var")]


def test_an_instance_norm_that_keeps_statistics_is_refused_while_it_trains() -> None:
    net = nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True), BatchRenorm1d(4)).train()
    x = torch.randn(2, 4, 5)
    with pytest.raises(InputError, match="module '0' is a InstanceNorm1d in training mode with track_running_stats"):
        to_onnx(net, x, mode="train", verify=False)
    net[0].eval()
    to_onnx(net, x, mode="train", verify=False)
    net[0] = nn.InstanceNorm1d(4)
    to_onnx(net, x, mode="train", verify=False)


@pytest.mark.parametrize(("captured", "anew"), [(False, False), (True, False), (False, True)])
def test_a_buffer_that_every_call_changes_is_said_at_inference(captured, anew, caplog) -> None:
    net = Counting(anew).eval()
    with keep_ops():
        module = torch.export.export(net, (X,)) if captured else net
    with caplog.at_level("INFO", logger="renorm_onnx.exporter"):
        to_onnx(module, X)
        to_onnx(net.norm, X)
    first, second = (text for record in caplog.records if (text := record.getMessage()).startswith("to_onnx"))
    assert "not checked: later calls, because each changes the module's buffers 'calls' and not the model's" in first
    assert "not checked" not in second
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


def test_a_buffer_is_named_by_its_whole_path_where_a_part_is_called_module(caplog) -> None:
    net = nn.Sequential(OrderedDict(module=Counting(anew=False))).eval()
    with caplog.at_level("INFO", logger="renorm_onnx.exporter"):
        to_onnx(net, X, verify=False)
    assert "changes the module's buffers 'module.calls' and not" in caplog.text


def test_what_a_module_assigns_is_taken_for_a_change_where_the_module_cannot_be_copied(caplog) -> None:
    net = nn.Sequential(Caching(), BatchRenorm1d(4)).eval()
    net[1].num_batches_tracked.fill_(1)
    net.kept = net[1].weight * 2  # torch copies no tensor that autograd follows
    with caplog.at_level("INFO", logger="renorm_onnx.exporter"):
        to_onnx(net, X, verify=False)
        assert "changes the module's buffers" not in caplog.text
        net.lock = threading.Lock()
        to_onnx(net, X, verify=False)
    assert "changes the module's buffers '0.table' and not" in caplog.text

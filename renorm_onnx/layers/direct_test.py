"""The usual step, written out, is the step that serves every case; and it is taken where it should be, there alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from renorm_onnx.layers import direct
from renorm_onnx.layers.conftest import LAYERS, make_batch, outcome, shaken, worst
from renorm_onnx.layers.modules import BatchRenorm2d
from renorm_onnx.layers.schedules import HardSwitch
from renorm_onnx.layers.step import take_step

OPTIONS = [
    {},
    {"stat": "var"},
    {"stat": "var_unbiased"},
    {"momentum": None},
    {"affine": False},
    {"r_max": 1.2, "d_max": 0.1},
    {"r_max": 1.0},
    {"d_max": 0.0},
]


def layer_with(rank=4, **options):
    return shaken(LAYERS[rank](3, **{"momentum": 0.1, "schedule": None, "dtype": torch.float64, **options}))


@pytest.mark.parametrize("schedule", [None, HardSwitch(2)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rank", [2, 4])
def test_a_usual_step_is_the_general_one(rank, options, schedule):
    layer = layer_with(rank, schedule=schedule, **options)
    general = copy.deepcopy(layer)
    for seed in range(4):
        x = make_batch(rank, seed=seed)
        assert direct.take_usual_step(copy.deepcopy(layer), x) is not None
        got = outcome(layer, x, lambda x: direct.take_usual_step(layer, x))
        assert worst(got, outcome(general, x, lambda x: take_step(general, x, None))) < (1e-13, "")


@pytest.mark.parametrize(
    "options", [{"virtual_batch_size": 2}, {"renorm_momentum": 0.3}, {"dtype": torch.float16}], ids=str
)
def test_an_unusual_layer_is_left_to_the_general_step(options):
    layer = layer_with(**options)
    before = copy.deepcopy(layer.state_dict())
    assert direct.take_usual_step(layer, make_batch(4, dtype=options.get("dtype", torch.float64))) is None
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_an_unusual_call_is_left_to_the_general_step():
    layer, x = layer_with(), make_batch(4)
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():  # may be the first run of a reentrant checkpoint
        assert direct.take_usual_step(layer, x) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert direct.take_usual_step(layer, x) is None
    assert direct.take_usual_step(layer, x.float()) is None
    for refused in (x[:0], x[:, :2], x[0], x.long(), x[:1, :, :1, :1]):
        assert direct.take_usual_step(layer, refused) is None
    layer.track_running_stats = False
    assert direct.take_usual_step(layer, x) is None
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_parametrized_weight_is_used_and_trained():
    layer = BatchRenorm2d(3, schedule=None, dtype=torch.float64)
    twice = copy.deepcopy(layer)
    with torch.no_grad():
        twice.weight.fill_(2)
    parametrize.register_parametrization(layer, "weight", Doubled())
    x = make_batch(4)
    y = layer(x)
    torch.testing.assert_close(y, twice(x))
    (y**3).sum().backward()
    assert layer.parametrizations.weight.original.grad.abs().max() > 0


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (3.0, 5.0)])
def test_a_step_that_fails_leaves_the_layer_as_it_was(bounds, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    layer = BatchRenorm2d(3, r_max=bounds[0], d_max=bounds[1], schedule=None).train()
    before = [buffer.clone() for buffer in layer.buffers()]
    monkeypatch.setattr(torch, "native_batch_norm", fail)
    with pytest.raises(torch.OutOfMemoryError):
        layer(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(old, new) for old, new in zip(before, layer.buffers(), strict=True))

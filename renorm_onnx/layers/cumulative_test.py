"""A cumulative average is that of the batches that taught something, whatever stood between and before them."""

import pytest
import torch
from torch import nn

from renorm_onnx.layers.clock import HostClock
from renorm_onnx.layers.conftest import LAYERS, make_batch, shaken
from renorm_onnx.layers.running_stats import update_stats
from renorm_onnx.layers.running_stats_test import OnADevice
from renorm_onnx.layers.schedules import Ramp
from renorm_onnx.layers.step_test import WAYS

GOOD = [make_batch(4, seed=seed) * (1 + seed) + seed for seed in range(4)]
INFINITE = torch.full_like(GOOD[0], torch.inf)
IDLE = {
    "none": [],
    "infinite": [INFINITE, torch.full_like(INFINITE, torch.nan)],
    "too large to square": [GOOD[0] * 1e300],
    "empty": [GOOD[0][:0]],
}


def layer_with(**options):
    return LAYERS[4](3, **{"momentum": None, "stat": "var", "schedule": None, "dtype": torch.float64, **options})


def by_hand(batches):
    """Mean over the batches of their means and of their biased variances."""
    moments = [torch.var_mean(x, (0, 2, 3), correction=0) for x in batches]
    return torch.stack([mean for _, mean in moments]).mean(0), torch.stack([var for var, _ in moments]).mean(0)


def check(layer, batches):
    mean, var = by_hand(batches)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 4}, {"renorm_momentum": 0.3}], ids=str)
@pytest.mark.parametrize("schedule", [None, "paper"])
@pytest.mark.parametrize(
    "idle", [[], [x for each in IDLE.values() for x in each]], ids=["all teach", "some teach nothing"]
)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_teaches_nothing_has_no_share(way, idle, schedule, options):
    layer = layer_with(schedule=schedule, **options)
    call = way(layer)
    for x in [*idle, *GOOD[:2], *idle, *GOOD[2:], *idle]:
        assert call(x).shape == x.shape
    check(layer, GOOD)
    assert int(layer.num_batches_tracked) == len(GOOD)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_with_a_momentum_every_batch_counts(way):
    layer = layer_with(momentum=0.1)
    for x in [GOOD[0], *IDLE["infinite"], *IDLE["empty"], GOOD[1]]:
        way(layer)(x)
    assert int(layer.num_batches_tracked) == 5


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_batch_that_teaches_one_channel_counts(way):
    layer = layer_with()
    partly = GOOD[0].clone()
    partly[:, 1] = torch.inf
    for x in [*GOOD[:2], partly, *GOOD[2:]]:
        way(layer)(x)
    assert int(layer.num_batches_tracked) == 5
    mean, _ = by_hand([*GOOD, GOOD[0]])
    torch.testing.assert_close(layer.running_mean[[0, 2]], mean[[0, 2]], rtol=1e-12, atol=1e-12)


def test_a_batch_that_its_mask_leaves_nothing_of_has_no_share():
    layer = layer_with()
    call = torch.compile(layer, backend="aot_eager")  # run eagerly on the CPU, such masks are refused
    whole = torch.ones(GOOD[0].size(0), *GOOD[0].shape[2:], dtype=torch.bool)
    nothing, one = torch.zeros_like(whole), torch.zeros_like(whole)
    one[0, 0, 0] = True
    for x, mask in ((GOOD[2], one), (GOOD[0], whole), (GOOD[3], nothing), (GOOD[1], whole)):
        call(x, mask)
    check(layer, GOOD[:2])
    assert int(layer.num_batches_tracked) == 2


@pytest.mark.parametrize("idle", IDLE.values(), ids=IDLE)
def test_statistics_taken_anew_are_those_of_the_batches_that_teach(idle):
    net = nn.Sequential(shaken(layer_with(momentum=0.1, schedule=Ramp(1, 9, 7))))
    net[0].num_batches_tracked.fill_(5)
    assert update_stats(net, [*idle, *GOOD]) == len(idle) + len(GOOD)
    check(net[0], GOOD)
    assert int(net[0].num_batches_tracked) == 5
    assert net[0].momentum == 0.1


@pytest.fixture
def on_device(monkeypatch):
    """Let clocks take the counters of layers for counters on a device."""
    read, advanced, known = HostClock.read, HostClock.advanced, {}

    def as_there(counter):
        return known.setdefault(id(counter), OnADevice(counter))

    monkeypatch.setattr(HostClock, "read", lambda clock, counter: read(clock, as_there(counter)))
    monkeypatch.setattr(HostClock, "advanced", lambda clock, counter: advanced(clock, as_there(counter)))


def some_infinite(count):
    return [INFINITE if seed % 3 == 0 else make_batch(4, seed=seed) for seed in range(count)]


def test_the_clock_of_a_device_follows_what_is_counted_there(on_device):
    layer = layer_with(schedule=Ramp(1, 40, 30))
    for x in some_infinite(30):
        layer(x)
    assert layer._clock.read(layer.num_batches_tracked) is None  # worn out
    assert int(layer.num_batches_tracked) == 20
    check(layer, [x for x in some_infinite(30) if x.isfinite().all()])


def test_taking_statistics_anew_does_not_wear_out_the_clock(on_device):
    net = nn.Sequential(layer_with(momentum=0.1))
    for x in some_infinite(30):
        net(x)
    update_stats(net, some_infinite(30))
    assert net[0]._clock.read(net[0].num_batches_tracked) == 30

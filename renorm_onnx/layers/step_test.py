"""What a step learns: the statistics in use elsewhere, ghost batches, cumulative averages, empty and frozen layers."""

import copy

import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError
from renorm_onnx.layers.clock import HostClock
from renorm_onnx.layers.conftest import algorithm_1, make_batch, outcome, shaken, worst
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d
from renorm_onnx.layers.schedules import HardSwitch


def layer_with(**options):
    return shaken(BatchRenorm2d(3, **{"momentum": 0.1, "schedule": None, "dtype": torch.float64, **options}))


def moments(x):
    axes = [0, *range(2, x.dim())]
    return x.mean(axes), x.var(axes, correction=0), x.numel() // x.size(1)


@pytest.mark.parametrize("schedule", [None, "paper"])
def test_each_statistic_moves_by_its_own_rule(schedule):
    x = make_batch(4)
    _, var, size = moments(x)
    start = layer_with().running_var
    sigma = torch.lerp((start + 1e-5).sqrt(), (var + 1e-5).sqrt(), 0.1)
    want = {
        "sigma": sigma**2 - 1e-5,
        "var": torch.lerp(start, var, 0.1),
        "var_unbiased": torch.lerp(start, var * size / (size - 1), 0.1),
    }
    for stat, value in want.items():
        layer = layer_with(stat=stat, schedule=schedule)
        layer(x)
        torch.testing.assert_close(layer.running_var, value, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("stat", ["sigma", "var", "var_unbiased"])
@pytest.mark.parametrize("gradients", [True, False])  # the usual step, and the general one
def test_the_variance_of_a_constant_channel_does_not_fall_below_zero(stat, gradients):
    for eps in (1e-5, 2e-5, 3e-5, 1e-3, 3e-3):
        layer = BatchRenorm1d(2, eps=eps, momentum=1.0, stat=stat)
        with torch.set_grad_enabled(gradients):
            layer(torch.full((4, 2), 3.0))
        assert layer.running_var.min() >= 0


def test_warm_up_with_the_unbiased_variance_is_torchs_batch_norm_step_for_step():
    layer = BatchRenorm2d(3, momentum=0.1, stat="var_unbiased", dtype=torch.float64)
    reference = nn.BatchNorm2d(3, momentum=0.1, dtype=torch.float64)
    for seed in range(5):
        x = make_batch(4, seed=seed)
        assert worst(outcome(layer, x), outcome(reference, x)) < (1e-12, "")


def test_renorm_momentum_gives_r_and_d_statistics_of_their_own():
    layer = layer_with(renorm_momentum=0.5)
    layer.renorm_mean.add_(0.3)
    layer.renorm_var.mul_(1.7)
    eps, fast = layer.eps, [layer.renorm_mean.clone(), (layer.renorm_var + layer.eps).sqrt()]
    slow = [layer.running_mean.clone(), (layer.running_var + eps).sqrt()]
    for seed in range(3):
        x = make_batch(4, seed=seed)
        want, *fast = algorithm_1(x, layer.weight, layer.bias, *fast, eps, 3.0, 5.0, 0.5)
        _, *slow = algorithm_1(x, layer.weight, layer.bias, *slow, eps, 3.0, 5.0, 0.1)
        torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer.renorm_mean, fast[0])
    torch.testing.assert_close((layer.renorm_var + eps).sqrt(), fast[1])
    torch.testing.assert_close(layer.running_mean, slow[0])
    torch.testing.assert_close((layer.running_var + eps).sqrt(), slow[1])


def test_a_batch_norm_checkpoint_starts_both_sets_of_statistics():
    reference = nn.BatchNorm2d(3, dtype=torch.float64)
    reference(make_batch(4))
    layer = BatchRenorm2d(3, renorm_momentum=0.5, dtype=torch.float64)
    layer.load_state_dict(reference.state_dict())
    assert torch.equal(layer.renorm_mean, reference.running_mean)
    assert torch.equal(layer.renorm_var, reference.running_var)
    twin = BatchRenorm2d(3, renorm_momentum=0.5, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.renorm_var, layer.renorm_var)


def test_momentum_none_averages_all_batches_alike():
    layer = BatchRenorm2d(3, momentum=None, stat="var", dtype=torch.float64)
    batches = [make_batch(4, seed=seed) for seed in range(4)]
    for x in batches:
        layer(x)
    for got, which in ((layer.running_mean, 0), (layer.running_var, 1)):
        want = torch.stack([moments(x)[which] for x in batches]).mean(0)
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("schedule", [None, "paper"])
def test_ghost_batches_are_normalized_by_themselves_against_the_same_running_statistics(schedule):
    layer = layer_with(virtual_batch_size=2, schedule=schedule)
    parts = make_batch(4).split(2)
    twins = [layer_with(schedule=schedule) for _ in parts]
    want = torch.cat([twin(part) for twin, part in zip(twins, parts, strict=True)])
    torch.testing.assert_close(layer(torch.cat(parts)), want)
    torch.testing.assert_close(layer.running_mean, sum(twin.running_mean for twin in twins) / 2)
    sigma = sum((twin.running_var + layer.eps).sqrt() for twin in twins) / 2
    torch.testing.assert_close((layer.running_var + layer.eps).sqrt(), sigma)
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize(("samples", "sizes"), [(3, [3]), (4, [2, 2]), (5, [3, 2]), (7, [3, 2, 2])])
def test_a_ghost_batch_is_never_smaller_than_asked(samples, sizes):
    layer = layer_with(virtual_batch_size=2)
    x = torch.cat([make_batch(4), make_batch(4, seed=2)])[:samples]
    want = torch.cat([layer_with()(part) for part in x.split(sizes)])
    torch.testing.assert_close(layer(x), want)


def test_ghost_batches_of_one_value_are_refused():
    layer = BatchRenorm1d(3, virtual_batch_size=1, schedule=None)
    with pytest.raises(InputError, match="one ghost batch; virtual_batch_size=1 is too small"):
        layer(torch.ones(4, 3))
    assert layer.num_batches_tracked.item() == 0


def test_without_running_statistics_both_modes_use_the_batch():
    layer = layer_with(track_running_stats=False)
    x = make_batch(4)
    want = torch.batch_norm(x, layer.weight, layer.bias, None, None, True, 0.0, layer.eps, False)
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x), want)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.ones(1, 3, 1, 1, dtype=torch.float64))


def test_tracking_may_be_switched_off_for_a_while():
    layer = layer_with()
    before = copy.deepcopy(layer.state_dict())
    layer.track_running_stats = False
    layer(make_batch(4))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_resetting_starts_anew():
    layer = layer_with(renorm_momentum=0.5)
    layer(make_batch(4))
    layer.reset_running_stats()
    fresh = BatchRenorm2d(3, renorm_momentum=0.5, dtype=torch.float64)
    for name, value in fresh.named_buffers():
        assert torch.equal(layer.get_buffer(name), value)


def test_a_frozen_layer_in_a_training_network_learns_nothing():
    model = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=torch.float64), layer_with())
    model.train()
    model[1].eval()
    before = copy.deepcopy(model[1].state_dict())
    model(make_batch(4)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())
    assert model[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_an_empty_batch_is_what_it_is_for_batch_norm(shape):
    layer, reference = layer_with(), shaken(nn.BatchNorm2d(3, dtype=torch.float64))
    reference.load_state_dict(layer.state_dict())
    for module in (layer, reference):
        x = torch.empty(shape, dtype=torch.float64, requires_grad=True)
        y = module(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
    for name, value in layer.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name])


def test_no_gradient_mode_and_inference_mode_still_learn():
    x = make_batch(4)
    layers = [layer_with() for _ in range(3)]
    layers[0](x)
    with torch.no_grad():
        layers[1](x)
    with torch.inference_mode():
        layers[2](x)
    assert all(torch.equal(layer.running_var, layers[0].running_var) for layer in layers)


def test_the_switch_falls_between_two_steps():
    layer, plain, corrected = layer_with(schedule=HardSwitch(1)), layer_with(r_max=1, d_max=0), layer_with()
    x = make_batch(4)
    assert torch.equal(layer(x), plain(x))
    corrected.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), corrected(x))


def test_a_refused_input_changes_nothing():
    layer = layer_with()
    before = copy.deepcopy(layer.state_dict())
    for bad in (torch.zeros(1, 3, 1, 1), torch.zeros(2, 4, 2, 2), torch.zeros(2, 3)):
        with pytest.raises(InputError):
            layer(bad.double())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("key", ["ra_mean", "scale", "running_std", "gamma"])
def test_a_state_dict_of_a_foreign_layer_is_refused_with_the_way_out(key):
    model = nn.Sequential(layer_with())
    state = {**model.state_dict(), f"0.{key}": torch.zeros(3)}
    with pytest.raises(RuntimeError, match=f"BatchRenorm2d: '0.{key}' belongs to another .* renorm_onnx.adopt"):
        model.load_state_dict(state, strict=False)


class FakeDeviceCounter:
    """A counter that lives on a device: reading it is counted."""

    def __init__(self, value):
        self.value, self._version, self.reads = value, 0, 0
        self.is_cpu = self.is_cuda = False

    def is_inference(self):
        return False

    def __int__(self):
        self.reads += 1
        return self.value

    def add(self):
        self.value += 1
        self._version += 1


def test_the_host_counts_along_without_asking_the_device():
    clock, counter = HostClock(), FakeDeviceCounter(7)
    for step in range(7, 30):
        assert clock.read(counter) == step
        counter.add()
        clock.advanced(counter)
    assert counter.reads == 1


def test_the_host_notices_a_write_it_did_not_make():
    clock, counter = HostClock(), FakeDeviceCounter(7)
    clock.read(counter)
    counter.value, counter._version = 100, 1
    assert clock.read(counter) == 100
    assert clock.read(FakeDeviceCounter(3)) == 3


def test_the_host_stops_asking_where_writes_keep_coming():
    clock, counter = HostClock(), FakeDeviceCounter(0)
    seen = []
    for _ in range(20):
        seen.append(clock.read(counter))
        counter.add()
    assert seen == [*range(HostClock.MAX_READS), *[None] * (20 - HostClock.MAX_READS)]
    assert counter.reads == HostClock.MAX_READS


def test_a_step_known_to_the_device_alone_is_the_same_step(monkeypatch):
    layers = [layer_with(schedule=HardSwitch(2)) for _ in range(2)]
    for seed in range(4):
        x = make_batch(4, seed=seed)
        want = layers[0](x)
        with monkeypatch.context() as patch:
            patch.setattr(HostClock, "read", lambda self, counter: None)
            torch.testing.assert_close(layers[1](x), want)
    torch.testing.assert_close(layers[1].state_dict(), layers[0].state_dict())


def no_gradients(layer):
    def call(x):
        with torch.no_grad():
            return layer(x)

    return call


WAYS = {
    "the usual step": lambda layer: layer,
    "the general step": no_gradients,
    "compiled": lambda layer: torch.compile(layer, backend="aot_eager"),
    "masked": lambda layer: lambda x: layer(x, torch.ones(x.size(0), *x.shape[2:], dtype=torch.bool)),
}


@pytest.mark.parametrize("schedule", [None, "paper"])
@pytest.mark.parametrize("options", [{}, {"stat": "var"}, {"stat": "var_unbiased"}, {"renorm_momentum": 0.3}], ids=str)
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_number_that_is_not_finite_spoils_one_channel_of_one_step(way, number, options, schedule):
    layer = layer_with(**options, schedule=schedule)
    before, sound = {k: v.clone() for k, v in layer.named_buffers()}, copy.deepcopy(layer)
    x = make_batch(4)
    sound(x)
    x[1, 1, 2, 0] = number
    y = way(layer)(x)
    assert [bool(y[:, channel].isfinite().all()) for channel in range(3)] == [True, False, True]
    for name, value in layer.named_buffers():
        want = sound.get_buffer(name).clone()
        if want.dim():
            want[1] = before[name][1]
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-12)
    assert layer(make_batch(4, seed=2)).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"eps": 1e-3}, {"stat": "var"}, {"virtual_batch_size": 4}], ids=str)
@pytest.mark.parametrize("momenta", [(0, None), (0.0, 0.0), (0.5, 0), (0, 0.5), (0.5, None)], ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_momentum_of_0_moves_no_statistic_by_a_bit(way, momenta, options):
    layer = BatchRenorm1d(64, momentum=momenta[0], renorm_momentum=momenta[1], schedule=None, **options)
    for name, buffer in layer.named_buffers():
        if name.endswith("_var"):
            buffer.copy_(torch.logspace(-9, 4, 64))
    before = copy.deepcopy(dict(layer.named_buffers()))
    way(layer)(torch.randn(8, 64, 2, generator=torch.Generator().manual_seed(0)))
    for which, momentum in zip(("running", "renorm"), momenta, strict=True):
        for name in (f"{which}_mean", f"{which}_var") if momentum is not None else ():
            assert torch.equal(layer.get_buffer(name), before[name]) == (momentum == 0), name
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_variance_that_overflows_teaches_nothing(way):
    layer = BatchRenorm1d(2, schedule=None)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    way(layer)(x * torch.tensor([1.0, 1e25]))
    assert layer.running_var[0] != 1
    assert layer.running_var[1] == 1


@pytest.mark.parametrize("schedule", [None, "paper"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_an_empty_batch_teaches_nothing_in_a_compiled_graph_either(schedule, dynamic):
    layer = layer_with(schedule=schedule)
    compiled = torch.compile(layer, backend="aot_eager", dynamic=dynamic)
    compiled(make_batch(4))
    before = {k: v.clone() for k, v in layer.named_buffers()}
    assert compiled(make_batch(4)[:0]).shape == (0, 3, 3, 5)
    for name, value in layer.named_buffers():
        assert torch.equal(value, before[name] + (name == "num_batches_tracked")), name

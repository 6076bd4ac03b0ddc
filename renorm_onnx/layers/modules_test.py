import copy
import io
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import renorm_onnx
from renorm_onnx.errors import InputError
from renorm_onnx.layers import functional
from renorm_onnx.layers.conftest import LAYERS, algorithm_1, make_batch, shaken
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from renorm_onnx.layers.options import CHECKS
from renorm_onnx.layers.schedules import PAPER, Schedule, Sigmoid, linear

TORCH = {BatchRenorm1d: nn.BatchNorm1d, BatchRenorm2d: nn.BatchNorm2d, BatchRenorm3d: nn.BatchNorm3d}
SCHEDULES = {"stretched": (800,), "linear": (1, 9), "Ramp": (1, 9, 5), "HardSwitch": (7,), "Sigmoid": (0.1,)}


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("step", [0, 4_999, 5_000, 5_001, 25_000, 40_000, 400_000])
def test_a_training_step_is_algorithm_1_along_the_papers_schedule(rank, step):
    layer = shaken(LAYERS[rank](3, momentum=0.1, dtype=torch.float64))
    layer.num_batches_tracked.fill_(step)
    x = make_batch(rank).requires_grad_()
    mu, sigma = layer.running_mean.clone(), (layer.running_var + layer.eps).sqrt()
    r_max, d_max = PAPER(step)
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    want, want_mu, want_sigma = algorithm_1(x, weight, bias, mu, sigma, layer.eps, r_max, d_max, 0.1)
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    want_grads = torch.autograd.grad(want, (x, weight, bias), g)

    got = layer(x)
    grads = torch.autograd.grad(got, (x, layer.weight, layer.bias), g)

    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.running_mean, want_mu, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close((layer.running_var + layer.eps).sqrt(), want_sigma, rtol=1e-13, atol=1e-13)
    assert layer.num_batches_tracked.item() == step + 1


def test_the_layers_are_torchs_norms_and_none_of_its_batch_norms():
    net = nn.Sequential(BatchRenorm2d(3), nn.BatchNorm2d(3))
    assert [m for m in net.modules() if isinstance(m, _NormBase)] == list(net)
    torchs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    assert [type(m) for m in torchs] == [BatchRenorm2d, nn.SyncBatchNorm]


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_evaluation_is_bit_equal_to_torchs_batch_norm(rank):
    layer = shaken(LAYERS[rank](3)).eval()
    reference = TORCH[LAYERS[rank]](3).eval()
    reference.load_state_dict(layer.state_dict())
    x = make_batch(rank, dtype=torch.float32)
    assert torch.equal(layer(x), reference(x))


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_state_dicts_load_strictly_both_ways(options):
    layer, reference = shaken(BatchRenorm2d(3, **options)), nn.BatchNorm2d(3, **options)
    reference.load_state_dict(layer.state_dict(), strict=True)
    other = BatchRenorm2d(3, **options)
    other.load_state_dict(reference.state_dict(), strict=True)
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_features": 0}, "BatchRenorm2d: num_features=0, expected an integer >= 1"),
        ({"num_features": 2.0}, r"num_features=2\.0"),
        ({"r_max": 0.5}, r"r_max=0\.5, expected a finite number >= 1"),
        ({"r_max": float("nan")}, "r_max=nan"),
        ({"d_max": -1.0}, r"d_max=-1\.0, expected a finite number >= 0"),
        ({"d_max": float("inf")}, "d_max=inf"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"eps": -1e-5}, "eps=-1e-05"),
        ({"momentum": float("nan")}, "momentum=nan"),
        ({"momentum": 1.5}, r"momentum=1\.5, expected a number in \[0, 1\]"),
        (
            {"renorm_momentum": float("nan")},
            r"renorm_momentum=nan, expected a number in \[0, 1\], or None to",
        ),
        ({"virtual_batch_size": 0}, "virtual_batch_size=0, expected an integer >= 1, or None"),
        ({"stat": "std"}, "stat='std', expected one of"),
        ({"momentum": "a"}, r"momentum='a', expected a number in \[0, 1\]"),
        ({"renorm_momentum": "a"}, r"renorm_momentum='a', expected a number in \[0, 1\]"),
        ({"eps": None}, "eps=None, expected a finite number >= 0"),
        (
            {"renorm_momentum": 0.1, "track_running_stats": False},
            r"renorm_momentum=0\.1, expected None because the layer has no second set .* track_running_stats=True",
        ),
        ({"schedule": "papre"}, "BatchRenorm2d: schedule='papre', expected 'paper', None, a Schedule or a function"),
    ],
)
def test_a_bad_constructor_argument_is_refused_by_name(arguments, message):
    with pytest.raises(InputError, match=message):
        BatchRenorm2d(**{"num_features": 3, **arguments})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_features", 0, "BatchRenorm2d: num_features=0, expected an integer >= 1"),
        ("eps", float("nan"), "eps=nan, expected a finite number >= 0"),
        ("momentum", 2.0, r"momentum=2\.0, expected a number in \[0, 1\]"),
        ("momentum", float("nan"), "momentum=nan"),
        ("r_max", 0.5, r"r_max=0\.5, expected a finite number >= 1 because r lies in \[1/r_max, r_max\]"),
        ("d_max", "a", r"d_max='a', expected a finite number >= 0 because d lies in \[-d_max, d_max\]"),
        ("stat", "bogus", "stat='bogus', expected one of"),
        ("schedule", "papre", "BatchRenorm2d: schedule='papre', expected 'paper', None, a Schedule or a function"),
        ("virtual_batch_size", 0, "virtual_batch_size=0, expected an integer >= 1, or None"),
        ("renorm_momentum", 1.5, r"renorm_momentum=1\.5, expected a number in \[0, 1\], or None to"),
        ("renorm_momentum", 0.1, "renorm_momentum=0.1, expected None because the layer has no second set of statistic"),
    ],
)
def test_what_the_constructor_refuses_is_refused_on_assignment_and_changes_nothing(name, value, message):
    layer = BatchRenorm2d(3)
    before = getattr(layer, name)
    with pytest.raises(InputError, match=message):
        setattr(layer, name, value)
    assert getattr(layer, name) is before
    assert layer(make_batch(4, dtype=torch.float32)).isfinite().all()


@pytest.mark.parametrize("given", [None, "paper", Sigmoid(0.1), lambda step: (1.5 + step, 0.5)])
def test_a_schedule_assigned_later_acts_as_one_given_to_the_constructor(given):
    made, changed = shaken(BatchRenorm2d(3, schedule=given)), shaken(BatchRenorm2d(3, schedule=linear(0, 7)))
    other = copy.deepcopy(changed)
    changed.schedule = given
    x = make_batch(4, dtype=torch.float32) * 3
    for layer in (made, changed, other):
        layer.num_batches_tracked.fill_(3)
    want = made(x)
    assert torch.equal(changed(x), want)
    assert not torch.equal(other(x), want)  # control: the schedule matters
    assert (changed.r_max, changed.d_max) == (3.0, 5.0)


def test_bounds_assigned_as_integers_are_kept_as_the_constructor_keeps_them():
    layer = BatchRenorm2d(3, schedule=None)
    layer.r_max, layer.d_max = 2, 0
    assert repr(layer) == repr(BatchRenorm2d(3, schedule=None, r_max=2, d_max=0))
    assert layer.schedule.bounds(0, layer.r_max, layer.d_max) == (2.0, 0.0)


@pytest.mark.parametrize("name", ["num_features", "virtual_batch_size"])
@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_whole_numbers_of_other_libraries_are_taken_as_torchs_layers_take_them(name, kind):
    layer = BatchRenorm2d(**{"num_features": 3, name: kind(3)})
    assert repr(layer) == repr(BatchRenorm2d(**{"num_features": 3, name: 3}))
    assert type(getattr(layer, name)) is int
    assert layer(make_batch(4, dtype=torch.float32)).isfinite().all()
    for wrong in (True, np.float64(3.0), np.int64(0)):
        with pytest.raises(InputError, match=rf"{name}={re.escape(repr(wrong))}, expected an integer >= 1"):
            BatchRenorm2d(**{"num_features": 3, name: wrong})


def test_reading_an_option_costs_no_property():
    layer = BatchRenorm2d(3)
    for name in CHECKS:
        assert name in vars(layer)
        assert not hasattr(type(layer), name)


@pytest.mark.parametrize("kind", list(TORCH))
def test_the_docstring_says_at_which_steps_the_default_schedule_moves(kind):
    schedule = kind(3).schedule
    for step in (schedule.start, schedule.d_end, schedule.r_end):
        assert f"{step:,}" in kind.__doc__


def test_every_schedule_that_the_docstring_names_comes_from_the_package():
    named = re.findall(r"`(\w+)\([a-z_, ]+\)`", BatchRenorm2d.__doc__)
    assert sorted(named) == sorted(SCHEDULES)
    for name in named:
        assert name in renorm_onnx.__all__
        assert isinstance(BatchRenorm2d(3, schedule=getattr(renorm_onnx, name)(*SCHEDULES[name])).schedule, Schedule)


@pytest.mark.parametrize("training", [True, False])
def test_a_bad_input_is_refused_with_its_shape(training):
    layer = BatchRenorm2d(3).train(training)
    with pytest.raises(ValueError, match=r"BatchRenorm2d: expected 4D input \(got 3D input of shape \(2, 3, 4\)\)"):
        layer(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 4, 4\), expected 3 channels .* num_features=3"):
        layer(torch.zeros(2, 5, 4, 4))
    with pytest.raises(ValueError, match=r"x has dtype torch.int64, expected a floating-point type"):
        layer(torch.zeros(2, 3, 4, 4, dtype=torch.int64))


def test_one_value_per_channel_is_torchs_error_and_changes_nothing():
    layer = BatchRenorm1d(4)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
        layer(torch.ones(1, 4))
    assert layer.num_batches_tracked.item() == 0
    assert torch.equal(layer.running_mean, torch.zeros(4))
    assert layer.eval()(torch.ones(1, 4)).shape == (1, 4)


@pytest.mark.parametrize("exported", [False, True])
def test_a_layer_without_a_counter_says_what_it_needs_one_for(exported):
    layer = BatchRenorm1d(3)
    layer.num_batches_tracked = None
    refused = pytest.raises(InputError, match="BatchRenorm1d: num_batches_tracked is None, expected a counter")
    with functional.keep_ops() if exported else nullcontext(), refused:
        layer(torch.randn(4, 3))
    assert torch.equal(layer.running_mean, torch.zeros(3))


def test_a_copy_and_a_pickle_go_on_like_the_original():
    layer = shaken(BatchRenorm2d(3, schedule=None))
    layer(make_batch(4, dtype=torch.float32))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(layer), torch.load(buffer, weights_only=False)]
    x = make_batch(4, seed=5, dtype=torch.float32)
    want = layer(x)
    for twin in twins:
        assert torch.equal(twin(x), want)
        assert torch.equal(twin.running_var, layer.running_var)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    ("layer", "given", "wanted"),
    [
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float64, torch.float16, torch.float64),
        (torch.float16, torch.float32, torch.float16),
        (torch.bfloat16, torch.float64, torch.bfloat16),
    ],
)
def test_an_input_of_another_type_is_refused_by_name_where_batch_norm_refuses_it(mode, layer, given, wanted):
    x = make_batch(4, dtype=given)
    for affine in (True, False):
        refusing = BatchRenorm2d(3, affine=affine, dtype=layer).train(mode)
        with pytest.raises(InputError, match=f"BatchRenorm2d: x has dtype {given}, expected {wanted} because running_"):
            refusing(x)
        assert refusing.num_batches_tracked.item() == 0
    with pytest.raises(RuntimeError, match="mixed dtype"):
        nn.BatchNorm2d(3, dtype=layer).train(mode)(x)
    with pytest.raises(InputError, match=f"expected {wanted} because weight is of that type"):
        BatchRenorm2d(3, track_running_stats=False, dtype=layer)(x)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_changes_nothing_about_the_types_that_are_taken(mode, given):
    x = make_batch(4, dtype=given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert BatchRenorm2d(3).train(mode)(x).dtype == nn.BatchNorm2d(3).train(mode)(x).dtype == given

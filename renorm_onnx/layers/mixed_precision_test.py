"""Autocast and loss scaling: the step of the float64 formula, to the rounding of the narrow type, learned from once."""

import copy

import pytest
import torch
from torch import nn

from renorm_onnx.layers.conftest import LAYERS, NaiveBatchRenorm, make_batch, outcome, shaken, worst

ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


def layer_for(rank=4, **options):
    return shaken(LAYERS[rank](3, **{"momentum": 0.1, "schedule": None, **options}))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_layer_under_autocast_takes_the_step_of_the_formula(dtype):
    layer = layer_for()
    want = NaiveBatchRenorm(copy.deepcopy(layer).double())
    for seed in range(3):
        x = make_batch(4, seed=seed, dtype=dtype)

        def call(x):
            with torch.autocast("cpu", dtype=dtype):
                return layer(x)

        got = outcome(layer, x, call)
        assert got["y"].dtype == got["x.grad"].dtype == dtype
        assert got["running_var"].dtype == got["weight"].dtype == torch.float32
        assert worst(got, outcome(want, x.double())) < (ROUNDING[dtype], "")


def test_the_naive_layer_loses_large_variances_in_float16():
    """The negative control of the next test."""
    naive = NaiveBatchRenorm(layer_for().half())
    naive(make_batch(4, dtype=torch.float16) * 500)
    assert not torch.isfinite(naive.running_var).all()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_a_network_under_autocast_keeps_its_statistics_in_float32(dtype):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer_for())
    with torch.autocast("cpu", dtype=dtype):
        y = model(make_batch(4, dtype=torch.float32) * 500)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    assert model[1].running_var.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert model[1].num_batches_tracked.item() == 1


def test_a_grad_scaler_gives_the_update_without_it():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), layer_for(2))

    plain, scaled = model(), model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (plain, scaled)]
    for seed in range(3):
        x = make_batch(2, seed=seed, dtype=torch.float32)
        for each in optimizers:
            each.zero_grad()
        plain(x).square().mean().backward()
        optimizers[0].step()
        scaler.scale(scaled(x).square().mean()).backward()
        scaler.step(optimizers[1])
        scaler.update()
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict())


def test_a_step_that_the_scaler_skips_is_learned_from_once():
    model = nn.Sequential(nn.Linear(3, 3), layer_for(2))
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**126)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(make_batch(2, dtype=torch.float32)).float().square().mean()
    scaler.scale(loss * 2.0**10).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model[1].num_batches_tracked.item() == 1
    assert all(torch.isfinite(value).all() for value in model.buffers())

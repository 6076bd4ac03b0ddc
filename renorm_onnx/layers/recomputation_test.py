"""Activation checkpointing changes neither gradients nor statistics."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from renorm_onnx.layers.conftest import NaiveBatchRenorm, make_batch, shaken, weights_like, worst
from renorm_onnx.layers.masked import length_mask
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d
from renorm_onnx.layers.recomputation import Corrections, Memory
from renorm_onnx.layers.schedules import HardSwitch

OPTIONS = [
    {},
    {"stat": "var_unbiased"},
    {"momentum": None},
    {"renorm_momentum": 0.3},
    {"virtual_batch_size": 2},
    {"schedule": "paper"},
    {"schedule": HardSwitch(1)},
]


def net(norm=BatchRenorm2d, **options):
    g = torch.Generator().manual_seed(4)
    layers = [nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64) for _ in range(2)]
    for layer in layers:
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=g))
    norms = [
        shaken(BatchRenorm2d(3, **{"momentum": 0.1, "schedule": None, "dtype": torch.float64, **options}), seed)
        for seed in range(2)
    ]
    if norm is NaiveBatchRenorm:
        norms = [NaiveBatchRenorm(layer) for layer in norms]
    return nn.Sequential(layers[0], norms[0], nn.Tanh(), layers[1], norms[1])


def checkpointed(model, reentrant):
    return lambda x: checkpoint(model, x, use_reentrant=reentrant)


def backward(model, x, call):
    """Everything one step of `model` produces, by `backward`, which alone the reentrant form supports."""
    x = x.clone().requires_grad_()
    y = call(x)
    model.zero_grad()
    (y * weights_like(y)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    return {"y": y.detach(), "x.grad": x.grad, **grads, **buffers}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(options, reentrant):
    plain = net(**options)
    model = copy.deepcopy(plain)
    for seed in range(3):
        x = make_batch(4, seed=seed)
        assert worst(backward(model, x, checkpointed(model, reentrant)), backward(plain, x, plain)) < (1e-12, "")


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_naive_layer_is_wrong_under_checkpointing(reentrant):
    """The negative control."""
    plain = net(NaiveBatchRenorm)
    model = copy.deepcopy(plain)
    x = make_batch(4)
    got = backward(model, x, checkpointed(model, reentrant))
    assert worst(got, backward(plain, x, plain)) > (0.01, "")


@pytest.mark.parametrize("reentrant", [False, True])
def test_several_checkpointed_runs_of_one_layer_are_told_apart(reentrant):
    plain = net()
    model = copy.deepcopy(plain)
    again = checkpointed(model, reentrant)

    def unrolled(call):
        return lambda x: call(call(call(x) * 0.5) + x)

    for seed in range(2):
        x = make_batch(4, seed=seed)
        got, want = backward(model, x, unrolled(again)), backward(plain, x, unrolled(plain))
        assert worst(got, want) < (1e-10, "")


@pytest.mark.parametrize("reentrant", [False, True])
def test_runs_may_be_checkpointed_before_and_after_the_switch_and_recomputed_together(reentrant):
    plain = net(schedule=HardSwitch(1))
    model = copy.deepcopy(plain)
    again = checkpointed(model, reentrant)
    x = make_batch(4)
    got = backward(model, x, lambda x: again(x) + again(2 * x))
    assert worst(got, backward(plain, x, lambda x: plain(x) + plain(2 * x))) < (1e-12, "")


@pytest.mark.parametrize("reentrant", [False, True])
def test_masked_runs_are_repeated_exactly(reentrant):
    plain = shaken(BatchRenorm1d(3, momentum=0.1, schedule=None, dtype=torch.float64))
    layer = copy.deepcopy(plain)
    x, mask = make_batch(3), length_mask(torch.tensor([5, 4, 1, 3, 0, 5]), 5)
    got = backward(layer, x, lambda x: checkpoint(layer, x, mask, use_reentrant=reentrant).tanh())
    assert worst(got, backward(plain, x, lambda x: plain(x, mask).tanh())) < (1e-12, "")


def test_a_constant_channel_and_a_nan_do_not_confuse_the_runs():
    memory = Memory()
    for value in (1.0, 2.0):
        mean = torch.tensor([value, float("nan")])
        memory.keep(Corrections(mean, torch.full((2,), value), torch.full((2,), -value)))
    run = memory.find(torch.tensor([2.0, float("nan")]))
    assert (run.r[0].item(), run.d[0].item()) == (2.0, -2.0)


def test_runs_are_kept_until_all_of_them_have_been_repeated():
    memory, means = Memory(), [torch.full((2,), float(n)) for n in range(3)]
    for mean in means[:2]:
        memory.keep(Corrections(mean, mean + 1, -mean))
    memory.find(means[1])
    memory.keep(Corrections(means[2], means[2] + 1, -means[2]))
    assert torch.equal(memory.find(means[0]).r, means[0] + 1)
    memory.passed()
    assert len(memory) == 3
    memory.keep(Corrections(means[1], means[1] + 1, -means[1]))
    assert len(memory) == 1


def test_nothing_is_kept_where_nothing_can_be_repeated():
    model = net()
    for seed in range(3):
        backward(model, make_batch(4, seed=seed), model)
    assert len(model[1]._memory) == 0


def test_what_is_kept_is_bounded_and_forgotten():
    model = net()
    for seed in range(3):
        backward(model, make_batch(4, seed=seed), checkpointed(model, False))
        assert len(model[1]._memory) == 1
    memory = Memory()
    wide = Corrections(torch.zeros(Memory.CAPACITY // 3 // 4), None, None)
    for _ in range(9):
        memory.keep(wide)
    assert len(memory) == 4


def test_what_is_kept_is_not_copied_with_the_layer():
    layer = net()[1]
    with torch.no_grad():
        layer(make_batch(4))
    assert len(layer._memory) == 1
    assert len(copy.deepcopy(layer)._memory) == 0
    assert len(pickle.loads(pickle.dumps(layer))._memory) == 0


def test_compiling_a_checkpointed_network_changes_nothing():
    plain = net()
    model = copy.deepcopy(plain)
    compiled = torch.compile(checkpointed(model, False), backend="aot_eager")
    x = make_batch(4)
    assert worst(backward(model, x, compiled), backward(plain, x, plain)) < (1e-9, "")

"""Activation checkpointing changes neither gradients nor statistics."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from renorm_onnx.layers import recomputation
from renorm_onnx.layers.conftest import NaiveBatchRenorm, make_batch, shaken, weights_like, worst
from renorm_onnx.layers.masked import length_mask
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d
from renorm_onnx.layers.recomputation import CAPACITY, Corrections, Memory
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


def twice_the_same(call):
    return lambda x: call(x) + 2 * call(x).sin()


class Twice(nn.Module):
    """A network that runs twice on the same batch within one checkpoint."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 2 * self.inner(x).sin()


@pytest.mark.parametrize("reentrant", [False, True])
def test_runs_on_the_same_batch_are_told_apart(reentrant):
    """By where they stand: their means are the same, and the statistics have moved between them."""
    plain = net()
    for model, around in ((copy.deepcopy(plain), twice_the_same), (Twice(copy.deepcopy(plain)), lambda call: call)):
        fresh = copy.deepcopy(model)
        x = make_batch(4)
        got = backward(model, x, around(checkpointed(model, reentrant)))
        assert worst(got, backward(fresh, x, around(fresh))) < (1e-12, "")


@pytest.mark.parametrize("reentrant", [False, True])
def test_by_their_means_alone_runs_on_the_same_batch_are_mistaken(reentrant, monkeypatch):
    """The negative control."""
    monkeypatch.setattr(Memory, "repeated", lambda self: None)
    plain = Twice(net())
    model = copy.deepcopy(plain)
    x = make_batch(4)
    got = backward(model, x, checkpointed(model, reentrant))
    assert worst(got, backward(plain, x, plain)) > (0.01, "")


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_training_pass_without_gradients_is_not_taken_for_the_first_run(reentrant):
    """As targets of a teacher, or the first pass of a cached gradient, on the batch that is trained on."""
    plain = net()
    model = copy.deepcopy(plain)
    for seed in range(3):
        x = make_batch(4, seed=seed)
        with torch.no_grad():
            model(x)
            plain(x)
        assert worst(backward(model, x, checkpointed(model, reentrant)), backward(plain, x, plain)) < (1e-12, "")


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_graph_that_is_kept_may_be_repeated_often_and_late(reentrant):
    plain = net()
    model = copy.deepcopy(plain)
    xs = [make_batch(4, seed=seed).requires_grad_() for seed in range(3)]

    def gradients(call):
        one, two = call(xs[0]), call(xs[1])
        found = []
        for y in (one, one):
            y.square().sum().backward(retain_graph=True)
        call(xs[2])
        two.square().sum().backward()
        for x in xs[:2]:
            found.append(x.grad.clone())
            x.grad = None
        return dict(enumerate(found))

    assert worst(gradients(checkpointed(model, reentrant)), gradients(plain)) < (1e-12, "")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the inner one, while the outer runs first
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_checkpoints_within_checkpoints_change_nothing(outer, inner):
    plain = net()
    model = copy.deepcopy(plain)

    def nested(call):
        return lambda x: call(call(x).sin()) + call(x * 2)

    for seed in range(2):
        x = make_batch(4, seed=seed)
        around = nested(checkpointed(model, inner))
        got = backward(model, x, lambda x: checkpoint(around, x, use_reentrant=outer).tanh())  # noqa: B023
        assert worst(got, backward(plain, x, lambda x: nested(plain)(x).tanh())) < (1e-10, "")


class StopsEarly(Twice):
    """Its second run saves nothing, so that a repetition ends before it."""

    def forward(self, x):
        y = self.inner(x).sin()
        with torch.no_grad():
            self.inner(2 * x)
        return y


def test_each_backward_pass_repeats_from_the_first_run_on():
    plain = StopsEarly(net())
    model = copy.deepcopy(plain)

    def gradients(call):
        x = make_batch(4).requires_grad_()
        y = call(x).square().sum()
        for _ in range(2):
            y.backward(retain_graph=True)
        return {"x.grad": x.grad}

    assert worst(gradients(checkpointed(model, False)), gradients(plain)) < (1e-12, "")


class OfOtherMakers(torch.autograd.Function):
    """A reentrant checkpoint that nothing on the stack gives away."""

    @staticmethod
    def forward(state, call, x):
        state.call = call
        state.save_for_backward(x)
        with torch.no_grad():
            return call(x)

    @staticmethod
    def backward(state, grad):
        x = state.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = state.call(x)
        torch.autograd.backward(y, grad)
        return None, x.grad


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_checkpoint_that_is_not_recognized_is_told_by_the_means(options):
    plain = net(**options)
    model = copy.deepcopy(plain)
    for seed in range(3):
        x = make_batch(4, seed=seed)
        got = backward(model, x, lambda x: OfOtherMakers.apply(model, x))
        assert worst(got, backward(plain, x, plain)) < (1e-10, "")


def test_a_new_batch_within_a_backward_pass_is_a_step_of_its_own():
    model = net()
    with torch.no_grad():
        model(make_batch(4))  # leaves runs behind that nothing will repeat
    plain, x, other = copy.deepcopy(model), make_batch(4, seed=1).requires_grad_(), make_batch(4, seed=2)
    y = model(x)
    outputs = []
    y.register_hook(lambda _: outputs.append(model(5 * other)))
    y.sum().backward()
    plain(x)
    assert torch.equal(outputs[0], plain(5 * other))
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_empty_batch_is_repeated_as_any_other(reentrant):
    layers = [BatchRenorm2d(3, dtype=torch.float64, schedule=None) for _ in range(2)]
    xs = [make_batch(4)[:0], make_batch(4)]
    for layer, call in zip(layers, (layers[0], checkpointed(layers[1], reentrant)), strict=True):
        torch.cat([call(x.clone().requires_grad_()) for x in xs]).square().sum().backward()
        assert layer.num_batches_tracked == 2
    torch.testing.assert_close(layers[1].weight.grad, layers[0].weight.grad, rtol=1e-12, atol=1e-12)


def test_a_constant_channel_and_a_nan_do_not_confuse_the_runs():
    memory = Memory()
    for value in (1.0, 2.0):
        mean = torch.tensor([value, float("nan")])
        memory.keep(Corrections(mean, torch.full((2,), value), torch.full((2,), -value)))
    run = memory.nearest(torch.tensor([2.0, float("nan")]))
    assert (run.r[0].item(), run.d[0].item()) == (2.0, -2.0)
    assert memory.nearest(torch.tensor([3.0, 1.0])) is None
    assert memory.nearest(torch.tensor([2.0, float("nan")], device="meta")) is None  # of another device: of no use


def test_nothing_is_kept_where_nothing_can_be_repeated():
    model = net()
    for seed in range(3):
        backward(model, make_batch(4, seed=seed), model)
    assert len(model[1]._memory) == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_kept_lives_as_long_as_the_graph_that_may_repeat_it(reentrant):
    model = net()
    memory = model[1]._memory
    ys = [checkpointed(model, reentrant)(make_batch(4, seed=seed).requires_grad_()) for seed in range(3)]
    assert len(memory) == 3
    del ys[0]  # never repeated
    assert len(memory) == 2
    ys.pop().sum().backward()
    assert len(memory) == 1
    ys.pop().sum().backward()
    assert len(memory) == 0


def pack_nothing(x):
    return x


def test_what_nothing_is_known_to_repeat_is_bounded():
    wide = Corrections(torch.zeros(CAPACITY // 3 // 4), None, None)
    memory = Memory()
    with torch.no_grad():
        for _ in range(9):
            memory.keep(wide)
    assert len(memory) == 1  # one run, kept four times
    assert len(memory._others) == 4
    endless = Memory()
    with torch.autograd.graph.saved_tensors_hooks(pack_nothing, pack_nothing):
        for _ in range(9):
            endless.keep(wide)
    assert len(endless._others) == 4


def hooks_that_recompute(call):
    """A checkpoint of other makers, whose one pair of hooks serves for ever and runs `call` again."""
    inputs = []

    def pack(x):
        return x

    def unpack(x):
        if inputs:
            x_again = inputs.pop()
            with torch.enable_grad():
                call(x_again)
        return x

    return inputs, torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def test_hooks_that_outlive_a_checkpoint_do_not_mix_up_its_runs():
    plain = net()
    model = copy.deepcopy(plain)
    inputs, hooks = hooks_that_recompute(model)
    for seed in range(3):
        x = make_batch(4, seed=seed)

        def hooked(x):
            inputs.append(x.detach())
            with hooks:
                return model(x)

        assert worst(backward(model, x, hooked), backward(plain, x, plain)) < (1e-10, "")
    memory, wide = Memory(), Corrections(torch.zeros(CAPACITY // 3 // 4), None, None)
    with hooks:
        for _ in range(9):
            memory.keep(wide)
    assert len(memory._others) == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_very_many_ghost_batches_is_repeated_exactly(reentrant, monkeypatch):
    monkeypatch.setattr(recomputation, "CAPACITY", 1)
    plain = shaken(BatchRenorm1d(3, momentum=0.1, schedule=None, dtype=torch.float64, virtual_batch_size=2))
    layer, x = copy.deepcopy(plain), make_batch(2).repeat(9, 1)
    got = backward(layer, x, checkpointed(layer, reentrant))
    assert worst(got, backward(plain, x, plain)) < (1e-12, "")


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

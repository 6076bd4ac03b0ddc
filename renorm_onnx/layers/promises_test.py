"""Each promise of the layer as one check, which the layer keeps and another layer breaks.

The other layer is the naive one wherever that goes wrong by itself; else ours, with the one thing changed that the
check is there to see. A check that cannot fail would be found here.
"""

import copy
import io
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from renorm_onnx.layers import kernels
from renorm_onnx.layers.conftest import LAYERS, NaiveBatchRenorm, make_batch, outcome, shaken, weights_like, worst
from renorm_onnx.layers.schedules import Ramp


def ours(layer):
    return layer


class OnTheHost(NaiveBatchRenorm):
    """Follows a schedule by numbers, as every peer does."""

    def __init__(self, layer):
        super().__init__(layer)
        self.step = 0

    def forward(self, x):
        self.r_max, self.d_max = Ramp(1, 5, 4)(self.step)
        self.step += 1
        return super().forward(x)


class InAttributes(NaiveBatchRenorm):
    """Keeps its statistics outside of the buffers, as avalanche does."""

    def __init__(self, layer):
        super().__init__(layer)
        for name in ("running_mean", "running_var"):
            value = self._buffers.pop(name)
            setattr(self, name, value)


class EpsOutside(NaiveBatchRenorm):
    """Adds eps to sigma_B and not to its square, as ludvb and mf1024 do."""

    def forward(self, x):
        shape = [1, -1] + [1] * (x.dim() - 2)
        axes = [0, *range(2, x.dim())]
        mean = x.mean(axes)
        sigma = ((x - mean.view(shape)) ** 2).mean(axes).sqrt() + self.eps
        return (x - mean.view(shape)) / sigma.view(shape) * self.weight.view(shape) + self.bias.view(shape)


class Twice(nn.Module):
    """Learns twice from each batch."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        with torch.no_grad():
            self.layer(x)
        return self.layer(x)


@contextmanager
def changed(target, name, value):
    with mock.patch.object(target, name, value):
        yield ours


def made(wrap, rank=4, dtype=torch.float64, **options):
    return wrap(shaken(LAYERS[rank](3, **{"momentum": 0.1, "schedule": None, "dtype": dtype, **options})))


def formula(layer):
    """The float64 reference, in the state of `layer`; called once and eagerly, the naive layer is right."""
    return NaiveBatchRenorm(copy.deepcopy(getattr(layer, "layer", layer)).double())


def compiled(wrap):
    eager = nn.Sequential(made(wrap), nn.Tanh(), made(wrap))
    net = copy.deepcopy(eager)
    call = torch.compile(net, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        x = make_batch(4, seed=seed)
        assert worst(outcome(net, x, call), outcome(eager, x)) < (1e-9, "")


def compiled_once(wrap):
    layer = made(wrap, schedule=Ramp(1, 5, 4))
    counter = CompileCounterWithBackend("eager")
    call = torch.compile(layer, backend=counter, fullgraph=True)
    for seed in range(6):
        call(make_batch(4, seed=seed))
    assert counter.frame_count == 1


def checkpointed(wrap, reentrant):
    plain = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=torch.float64), made(wrap), nn.Tanh())
    model = copy.deepcopy(plain)
    results = []
    for net, call in ((plain, plain), (model, lambda x: checkpoint(model, x, use_reentrant=reentrant))):
        x = make_batch(4).requires_grad_()
        y = call(x)
        (y * weights_like(y)).sum().backward()
        results.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    torch.testing.assert_close(*results)


def under_autocast(wrap, dtype):
    layer = made(wrap, dtype=torch.float32)
    reference = formula(layer)

    def call(x):
        with torch.autocast("cpu", dtype=dtype):
            return layer(x)

    for seed in range(2):
        x = make_batch(4, seed=seed, dtype=dtype)
        got = outcome(layer, x, call)
        assert got["y"].dtype == dtype
        assert worst(got, outcome(reference, x.double())) < (2e-3 if dtype is torch.float16 else 2e-2, "")


def scaled(wrap):
    layer = made(wrap, dtype=torch.float32)
    reference = formula(layer)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(layer.parameters(), 0.0)
    for seed in range(3):
        optimizer.zero_grad()
        x = make_batch(4, seed=seed)
        want = outcome(reference, x)
        y = layer(x.float())
        scaler.scale((y * weights_like(y)).sum()).backward()
        scaler.unscale_(optimizer)
        for got, name in zip(layer.parameters(), ("weight", "bias"), strict=True):
            torch.testing.assert_close(got.grad.double(), want[name], rtol=1e-4, atol=1e-4)
        scaler.step(optimizer)
        scaler.update()
    assert list(layer.buffers())[-1].item() == 3


def accumulated(wrap):
    layer = made(wrap)
    reference = formula(layer)
    for model in (layer, reference):
        for seed in range(3):
            y = model(make_batch(4, seed=seed))
            (y * weights_like(y)).sum().backward()
    for got, want in zip(layer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    torch.testing.assert_close(list(layer.buffers()), list(reference.buffers()))


def resumed(wrap):
    layer = made(wrap)
    layer(make_batch(4))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    fresh = wrap(LAYERS[4](3, momentum=0.1, schedule=None, dtype=torch.float64))
    fresh.load_state_dict(layer.state_dict())
    twins = [copy.deepcopy(layer), torch.load(file, weights_only=False), fresh]
    x = make_batch(4, seed=5)
    want = layer(x)
    for twin in twins:
        assert torch.equal(twin(x), want)


def exported(wrap):
    program = torch.export.export(made(wrap).eval(), (make_batch(4),))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["aten.batch_norm.default"]


def transformed(wrap):
    members = [made(wrap), made(wrap)]
    parameters, buffers = torch.func.stack_module_state(members)
    xs = torch.stack([make_batch(4, seed=seed) for seed in range(2)])
    cotangent = weights_like(xs[0])
    want = [outcome(copy.deepcopy(member), x) for member, x in zip(members, xs, strict=True)]

    def loss(parameters, buffers, x):
        return (functional_call(members[0], (parameters, buffers), (x,)) * cotangent).sum()

    grads = torch.vmap(torch.func.grad(loss))(parameters, buffers, xs)
    for name in ("weight", "bias"):
        torch.testing.assert_close(grads[name], torch.stack([each[name] for each in want]))
    torch.testing.assert_close(buffers["running_var"], torch.stack([each["running_var"] for each in want]))


def differentiated_twice(wrap):
    layer = made(wrap, r_max=1.5, d_max=0.5)
    with torch.no_grad():  # so far from the batch that r and d stay at their bounds, where they are constants
        layer.running_mean.add_(100)
        layer.running_var.mul_(100)
    buffers = {name: value.clone() for name, value in layer.named_buffers()}

    def function(x, weight, bias):
        state = {"weight": weight, "bias": bias, **{name: value.clone() for name, value in buffers.items()}}
        return functional_call(layer, state, (x,))

    leaves = [value.detach().clone().requires_grad_() for value in (make_batch(4)[:2, :, :2, :2], *layer.parameters())]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def with_a_constant_channel(wrap):
    x = make_batch(4)
    x[:, 1] = 7.0
    assert all(torch.isfinite(value).all() for value in outcome(made(wrap), x).values())


def of_large_variance(wrap):
    layer = made(wrap, dtype=torch.float32)
    got = outcome(layer, make_batch(4, dtype=torch.float16) * 300)
    assert all(torch.isfinite(value).all() for value in got.values())


def of_one_value(wrap):
    try:
        made(wrap, 2)(torch.ones(1, 3, dtype=torch.float64))
    except ValueError as error:
        assert "Expected more than 1 value per channel" in str(error)  # noqa: PT017 (other layers may not raise)
    else:
        raise AssertionError("one value per channel was taken for a batch")


def frozen(wrap):
    model = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=torch.float64), made(wrap)).train()
    model[1].eval()
    before = copy.deepcopy(model[1].state_dict())
    model(make_batch(4)).sum().backward()
    torch.testing.assert_close(model[1].state_dict(), before, rtol=0, atol=0)


def with_frozen_parameters(wrap):
    want = outcome(made(wrap), make_batch(4))
    for name in ("weight", "bias"):
        layer = made(wrap)
        layer.get_parameter(name).requires_grad_(False)
        x = make_batch(4).requires_grad_()
        y = layer(x)
        (y * weights_like(y)).sum().backward()
        assert layer.get_parameter(name).grad is None
        other = "bias" if name == "weight" else "weight"
        torch.testing.assert_close(layer.get_parameter(other).grad, want[other])
        torch.testing.assert_close(x.grad, want["x.grad"])


def of_nothing(wrap):
    layer = made(wrap)
    before = [value.clone() for value in layer.buffers()][:2]
    assert layer(torch.empty(0, 3, 4, 4, dtype=torch.float64)).shape == (0, 3, 4, 4)
    torch.testing.assert_close(list(layer.buffers())[:2], before, rtol=0, atol=0)


def of_any_strides(wrap):
    x = make_batch(4)
    strided = torch.empty(3, 2 * x.size(0), *x.shape[2:], dtype=x.dtype)[:, ::2].transpose(0, 1).copy_(x)
    layer = made(wrap)
    assert worst(outcome(layer, strided), outcome(formula(made(wrap)), x)) < (1e-11, "")


def of_any_rank(wrap):
    for rank in (2, 3, 4, 5):
        layer = made(wrap, rank)
        reference = formula(made(ours, rank))
        for seed in range(2):
            x = make_batch(rank, seed=seed)
            assert worst(outcome(layer, x), outcome(reference, x)) < (1e-11, "")


STATISTICS, BACKWARD, RULE = kernels.statistics, kernels._backward, kernels._Renormalize.backward


def statistics_of_storage(x):
    return STATISTICS(torch.as_strided(x, x.shape, torch.empty(x.shape).stride()))


def statistics_of_one_position(x):
    return STATISTICS(x if x.dim() == 2 else x.flatten(2)[:, :, 0])


def rule_with_the_scale_of_the_forward_pass(ctx, grad):
    with mock.patch.object(torch, "is_grad_enabled", return_value=False):
        return RULE(ctx, grad)


def backward_without_the_shift(*arguments):
    *others, (needs_x, needs_scale, _) = arguments
    return BACKWARD(*others, (needs_x, needs_scale, needs_scale))


PROMISES = {
    "under torch.compile": (compiled, nullcontext(NaiveBatchRenorm)),
    "in one compiled graph for the whole schedule": (compiled_once, nullcontext(OnTheHost)),
    "checkpointed": (partial(checkpointed, reentrant=False), nullcontext(NaiveBatchRenorm)),
    "checkpointed, reentrant": (partial(checkpointed, reentrant=True), nullcontext(NaiveBatchRenorm)),
    "under autocast to float16": (partial(under_autocast, dtype=torch.float16), nullcontext(NaiveBatchRenorm)),
    "under autocast to bfloat16": (partial(under_autocast, dtype=torch.bfloat16), nullcontext(NaiveBatchRenorm)),
    "with a GradScaler": (scaled, nullcontext(Twice)),
    "with accumulated gradients": (accumulated, nullcontext(Twice)),
    "copied, pickled and loaded": (resumed, nullcontext(InAttributes)),
    "exported": (exported, nullcontext(NaiveBatchRenorm)),
    "under vmap and grad": (transformed, changed(kernels, "_transform_active", lambda: False)),
    "differentiated twice": (
        differentiated_twice,
        changed(kernels._Renormalize, "backward", staticmethod(rule_with_the_scale_of_the_forward_pass)),
    ),
    "with a constant channel": (with_a_constant_channel, nullcontext(EpsOutside)),
    "of float16 with large variance": (of_large_variance, nullcontext(NaiveBatchRenorm)),
    "of one value per channel": (of_one_value, nullcontext(NaiveBatchRenorm)),
    "frozen by eval()": (frozen, nullcontext(NaiveBatchRenorm)),
    "with frozen parameters": (with_frozen_parameters, changed(kernels, "_backward", backward_without_the_shift)),
    "of an empty batch": (of_nothing, nullcontext(NaiveBatchRenorm)),
    "of any strides": (of_any_strides, changed(kernels, "statistics", statistics_of_storage)),
    "of 2 to 5 dimensions": (of_any_rank, changed(kernels, "statistics", statistics_of_one_position)),
}


@pytest.mark.parametrize("check", [check for check, _ in PROMISES.values()], ids=PROMISES)
def test_the_layer_is_right(check):
    check(ours)


@pytest.mark.parametrize(("check", "breaking"), PROMISES.values(), ids=PROMISES)
def test_a_layer_that_breaks_the_promise_is_found_out(check, breaking):
    with breaking as wrap, pytest.raises((AssertionError, RuntimeError)):
        check(wrap)

import copy

import pytest
import torch
from torch.func import grad, vmap

from renorm_onnx import batch_renorm
from renorm_onnx.errors import InputError
from renorm_onnx.layers import functional
from renorm_onnx.layers.conftest import LAYERS, algorithm_1, make_batch, shaken, weights_like
from renorm_onnx.layers.functional import STATS

BOUNDS = {"r_max": 1.5, "d_max": 0.5}


def layer_for(rank, **options):
    return shaken(LAYERS[rank](3, **{"momentum": 0.1, "schedule": None, "dtype": torch.float64, **BOUNDS, **options}))


def state_of(layer):
    return layer.running_mean.clone(), layer.running_var.clone()


def formula(x, mean, var, weight, bias, momentum=0.1):
    """The paper's lines in float64, by autograd: y and the statistics after."""
    x, mean, var, weight, bias = (tensor.double() for tensor in (x, mean, var, weight, bias))
    sigma = torch.sqrt(var + 1e-5)
    y, mu, sigma = algorithm_1(x, weight, bias, mean, sigma, 1e-5, BOUNDS["r_max"], BOUNDS["d_max"], momentum)
    return y, mu, sigma**2 - 1e-5


@pytest.mark.parametrize("rank", LAYERS)
@pytest.mark.parametrize("stat", STATS)
def test_it_takes_the_steps_of_the_layer(rank, stat):
    layer = layer_for(rank, stat=stat)
    mean, var = state_of(layer)
    for seed in range(4):
        x = make_batch(rank, seed=seed)
        y = batch_renorm(x, mean, var, layer.weight, layer.bias, True, 0.1, stat=stat, **BOUNDS)
        torch.testing.assert_close(y, layer(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close((mean, var), state_of(layer), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(batch_renorm(x, mean, var, layer.weight, layer.bias), layer.eval()(x))


@pytest.mark.parametrize(
    ("dtype", "state", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-10),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 4e-2),  # about 4 units of the type's last place, as the next two
        (torch.float16, torch.float32, 5e-3),
        (torch.float16, torch.float16, 5e-3),
    ],
    ids=str,
)
def test_outputs_gradients_and_statistics_are_those_of_algorithm_1(dtype, state, tolerance):
    x = make_batch(4, dtype=dtype).requires_grad_()
    layer = layer_for(4, dtype=state)
    mean, var = state_of(layer)
    leaves = (x, layer.weight, layer.bias)
    want, want_mean, want_var = formula(x, mean, var, layer.weight, layer.bias)
    cotangent = weights_like(want).to(dtype)
    want_grads = torch.autograd.grad(want, leaves, cotangent.double())
    y = batch_renorm(x, mean, var, layer.weight, layer.bias, True, 0.1, **BOUNDS)
    grads = torch.autograd.grad(y, leaves, cotangent)
    assert (y.dtype, mean.dtype, grads[1].dtype) == (dtype, state, state)
    for got, wanted in zip((y, mean, var, *grads), (want, want_mean, want_var, *want_grads), strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance * scale)
    plain = batch_renorm(x, *state_of(layer), layer.weight, layer.bias, True, r_max=1, d_max=0)
    control = torch.autograd.grad(plain, x, cotangent)[0].double()
    assert (control - want_grads[0]).abs().max() > 5 * tolerance * want_grads[0].abs().max()


def test_gradients_pass_through_steps_of_an_inner_loop():
    """As in MAML: one set of statistics per inner step, and second derivatives."""
    layer, x = layer_for(4), make_batch(4)
    outcomes = []
    for step in (lambda *args: batch_renorm(*args, True, 0.1, **BOUNDS), lambda *args: formula(*args)[0]):
        weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
        means, variances = (torch.stack([values, 2 * values]) for values in state_of(layer))
        fast = weight
        for i in range(2):
            y = step(x, means[i], variances[i], fast, bias)
            (slope,) = torch.autograd.grad((y.sin() * weights_like(y)).sum(), fast, create_graph=True)
            fast = fast - 0.1 * slope
        outcomes.append((fast.detach(), *torch.autograd.grad(fast.square().sum(), (weight, bias))))
    torch.testing.assert_close(*outcomes, rtol=1e-9, atol=1e-9)
    assert (outcomes[0][1] - 2 * outcomes[0][0]).abs().max() > 0.01  # control: the first-order gradient is another


def test_no_gradient_reaches_the_statistics():
    layer, x = layer_for(4), make_batch(4)
    means, variances = (values.requires_grad_() for values in state_of(layer))
    y = batch_renorm(x, means, variances, layer.weight, layer.bias, True, 0.1, **BOUNDS)
    torch.testing.assert_close(y, layer(x), rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(y.sum(), (means, variances), allow_unused=True) == (None, None)
    torch.testing.assert_close((means.detach(), variances.detach()), state_of(layer), rtol=1e-12, atol=1e-12)


def test_transforms_map_over_statistics_and_take_gradients():
    layer = layer_for(4)
    xs = torch.stack([make_batch(4, seed=seed) for seed in (1, 2)])
    means, variances = (torch.stack([values, values + 0.5]) for values in state_of(layer))
    singles, cotangent = [], weights_like(xs[0])
    for i in range(2):
        x, mean, var = xs[i].clone().requires_grad_(), means[i].clone(), variances[i].clone()
        y, mean, var = formula(x, mean, var, layer.weight, layer.bias)
        singles.append((y, torch.autograd.grad((y * cotangent).sum(), x)[0], mean, var))
    ys, slopes, after_mean, after_var = (torch.stack(each) for each in zip(*singles, strict=True))

    def call(x, mean, var):
        return batch_renorm(x, mean, var, layer.weight.detach(), layer.bias.detach(), True, 0.1, **BOUNDS)

    def loss(x, mean, var):
        return (call(x, mean.clone(), var.clone()) * cotangent).sum()

    torch.testing.assert_close(vmap(grad(loss))(xs, means, variances), slopes, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad(loss)(xs[0], means[0], variances[0]), slopes[0], rtol=1e-10, atol=1e-10)
    before = means.clone()
    with pytest.raises(InputError, match="batch_renorm: vmap or functionalize has taken x but not running_mean"):
        vmap(lambda x: call(x, means[0], variances[0]))(xs)
    assert torch.equal(means, before)
    torch.testing.assert_close(vmap(call)(xs, means, variances), ys.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((means, variances), (after_mean, after_var), rtol=1e-12, atol=1e-12)


def late_gradients(call):
    """Three steps, and only then their gradients: the statistics have moved, and r and d must not come from them."""
    layer = layer_for(4)
    mean, var = state_of(layer)
    xs = [make_batch(4, seed=seed).requires_grad_() for seed in range(3)]
    ys = [call(x, mean, var, layer.weight, layer.bias, True, 0.5, **BOUNDS) for x in xs]
    grads = torch.autograd.grad(sum((y * weights_like(y)).sum() for y in ys), [*xs, layer.weight, layer.bias])
    return *(y.detach() for y in ys), *grads, mean, var


def test_a_compiled_step_is_the_eager_one_also_when_its_gradients_come_late(monkeypatch):
    with torch._functorch.config.patch(activation_memory_budget=1e-9):
        compiled = torch.compile(batch_renorm, backend="aot_eager_decomp_partition", fullgraph=True)
        torch.testing.assert_close(late_gradients(compiled), late_gradients(batch_renorm), rtol=1e-11, atol=1e-11)
        torch.compiler.reset()
        monkeypatch.setattr(functional, "save_for_backward", lambda r, d: (r, d))
        with pytest.raises((AssertionError, RuntimeError)):  # control: what is computed again is another r and d
            torch.testing.assert_close(late_gradients(compiled), late_gradients(batch_renorm), rtol=1e-2, atol=1e-2)


def test_a_batch_that_says_nothing_teaches_nothing():
    layer = layer_for(3)
    mean, var = state_of(layer)
    y = batch_renorm(torch.zeros(0, 3, 5, dtype=torch.float64), mean, var, layer.weight, layer.bias, True)
    assert y.shape == (0, 3, 5)
    x = make_batch(3)
    x[0, 1, 0] = torch.inf
    finite = copy.deepcopy(layer)
    finite(x)
    torch.testing.assert_close((mean, var), state_of(layer), rtol=0, atol=0)
    batch_renorm(x, mean, var, layer.weight, layer.bias, True, 0.1)
    torch.testing.assert_close((mean, var), state_of(finite))
    assert mean[1] == layer.running_mean[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": torch.ones(1, 3)}, r"Expected more than 1 value per channel .* \(1, 3\)"),
        ({"x": torch.ones(3)}, r"x has shape \(3,\) and dtype torch\.float32, expected \(N, C, \*\)"),
        ({"x": torch.ones(4, 3, dtype=torch.int32)}, r"x has shape \(4, 3\) and dtype torch\.int32"),
        ({"running_mean": None}, "running_mean is None, expected statistics because r and d are measured from them"),
        ({"running_var": torch.ones(1)}, r"running_var has shape \(1,\) .* expected \(3,\) and torch\.float32 because"),
        ({"weight": torch.ones(3).double()}, r"weight has shape \(3,\) and dtype torch\.float64, expected \(3,\) and"),
        ({"bias": torch.ones(4)}, r"bias has shape \(4,\)"),
        ({"stat": "std"}, "stat='std', expected one of"),
        ({"r_max": float("nan")}, r"r_max=nan, d_max=5\.0, expected finite r_max >= 1"),
        ({"momentum": None}, r"momentum=None, expected a number in \[0, 1\]"),
        ({"momentum": 1.5}, r"momentum=1\.5, expected a number"),
    ],
    ids=str,
)
def test_what_it_cannot_use_is_refused_and_changes_nothing(changes, said):
    given = {"x": torch.randn(4, 3), "running_mean": torch.zeros(3), "running_var": torch.ones(3), "training": True}
    given |= changes
    before = copy.deepcopy(given)
    with pytest.raises(InputError, match=f"batch_renorm: {said}"):
        batch_renorm(**given)
    for name in ("running_mean", "running_var"):
        assert given[name] is None or torch.equal(given[name], before[name])

"""The paths of a step: derivatives of both orders, layouts, narrow types, what is kept, function transforms."""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from renorm_onnx.errors import InputError
from renorm_onnx.layers import functional, kernels, modules, recomputation
from renorm_onnx.layers.conftest import LAYERS, NaiveBatchRenorm, make_batch, outcome, shaken, weights_like, worst
from renorm_onnx.layers.modules import BatchRenorm2d


@pytest.fixture(params=["usual step", "any step", "traceable"])
def path(request, monkeypatch):
    """Force each of the paths that a training step may take."""
    if request.param == "any step":
        monkeypatch.setattr(modules, "take_usual_step", lambda layer, x: None)
    if request.param == "traceable":
        monkeypatch.setattr(kernels, "available", lambda x: False)
    return request.param


def layer_for(rank, dtype=torch.float64, **options):
    return shaken(LAYERS[rank](3, **{"momentum": 0.1, "schedule": None, "dtype": dtype, **options}))


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_every_path_equals_the_plain_formula(rank, path):
    layer = layer_for(rank)
    naive = NaiveBatchRenorm(layer)
    for seed in range(3):
        x = make_batch(rank, seed=seed)
        assert worst(outcome(layer, x), outcome(naive, x)) < (1e-11, "")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("options", [{}, {"r_max": 1.5, "d_max": 0.5}, {"r_max": 1, "d_max": 0}], ids=str)
def test_first_and_second_derivatives_are_right(options, affine, path):
    # Free running statistics would make the function differ between the evaluations of the finite differences.
    layer = layer_for(4, affine=affine, **options)
    state = copy.deepcopy(layer.state_dict())
    x = make_batch(4)[:2, :, :2, :2].clone().requires_grad_()
    fixed_r_d = _with_fixed_corrections(layer, x)
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(fixed_r_d, (x, *parameters))
    assert torch.autograd.gradgradcheck(fixed_r_d, (x, *parameters))
    layer.load_state_dict(state)


def _with_fixed_corrections(layer, x):
    """The normalization as a function of x, gamma and beta, at the r and d that x gives: they carry no gradient."""

    def parts(x):
        batch = functional.batch_statistics(x)
        sigma = functional.deviation(layer.running_var, layer.eps)
        spread = functional.deviation(batch.var, layer.eps)
        bounds = layer.r_max, layer.d_max
        return batch, functional.corrections(batch.mean, spread, layer.running_mean, sigma, *bounds)

    _, (r, d) = parts(x)

    def function(x, weight=None, bias=None):
        return functional.normalize(x, weight, bias, parts(x)[0], r, d, layer.eps)

    return function


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parameters_get_no_gradient_and_spoil_no_other(frozen, path):
    layer = layer_for(4)
    want = outcome(layer_for(4), make_batch(4))
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    x = make_batch(4).requires_grad_()
    y = layer(x)
    (y * weights_like(y)).sum().backward()
    torch.testing.assert_close(x.grad, want["x.grad"])
    for name in ("weight", "bias"):
        grad = getattr(layer, name).grad
        assert grad is None if name in frozen else torch.allclose(grad, want[name])


def test_an_input_without_gradient_is_fine(path):
    layer = layer_for(4)
    y = layer(make_batch(4))
    (y * weights_like(y)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, outcome(layer_for(4), make_batch(4))["weight"])


@pytest.mark.parametrize("r_max", [1.0, 3.0])
def test_a_constant_channel_has_finite_gradients(r_max, path):
    layer = layer_for(4, r_max=r_max, d_max=5 * (r_max > 1))
    x = make_batch(4)
    x[:, 1] = 7.0
    got = outcome(layer, x)
    assert all(torch.isfinite(value).all() for value in got.values())
    assert layer.running_var.min() >= 0


def test_bad_values_stay_in_their_channel(path):
    clean, dirty = layer_for(4), layer_for(4)
    x = make_batch(4)
    want = outcome(clean, x)
    x[0, 1, 0, 0], x[1, 1, 0, 0] = float("nan"), float("inf")
    got = outcome(dirty, x)
    for name, value in want.items():
        axis = 1 if value.dim() == 4 else 0
        if value.dim():
            for channel in (0, 2):
                torch.testing.assert_close(got[name].select(axis, channel), value.select(axis, channel))


@pytest.mark.parametrize("rank", [4, 5])
def test_channels_last_stays_channels_last(rank, path):
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[rank]
    x = make_batch(rank).contiguous(memory_format=memory_format)
    got = outcome(layer_for(rank), x)
    assert got["y"].is_contiguous(memory_format=memory_format)
    assert got["x.grad"].is_contiguous(memory_format=memory_format)
    assert worst(got, outcome(layer_for(rank), x.contiguous())) < (1e-12, "")


def test_any_strides_will_do(path):
    x = make_batch(4)
    strided = torch.empty(3, 2 * x.size(0), *x.shape[2:], dtype=x.dtype)[:, ::2].transpose(0, 1).copy_(x)
    assert not strided.is_contiguous()
    assert worst(outcome(layer_for(4), strided), outcome(layer_for(4), x)) < (1e-12, "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"schedule": "paper"}], ids=str)
def test_narrow_input_has_float32_statistics(dtype, options, path):
    layer = layer_for(4, dtype=torch.float32, **options)
    wide = copy.deepcopy(layer)
    x = make_batch(4, dtype=dtype) * 300  # variances up to 1.4e6, beyond the largest float16
    got, want = outcome(layer, x), outcome(wide, x.float())
    assert got["y"].dtype == dtype
    assert got["x.grad"].dtype == dtype
    assert layer.running_var.max() > 65504 * layer.momentum
    torch.testing.assert_close(got["running_var"], want["running_var"], rtol=1e-4, atol=0)
    torch.testing.assert_close(got["running_mean"], want["running_mean"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["y"].float(), want["y"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_converted_to_half_works(dtype, path):
    layer = layer_for(4, dtype=torch.float32).to(dtype)
    wide = copy.deepcopy(layer).float()
    got, want = outcome(layer, make_batch(4, dtype=dtype)), outcome(wide, make_batch(4, dtype=dtype).float())
    for name in ("y", "weight", "bias", "running_var"):
        assert got[name].dtype == dtype
        torch.testing.assert_close(got[name].float(), want[name], rtol=0.03, atol=0.15)
    layer(make_batch(4, dtype=dtype) * 500)
    assert torch.isfinite(layer.running_var).all()


def test_what_is_kept_for_the_backward_pass_is_x_and_vectors():
    layer = layer_for(4, dtype=torch.float32)
    x = torch.randn(8, 3, 64, 64, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert sum(kept.values()) <= x.numel() * 4 + 10 * 3 * 4
    assert all(tensor.shape == (3,) for tensor in (*y.grad_fn.by, y.grad_fn.scale))


def test_two_steps_may_be_differentiated_together():
    layer = layer_for(4)
    naive = NaiveBatchRenorm(layer)
    x = make_batch(4)
    got = outcome(layer, x, lambda x: layer(x) + layer(layer(2 * x)))
    assert worst(got, outcome(naive, x, lambda x: naive(x) + naive(naive(2 * x)))) < (1e-10, "")


def test_gradients_accumulate_over_microbatches():
    layer = layer_for(4)
    naive = NaiveBatchRenorm(layer)
    for model in (layer, naive):
        for seed in range(3):
            y = model(make_batch(4, seed=seed))
            (y * weights_like(y)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, naive.weight.grad)
    assert layer.num_batches_tracked.item() == 3


def test_func_grad_equals_autograd():
    layer = layer_for(4)
    x = make_batch(4)
    want = outcome(copy.deepcopy(layer), x)
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())

    def loss(parameters, buffers, x):
        y = functional_call(layer, (parameters, {k: v.clone() for k, v in buffers.items()}), (x,))
        return (y * weights_like(y)).sum()

    grads, grad_x = torch.func.grad(loss, argnums=(0, 2))(parameters, buffers, x)
    torch.testing.assert_close(grad_x, want["x.grad"])
    torch.testing.assert_close(grads["weight"], want["weight"])


def test_func_vmap_over_an_ensemble_equals_a_loop():
    members = [shaken(BatchRenorm2d(3, momentum=0.1, schedule=None, dtype=torch.float64), seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(members)
    x = make_batch(4)
    base = copy.deepcopy(members[0])

    def call(parameters, buffers):
        return functional_call(base, (parameters, buffers), (x,))

    y = torch.vmap(call)(parameters, buffers)
    torch.testing.assert_close(y, torch.stack([member(x) for member in members]))
    torch.testing.assert_close(buffers["running_var"], torch.stack([member.running_var for member in members]))


TRANSFORMS = {
    "vmap": lambda call, x: torch.vmap(call)(torch.stack([x, x])),
    "vmap of grad": lambda call, x: torch.vmap(torch.func.grad(lambda x: call(x).sum()))(torch.stack([x, x])),
    "functionalize": lambda call, x: torch.func.functionalize(call)(x),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_statistics_that_a_transform_does_not_know_of_are_not_trained(transform, masked):
    layer, x = layer_for(4), make_batch(4)
    mask = (torch.ones(x.size(0), *x.shape[2:], dtype=torch.bool),) if masked else ()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(
        InputError, match=r"BatchRenorm2d: vmap or functionalize has taken x but not running_mean, .*cal"
    ):
        transform(lambda x: layer(x, *mask), x)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    # What the message advises.
    transform(lambda x: layer.eval()(x, *mask), x)
    untracked = layer_for(4, track_running_stats=False)
    transform(lambda x: untracked(x, *mask), x)
    buffers = {name: torch.stack([value, value]) for name, value in layer.train().named_buffers()}
    y = torch.vmap(lambda x, buffers: functional_call(layer, buffers, (x, *mask)))(torch.stack([x, x]), buffers)
    torch.testing.assert_close(y, torch.stack([copy.deepcopy(layer)(x, *mask)] * 2))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap has a loop alone for addcmul_
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"r_max": 1, "d_max": 0}, {"affine": False}], ids=str)
def test_a_batch_of_gradients_is_the_gradients_one_by_one(options, memory_format, path):
    layer = layer_for(4, **options)
    naive = NaiveBatchRenorm(layer)
    x = make_batch(4).contiguous(memory_format=memory_format).requires_grad_()
    vectors = torch.stack([weights_like(x, seed) for seed in range(4)])
    y = layer(x)
    leaves = [x, *layer.parameters()]
    batched = torch.autograd.grad(y, leaves, vectors, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda vector: torch.autograd.grad(y, leaves, vector, retain_graph=True))(vectors)
    if not layer.affine:
        naive.weight, naive.bias = torch.ones(3), torch.zeros(3)
    y = naive(x)
    leaves = [x, *naive.parameters()]
    want = [torch.autograd.grad(y, leaves, vector, retain_graph=True) for vector in vectors]
    want = [torch.stack(each) for each in zip(*want, strict=True)]
    for got in (batched, mapped):
        torch.testing.assert_close(list(got), want, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # imported by forward_ad
def test_forward_mode_derivatives_equal_reverse_mode():
    layer = layer_for(4)
    x, v = make_batch(4), make_batch(4, seed=9)
    x_leaf = x.clone().requires_grad_()
    y = copy.deepcopy(layer)(x_leaf)
    (want,) = torch.autograd.grad(y, x_leaf, weights_like(y))
    state = copy.deepcopy(layer.state_dict())
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close((tangent * weights_like(y)).sum(), (want * v).sum())
    layer.load_state_dict(state)
    _, tangent = torch.func.jvp(lambda x: _pure(layer, x), (x,), (v,))
    torch.testing.assert_close((tangent * weights_like(y)).sum(), (want * v).sum())


def _pure(layer, x):
    return functional_call(layer, {name: value.clone() for name, value in layer.named_buffers()}, (x,))


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (3.0, 5.0)])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_parameters_of_another_length_are_refused_and_teach_nothing(bounds, name, length):
    layer = BatchRenorm2d(3, r_max=bounds[0], d_max=bounds[1], schedule=None)
    before = copy.deepcopy(layer.state_dict())
    setattr(layer, name, torch.nn.Parameter(torch.ones(length)))
    with pytest.raises(InputError, match=rf"{name} of shape \({length},\).*x has 3 channels"):
        layer(torch.randn(4, 3, 5, 5))
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(layer.state_dict()[key], before[key], rtol=0, atol=0)


@contextmanager
def defaults(dtype=torch.float32, device="cpu"):
    """Give torch other defaults for the time of the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = [{"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"device": "meta"}]
STEPS = [{}, {"affine": True}, {"schedule": None}, {"virtual_batch_size": 2}, {"renorm_momentum": 1.0}]


@pytest.mark.parametrize("given", DEFAULTS, ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_is_the_same_whatever_torchs_defaults(given, kind, masked, path):
    x, mask = (make_batch(4) + 5).to(kind), torch.arange(60).view(4, 3, 5) % 5 > 0
    arguments = (x, mask) if masked else (x,)
    for options in STEPS:
        options = {"affine": False, "momentum": 1.0, "stat": "var", "schedule": "paper", **options}
        layers = [layer_for(4, torch.float32, **options) for _ in range(2)]
        want = layers[0](*arguments)
        with defaults(**given):
            got = layers[1](*arguments)
        assert torch.equal(got, want), options
        for name, value in layers[1].named_buffers():
            assert torch.equal(value, layers[0].get_buffer(name)), (name, options)
        mean = x.double().mean((0, 2, 3)) if not masked else x.double()[:, :, :, 1:].mean((0, 2, 3))
        assert (layers[1].running_mean - mean).abs().max() < 1e-5  # bfloat16 rounds 5 by 0.02


class HostScalars(TorchDispatchMode):
    """Notes the operations that get a vector together with a 0-d tensor of the host's."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        dimensions = {arg.dim() for arg in args if isinstance(arg, torch.Tensor)}
        if len(dimensions) > 1 and 0 in dimensions:
            self.found.add((str(function), [isinstance(arg, torch.Tensor) for arg in args].count(True)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"stat": "var"}, {"r_max": 1, "d_max": 0}, {"renorm_momentum": 0.2}], ids=str)
@pytest.mark.parametrize("gradients", [True, False])  # the usual step, and the general one
def test_constants_of_the_host_meet_vectors_in_operations_of_two_operands_alone(options, gradients, monkeypatch):
    """On CUDA others refuse them: "CPU Scalar support for self argument is not supported when calling addcmul"."""
    monkeypatch.setattr(recomputation, "unseen", nullcontext)
    layer = layer_for(4, **options)
    with HostScalars() as mode, torch.set_grad_enabled(gradients):
        y = layer(make_batch(4))
        if gradients:
            y.sum().backward()
    assert mode.found
    assert all(count == 2 for _, count in mode.found), mode.found

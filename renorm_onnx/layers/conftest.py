"""What the tests of layers share: independent references, layers away from their initial state, the devices."""

import copy
import warnings

import pytest
import torch
from torch import nn

from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

with warnings.catch_warnings():
    # Its import uses a function that torch itself deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch._inductor.compile_fx

LAYERS = {2: BatchRenorm1d, 3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}


def algorithm_1(x, weight, bias, mu, sigma, eps, r_max, d_max, alpha):
    """The paper's Algorithm 1 with autograd, written from its lines."""
    axes = [0, *range(2, x.dim())]
    shape = [1, -1] + [1] * (x.dim() - 2)
    mu_b = x.mean(axes)
    sigma_b = torch.sqrt(((x - mu_b.view(shape)) ** 2).mean(axes) + eps)
    r = torch.clamp(sigma_b.detach() / sigma, 1 / r_max, r_max)
    d = torch.clamp((mu_b.detach() - mu) / sigma, -d_max, d_max)
    x_hat = (x - mu_b.view(shape)) / sigma_b.view(shape) * r.view(shape) + d.view(shape)
    y = weight.view(shape) * x_hat + bias.view(shape)
    return y, mu + alpha * (mu_b.detach() - mu), sigma + alpha * (sigma_b.detach() - sigma)


class NaiveBatchRenorm(nn.Module):
    """Algorithm 1 as everybody writes it first: autograd through tensors, buffers updated in place."""

    def __init__(self, layer):
        super().__init__()
        self.eps, self.momentum, self.r_max, self.d_max = layer.eps, layer.momentum, layer.r_max, layer.d_max
        self.weight, self.bias = copy.deepcopy(layer.weight), copy.deepcopy(layer.bias)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(layer, name).clone())

    def forward(self, x):
        sigma = torch.sqrt(self.running_var + self.eps)
        y, mu, sigma = algorithm_1(
            x, self.weight, self.bias, self.running_mean, sigma, self.eps, self.r_max, self.d_max, self.momentum
        )
        with torch.no_grad():
            self.running_mean.copy_(mu)
            self.running_var.copy_(sigma**2 - self.eps)
            self.num_batches_tracked.add_(1)
        return y


def shaken(layer, seed=0):
    """Fill parameters and buffers with values far from their initial ones; r and d then act, some of them clipped."""
    g = torch.Generator().manual_seed(seed)

    def draw(kind, like):
        return kind(like.shape, generator=g).to(like)

    with torch.no_grad():
        if layer.affine:
            layer.weight.copy_(draw(torch.rand, layer.weight) + 0.5)
            layer.bias.copy_(draw(torch.randn, layer.bias))
        if layer.running_mean is not None:
            layer.running_mean.copy_(draw(torch.randn, layer.running_mean))
            layer.running_var.copy_(draw(torch.rand, layer.running_var) * 3 + 0.2)
    return layer


def make_batch(rank, channels=3, seed=1, dtype=torch.float64):
    """A batch whose channels differ in mean and spread."""
    g = torch.Generator().manual_seed(seed)
    shape = {2: (16,), 3: (6, 5), 4: (4, 3, 5), 5: (2, 3, 2, 4)}[rank]
    x = torch.randn(shape[0], channels, *shape[1:], generator=g, dtype=torch.float64)
    scale = torch.linspace(0.3, 4.0, channels, dtype=torch.float64).view(1, -1, *[1] * (rank - 2))
    return (x * scale + torch.linspace(-3, 2, channels).view_as(scale)).to(dtype)


def weights_like(y, seed=3):
    """The gradient that flows into y."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y)


def outcome(module, x, call=None):
    """Everything one training step of `module` produces: output, gradients, buffers."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = (module if call is None else call)(x)
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(y, [x, *parameters.values()], weights_like(y))
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    return {"y": y.detach(), "x.grad": grads[0], **dict(zip(parameters, grads[1:], strict=True)), **buffers}


def worst(got, want):
    """The largest difference between two outcomes, each tensor measured by its largest element."""
    assert got.keys() == want.keys()
    differences = {
        name: ((got[name].double() - want[name].double()).abs().max() / want[name].double().abs().max().clamp(min=1e-3))
        for name in want
    }
    return max((value.item(), name) for name, value in differences.items())


@pytest.fixture
def cuda():
    """The CUDA device, for tests that are marked as needing it."""
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()

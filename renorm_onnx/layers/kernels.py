"""The eager path on torch's native kernels: one pass for the statistics, one read and one write to normalize.

Only plain tensors on the CPU or on CUDA come here, outside every tracer and function transform; the rest takes the path
of `functional` that all of them understand. What is saved for the backward pass is x and vectors of length C.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from renorm_onnx.errors import InputError

# Looked up once: a small layer is as fast as what it calls.
_backward = torch.ops.aten.native_batch_norm_backward.default
_transform_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling
_count_of_modes = torch._C._len_torch_dispatch_stack
_functorch = torch._C._functorch
_mode = torch._C._get_dispatch_mode
_key = torch._C._TorchDispatchModeKey
_TRACING = (_key.FAKE, _key.PROXY, _key.FUNCTIONAL)
_HALF = (torch.float16, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)


def is_eager() -> bool:
    """Return whether a call is carried out here and now: by no compiler, tracer or function transform.

    So is it on every device, and on tensors of other types, which `available` leaves to other kernels.
    """
    return (
        not _is_compiling()
        and not _transform_active()
        and _tracing_state() is None
        and not (_count_of_modes() and _is_traced_by_mode())
    )


def available(x: Tensor) -> bool:
    """Return whether the native kernels can take `x` here: the call is eager, `x` plain, and on the CPU or CUDA."""
    return is_eager() and type(x) in _PLAIN and (x.is_cpu or x.is_cuda) and forward_ad._current_level < 0


def _is_traced_by_mode() -> bool:
    """Return whether values are not there to be read: `make_fx`, `FakeTensorMode`; others only look on."""
    return any(_mode(key) is not None for key in _TRACING)


def is_mapped(x: Tensor) -> bool:
    """Return whether `vmap` runs over `x`, or `functionalize` stands for it, at any depth of function transforms."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x) or torch._is_functional_tensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


@lru_cache(maxsize=64)
def constant(value: float, dtype: torch.dtype) -> Tensor:
    """Return a 0-d tensor on the CPU, for which adding and subtracting is faster than for a Python number.

    Operations of two operands mix it with a vector on any device; those of more refuse to, `addcmul` on CUDA for one.
    """
    return torch.tensor(value, dtype=dtype, device="cpu")


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of x over all axes but 1, each of shape (C,), float32 for half inputs.

    Args:
        x: Shape (N, C, *), detached.
    """
    if x.dtype in _HALF and x.is_cpu:
        # The CPU kernel takes the type of its results from the running statistics it is given.
        scratch = torch.zeros(x.size(1), dtype=torch.float32, device=x.device)
        mean, var = torch.batch_norm_update_stats(x, scratch, torch.ones_like(scratch), 0.0)
    else:
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    return mean, var


def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Apply native batch norm, differentiable; what batch renormalization is while r_max=1 and d_max=0.

    Args:
        x: Shape (N, C, *).
        weight: gamma, shape (C,), or None for 1.
        bias: beta, shape (C,), or None for 0.
        eps: Added to the variance.

    Returns:
        y; the batch mean and 1 / sigma_B, shape (C,), float32 for half inputs.

    Raises:
        InputError: gamma or beta is not of length C.
    """
    _check_lengths(x, weight, bias)
    if x.dtype in _HALF:
        weight = torch.ones(x.size(1), dtype=torch.float32, device=x.device) if weight is None else weight.float()
        bias = None if bias is None else bias.float()
    y, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    return y, mean, inverse


def _check_lengths(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    # The native kernel reads beyond the end of what is too short.
    channels = x.shape[1]
    if (weight is not None and weight.numel() != channels) or (bias is not None and bias.numel() != channels):
        shapes = [None if given is None else tuple(given.shape) for given in (weight, bias)]
        raise InputError(
            f"batch renorm: weight of shape {shapes[0]} and bias of shape {shapes[1]}; x has {channels} channels"
        )


class Corrected(NamedTuple):
    """What a batch is normalized by: Algorithm 1's letters, all of shape (C,), detached, in the accumulation type."""

    mean: Tensor
    var: Tensor  # biased
    inverse: Tensor  # 1 / sigma_B
    r: Tensor
    d: Tensor


def renormalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, by: Corrected) -> Tensor:
    """Normalize by the statistics of x with r and d applied, in one read and one write.

    Args:
        x: Shape (N, C, *).
        weight: gamma, shape (C,), or None for 1.
        bias: beta, shape (C,), or None for 0.
        eps: Added to the variance.
        by: Statistics of x, with its r and d.

    Returns:
        y of the shape, type and memory format of x.

    Raises:
        InputError: gamma or beta is not of length C.
    """
    _check_lengths(x, weight, bias)
    y: Tensor = _apply(x, weight, bias, eps, by)  # type: ignore[no-untyped-call]
    return y


class _Renormalize(torch.autograd.Function):
    """y = (x - mu_B) / sigma_B * (gamma r) + (beta + gamma d), with mu_B and sigma_B functions of x, r and d constants.

    The gradient is that of batch norm with weight gamma r; by the chain rule dgamma = r * dw + d * db and dbeta = db.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        by: Corrected,
    ) -> Tensor:
        mean, var, inverse, r, d = by
        scale = r if weight is None else torch.mul(weight, r)
        if bias is None:
            shift = d if weight is None else torch.mul(weight, d)
        else:
            shift = torch.add(bias, d) if weight is None else torch.addcmul(bias, weight, d)
        ctx.save_for_backward(x, weight)
        # Constants of the gradient, not tensors on its way, and small.
        ctx.by, ctx.scale, ctx.eps = by, scale, eps
        if x.is_cuda:
            # native_batch_norm would copy the mean there, and compute the inverse once more.
            return torch.batch_norm_elemt(x, scale, shift, mean, inverse, eps)
        return torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        mean, _, inverse, r, d = ctx.by
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if _is_channels_last(x) and not (_functorch.is_batchedtensor(grad) or _functorch.is_legacy_batchedtensor(grad)):
            # The fast kernels want both alike; they are not for a batch of gradients, which has no such format.
            grad = grad.contiguous(memory_format=torch.channels_last)
        # The second derivative needs the gradient of gamma in the scale as well.
        scale = torch.mul(weight, r) if needs_weight and torch.is_grad_enabled() else ctx.scale
        mask = (needs_x, needs_weight, needs_weight or needs_bias)
        grad_x, grad_scale, grad_shift = _backward(grad, x, scale, None, None, mean, inverse, True, ctx.eps, mask)
        grad_weight = torch.mul(grad_scale, r).addcmul_(grad_shift, d) if needs_weight else None
        return grad_x, grad_weight, grad_shift if needs_bias else None, None, None


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


# Not _Renormalize.apply, whose care for function transforms costs as much as two operations.
_apply = super(torch.autograd.Function, _Renormalize).apply  # type: ignore[misc]

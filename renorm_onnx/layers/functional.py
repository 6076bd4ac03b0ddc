"""Batch renormalization on tensors.

Source: Ioffe 2017 (arXiv:1702.03275), Algorithm 1::

    r = clip(sigma_B / sigma, 1/r_max, r_max)        no gradient flows through r, d
    d = clip((mu_B - mu) / sigma, -d_max, d_max)
    y = ((x - mu_B) / sigma_B * r + d) * gamma + beta
    mu    += momentum * (mu_B - mu)                  after use
    sigma += momentum * (sigma_B - sigma)

sigma is sqrt(var + eps); the batch variance divides by m, not m - 1. At inference y = (x - mu) / sigma * gamma + beta.

Since r and d are constants to the gradient, y is batch normalization with gamma * r in place of gamma and
beta + gamma * d in place of beta. Every path rests on that: each is torch's own batch norm kernel with another scale
and shift.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from renorm_onnx.layers import kernels
from renorm_onnx.layers.kernels import Corrected
from renorm_onnx.layers.saving import save_for_backward

Stat = Literal["sigma", "var", "var_unbiased"]
STATS: tuple[str, ...] = get_args(Stat)

# In which type statistics are computed, by the type of what they are taken of.
ACCUMULATED_IN = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}

# Types of what is learned that input of these types may come to.
_NARROW = (torch.float16, torch.bfloat16)
_TAKEN_BY_NARROW = (torch.float32, *_NARROW)

# Read by `keeping_ops`; switched by `keep_ops` alone.
_keep_ops = False


@contextmanager
def keep_ops() -> Iterator[None]:
    """Let layers appear in captured graphs as one `renorm_onnx::` operator each, for the time of the block."""
    global _keep_ops
    before, _keep_ops = _keep_ops, True
    try:
        yield
    finally:
        _keep_ops = before


def keeping_ops() -> bool:
    """Return whether the call happens inside `keep_ops`."""
    return _keep_ops


class BatchStatistics(NamedTuple):
    """Statistics of one batch, all of shape (C,), detached, in the accumulation type (float32 for half inputs)."""

    mean: Tensor
    var: Tensor  # biased: divides by size
    size: int | Tensor  # values per channel


def accumulation_type(x: Tensor) -> torch.dtype:
    """Return the type in which statistics of `x` are computed: float32 for float16 and bfloat16, else its own."""
    return ACCUMULATED_IN.get(x.dtype, x.dtype)


def fits(kind: torch.dtype, state: torch.dtype) -> bool:
    """Return whether statistics and parameters of the type `state` can normalize input of the type `kind`."""
    return state is kind or (kind in _NARROW and state in _TAKEN_BY_NARROW)


def batch_statistics(x: Tensor) -> BatchStatistics:
    """Compute mean and biased variance per channel.

    Args:
        x: Shape (N, C, *), not empty.

    Returns:
        The statistics, each of shape (C,).
    """
    values = x.detach()
    size = x.numel() // x.size(1)
    if kernels.available(x):
        return BatchStatistics(*kernels.statistics(values), size)
    var, mean = torch.var_mean(values.to(accumulation_type(x)), [0, *range(2, x.dim())], correction=0)
    return BatchStatistics(mean, var, size)


def deviation(var: Tensor, eps: float | Tensor) -> Tensor:
    """Return sigma = sqrt(var + eps)."""
    return torch.add(var, eps).sqrt_()


def corrections(
    mean: Tensor,
    batch_sigma: Tensor,
    running_mean: Tensor,
    sigma: Tensor,
    r_max: float | Tensor,
    d_max: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute r and d of Algorithm 1 from the statistics before their update.

    Bounds are tensors in a compiled graph, which then serves every step.

    Args:
        mean: mu_B, shape (C,), detached, as the next three.
        batch_sigma: sigma_B.
        running_mean: mu. Read, never written.
        sigma: sigma. Read, never written.
        r_max: Bound on r, at least 1, no unit. A float, or a 0-d tensor.
        d_max: Bound on d, at least 0, in standard deviations. Of the same type.

    Returns:
        r and d, shape (C,), detached.
    """
    r = torch.div(batch_sigma, sigma)
    d = torch.sub(mean, running_mean).div_(sigma)
    if isinstance(r_max, Tensor) and isinstance(d_max, Tensor):
        r_max, d_max = r_max.to(r.dtype), d_max.to(r.dtype)
        r = torch.minimum(torch.maximum(r, r_max.reciprocal()), r_max)
        d = torch.minimum(torch.maximum(d, -d_max), d_max)
        return save_for_backward(r, d)
    r_bound, d_bound = float(r_max), float(d_max)
    return r.clamp_(1 / r_bound, r_bound), d.clamp_(-d_bound, d_bound)


def observed_spread(batch: BatchStatistics, batch_sigma: Tensor, stat: str) -> Tensor:
    """Return what one batch contributes to the running statistic: sigma_B, or its variance, biased or not.

    Args:
        batch: Statistics of the batch.
        batch_sigma: sigma_B, shape (C,).
        stat: One of `STATS`.
    """
    if stat == "sigma":
        return batch_sigma
    if stat == "var":
        return batch.var
    size = batch.size.to(batch.var.dtype) if isinstance(batch.size, Tensor) else batch.size
    return batch.var * (size / (size - 1).clamp(min=1) if isinstance(size, Tensor) else size / max(size - 1, 1))


def update_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    spread: Tensor,
    *,
    momentum: float | Tensor,
    eps: float | Tensor,
    stat: str,
    sigma: Tensor | None = None,
) -> None:
    """Move the running statistics towards those of a batch, in place.

    ::

        mu  += momentum * (mu_B - mu)
        "sigma":                s = sqrt(var + eps);  s += momentum * (spread - s);  var = max(s^2 - eps, 0)
        "var", "var_unbiased":  var += momentum * (spread - var)

    A channel whose spread is not finite teaches nothing: one infinite number in one batch would else stay in the
    statistics for ever, and with it in every later r and d. The number 0 as momentum leaves everything to the bit.

    Args:
        running_mean: Shape (C,). Written.
        running_var: Shape (C,). Written.
        mean: mu_B, shape (C,), detached.
        spread: As `observed_spread` gives it.
        momentum: Share of the batch, in [0, 1].
        eps: As in `deviation`; a tensor on the native path.
        stat: One of `STATS`.
        sigma: `deviation(running_var, eps)` if the caller has it already. Overwritten.
    """
    kind, native = mean.dtype, isinstance(eps, Tensor)
    if isinstance(momentum, Tensor):
        momentum = momentum.to(kind)
    elif momentum == 0:
        return
    finite = spread < inf  # neither is NaN, which the spread is wherever the mean is not finite
    if stat != "sigma":
        var = running_var.to(kind, copy=True)
        _move(var, torch.where(finite, spread, var), momentum, native)
    else:
        sigma = deviation(running_var.to(kind), eps) if sigma is None else sigma
        _move(sigma, torch.where(finite, spread, sigma), momentum, native)
        var = sigma.mul_(sigma).sub_(eps).relu_()  # below 0 by rounding alone
    mu = running_mean.to(kind)
    mean = torch.where(finite, mean, mu)
    if running_var.dtype == kind:
        _move(running_mean, mean, momentum, native)
    else:
        # A module converted to half: better the largest number than infinity.
        var.clamp_(max=torch.finfo(running_var.dtype).max)
        running_mean.copy_(_move(mu, mean, momentum, native))
    running_var.copy_(var)


def _move(value: Tensor, target: Tensor, share: float | Tensor, native: bool) -> Tensor:
    """Move `value` towards `target`, in place. One operation on the native path; vmap has no rule for that one."""
    return value.lerp_(target, share) if native else value.add_((target - value) * share)


def scale_and_shift(weight: Tensor | None, bias: Tensor | None, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return gamma * r and beta + gamma * d, shape (C,), in the type of r."""
    if weight is None:
        return r, d if bias is None else d + bias
    shift = weight * d
    # Two operations: the backward pass of addcmul costs more than theirs.
    return weight * r, shift if bias is None else bias + shift


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: BatchStatistics,
    r: Tensor,
    d: Tensor,
    eps: float,
) -> Tensor:
    """Normalize by the statistics of x itself, with r and d applied.

    Where the native kernels cannot be used, this is torch's batch norm in training mode with another scale and shift,
    which every compiler, exporter and function transform understands. It computes the statistics again.

    Args:
        x: Shape (N, C, *).
        weight: gamma, shape (C,), or None for 1.
        bias: beta, shape (C,), or None for 0.
        batch: `batch_statistics(x)`.
        r: Shape (C,).
        d: Shape (C,).
        eps: Added to the variance.

    Returns:
        y of the shape and type of x.
    """
    if kernels.available(x):
        by = Corrected(batch.mean, batch.var, torch.rsqrt(batch.var + eps), r, d)
        return kernels.renormalize(x, weight, bias, eps, by)
    scale, shift = scale_and_shift(weight, bias, r, d)
    return torch.batch_norm(x, scale, shift, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)


ONE_VALUE = "Expected more than 1 value per channel when training, got input size"

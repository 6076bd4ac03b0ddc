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
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from renorm_onnx.errors import InputError

Stat = Literal["sigma", "var", "var_unbiased"]
STATS: tuple[str, ...] = get_args(Stat)

# Read by `eval_forward`; switched by `keep_ops` alone.
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
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def batch_statistics(x: Tensor) -> BatchStatistics:
    """Compute mean and biased variance per channel, by operations that every tracer and backend knows.

    Args:
        x: Shape (N, C, *), not empty.

    Returns:
        The statistics, each of shape (C,).
    """
    with torch.no_grad():
        values = x.detach().to(accumulation_type(x))
        var, mean = torch.var_mean(values, [0, *range(2, x.dim())], correction=0)
    return BatchStatistics(mean, var, x.numel() // x.size(1))


def corrections(
    batch: BatchStatistics,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    r_max: float | Tensor,
    d_max: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute r and d of Algorithm 1 from the statistics before their update.

    With tensors as bounds the clipping is by minimum and maximum, which the partitioner of torch.compile saves for the
    backward pass; a clamp it may recompute there, from running statistics that the same graph has since updated
    (pytorch/pytorch#197039).

    Args:
        batch: Statistics of the batch.
        running_mean: Shape (C,). Read, never written.
        running_var: Shape (C,). Read, never written.
        eps: Added to variances, in units of x squared.
        r_max: Bound on r, at least 1, no unit. A float, or a 0-d tensor.
        d_max: Bound on d, at least 0, in standard deviations. Of the same type.

    Returns:
        r and d, shape (C,), detached.
    """
    with torch.no_grad():
        sigma = torch.add(running_var.to(batch.var.dtype), eps).sqrt_()
        r = torch.add(batch.var, eps).sqrt_().div_(sigma)
        d = torch.sub(batch.mean, running_mean).div_(sigma)
        if isinstance(r_max, Tensor) and isinstance(d_max, Tensor):
            r_max, d_max = r_max.to(r.dtype), d_max.to(r.dtype)
            return (
                torch.minimum(torch.maximum(r, r_max.reciprocal()), r_max),
                torch.minimum(torch.maximum(d, -d_max), d_max),
            )
        r_bound, d_bound = float(r_max), float(d_max)
        return r.clamp_(1 / r_bound, r_bound), d.clamp_(-d_bound, d_bound)


def update_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    batch: BatchStatistics,
    *,
    momentum: float | Tensor,
    eps: float,
    stat: str,
) -> None:
    """Move the running statistics towards those of the batch, in place.

    ::

        mu  += momentum * (mu_B - mu)
        "sigma":         s = sqrt(var + eps);  s += momentum * (sigma_B - s);  var = max(s^2 - eps, 0)
        "var":           var += momentum * (var_B - var)
        "var_unbiased":  var += momentum * (var_B * m / (m - 1) - var)           torch's batch norm

    Args:
        running_mean: Shape (C,). Written.
        running_var: Shape (C,). Written.
        batch: Statistics of the batch.
        momentum: Share of the batch, in [0, 1].
        eps: As in `corrections`.
        stat: One of `STATS`.
    """
    with torch.no_grad():
        mean, var = batch.mean, batch.var
        if stat == "sigma":
            sigma = torch.add(running_var.to(var.dtype), eps).sqrt_()
            sigma.lerp_(torch.add(var, eps).sqrt_(), momentum)
            var = sigma.square_().sub_(eps).clamp_(min=0)
        else:
            if stat == "var_unbiased":
                var = var * (batch.size / (batch.size - 1))
            var = torch.lerp(running_var.to(var.dtype), var, momentum)
        if running_var.dtype == torch.float16:
            var = var.clamp(max=torch.finfo(torch.float16).max)
        running_mean.copy_(torch.lerp(running_mean.to(mean.dtype), mean, momentum))
        running_var.copy_(var)


def scale_and_shift(weight: Tensor | None, bias: Tensor | None, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return gamma * r and beta + gamma * d, shape (C,), in the type of r."""
    if weight is None:
        return r, d if bias is None else d + bias
    scale, shift = weight * r, weight * d
    return scale, shift if bias is None else shift + bias


def normalize_traceable(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, r: Tensor, d: Tensor, eps: float
) -> Tensor:
    """Normalize by batch statistics with r and d applied, by operations that every tracer and backend knows.

    Args:
        x: Shape (N, C, *).
        weight: gamma, shape (C,), or None for 1.
        bias: beta, shape (C,), or None for 0.
        r: Shape (C,).
        d: Shape (C,).
        eps: Added to the variance.

    Returns:
        y of the shape and type of x.
    """
    scale, shift = scale_and_shift(weight, bias, r, d)
    return F.batch_norm(x, None, None, scale, shift, True, 0.0, eps)


def batch_renorm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.01,
    eps: float = 1e-5,
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    stat: Stat = "sigma",
) -> Tensor:
    """Apply batch renormalization; in training, update the running statistics in place.

    Source: Ioffe 2017 (arXiv:1702.03275), Algorithm 1; see the module for the formula. With r_max=1, d_max=0 the
    output is that of batch normalization.

    Args:
        x: Shape (N, C, *).
        running_mean: Shape (C,). Written when training.
        running_var: Shape (C,). Written when training.
        weight: gamma, shape (C,), or None for 1.
        bias: beta, shape (C,), or None for 0.
        training: Use the batch's statistics, corrected; else the running ones.
        momentum: Share of the batch in the update, in [0, 1].
        eps: Added to variances, in units of x squared.
        r_max: Bound on r, at least 1, no unit.
        d_max: Bound on d, at least 0, in standard deviations.
        stat: What is averaged over time: sigma as in the paper, or the variance, biased or not.

    Returns:
        y of the shape and type of x.

    Raises:
        InputError: There is one value per channel in training, or `stat` is unknown.
    """
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
    if stat not in STATS:
        raise InputError(f"batch_renorm: stat={stat!r}, expected one of {STATS}")
    if x.numel() == x.size(1):
        raise InputError(f"batch_renorm: {ONE_VALUE} {tuple(x.shape)}")
    batch = batch_statistics(x)
    r, d = corrections(batch, running_mean, running_var, eps, r_max, d_max)
    y = normalize_traceable(x, weight, bias, r, d, eps)
    update_statistics(running_mean, running_var, batch, momentum=momentum, eps=eps, stat=stat)
    return y


ONE_VALUE = "Expected more than 1 value per channel when training, got input size"


def eval_forward(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    momentum: float | None,
    r_max: float,
    d_max: float,
    stat: str,
) -> Tensor:
    """Normalize by the running statistics: one `F.batch_norm`, or one operator of ours inside `keep_ops`.

    Args:
        x: Shape (N, C, *).
        running_mean: Shape (C,).
        running_var: Shape (C,).
        weight: gamma, shape (C,), or None for 1.
        bias: beta, shape (C,), or None for 0.
        eps: Added to the variance.
        momentum: Written into the operator, as the next three; no influence on the value. None is written as 0.
        r_max: The layer's bound on r.
        d_max: The layer's bound on d.
        stat: The layer's tracked statistic.

    Returns:
        y of the shape and type of x.
    """
    if _keep_ops:
        weight = torch.ones_like(running_mean) if weight is None else weight
        bias = torch.zeros_like(running_mean) if bias is None else bias
        y: Tensor = torch.ops.renorm_onnx.batch_renorm(
            x, weight, bias, running_mean, running_var, eps, momentum or 0.0, r_max, d_max, stat
        )
        return y
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)


class TrainingOutputs(NamedTuple):
    """The seven outputs of `renorm_onnx::batch_renorm_training`, in order; all but y of shape (C,)."""

    y: Tensor
    new_mean: Tensor
    new_var: Tensor
    batch_mean: Tensor
    batch_var: Tensor
    r: Tensor
    d: Tensor


def training_operator(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    momentum: float,
    r_max: float,
    d_max: float,
    stat: str,
) -> TrainingOutputs:
    """Take one training step as one operator of ours; nothing is written, the new statistics are outputs.

    Args:
        x: Shape (N, C, *).
        running_mean: Shape (C,).
        running_var: Shape (C,).
        weight: gamma, shape (C,), or None for 1.
        bias: beta, shape (C,), or None for 0.
        eps: Added to variances.
        momentum: Share of the batch in the new statistics.
        r_max: Bound on r.
        d_max: Bound on d.
        stat: One of `STATS`.

    Returns:
        y, the new running statistics, those of the batch, r and d.
    """
    weight = torch.ones_like(running_mean) if weight is None else weight
    bias = torch.zeros_like(running_mean) if bias is None else bias
    return TrainingOutputs(
        *torch.ops.renorm_onnx.batch_renorm_training(
            x, weight, bias, running_mean, running_var, eps, momentum, r_max, d_max, stat
        )
    )


def _inference_operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    momentum: float,
    r_max: float,
    d_max: float,
    stat: str,
) -> Tensor:
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)


def _training_operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    momentum: float,
    r_max: float,
    d_max: float,
    stat: str,
) -> tuple[Tensor, ...]:
    batch = batch_statistics(x)
    r, d = corrections(batch, running_mean, running_var, eps, r_max, d_max)
    y = normalize_traceable(x, weight, bias, r, d, eps)
    new_mean, new_var = running_mean.clone(), running_var.clone()
    update_statistics(new_mean, new_var, batch, momentum=momentum, eps=eps, stat=stat)
    return tuple(TrainingOutputs(y, new_mean, new_var, batch.mean, batch.var, r, d))


# Composite: without a translation table an exporter or compiler sees through to ordinary batch norm.
_ARGUMENTS = (
    "(Tensor x, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var, "
    "float eps, float momentum, float r_max, float d_max, str stat)"
)
_LIBRARY = torch.library.Library("renorm_onnx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"batch_renorm{_ARGUMENTS} -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("batch_renorm", _inference_operator, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    f"batch_renorm_training{_ARGUMENTS} -> (Tensor y, Tensor new_mean, Tensor new_var, "
    "Tensor batch_mean, Tensor batch_var, Tensor r, Tensor d)"
)
_LIBRARY.impl("batch_renorm_training", _training_operator, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]

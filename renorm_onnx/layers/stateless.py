"""Batch renormalization as a function: one step of the layer with parameters and statistics that the caller keeps."""

from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from renorm_onnx.errors import InputError
from renorm_onnx.layers import kernels
from renorm_onnx.layers.functional import (
    ONE_VALUE,
    STATS,
    Stat,
    batch_statistics,
    corrections,
    deviation,
    fits,
    normalize,
    observed_spread,
    update_statistics,
)


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
    """Apply batch renormalization as a function; the counterpart of `torch.nn.functional.batch_norm`.

    Source: Ioffe 2017 (arXiv:1702.03275), Algorithm 1. In training::

        r = clip(sigma_B / sigma, 1/r_max, r_max)        no gradient flows through r, d
        d = clip((mu_B - mu) / sigma, -d_max, d_max)
        y = ((x - mu_B) / sigma_B * r + d) * weight + bias
        mu    += momentum * (mu_B - mu)                  after use, in place
        sigma += momentum * (sigma_B - sigma)

    with sigma = sqrt(running_var + eps); else y = (x - mu) / sigma * weight + bias. With r_max=1, d_max=0 the output in
    training is that of batch normalization.

    It is one training step of `BatchRenorm*d`, and what a layer adds to that is the caller's: no step is counted, so
    the bounds are those given (a schedule, as `stretched(total_steps)`, returns both for a step), and under activation
    checkpointing, which calls it twice, it learns twice, the second time with another r and d. For statistics under
    `torch.func`, pass them through the transform: `vmap` maps over them, `grad` takes a clone.

    >>> mean, var = torch.zeros(3), torch.ones(3)
    >>> batch_renorm(torch.randn(8, 3), mean, var, training=True).shape
    torch.Size([8, 3])

    Args:
        x: Shape (N, C, *).
        running_mean: mu, shape (C,). Written when training, but for channels that are not finite and for an empty x.
        running_var: Shape (C,). Written likewise.
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
        InputError: x has no channel axis or is of no floating-point type; a vector is not of length C or of another
            type than x (float32 and half types go with half x); statistics are missing. In training: there is one
            value per channel; `stat` is unknown; momentum or a bound is out of its range; `vmap` or `functionalize`
            has taken x, but not the statistics.
    """
    if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        _check_tensors(x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
    if stat not in STATS:
        raise InputError(f"batch_renorm: stat={stat!r}, expected one of {STATS}")
    if not (1 <= r_max < inf and 0 <= d_max < inf):
        raise InputError(f"batch_renorm: r_max={r_max!r}, d_max={d_max!r}, expected finite r_max >= 1 and d_max >= 0")
    if momentum is None or not 0 <= momentum <= 1:
        raise InputError(f"batch_renorm: momentum={momentum!r}, expected a number in [0, 1]")
    if x.numel() == x.size(1):
        raise InputError(f"batch_renorm: {ONE_VALUE} {tuple(x.shape)}")
    if not torch.compiler.is_compiling() and kernels.is_mapped(x) and not kernels.is_mapped(running_mean):
        raise InputError(
            "batch_renorm: vmap or functionalize has taken x but not running_mean, which training writes in place; "
            "pass the statistics through it too"
        )
    if x.numel() == 0:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    running_mean, running_var = running_mean.detach(), running_var.detach()
    batch = batch_statistics(x)
    kind = batch.var.dtype
    batch_sigma, sigma = deviation(batch.var, eps), deviation(running_var.to(kind), eps)
    r_bound, d_bound = (torch.full((), bound, dtype=kind, device=x.device) for bound in (r_max, d_max))
    r, d = corrections(batch.mean, batch_sigma, running_mean, sigma, r_bound, d_bound)
    y = normalize(x, weight, bias, batch, r, d, eps)
    spread = observed_spread(batch, batch_sigma, stat)
    update_statistics(running_mean, running_var, batch.mean, spread, momentum=momentum, eps=eps, stat=stat)
    return y


def _check_tensors(x: Tensor, **vectors: Tensor | None) -> None:
    if x.dim() < 2 or not x.dtype.is_floating_point:
        raise InputError(
            f"batch_renorm: x has shape {tuple(x.shape)} and dtype {x.dtype}, expected (N, C, *) and a floating-point "
            "type"
        )
    for name, vector in vectors.items():
        if vector is None and name in ("running_mean", "running_var"):
            raise InputError(
                f"batch_renorm: {name} is None, expected statistics because r and d are measured from them; without "
                "any, use torch.nn.functional.batch_norm"
            )
        if vector is not None and (tuple(vector.shape) != (x.size(1),) or not fits(x.dtype, vector.dtype)):
            raise InputError(
                f"batch_renorm: {name} has shape {tuple(vector.shape)} and dtype {vector.dtype}, expected "
                f"{(x.size(1),)} and {x.dtype} because x has shape {tuple(x.shape)} and that type"
            )

"""Batch renormalization as operators of torch, so that an exporter meets one node per layer.

Both are composite: where no translation is asked for, a compiler or exporter sees through them to ordinary batch norm.
The layers call them inside `functional.keep_ops` alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from renorm_onnx.layers import functional


class TrainingOutputs(NamedTuple):
    """The outputs of `renorm_onnx::batch_renorm_training`, in order; the last two of shape (C,)."""

    y: Tensor
    new_mean: Tensor
    new_var: Tensor


def training_operator(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bounds: tuple[Tensor, Tensor],
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
        bounds: r_max and d_max of this step, 0-d. Tensors, so that an exported graph can follow the schedule.
        eps: Added to variances.
        momentum: Share of the batch in the new statistics.
        r_max: The layer's own bound on r, reached at the schedule's end; only written down.
        d_max: The layer's own bound on d; only written down.
        stat: One of `STATS`.

    Returns:
        y and the new running statistics.
    """
    weight = torch.ones_like(running_mean) if weight is None else weight
    bias = torch.zeros_like(running_mean) if bias is None else bias
    return TrainingOutputs(
        *torch.ops.renorm_onnx.batch_renorm_training(
            x, weight, bias, running_mean, running_var, *bounds, eps, momentum, r_max, d_max, stat
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
    r_bound: Tensor,
    d_bound: Tensor,
    eps: float,
    momentum: float,
    r_max: float,
    d_max: float,
    stat: str,
) -> tuple[Tensor, ...]:
    batch = functional.batch_statistics(x)
    batch_sigma, sigma = (
        functional.deviation(batch.var, eps),
        functional.deviation(running_var.to(batch.var.dtype), eps),
    )
    r, d = functional.corrections(batch.mean, batch_sigma, running_mean, sigma, r_bound, d_bound)
    y = functional.normalize(x, weight, bias, batch, r, d, eps)
    new_mean, new_var = running_mean.clone(), running_var.clone()
    spread = functional.observed_spread(batch, batch_sigma, stat)
    functional.update_statistics(new_mean, new_var, batch.mean, spread, momentum=momentum, eps=eps, stat=stat)
    return tuple(TrainingOutputs(y, new_mean, new_var))


_TENSORS = "Tensor x, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var"
_NUMBERS = "float eps, float momentum, float r_max, float d_max, str stat"
_LIBRARY = torch.library.Library("renorm_onnx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"batch_renorm({_TENSORS}, {_NUMBERS}) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("batch_renorm", _inference_operator, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    f"batch_renorm_training({_TENSORS}, Tensor r_bound, Tensor d_bound, {_NUMBERS})"
    " -> (Tensor y, Tensor new_mean, Tensor new_var)"
)
_LIBRARY.impl("batch_renorm_training", _training_operator, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]

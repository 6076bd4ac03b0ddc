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
    y, batch, batch_sigma, r, d = functional.corrected(x, running_mean, running_var, weight, bias, eps, r_max, d_max)
    new_mean, new_var = running_mean.clone(), running_var.clone()
    spread = functional.observed_spread(batch, batch_sigma, stat)
    functional.update_statistics(new_mean, new_var, batch.mean, spread, momentum=momentum, eps=eps, stat=stat)
    return tuple(TrainingOutputs(y, new_mean, new_var, batch.mean, batch.var, r, d))


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

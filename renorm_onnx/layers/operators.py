"""Batch renormalization as operators of torch, so that an exporter meets one node per layer.

All are composite: where no translation is asked for, a compiler or exporter sees through them to ordinary batch norm.
The layers call them inside `functional.keep_ops` alone. What changes from step to step is a tensor: an exported graph
follows the schedule, and a cumulative average.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from renorm_onnx.layers import functional


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
    share: Tensor,
    eps: float,
    momentum: float,
    r_max: float,
    d_max: float,
    stat: str,
) -> tuple[Tensor, ...]:
    sets = [(running_mean, running_var, share)]
    return _trained(x, weight, bias, (r_bound, d_bound), sets, eps, stat)


def _two_sets_operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    r_bound: Tensor,
    d_bound: Tensor,
    share: Tensor,
    renorm_mean: Tensor,
    renorm_var: Tensor,
    renorm_share: Tensor,
    eps: float,
    momentum: float,
    r_max: float,
    d_max: float,
    stat: str,
) -> tuple[Tensor, ...]:
    sets = [(running_mean, running_var, share), (renorm_mean, renorm_var, renorm_share)]
    return _trained(x, weight, bias, (r_bound, d_bound), sets, eps, stat)


def _trained(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    bounds: tuple[Tensor, Tensor],
    sets: list[tuple[Tensor, Tensor, Tensor]],
    eps: float,
    stat: str,
) -> tuple[Tensor, ...]:
    """Return y, then mean and variance of each set after the step; r and d come from the last set."""
    batch = functional.batch_statistics(x)
    mean, var, _ = sets[-1]
    batch_sigma, sigma = functional.deviation(batch.var, eps), functional.deviation(var.to(batch.var.dtype), eps)
    r, d = functional.corrections(batch.mean, batch_sigma, mean, sigma, *bounds)
    y = functional.normalize(x, weight, bias, batch, r, d, eps)
    spread = functional.observed_spread(batch, batch_sigma, stat)
    moved: list[Tensor] = []
    for old_mean, old_var, share in sets:
        new_mean, new_var = old_mean.clone(), old_var.clone()
        functional.update_statistics(new_mean, new_var, batch.mean, spread, momentum=share, eps=eps, stat=stat)
        moved += [new_mean, new_var]
    return (y, *moved)


_TENSORS = "Tensor x, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var"
_CHANGING = "Tensor r_bound, Tensor d_bound, Tensor share"
_SECOND = "Tensor renorm_mean, Tensor renorm_var, Tensor renorm_share"
_NUMBERS = "float eps, float momentum, float r_max, float d_max, str stat"
_NEW = "Tensor y, Tensor new_mean, Tensor new_var"
_LIBRARY = torch.library.Library("renorm_onnx", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, _implementation in (
    (f"batch_renorm({_TENSORS}, {_NUMBERS}) -> Tensor", _inference_operator),
    (f"batch_renorm_training({_TENSORS}, {_CHANGING}, {_NUMBERS}) -> ({_NEW})", _training_operator),
    (
        f"batch_renorm_training_two_sets({_TENSORS}, {_CHANGING}, {_SECOND}, {_NUMBERS})"
        f" -> ({_NEW}, Tensor new_renorm_mean, Tensor new_renorm_var)",
        _two_sets_operator,
    ),
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_schema.partition("(")[0], _implementation, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]

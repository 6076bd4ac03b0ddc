"""Batch renormalization over several processes.

`SyncBatchRenorm` normalizes by the statistics of the whole batch, wherever its parts lie. With n_i values per channel
on rank i (the law of total variance)::

    n     = sum n_i
    mu_B  = sum n_i mu_i / n
    var_B = sum n_i (var_i + (mu_i - mu_B)^2) / n

With a mask, only valid positions count, and n_i, which may be 0, is their number.

Every rank gathers the same (mu_i, var_i, n_i) and computes the same numbers in the same order, so r, d and the running
statistics are identical everywhere, to the bit. The gradient needs two more sums over all ranks::

    dx = gamma r / sigma_B * (dy - sum(dy) / n - x_hat sum(dy x_hat) / n),     x_hat = (x - mu_B) / sigma_B

With a mask, dy and x_hat are summed over padded positions too, where y is what 0 becomes, and dx is 0 there. The
gradients of gamma and beta stay local: DistributedDataParallel averages them as it does all others.
"""

import copy
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from renorm_onnx.errors import InputError
from renorm_onnx.layers import kernels
from renorm_onnx.layers.activated import Activated
from renorm_onnx.layers.functional import ONE_VALUE, BatchStatistics, accumulation_type, scale_and_shift
from renorm_onnx.layers.masked import check_mask
from renorm_onnx.layers.modules import _BatchRenorm
from renorm_onnx.layers.swap import check_module, plan_swaps, quoted, refuse_lazy, swap_layers, why_not

logger = logging.getLogger(__name__)

# Of a module's attributes, the containers that two modules cannot share.
_OWN_TABLES = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})


def _gather(values: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """Stack a tensor of every rank along a new first axis, to the same bits on each.

    A sum of tensors that are zero except in their own row is exact, and unlike a gather it exists for every backend
    and device.
    """
    rows = values.new_zeros(dist.get_world_size(group), *values.shape)
    rows[dist.get_rank(group)] = values
    dist.all_reduce(rows, group=group)
    return rows


def pooled_statistics(local: BatchStatistics, group: "dist.ProcessGroup | None" = None) -> BatchStatistics:
    """Combine the statistics of every rank's part of the batch into those of the whole.

    Args:
        local: Statistics of this rank's part; with size 0, mean and variance may be anything finite.
        group: The processes; None for all.

    Returns:
        The same statistics on every rank; `size` is a 0-d tensor.
    """
    with torch.no_grad():
        count = torch.as_tensor(local.size, dtype=local.mean.dtype, device=local.mean.device)
        rows = _gather(torch.cat([local.mean, local.var, count.view(1)]), group)
        channels = local.mean.numel()
        mean, var, counts = torch.split(rows, [channels, channels, 1], dim=1)  # (ranks, C), (ranks, C), (ranks, 1)
        size = counts.sum()
        share = counts / size.clamp(min=1)
        pooled_mean = (share * mean).sum(0)
        pooled_var = (share * (var + (mean - pooled_mean).square_())).sum(0)
    return BatchStatistics(pooled_mean, pooled_var, size)


class _PooledNormalization(torch.autograd.Function):
    """Normalization by given statistics of which x is one part; the gradient includes what it owes to them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        batch: BatchStatistics,
        r: Tensor,
        d: Tensor,
        eps: float,
        group: "dist.ProcessGroup | None",
    ) -> Tensor:
        ctx.eps, ctx.group = eps, group
        ctx.save_for_backward(x, weight, r, d, *batch)
        scale, shift = scale_and_shift(weight, bias, r, d)
        if x.numel() == 0:
            return torch.empty_like(x)
        return F.batch_norm(x, batch.mean, batch.var, scale, shift, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, r, d, mean, var, size = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)  # (C,) -> (1, C, 1, ...)
        axes = [0, *range(2, x.dim())]
        dy = dy.to(accumulation_type(x))
        inverse = torch.rsqrt(var + ctx.eps)
        x_hat = (x - mean.view(shape)).mul_(inverse.view(shape))
        sums = torch.stack([dy.sum(axes), (dy * x_hat).sum(axes)])  # (2, C)
        d_weight = d_bias = dx = None
        if ctx.needs_input_grad[1]:
            d_weight = (r * sums[1] + d * sums[0]).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = sums[0].clone()
        if ctx.needs_input_grad[0]:
            dist.all_reduce(sums, group=ctx.group)
            of_dy, of_dy_x_hat = (sums / size).unbind()
            scale = inverse * r if weight is None else inverse * r * weight
            dx = dy - x_hat.mul_(of_dy_x_hat.view(shape)) - of_dy.view(shape)
            dx = dx.mul_(scale.view(shape)).to(x.dtype)
        return dx, d_weight, d_bias, None, None, None, None, None


def _refuse_ghosts(who: str, virtual_batch_size: int | None) -> None:
    if virtual_batch_size is not None:
        raise InputError(
            f"{who}: virtual_batch_size={virtual_batch_size!r}, expected None because ghost batches split a batch that "
            "SyncBatchRenorm joins"
        )


class SyncBatchRenorm(_BatchRenorm):
    """Batch renormalization by the statistics of the batch on all processes; of (N, C) up to (N, C, D, H, W).

    In evaluation, without an initialized process group, or with one process, this is `BatchRenorm*d`. The parts of the
    batch may differ in size, and be empty; so may what their masks leave, and a process may have no mask. Unlike
    `torch.nn.SyncBatchNorm` it also runs on the CPU (gloo). It cannot be differentiated twice.

    Source: Ioffe 2017 (arXiv:1702.03275), Algorithm 1, with the mini-batch of section 4, which is spread over 50
    synchronized workers; see the module for the formula.

    Args:
        process_group: The processes that share a batch; None for all.
        *args: As `BatchRenorm2d`.
        **kwargs: As `BatchRenorm2d`.

    Raises:
        InputError: As `BatchRenorm2d`; or `virtual_batch_size` is given.
    """

    ranks = (2, 3, 4, 5)

    def __init__(self, *args: Any, process_group: "dist.ProcessGroup | None" = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep an option as `BatchRenorm2d` does, but no size of ghost batches."""
        if name == "virtual_batch_size":
            _refuse_ghosts(type(self).__name__, value)
        super().__setattr__(name, value)

    def _pools(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1

    @torch.jit.unused
    def _forward(self, x: Tensor) -> Tensor:
        return self._take_untracked_step(x, None) if self._pools_untracked() else super()._forward(x)

    @torch.jit.unused
    def _masked_forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self._take_untracked_step(x, mask) if self._pools_untracked() else super()._masked_forward(x, mask)

    def _pools_untracked(self) -> bool:
        untracked = self.running_mean is None or self.running_var is None or not self.track_running_stats
        return self.training and untracked and self._pools()

    def _take_untracked_step(self, x: Tensor, mask: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        if mask is not None:
            check_mask(x, mask, type(self).__name__)
        batch = self._batch_statistics(x, mask)
        return self._normalize(x, mask, batch, torch.ones_like(batch.mean), torch.zeros_like(batch.mean))

    def _statistics_are_its_own(self) -> bool:
        return not self._pools()

    def _check_values_per_channel(self, x: Tensor) -> None:
        if not self._pools():  # one value here may be one of many
            super()._check_values_per_channel(x)

    def _check_valid_positions(self, x: Tensor, mask: Tensor) -> None:
        if not (self.training and self._pools()):
            super()._check_valid_positions(x, mask)

    def _batch_statistics(self, x: Tensor, mask: Tensor | None) -> BatchStatistics:
        if not self._pools():
            return super()._batch_statistics(x, mask)
        if x.numel() == 0:
            nothing = torch.zeros(x.size(1), dtype=accumulation_type(x), device=x.device)
            local = BatchStatistics(nothing, nothing, 0)
        else:
            local = super()._batch_statistics(x, mask)
        pooled = pooled_statistics(local, self.process_group)
        # Every rank sees the same size, so all of them stop here. On an accelerator reading it would cost a wait, and
        # no compiler follows a question about a value.
        if x.device.type == "cpu" and kernels.is_eager() and pooled.size <= 1:
            left = "" if mask is None else f", of which masks leave {int(pooled.size)} valid per channel"
            raise InputError(f"{type(self).__name__}: {ONE_VALUE} {tuple(x.shape)}{left}, on all processes together")
        return pooled

    def _normalize(self, x: Tensor, mask: Tensor | None, batch: BatchStatistics, r: Tensor, d: Tensor) -> Tensor:
        if not self._pools():
            return super()._normalize(x, mask, batch, r, d)
        if mask is not None:
            x = torch.where(mask.unsqueeze(1), x, 0.0)  # whose gradient is 0 at padded positions
        y: Tensor = _PooledNormalization.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, batch, r, d, self.eps, self.process_group
        )
        return y


class SyncBatchRenormAct(Activated, SyncBatchRenorm):
    """`SyncBatchRenorm`, then `drop`, then `act`; arguments as in `Activated`."""


def convert_sync_batchrenorm(module: nn.Module, process_group: "dist.ProcessGroup | None" = None) -> nn.Module:
    """Turn every `BatchRenorm*d` of a model into `SyncBatchRenorm`, in place but for the root.

    Call it before wrapping the model in DistributedDataParallel, on every rank. Parameters, buffers, hooks and options
    stay the same objects. `torch.nn.SyncBatchNorm.convert_sync_batchnorm` does not touch our layers, nor this torch's.

    Left alone, and named in a logged warning, as they go on without synchronizing: subclasses with a forward of their
    own, layers under parametrization or pruning, and whatever else their state alone does not describe.

    Args:
        module: The model, or one layer.
        process_group: The processes that share a batch; None for all.

    Returns:
        `module`, or its replacement if it is itself such a layer.

    Raises:
        InputError: `module` is no module; a layer has a `virtual_batch_size`, or is lazy and has not seen a batch. The
            model is then as it was.
    """
    check_module(module, "convert_sync_batchrenorm")
    alone: list[str] = []

    def build(name: str, old: nn.Module) -> nn.Module | None:
        activated = isinstance(old, Activated)
        if not isinstance(old, _BatchRenorm) or isinstance(old, SyncBatchRenorm):
            return None
        refuse_lazy(old, "convert_sync_batchrenorm", name)
        reason = why_not(old, children=Activated.followers if activated else ())
        if reason:
            alone.append(f"{quoted(name)} ({reason})")
            return None
        _refuse_ghosts(f"convert_sync_batchrenorm: {quoted(name)}", old.virtual_batch_size)
        kind = SyncBatchRenormAct if activated else SyncBatchRenorm
        new: SyncBatchRenorm = kind.__new__(kind)
        state = old.__getstate__()
        vars(new).update({key: copy.copy(value) if key in _OWN_TABLES else value for key, value in state.items()})
        new.process_group = process_group
        return new

    swaps = plan_swaps(module, build)
    if alone:
        logger.warning("convert_sync_batchrenorm: left alone %s", "; ".join(alone))
    return swap_layers(module, swaps)

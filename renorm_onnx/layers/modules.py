"""BatchRenorm1d, BatchRenorm2d and BatchRenorm3d: buffers, checks and modes around `functional`.

Parameters and buffers are named, shaped and meant as in `torch.nn.BatchNorm*d`, so state dicts load strictly both
ways. The classes derive from `_NormBase`, not from `_BatchNorm`: torch's `convert_sync_batchnorm` matches the latter
and would silently replace renormalization by normalization.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)
from torch.nn.modules.batchnorm import _NormBase

from renorm_onnx.errors import InputError
from renorm_onnx.layers import functional
from renorm_onnx.layers.functional import STATS, BatchStatistics, Stat
from renorm_onnx.layers.schedules import Bounds, Schedule, as_schedule, check_bounds


def _check_arguments(who: str, num_features: int, eps: float, momentum: float | None, stat: str) -> None:
    if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 1:
        raise InputError(f"{who}: num_features={num_features!r}, expected an integer >= 1")
    if not (math.isfinite(eps) and eps >= 0):
        raise InputError(f"{who}: eps={eps!r}, expected a finite number >= 0")
    if momentum is not None and not (math.isfinite(momentum) and 0 <= momentum <= 1):
        raise InputError(f"{who}: momentum={momentum!r}, expected a number in [0, 1], or None for a cumulative average")
    if stat not in STATS:
        raise InputError(f"{who}: stat={stat!r}, expected one of {STATS}")


class _BatchRenorm(_NormBase):
    """What the three layers share; they differ only in the ranks they accept."""

    r_max: float
    d_max: float
    stat: str
    ranks: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        schedule: str | Schedule | Callable[[int], Bounds] | None = "paper",
        stat: Stat = "sigma",
    ) -> None:
        who = type(self).__name__
        _check_arguments(who, num_features, eps, momentum, stat)
        check_bounds((r_max, d_max), f"{who}: got")
        resolved = as_schedule(schedule)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.r_max = float(r_max)
        self.d_max = float(d_max)
        self.stat = stat
        self.schedule = resolved

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x of shape (N, C, *) as the mode says: by corrected batch statistics, or by the running ones."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        else:
            y = self._forward(x)
        return y

    @torch.jit.unused
    def _forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if self.running_mean is None or self.running_var is None or (self.training and not self.track_running_stats):
            self._check_values_per_channel(x)
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        if self.training:
            return self._training_forward(x, self.running_mean, self.running_var)
        return functional.eval_forward(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.eps,
            momentum=self.momentum,
            r_max=self.r_max,
            d_max=self.d_max,
            stat=self.stat,
        )

    def _training_forward(self, x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        self._check_values_per_channel(x)
        assert self.num_batches_tracked is not None
        step = self.num_batches_tracked
        if functional.keeping_ops():
            return self._training_operator(x, running_mean, running_var)
        r_max, d_max = self.schedule.bounds_on_device(step, self.r_max, self.d_max)
        batch = self._batch_statistics(x)
        r, d = functional.corrections(batch, running_mean, running_var, self.eps, r_max, d_max)
        y = self._normalize(x, batch, r, d)
        step.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / step
        functional.update_statistics(running_mean, running_var, batch, momentum=momentum, eps=self.eps, stat=self.stat)
        return y

    def _training_operator(self, x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        """Take one step, with the schedule at its end, as the single operator that an exporter translates."""
        if self.momentum is None:
            raise InputError(
                f"{type(self).__name__}: momentum=None (cumulative average) has no exported training form; set one"
            )
        out = functional.training_operator(
            x,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            self.eps,
            momentum=self.momentum,
            r_max=self.r_max,
            d_max=self.d_max,
            stat=self.stat,
        )
        with torch.no_grad():
            running_mean.copy_(out.new_mean)
            running_var.copy_(out.new_var)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        return out.y

    def _batch_statistics(self, x: Tensor) -> BatchStatistics:
        """Return the statistics that normalize x; a subclass may pool them over processes."""
        return functional.batch_statistics(x)

    def _normalize(self, x: Tensor, batch: BatchStatistics, r: Tensor, d: Tensor) -> Tensor:
        """Normalize x by `batch` with r and d; a subclass that pools statistics pools their gradient here."""
        return functional.normalize_traceable(x, self.weight, self.bias, r, d, self.eps)

    def _check_input_dim(self, input: Tensor) -> None:
        who = type(self).__name__
        if input.dim() not in self.ranks:
            wanted = " or ".join(f"{rank}D" for rank in self.ranks)
            raise InputError(f"{who}: expected {wanted} input (got {input.dim()}D input of shape {tuple(input.shape)})")
        if input.size(1) != self.num_features:
            raise InputError(
                f"{who}: x has shape {tuple(input.shape)}, expected {self.num_features} channels at axis 1 "
                f"because num_features={self.num_features}"
            )
        if not input.is_floating_point():
            raise InputError(f"{who}: x has dtype {input.dtype}, expected a floating-point type; convert it first")

    def _check_values_per_channel(self, x: Tensor) -> None:
        if x.numel() == x.size(1):
            raise InputError(f"{type(self).__name__}: {functional.ONE_VALUE} {tuple(x.shape)}")

    def extra_repr(self) -> str:
        """Describe the layer as its constructor would be called."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, r_max={self.r_max}, d_max={self.d_max}, "
            f"schedule={self.schedule}, stat={self.stat!r}"
        )


class BatchRenorm1d(_BatchRenorm):
    """Batch renormalization of (N, C) or (N, C, L); arguments as in `BatchRenorm2d`."""

    ranks = (2, 3)


class BatchRenorm2d(_BatchRenorm):
    """Batch renormalization of (N, C, H, W)."""

    ranks = (4,)


class BatchRenorm3d(_BatchRenorm):
    """Batch renormalization of (N, C, D, H, W); arguments as in `BatchRenorm2d`."""

    ranks = (5,)

"""BatchRenorm1d, BatchRenorm2d and BatchRenorm3d: buffers, checks and modes around `functional`.

Parameters and buffers are named, shaped and meant as in `torch.nn.BatchNorm*d`, so state dicts load strictly both
ways. The classes derive from `_NormBase`, not from `_BatchNorm`: torch's `convert_sync_batchnorm` matches the latter
and would silently replace renormalization by normalization.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)
from torch.nn.modules.batchnorm import _NormBase

from renorm_onnx.errors import InputError
from renorm_onnx.layers import functional
from renorm_onnx.layers.clock import HostClock
from renorm_onnx.layers.direct import take_usual_step
from renorm_onnx.layers.exported import evaluate_exported, take_exported_step
from renorm_onnx.layers.functional import BatchStatistics, Stat
from renorm_onnx.layers.masked import check_mask, check_valid_positions, masked_statistics, normalize_masked
from renorm_onnx.layers.options import CHECKS
from renorm_onnx.layers.recomputation import Memory
from renorm_onnx.layers.schedules import Bounds, Schedule
from renorm_onnx.layers.step import take_step

# Names in the state dicts of other libraries' layers that ours does not have.
_FOREIGN = (
    "ra_mean",
    "ra_var",
    "steps",
    "scale",
    "running_std",
    "running_avg_mean",
    "running_avg_std",
    "gamma",
    "beta",
)


class _BatchRenorm(_NormBase):
    """What the three layers share; they differ only in the ranks they accept.

    A subclass may replace `_batch_statistics`, `_normalize`, `_statistics_are_its_own` and the two checks for too few
    values together, to pool statistics over processes.
    """

    r_max: float
    d_max: float
    stat: str
    ranks: tuple[int, ...]
    renorm_mean: Tensor | None
    renorm_var: Tensor | None

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
        renorm_momentum: float | None = None,
        virtual_batch_size: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # as torch's own layers from 2.13 on
            self.register_parameter("bias", None)
        self.r_max = r_max
        self.d_max = d_max
        self.stat = stat
        self.schedule = cast(Schedule, schedule)  # which it is once assigned
        if renorm_momentum is not None and self.running_mean is not None and self.running_var is not None:
            self.register_buffer("renorm_mean", self.running_mean.clone())
            self.register_buffer("renorm_var", self.running_var.clone())
        self.renorm_momentum = renorm_momentum
        self.virtual_batch_size = virtual_batch_size
        self._memory = Memory()
        self._clock = HostClock()

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep an option as the constructor would, or refuse it; assignments are rare, a property would slow reads."""
        check = CHECKS.get(name)
        if check is not None:
            value = check(type(self).__name__, value)
            if name == "renorm_momentum" and value is not None and "renorm_mean" not in self._buffers:
                raise InputError(
                    f"{type(self).__name__}: renorm_momentum={value!r}, expected None because the layer has no second "
                    "set of statistics; give it to the constructor, together with track_running_stats=True"
                )
        super().__setattr__(name, value)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize x as the mode says: by corrected batch statistics, or by the running ones.

        Args:
            x: Shape (N, C, *).
            mask: True at valid positions, shape (N, *), bool; statistics are taken from these alone. For padded
                sequences see `renorm_onnx.length_mask`. Evaluation does not need it.
                Fewer than two valid positions (where statistics are pooled, on all processes together) are refused on
                the CPU; on other devices and in compiled graphs, where looking would wait for the device, and in a
                ghost batch, they teach nothing, but the step is counted unless `momentum` is None.

        Returns:
            y of the shape and type of x.

        Raises:
            InputError: x has a rank, a number of channels or a type that the layer does not take; in training, x has
                one value per channel, or its mask leaves no more; the mask does not fit x; the schedule returns bounds
                that cannot be used.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            y = self._scripted_forward(x)
        elif mask is None:
            y = self._forward(x)
        else:
            y = self._masked_forward(x, mask)
        return y

    def _scripted_forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("batch renorm: a scripted layer evaluates only; call eval() on the scripted module")
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, mean is None or var is None, 0.0, self.eps)

    @torch.jit.unused
    def _forward(self, x: Tensor) -> Tensor:
        if self.training:
            y = take_usual_step(self, x)
            if y is not None:
                return y
        if isinstance(x, torch.fx.Proxy):
            return as_leaf(self, x, None)
        self._check_input_dim(x)
        mean, var = self._buffers["running_mean"], self._buffers["running_var"]
        if mean is None or var is None or (self.training and not self.track_running_stats):
            self._check_values_per_channel(x)
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        if self.training:
            self._check_values_per_channel(x)
            if functional.keeping_ops():
                return take_exported_step(self, x)
            return take_step(self, x, None)
        if functional.keeping_ops():
            return evaluate_exported(self, x, mean, var)
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    @torch.jit.unused
    def _masked_forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            return as_leaf(self, x, mask)
        self._check_input_dim(x)
        check_mask(x, mask, type(self).__name__)
        if self.running_mean is None or self.running_var is None or (self.training and not self.track_running_stats):
            self._check_valid_positions(x, mask)
            one = torch.ones(x.size(1), dtype=functional.accumulation_type(x), device=x.device)
            return normalize_masked(x, mask, self.weight, self.bias, one, torch.zeros_like(one), self.eps)
        if not self.training:
            return self._forward(x)
        self._check_valid_positions(x, mask)
        return take_step(self, x, mask)

    def _batch_statistics(self, x: Tensor, mask: Tensor | None) -> BatchStatistics:
        """Return the statistics that normalize x, of its valid positions; a subclass may pool them over processes."""
        return functional.batch_statistics(x) if mask is None else masked_statistics(x, mask)

    def _normalize(self, x: Tensor, mask: Tensor | None, batch: BatchStatistics, r: Tensor, d: Tensor) -> Tensor:
        """Normalize x by `batch` with r and d; a subclass that pools statistics pools their gradient here."""
        if mask is None:
            return functional.normalize(x, self.weight, self.bias, batch, r, d, self.eps)
        return normalize_masked(x, mask, self.weight, self.bias, r, d, self.eps)

    def _statistics_are_its_own(self) -> bool:
        """Return whether x alone determines its statistics, so that torch's batch norm may compute them."""
        return True

    def _check_input_dim(self, input: Tensor) -> None:
        if _is_tracing():
            return
        who, shape, kind = type(self).__name__, input.shape, input.dtype
        if len(shape) not in self.ranks:
            wanted = " or ".join(f"{rank}D" for rank in self.ranks)
            raise InputError(f"{who}: expected {wanted} input (got {len(shape)}D input of shape {tuple(shape)})")
        if shape[1] != self.num_features:
            raise InputError(
                f"{who}: x has shape {tuple(shape)}, expected {self.num_features} channels at axis 1 "
                f"because num_features={self.num_features}"
            )
        if not kind.is_floating_point:
            advice = "apply to_batchnorm before quantizing the model" if input.is_quantized else "convert it first"
            raise InputError(f"{who}: x has dtype {kind}, expected a floating-point type; {advice}")
        # Not by getattr, which is slow where a module has no such attribute of its own.
        for name, state in (
            ("running_mean", self._buffers["running_mean"]),
            ("weight", self._parameters.get("weight")),
        ):
            if state is None or state.dtype is kind or functional.fits(kind, state.dtype):
                continue
            raise InputError(
                f"{who}: x has dtype {kind}, expected {state.dtype} because {name} is of that type; convert x, or the "
                "layer"
            )

    def _check_values_per_channel(self, x: Tensor) -> None:
        if not _is_tracing() and x.numel() == x.size(1):
            raise InputError(f"{type(self).__name__}: {functional.ONE_VALUE} {tuple(x.shape)}")

    def _check_valid_positions(self, x: Tensor, mask: Tensor) -> None:
        check_valid_positions(x, mask, type(self).__name__)

    def reset_running_stats(self) -> None:
        """Set the running statistics to mean 0 and variance 1, and the step to 0, in place."""
        super().reset_running_stats()
        if "renorm_mean" in self._buffers:
            self._buffers["renorm_mean"].zero_()  # type: ignore[union-attr]
            self._buffers["renorm_var"].fill_(1)  # type: ignore[union-attr]

    def reset_parameters(self) -> None:
        """Reset the running statistics, set gamma to 1 and beta to 0, in place."""
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                torch.nn.init.constant_(parameter, value)

    def extra_repr(self) -> str:
        """Describe the layer as its constructor would be called."""
        text = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, r_max={self.r_max}, d_max={self.d_max}, "
            f"schedule={self.schedule}, stat={self.stat!r}"
        )
        for name in ("renorm_momentum", "virtual_batch_size"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        return f"{text}, bias=False" if self.affine and self.bias is None else text

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process's running step."""
        state = {**self.__dict__, "_memory": Memory(), "_clock": HostClock()}
        state.pop("_compiled_call_impl", None)
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: list[str]
    ) -> None:
        foreign = [name for name in _FOREIGN if prefix + name in state_dict]
        if foreign:
            lists[-1].append(
                f"{type(self).__name__}: {prefix + foreign[0]!r} belongs to another library's layer; load the state "
                "dict into a model of that library's layers and pass that model to renorm_onnx.adopt"
            )
        if "renorm_mean" in self._buffers:
            # A checkpoint of plain batch norm has one set of statistics, which then starts both.
            for ours, theirs in (("renorm_mean", "running_mean"), ("renorm_var", "running_var")):
                if prefix + ours not in state_dict and prefix + theirs in state_dict:
                    state_dict[prefix + ours] = state_dict[prefix + theirs].clone()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)  # type: ignore[no-untyped-call]


def _is_tracing() -> bool:
    """Return whether TorchScript traces, which cannot follow a question about a shape."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def as_leaf(layer: _BatchRenorm, x: torch.fx.Proxy, mask: Tensor | None) -> Tensor:
    """Return the call of a layer in a graph of `torch.fx`, as one node, as the layers of torch are.

    What a layer does depends on its mode and its step, which such a graph cannot follow; the layer itself can.

    Args:
        layer: Part of the traced model.
        x: Stands for a tensor of shape (N, C, *).
        mask: Stands for valid positions, or None.

    Raises:
        InputError: The layer itself is what is traced.
    """
    name = x.tracer.path_of_module(layer)  # type: ignore[attr-defined]
    if not name:
        raise InputError(
            f"{type(layer).__name__}: torch.fx cannot trace a single layer, expected a model that holds it"
        )
    arguments = (x,) if mask is None else (x, mask)
    return cast(Tensor, x.tracer.create_proxy("call_module", name, arguments, {}))


class BatchRenorm1d(_BatchRenorm):
    """Batch renormalization of (N, C) or (N, C, L); arguments as in `BatchRenorm2d`.

    The default schedule is plain batch normalization up to step 5,000; it reaches d_max at 25,000 and r_max at 40,000.
    """

    ranks = (2, 3)


class BatchRenorm2d(_BatchRenorm):
    """Batch renormalization of (N, C, H, W): batch normalization that trains with what it will infer with.

    Source: Ioffe 2017 (arXiv:1702.03275), Algorithm 1::

        r = clip(sigma_B / sigma, 1/r_max, r_max)        no gradient flows through r, d
        d = clip((mu_B - mu) / sigma, -d_max, d_max)
        y = ((x - mu_B) / sigma_B * r + d) * gamma + beta
        mu    += momentum * (mu_B - mu)                  after use
        sigma += momentum * (sigma_B - sigma)

    with sigma = sqrt(var + eps) and biased batch variances. Evaluation is batch normalization by mu and sigma, one call
    of `F.batch_norm`. With `track_running_stats=False` batch statistics are used in both modes, without r and d.

    Gradients are those of the formula eagerly, compiled and checkpointed, with one exception. Compile the model that
    checkpoints; a compiled part inside of `torch.utils.checkpoint` is run again as it is: it learns twice, as torch's
    batch norm does there, and computes r and d again from statistics that have moved. So does an exported training
    program inside of one.

    >>> layer = BatchRenorm2d(16, schedule=None)
    >>> layer(torch.randn(4, 16, 8, 8)).shape
    torch.Size([4, 16, 8, 8])

    Args:
        num_features: C.
        eps: Added to variances, in units of x squared.
        momentum: Share of a batch in the running statistics; None averages all batches alike, and neither averages nor
            counts one that teaches nothing: empty, masked but for one position, or finite in no channel. (A channel
            that is not finite in the first batch of some keeps a share of where it started. In a training step that
            `to_onnx` exports, every batch counts.)
        affine: Learn gamma and beta.
        track_running_stats: Keep running statistics.
        device: Of parameters and buffers.
        dtype: Of parameters and buffers.
        r_max: Bound on r at the schedule's end, at least 1.
        d_max: Bound on d at the schedule's end, at least 0, in standard deviations.
        schedule: How the bounds get there from (1, 0), step by step. `"paper"` is plain batch normalization up to step
            5,000, then two straight lines: to d_max at step 25,000 and to r_max at step 40,000. A run that is much
            shorter never gets there: give it `stretched(total_steps)`, which has the same shape, `linear(start, end)`,
            `Ramp(start, r_end, d_end)`, `HardSwitch(at)` or `Sigmoid(t_delta)`, all of `renorm_onnx`. None: the bounds
            hold from the first step. A function from the step to (r_max, d_max) will do as well. The step is
            `num_batches_tracked`; with gradient accumulation each microbatch counts.
        stat: What is averaged over time and kept as `running_var`: `"sigma"`, as in the paper (kept as sigma^2 - eps);
            the variance, `"var"`; or m / (m - 1) times it, `"var_unbiased"`, as torch's batch norm does.
        renorm_momentum: Momentum of a second set of statistics, from which r and d are computed, as in Keras. It adds
            the buffers `renorm_mean` and `renorm_var`; a state dict without them starts both sets alike.
        virtual_batch_size: Normalize groups of at least this many samples by their own statistics (ghost batches). The
            running statistics take the mean over the groups, once per step.
        bias: With `affine`, learn beta as well as gamma; without it beta is 0.

    Raises:
        InputError: An argument is out of its range or not finite; the same if it is assigned to the layer later.
    """

    ranks = (4,)


class BatchRenorm3d(_BatchRenorm):
    """Batch renormalization of (N, C, D, H, W); arguments as in `BatchRenorm2d`.

    The default schedule is plain batch normalization up to step 5,000; it reaches d_max at 25,000 and r_max at 40,000.
    """

    ranks = (5,)

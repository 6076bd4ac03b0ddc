"""The usual training step, written out: what `step.take_step` does for it, with nothing that only the others need.

Usual is one batch of an eager tensor, all of it valid, with one set of running statistics in the accumulation type, and
no checkpoint around. On small layers a step costs as much as the calls it makes, so there are few here.
"""

from math import inf

import torch
from torch import Tensor

from renorm_onnx.layers import kernels, recomputation
from renorm_onnx.layers.functional import ACCUMULATED_IN, BatchStatistics, observed_spread
from renorm_onnx.layers.kernels import Corrected
from renorm_onnx.layers.step import Layer

_ONE = torch.ones((), dtype=torch.int64, device="cpu")  # adding a Python number is slower


def take_usual_step(layer: Layer, x: Tensor) -> Tensor | None:
    """Take one training step if it is a usual one, as `step.take_step` would; else do nothing.

    Args:
        layer: In training mode.
        x: Anything; what the layer refuses is not usual.

    Returns:
        y of the shape and type of x, or None where the step is not a usual one.

    Raises:
        InputError: The schedule returns bounds that cannot be used. Nothing has changed then.
    """
    if not kernels.available(x):
        return None
    buffers, parameters, shape = layer._buffers, layer._parameters, x.shape
    mean, var, step = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    if (
        mean is None
        or var is None
        or step is None
        or var.dtype is not ACCUMULATED_IN.get(x.dtype)
        or len(shape) not in layer.ranks
        or not shape[1] == layer.num_features < x.numel()
        or not layer.track_running_stats
        or layer.virtual_batch_size is not None
        or layer.renorm_momentum is not None
        or "weight" not in parameters  # a parametrized layer keeps its weight elsewhere
        or "bias" not in parameters
        or not layer._statistics_are_its_own()
        or recomputation.may_be_repeated()
        or (layer._memory.used and recomputation.is_repeated())
        or (now := layer._clock.read(step)) is None
    ):
        return None
    r_max, d_max = layer.schedule.checked(now, layer.r_max, layer.d_max, type(layer).__name__)
    eps, weight, bias = layer.eps, parameters["weight"], parameters["bias"]
    added = kernels.constant(eps, var.dtype)
    if r_max == 1 and d_max == 0:
        y, batch_mean, inverse = kernels.plain(x, weight, bias, eps)
        sigma, batch_var, batch_sigma = torch.add(var, added).sqrt_(), None, inverse.reciprocal()
    else:
        batch_mean, batch_var = kernels.statistics(x.detach())
        sigma, batch_sigma = torch.add(var, added).sqrt_(), torch.add(batch_var, added).sqrt_()
        r = torch.div(batch_sigma, sigma).clamp_(1 / r_max, r_max)
        d = torch.sub(batch_mean, mean).div_(sigma).clamp_(-d_max, d_max)
        by = Corrected(batch_mean, batch_var, batch_sigma.reciprocal(), r, d)
        y = kernels.renormalize(x, weight, bias, eps, by)
    # Only now: what fails above, as for want of memory, leaves the layer as it was.
    share = 1 / (now + 1) if layer.momentum is None else layer.momentum
    spread, tracked, counted = batch_sigma, sigma, _ONE
    if layer.stat != "sigma":
        if batch_var is None:
            batch_var = batch_sigma.square().sub_(added).relu_()
        batch = BatchStatistics(batch_mean, batch_var, x.numel() // layer.num_features)
        spread, tracked = observed_spread(batch, batch_sigma, layer.stat), var
    if not (spread.is_cpu and spread.max().item() < inf):  # the host must not wait for a device to tell
        finite = spread < inf
        batch_mean, spread = torch.where(finite, batch_mean, mean), torch.where(finite, spread, tracked)
        if layer.momentum is None:
            counted = finite.any()  # as in the general step
    if share:  # 0 must not move a variance by rounding
        mean.lerp_(batch_mean, share)
        tracked.lerp_(spread, share)
        if tracked is sigma:
            torch.sub(sigma.mul_(sigma), added, out=var).relu_()  # below 0 by rounding alone
    step.add_(counted)
    if counted is _ONE:
        layer._clock.advanced(step)
    return y

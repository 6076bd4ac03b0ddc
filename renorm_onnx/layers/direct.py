"""The usual training step, written out: what `step.take_step` does for it, with nothing that only the others need.

Usual is one batch of an eager tensor, all of it valid, with one set of running statistics in the accumulation type, and
no checkpoint around. On small layers a step costs as much as the calls it makes, so there are few here.
"""

import torch
from torch import Tensor

from renorm_onnx.layers import kernels, recomputation
from renorm_onnx.layers.functional import BatchStatistics, accumulation_type, keeping_ops, observed_spread
from renorm_onnx.layers.kernels import Corrected
from renorm_onnx.layers.step import Layer

_WIDE = (torch.float32, torch.float64)
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
    if not (kernels.available(x) and _is_usual(layer, x)):
        return None
    buffers, parameters = layer._buffers, layer._parameters
    mean, var, step = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    now = None if step is None else layer._clock.read(step)
    if mean is None or var is None or step is None or now is None:
        return None
    r_max, d_max = layer.schedule.checked(now, layer.r_max, layer.d_max, type(layer).__name__)
    share = 1 / (now + 1) if layer.momentum is None else layer.momentum
    eps = kernels.constant(layer.eps, var.dtype)
    seen: list[Tensor] = []

    def correct(x: Tensor) -> Corrected:
        batch_mean, batch_var = kernels.statistics(x)
        sigma, batch_sigma = torch.add(var, eps).sqrt_(), torch.add(batch_var, eps).sqrt_()
        r = torch.div(batch_sigma, sigma).clamp_(1 / r_max, r_max)
        d = torch.sub(batch_mean, mean).div_(sigma).clamp_(-d_max, d_max)
        seen.extend((batch_mean, batch_var, batch_sigma, sigma))
        return Corrected(batch_mean, batch_var, batch_sigma.reciprocal(), r, d)

    def learn(batch_mean: Tensor, batch_var: Tensor | None, batch_sigma: Tensor, sigma: Tensor | None = None) -> None:
        mean.lerp_(batch_mean, share)
        if layer.stat == "sigma":
            sigma = torch.add(var, eps).sqrt_() if sigma is None else sigma
            sigma.lerp_(batch_sigma, share)
            torch.sub(sigma.mul_(sigma), eps, out=var)
            var.relu_()  # below 0 by rounding alone
        else:
            batch_var = batch_sigma.square().sub_(eps).relu_() if batch_var is None else batch_var
            batch = BatchStatistics(batch_mean, batch_var, x.numel() // layer.num_features)
            var.lerp_(observed_spread(batch, batch_sigma, layer.stat), share)

    if r_max == 1 and d_max == 0:
        y, batch_mean, inverse = kernels.plain(x, parameters["weight"], parameters["bias"], layer.eps)
        learn(batch_mean, None, inverse.reciprocal())
    else:
        y = kernels.renormalize(x, parameters["weight"], parameters["bias"], layer.eps, correct)
        learn(*seen)  # last: what fails before, as for want of memory, leaves the layer as it was
    step.add_(_ONE)
    layer._clock.advanced(step)
    return y


def _is_usual(layer: Layer, x: Tensor) -> bool:
    var, parameters, kind = layer._buffers["running_var"], layer._parameters, x.dtype
    return (
        var is not None
        and ((kind is var.dtype and kind in _WIDE) or accumulation_type(x) is var.dtype is not kind)
        and x.dim() in layer.ranks
        and x.size(1) == layer.num_features < x.numel()
        and layer.track_running_stats
        and layer.virtual_batch_size is None
        and layer.renorm_momentum is None
        and "weight" in parameters  # a parametrized layer keeps its weight elsewhere
        and "bias" in parameters
        and layer._statistics_are_its_own()
        and not recomputation.may_be_repeated()
        and not (layer._memory.runs and recomputation.is_repeated())
        and not keeping_ops()
    )

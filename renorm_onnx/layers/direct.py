"""The usual training step, written out: what `step.take_step` does for it, with nothing that only the others need.

Usual is one batch of an eager tensor, all of it valid, with one set of running statistics in the accumulation type, and
no checkpoint around. On small layers a step costs as much as the calls it makes, so there are few here.
"""

import torch
from torch import Tensor

from renorm_onnx.layers import kernels, recomputation
from renorm_onnx.layers.functional import BatchStatistics, accumulation_type, normalize
from renorm_onnx.layers.step import Layer

_WIDE = (torch.float32, torch.float64)


def take_usual_step(layer: Layer, x: Tensor) -> Tensor | None:
    """Take one training step if it is a usual one, as `step.take_step` would; else do nothing.

    Args:
        layer: In training mode, with running statistics.
        x: Shape (N, C, *), checked.

    Returns:
        y of the shape and type of x, or None where the step is not a usual one.

    Raises:
        InputError: The schedule returns bounds that cannot be used. Nothing has changed then.
    """
    buffers, parameters = layer._buffers, layer._parameters
    mean, var, step = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    if mean is None or var is None or step is None or "weight" not in parameters or "bias" not in parameters:
        return None  # a parametrized layer keeps its weight elsewhere
    weight, bias = parameters["weight"], parameters["bias"]
    if not _is_usual(layer, x, weight, var, step):
        return None
    now = layer._clock.read(step)
    if now is None:
        return None
    r_max, d_max = layer.schedule.checked(now, layer.r_max, layer.d_max, type(layer).__name__)
    eps = kernels.constant(layer.eps, var.dtype)
    if r_max == 1 and d_max == 0:
        y, batch_mean, inverse = kernels.plain(x, weight, bias, layer.eps)
        batch_sigma = inverse.reciprocal()
        batch_var = None
        sigma = torch.add(var, eps).sqrt_() if layer.stat == "sigma" else None
    else:
        batch_mean, batch_var = kernels.statistics(x.detach())
        batch_sigma, sigma = torch.add(batch_var, eps).sqrt_(), torch.add(var, eps).sqrt_()
        r = torch.div(batch_sigma, sigma).clamp_(1 / r_max, r_max)
        d = torch.sub(batch_mean, mean).div_(sigma).clamp_(-d_max, d_max)
        y = normalize(x, weight, bias, BatchStatistics(batch_mean, batch_var, 0), r, d, layer.eps)
    share = 1 / (now + 1) if layer.momentum is None else layer.momentum
    mean.lerp_(batch_mean, share)
    if layer.stat == "sigma" and sigma is not None:
        sigma.lerp_(batch_sigma, share)
        torch.mul(sigma, sigma, out=var)
        var.sub_(eps).relu_()  # below 0 by rounding alone
    else:
        batch_var = batch_sigma.square_().sub_(eps) if batch_var is None else batch_var
        var.lerp_(_unbiased(batch_var, x) if layer.stat == "var_unbiased" else batch_var, share)
    step.add_(kernels.constant(1, torch.int64))
    layer._clock.advanced(step)
    return y


def _is_usual(layer: Layer, x: Tensor, weight: Tensor | None, var: Tensor, step: Tensor) -> bool:
    kind = var.dtype
    return (
        kernels.available(x)
        and layer.virtual_batch_size is None
        and layer.renorm_momentum is None
        and (x.dtype is kind or (x.is_cuda and accumulation_type(x) is kind))
        and (weight is None or weight.dtype is kind)
        and kind in _WIDE
        and type(step) is Tensor
        and step.device == x.device
        and x.numel() > 0
        and layer._statistics_are_its_own()
        and not recomputation.may_be_repeated()
        and not (len(layer._memory) and recomputation.is_repeated())
    )


def _unbiased(batch_var: Tensor, x: Tensor) -> Tensor:
    size = x.numel() // x.size(1)
    return torch.mul(batch_var, kernels.constant(size / (size - 1), batch_var.dtype))

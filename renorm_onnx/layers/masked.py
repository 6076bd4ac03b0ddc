"""Batch renormalization of padded batches: statistics over the valid positions alone.

A mask has the shape of x without its channel axis, (N, *), and is True where a position holds data. The padded
positions are read as 0, whatever they hold: it reaches neither the statistics nor a gradient.
"""

import torch
from torch import Tensor

from renorm_onnx.errors import InputError
from renorm_onnx.layers import kernels
from renorm_onnx.layers.functional import ONE_VALUE, BatchStatistics, accumulation_type, scale_and_shift

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def length_mask(lengths: Tensor, length: int) -> Tensor:
    """Return the mask of sequences padded at their end.

    >>> length_mask(torch.tensor([1, 3]), 3)
    tensor([[ True, False, False],
            [ True,  True,  True]])

    Args:
        lengths: Valid positions per sequence, shape (N,), integers.
        length: Positions including padding.

    Returns:
        Shape (N, length), bool.

    Raises:
        InputError: `lengths` is not a vector of integers; or, on the CPU and run eagerly, one is outside 0 .. `length`.
    """
    if not isinstance(lengths, Tensor):
        raise InputError(
            f"length_mask: lengths is a {type(lengths).__name__}, expected a tensor of integers, such as "
            "torch.tensor([3, 1])"
        )
    if lengths.dim() != 1 or lengths.dtype not in _INTEGERS:
        raise InputError(
            f"length_mask: lengths has shape {tuple(lengths.shape)} and dtype {lengths.dtype}, expected integers (N,)"
        )
    if lengths.is_cpu and kernels.available(lengths) and lengths.numel() > 0:
        least, most = (int(bound) for bound in lengths.aminmax())
        if least < 0 or most > length:
            raise InputError(f"length_mask: lengths has values from {least} to {most}, expected 0 to length={length}")
    return torch.arange(length, device=lengths.device) < lengths.unsqueeze(1)


def check_mask(x: Tensor, mask: Tensor, who: str) -> None:
    """Refuse a mask that does not say for every position of x whether it is valid.

    Args:
        x: Shape (N, C, *).
        mask: What should be bool of shape (N, *).
        who: Name of the layer, for the message.

    Raises:
        InputError: Another shape or dtype.
    """
    wanted = (x.size(0), *x.shape[2:])
    if mask.dtype != torch.bool or tuple(mask.shape) != wanted:
        raise InputError(
            f"{who}: mask has shape {tuple(mask.shape)} and dtype {mask.dtype}, expected {wanted} and torch.bool "
            f"because x has shape {tuple(x.shape)}"
        )


def check_valid_positions(x: Tensor, mask: Tensor, who: str) -> None:
    """Refuse a mask that leaves too little to normalize by, where asking does not wait for a device.

    That is on the CPU, run eagerly. Elsewhere such a batch is normalized by what there is and teaches nothing.

    Args:
        x: Shape (N, C, *), for the message.
        mask: Shape (N, *), bool. A batch of no positions at all is no mistake of its mask.
        who: Name of the layer, for the message.

    Raises:
        InputError: Fewer than two positions are valid.
    """
    if mask.is_cpu and kernels.available(mask) and mask.numel() > 0 and (size := int(mask.sum())) < 2:
        raise InputError(
            f"{who}: {ONE_VALUE} {tuple(x.shape)}, of which the mask leaves {size} valid per channel; "
            "leave such a batch out of training"
        )


def masked_statistics(x: Tensor, mask: Tensor) -> BatchStatistics:
    """Compute mean and biased variance per channel over the valid positions.

    Args:
        x: Shape (N, C, *).
        mask: Shape (N, *), bool.

    Returns:
        The statistics, each of shape (C,); `size`, the number of valid positions, is a 0-d tensor. Without any, 0.
    """
    mean, var, size = _moments(x.detach(), mask)
    return BatchStatistics(mean, var, size)


def normalize_masked(
    x: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    r: Tensor,
    d: Tensor,
    eps: float,
) -> Tensor:
    """Normalize by the statistics of the valid positions, with r and d applied.

    Args:
        x: Shape (N, C, *).
        mask: Shape (N, *), bool.
        weight: gamma, shape (C,), or None for 1.
        bias: beta, shape (C,), or None for 0.
        r: Shape (C,).
        d: Shape (C,).
        eps: Added to the variance.

    Returns:
        y of the shape and type of x; at padded positions what 0 would become.
    """
    shape = [1, -1] + [1] * (x.dim() - 2)  # (C,) -> (1, C, 1, ...)
    mean, var, _ = _moments(x, mask)
    # where, not a product: padding may hold infinities, and 0 times infinity is no gradient of gamma.
    x = torch.where(mask.unsqueeze(1), x, 0.0)
    scale, shift = scale_and_shift(weight, bias, r, d)
    scale = scale / torch.sqrt(var + eps)
    return ((x - mean.view(shape)) * scale.view(shape) + shift.view(shape)).to(x.dtype)


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = [1, -1] + [1] * (x.dim() - 2)  # (C,) -> (1, C, 1, ...)
    axes = [0, *range(2, x.dim())]
    valid = mask.unsqueeze(1)  # (N, *) -> (N, 1, *)
    values = x.to(accumulation_type(x))
    size = mask.sum()
    divisor = size.clamp(min=1)
    mean = torch.where(valid, values, 0.0).sum(axes) / divisor
    centered = torch.where(valid, values - mean.view(shape), 0.0)
    return mean, centered.square().sum(axes) / divisor, size

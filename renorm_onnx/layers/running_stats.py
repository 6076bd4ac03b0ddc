"""The running statistics of a trained model: taken anew from data, or pooled over processes.

Both treat torch's own BatchNorm layers like ours, so that a model that mixes the two stays consistent.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from renorm_onnx.errors import InputError
from renorm_onnx.layers.clock import HostClock
from renorm_onnx.layers.distributed import pooled_statistics
from renorm_onnx.layers.functional import BatchStatistics, accumulation_type
from renorm_onnx.layers.modules import _BatchRenorm
from renorm_onnx.layers.schedules import CONSTANT
from renorm_onnx.layers.swap import check_module

# The sets of statistics that a layer may keep.
_SETS = ("running", "renorm")
# What a pass over data changes on a layer and puts back.
_OPTIONS = ("momentum", "schedule", "r_max", "d_max", "_clock")


class _Tracked(NamedTuple):
    """A norm layer that keeps running statistics, and the buffers it keeps them in.

    The first set is that of evaluation; a layer with a `renorm_momentum` has another, for r and d.
    """

    layer: _BatchRenorm | _BatchNorm
    sets: tuple[tuple[Tensor, Tensor], ...]  # (mean, var)
    steps: Tensor


def _tracked(module: nn.Module) -> list[_Tracked]:
    found = []
    for layer in module.modules():
        if isinstance(layer, _BatchRenorm | _BatchNorm) and layer.track_running_stats:
            kept = [[layer._buffers.get(f"{which}_{name}") for name in ("mean", "var")] for which in _SETS]
            sets = tuple((mean, var) for mean, var in kept if mean is not None and var is not None)
            if sets and layer.num_batches_tracked is not None:
                found.append(_Tracked(layer, sets, layer.num_batches_tracked))
    return found


@contextmanager
def _averaging_anew(module: nn.Module, tracked: list[_Tracked]) -> Iterator[None]:
    """Train mode, cumulative averages from zero, r = 1 and d = 0; afterwards all as it was but for the statistics.

    If the block raises, the statistics too are as they were.
    """
    training = [(each, each.training) for each in module.modules()]
    options = [{key: vars(each.layer)[key] for key in _OPTIONS if key in vars(each.layer)} for each in tracked]
    saved = [[(mean.clone(), var.clone()) for mean, var in each.sets] for each in tracked]
    steps = [each.steps.clone() for each in tracked]
    module.train()
    for layer, *_ in tracked:
        layer.reset_running_stats()
        layer.momentum = None
        if isinstance(layer, _BatchRenorm):
            layer.schedule, layer.r_max, layer.d_max = CONSTANT, 1.0, 0.0
            layer._clock = HostClock()  # a cumulative average has its own, and wears it out on a device
    try:
        yield
        # The second set, an average with a memory, has forgotten nothing of where it started from.
        saved = [[each.sets[0]] * len(each.sets) for each in tracked]
    finally:
        for each, before, statistics, count in zip(tracked, options, saved, steps, strict=True):
            vars(each.layer).update(before)
            each.steps.copy_(count)
            for (mean, var), (old_mean, old_var) in zip(each.sets, statistics, strict=True):
                mean.copy_(old_mean)
                var.copy_(old_var)
        for module_, mode in training:
            module_.training = mode


def update_stats(
    module: nn.Module,
    batches: Iterable[Any],
    device: torch.device | str | int | None = None,
    *,
    feed: Callable[[Any], Any] | None = None,
) -> int:
    """Take the running statistics of every norm layer anew from one pass over `batches`, in place.

    For averaged weights (SWA, EMA), pruned or otherwise edited networks, whose statistics no longer belong to their
    weights. `torch.optim.swa_utils.update_bn` does this for torch's BatchNorm and skips every other type.

    Each layer starts from nothing and averages over the batches with equal weight; one that teaches it nothing, being
    empty or finite in no channel, has none. A second set of statistics (`renorm_momentum`) becomes the same. During the
    pass layers normalize by the batch alone (r = 1, d = 0): corrections towards statistics that are only being
    collected would distort the input of every layer behind. Afterwards the training flags of all modules, the layers'
    options and `num_batches_tracked` are as before, so a schedule goes on where it was. On several processes, follow
    with `sync_running_stats`.

    Args:
        module: The model; put into training mode for the pass.
        batches: Tensors, or tuples and lists whose first element is the tensor, each given to the model.
        device: Where to move each batch; None leaves it.
        feed: Called with each batch as it comes, instead of the model with a tensor, for models with other arguments.

    Returns:
        The number of batches used; 0 if the model has no layer that tracks statistics.

    Raises:
        InputError: `module` is no module: the arguments stand in the other order than those of `update_bn`.
        InputError: `batches` is empty. The statistics are then unchanged, as after any other exception.
    """
    check_module(module, "update_stats(module, batches)")
    tracked = _tracked(module)
    if not tracked:
        return 0
    used = 0
    with torch.no_grad(), _averaging_anew(module, tracked):
        for batch in batches:
            if feed is not None:
                feed(batch)
            else:
                x = batch[0] if isinstance(batch, tuple | list) else batch
                module(x if device is None else x.to(device))
            used += 1
        if not used:
            raise InputError("update_stats: batches is empty, expected at least one batch to take statistics from")
    return used


def sync_running_stats(module: nn.Module, process_group: "dist.ProcessGroup | None" = None) -> int:
    """Replace the running statistics of every rank by those of all ranks together, in place.

    Plain DistributedDataParallel keeps a model's statistics per rank and, with its default `broadcast_buffers=True`,
    overwrites them with rank 0's at every step, so what is exported has seen one rank's data only. Train with
    `broadcast_buffers=False`, then call this on every rank before evaluating or exporting::

        mu  = mean of mu_i over the ranks
        var = mean of var_i + (mu_i - mu)^2                law of total variance, ranks weighted alike

    `num_batches_tracked` becomes the largest of any rank. torch's own BatchNorm layers are treated alike. Where
    r and d must agree during training, use `SyncBatchRenorm`.

    Args:
        module: The model, the same on every rank.
        process_group: The processes; None for all.

    Returns:
        The number of layers whose statistics were combined; 0 without an initialized process group.

    Raises:
        InputError: `module` is no module.
    """
    check_module(module, "sync_running_stats")
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    tracked = _tracked(module)
    with torch.no_grad():
        for _, sets, steps in tracked:
            for mean, var in sets:
                kind = accumulation_type(mean)
                pooled = pooled_statistics(BatchStatistics(mean.to(kind), var.to(kind), 1), process_group)
                mean.copy_(pooled.mean)
                var.copy_(pooled.var)
            # A copy: torch does not number what a collective writes, and the layer's clock goes by these numbers.
            most = steps.clone()
            dist.all_reduce(most, dist.ReduceOp.MAX, group=process_group)
            steps.copy_(most)
    return len(tracked)

"""Networks whose weights and statistics are their own, without data and without a training worth the name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models import Entry
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from renorm_onnx.layers.running_stats import update_stats

NORMS: Mapping[int, type[nn.Module]] = {0: BatchRenorm1d, 2: BatchRenorm2d, 3: BatchRenorm3d}
"""The layer for each number of spatial dimensions."""

_STEPS, _BATCH = 4, 4


def calibrated(entry: Entry, *, small: bool, seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Build a network and train it briefly on seeded inputs, so that no parameter or statistic is at its first value.

    Args:
        entry: Of the table `MODELS`.
        small: Take the small network and its inputs.
        seed: Of weights, inputs and targets.

    Returns:
        The network in inference mode, and example inputs.
    """
    norm = NORMS[entry.spatial_dims]
    torch.manual_seed(seed)
    network = entry.build(norm=lambda channels: norm(channels, schedule=None), **(entry.small if small else {}))
    sizes = entry.small_inputs if small else {}
    batches = [entry.example_inputs(_BATCH, seed=seed + 1 + step, **sizes) for step in range(_STEPS)]
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    for batch in batches:
        y = network(*batch)
        target = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.mse_loss(y, target))
        optimizer.step()
    update_stats(network, batches)
    return network.eval(), entry.example_inputs(2, seed=seed, **sizes)

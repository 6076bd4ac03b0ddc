"""Activation checkpointing: a layer that is run again in the backward pass repeats what it did, and learns nothing.

`torch.utils.checkpoint` runs a part of the network a second time while the backward pass is under way. By then the
running statistics have moved, so r and d would come out different from those of the first run, and the gradients would
belong to another function. So a layer keeps the corrections of runs that may be repeated.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Private names of torch. A torch without them would be taken to repeat nothing, though it may.
_running_backward = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_hooks_on_saved_tensors = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


class Corrections(NamedTuple):
    """What one run of a layer applied; `r` and `d` are None where it applied plain batch norm."""

    mean: Tensor
    r: Tensor | None
    d: Tensor | None


def is_repeated() -> bool:
    """Return whether a backward pass is under way in this thread, so that a forward call repeats an earlier one."""
    return bool(_running_backward() != -1)


def may_be_repeated() -> bool:
    """Return whether the present forward call may be run again.

    The reentrant form of checkpointing runs it without gradients, the other form with hooks on saved tensors.
    """
    return not torch.is_grad_enabled() or _hooks_on_saved_tensors(True) is not None


class Memory:
    """Corrections of the runs of one layer that may yet be repeated, newest last."""

    # A shared layer unrolled over time has one run per step. Beyond this many numbers per layer the oldest run is
    # dropped: a training pass under no_grad looks like the first run of a reentrant checkpoint, and is never repeated.
    CAPACITY = 3 << 17

    def __init__(self) -> None:
        self.runs: list[Corrections] = []
        self._repeated = 0

    def __len__(self) -> int:
        return len(self.runs)

    def keep(self, run: Corrections) -> None:
        """Remember one run; runs that have all been repeated are forgotten first."""
        if self._repeated >= len(self.runs):
            self.runs.clear()
            self._repeated = 0
        if 3 * run.mean.numel() * len(self.runs) >= self.CAPACITY:
            del self.runs[0]
        self.runs.append(run)

    def plain(self) -> bool:
        """Return whether there are remembered runs, all of them plain batch norm."""
        return bool(self.runs) and all(run.r is None for run in self.runs)

    def find(self, mean: Tensor) -> Corrections:
        """Return the run whose batch mean was `mean`, or the nearest to it.

        The device is asked for the choice only where runs of plain batch norm and corrected ones await repetition
        together, since these differ in more than numbers; else the choice stays on the device.

        Args:
            mean: Batch mean of the repeated run, shape (C,).
        """
        self._repeated += 1
        runs = self.runs
        if len(runs) == 1:
            return runs[0]
        distance = torch.stack([run.mean for run in runs]) - mean  # (runs, C)
        index = torch.nan_to_num(distance, posinf=0.0, neginf=0.0).square().sum(1).argmin()
        r = [run.r for run in runs if run.r is not None]
        d = [run.d for run in runs if run.d is not None]
        if len(r) < len(runs):
            return runs[int(index)]
        chosen = index.unsqueeze(0)
        return Corrections(mean, torch.stack(r).index_select(0, chosen)[0], torch.stack(d).index_select(0, chosen)[0])

    def passed(self) -> None:
        """Count a repeated run that needed nothing."""
        self._repeated += 1

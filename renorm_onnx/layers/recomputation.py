"""Activation checkpointing: a layer that is run again in the backward pass repeats what it did, and learns nothing.

`torch.utils.checkpoint` runs a part of the network a second time while the backward pass is under way. By then the
running statistics have moved, so r and d would come out different from those of the first run, and the gradients would
belong to another function. So a layer keeps the corrections of runs that may be repeated.

Which runs are repeated is read off the stack. While a checkpoint runs first, it is there as the hook that will unpack
what it saves or, in the reentrant form, as the context of its autograd function; while it runs again, so is what that
hook closes over, or that context. It repeats the same calls in the same order. Both live as long as the graph whose
backward pass may run the part again, and so do the corrections.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils import _python_dispatch

# Private names of torch. A torch without them would be taken to repeat nothing, though it may.
_running_backward = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_hooks_on_saved_tensors = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
_count_of_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_without_modes = getattr(_python_dispatch, "_disable_current_modes", nullcontext)

# A checkpoint of other makers may not be recognized, and a training pass without gradients looks like the first run of
# one: so many numbers are kept of what they leave behind, those of the newest runs.
CAPACITY = 3 << 17
# How far apart the means of a batch and of its repetition may lie, of the largest: kernels may sum in another order.
_SAME_BATCH = 1e-2


class Corrections(NamedTuple):
    """What one run of a layer applied; `r` and `d` are None where it applied plain batch norm."""

    mean: Tensor
    r: Tensor | None
    d: Tensor | None


NOTHING = Corrections(torch.zeros(0, device="cpu"), None, None)  # a run on an empty batch


def is_repeated() -> bool:
    """Return whether a backward pass is under way in this thread, so that a forward call may repeat an earlier one."""
    return bool(_running_backward() != -1)


def may_be_repeated() -> bool:
    """Return whether the present forward call may be run again.

    The reentrant form of checkpointing runs it without gradients, the other form with hooks on saved tensors.
    """
    return not torch.is_grad_enabled() or _hooks_on_saved_tensors(True) is not None


def unseen() -> AbstractContextManager[Any]:
    """Hide what follows from selective checkpointing, for which both runs must call the same operators.

    What a first run does besides normalizing, a repetition does not.
    """
    context: AbstractContextManager[Any] = _without_modes() if _count_of_modes() else nullcontext()
    return context


class _Runs:
    """The runs of one layer in one checkpoint, in order."""

    def __init__(self) -> None:
        self.kept: list[Corrections] = []
        self._backward = -1
        self._place = 0

    def next(self) -> Corrections:
        """Return the run whose turn it is: each backward pass repeats them from the first one on."""
        backward = _running_backward()
        if backward != self._backward:
            self._backward, self._place = backward, 0
        run = self.kept[self._place % len(self.kept)]
        self._place += 1
        return run


class Memory:
    """Corrections of the runs of one layer that may yet be repeated."""

    def __init__(self) -> None:
        self.used = False  # whether a run was ever kept: read in every step
        self._owned: WeakKeyDictionary[object, _Runs] = WeakKeyDictionary()
        self._hooks: WeakValueDictionary[tuple[int, ...], FunctionType] = WeakValueDictionary()
        self._codes: dict[int, CodeType] = {}  # of the hooks, by identity: to compare code takes long
        self._others: list[Corrections] = []

    def __len__(self) -> int:
        return len(self._all())

    def __reduce__(self) -> tuple[type["Memory"], tuple[()]]:
        """Leave everything behind in a copy or a pickle: it belongs to this process's graphs."""
        return Memory, ()

    def _all(self) -> list[Corrections]:
        """Every run, newest last, those of one checkpoint in their order; a run may be owned by several."""
        runs = [*self._others, *(run for owned in self._owned.values() for run in owned.kept)]
        return list({id(run): run for run in runs}.values())

    def keep(self, run: Corrections) -> None:
        """Remember one run for as long as it may be repeated."""
        self.used = True
        if not self._keep_for_checkpoints(run):
            self._others.append(run)
            del self._others[: -max(1, CAPACITY // (3 * max(1, run.mean.numel())))]

    def _keep_for_checkpoints(self, run: Corrections) -> bool:
        """Remember it for each checkpoint that is known to run here first; say whether there is one."""
        owners = list(_checkpoints_of_first_run())
        for owner in owners:
            self._owned.setdefault(owner, _Runs()).kept.append(run)
            if isinstance(owner, FunctionType):
                self._codes[id(owner.__code__)] = owner.__code__
                self._hooks[_key(owner.__code__, _closed_over(owner))] = owner
        return bool(owners)

    def repeated(self) -> Corrections | None:
        """Return the run that the present call repeats; None if no known checkpoint is run again here."""
        owned = self._under_repetition()
        run = None if owned is None else owned.next()
        if run is not None and may_be_repeated():  # a checkpoint inside runs first
            self._keep_for_checkpoints(run)
        return run

    def _under_repetition(self) -> _Runs | None:
        for frame in _stack():
            if id(frame.f_code) in self._codes:
                hook = self._hooks.get(_key(frame.f_code, frame.f_locals))
                return None if hook is None else self._owned.get(hook)
            context = _context(frame, "backward")
            if context is not None and context in self._owned:
                return self._owned[context]
        return None

    def nearest(self, mean: Tensor) -> Corrections | None:
        """Return the newest of the runs whose batch mean is nearest to `mean`; None if none is that of the same batch.

        For repetitions of which the stack does not tell what they repeat. The host waits for the device.

        Args:
            mean: Batch mean of the repeated run, shape (C,).
        """
        runs = [run for run in self._all() if run.mean.shape == mean.shape and run.mean.device == mean.device]
        if not runs:
            return None
        distance = torch.stack([run.mean for run in reversed(runs)]) - mean  # (runs, C)
        furthest = torch.nan_to_num(distance, posinf=0.0, neginf=0.0).abs().amax(1)
        index = int(furthest.argmin())
        scale = torch.nan_to_num(mean, posinf=0.0, neginf=0.0).abs().max()
        return runs[-1 - index] if furthest[index] <= _SAME_BATCH * scale else None


def _checkpoints_of_first_run() -> Iterator[object]:
    """What stands for the checkpoints around the present call while they run first."""
    hooks = _hooks_on_saved_tensors(True)
    # Those of torch are made anew for each checkpoint; others may serve for ever, and tell no run from the next.
    if hooks is not None and isinstance(hooks[1], FunctionType) and hooks[1].__module__ == "torch.utils.checkpoint":
        yield hooks[1]
    if not torch.is_grad_enabled():
        contexts = (_context(frame, "forward") for frame in _stack())
        yield from (context for context in contexts if context is not None)


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _context(frame: FrameType, method: str) -> BackwardCFunction | None:
    """The context of an autograd function whose `method` runs in `frame`."""
    code = frame.f_code
    # By their names first: to look into a frame copies its variables.
    if code.co_name != method or code.co_varnames[:1] != ("ctx",):
        return None
    context = frame.f_locals.get("ctx")
    return context if isinstance(context, BackwardCFunction) else None


def _closed_over(function: FunctionType) -> dict[str, object]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if cell != CellType()}  # an empty one raises


def _key(code: CodeType, variables: Mapping[str, object]) -> tuple[int, ...]:
    """What tells a function from others of the same code, on the stack too, where the function itself is not found."""
    return (id(code), *(id(variables.get(name)) for name in code.co_freevars))

"""r_max and d_max as functions of the step.

A schedule turns a step and a layer's final bounds into the bounds of that step. The step is the layer's
`num_batches_tracked` before the batch: the first training batch is step 0. It is a buffer, so a schedule resumes from a
checkpoint by itself; with gradient accumulation every microbatch counts as a step.

Schedules hold no state. One object may serve every layer of a model, and then each step is computed once, not per
layer.
"""

import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from renorm_onnx.errors import InputError

Bounds = tuple[float, float]


def float64(step: Tensor) -> Tensor:
    """Return the step in float64, or in float32 where the device has no other."""
    return step.to(torch.float32 if step.device.type == "mps" else torch.float64)


class Schedule(ABC):
    """How a layer gets from plain batch normalization (1, 0) to its own (r_max, d_max)."""

    @abstractmethod
    def bounds(self, step: int, r_max: float, d_max: float) -> Bounds:
        """Return (r_max, d_max) at `step`, given the layer's own bounds.

        Args:
            step: Training batches this layer has already seen.
            r_max: The layer's bound on r, reached at the end.
            d_max: The layer's bound on d, in standard deviations, reached at the end.
        """

    @abstractmethod
    def bounds_on_device(self, step: Tensor, r_max: float, d_max: float) -> tuple[Tensor, Tensor]:
        """Return the same two bounds as 0-d tensors, by tensor operations alone.

        Compiled and captured graphs use this form: one graph serves every step, and the host never waits for the
        device.

        Args:
            step: 0-d integer tensor.
            r_max: As in `bounds`.
            d_max: As in `bounds`.
        """

    def __call__(self, step: int, r_max: float = 3.0, d_max: float = 5.0) -> Bounds:
        """Return (r_max, d_max) at `step`, for looking at a schedule or plotting it."""
        return self.bounds(step, r_max, d_max)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the remembered bounds behind; they belong to this process's current step."""
        return {k: v for k, v in self.__dict__.items() if k != "_remembered"}

    def checked(self, step: int, r_max: float, d_max: float, who: str) -> Bounds:
        """Return `bounds`, refused if no layer can use them; the last answer is remembered.

        Args:
            step: As in `bounds`.
            r_max: As in `bounds`.
            d_max: As in `bounds`.
            who: Name of the layer, for the message.

        Raises:
            InputError: The schedule returned something other than two finite numbers, r_max >= 1 and d_max >= 0.
        """
        remembered = self.__dict__.get("_remembered")
        if remembered is not None and remembered[0] == step and remembered[1] == r_max and remembered[2] == d_max:
            return remembered[3]  # type: ignore[no-any-return]
        found = self.bounds(step, r_max, d_max)
        # Without the price of a message, where there is nothing to say.
        if not (
            type(found) is tuple
            and len(found) == 2
            and type(found[0]) is type(found[1]) is float
            and 1 <= found[0] < math.inf
            and 0 <= found[1] < math.inf
        ):
            found = check_bounds(found, f"{who}: schedule {self!r} at step {step} returned")
        # Not an attribute of the frozen dataclass: only the memory of the last question.
        self.__dict__["_remembered"] = (step, r_max, d_max, found)
        return found


def check_bounds(bounds: Any, opening: str) -> Bounds:
    """Return bounds as two floats, or refuse what Algorithm 1 cannot use.

    Args:
        bounds: What should be (r_max, d_max).
        opening: First words of the message.

    Raises:
        InputError: Not two finite numbers with r_max >= 1 and d_max >= 0.
    """
    try:
        r_max, d_max = (float(value) for value in bounds)
    except (TypeError, ValueError):
        raise InputError(f"{opening} {bounds!r}, expected a pair of numbers (r_max, d_max)") from None
    if not (math.isfinite(r_max) and r_max >= 1):
        raise InputError(f"{opening} r_max={r_max!r}, expected a finite number >= 1 because r lies in [1/r_max, r_max]")
    if not (math.isfinite(d_max) and d_max >= 0):
        raise InputError(f"{opening} d_max={d_max!r}, expected a finite number >= 0 because d lies in [-d_max, d_max]")
    return r_max, d_max


def _check_steps(who: str, **steps: float) -> None:
    for name, value in steps.items():
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{who}: {name}={value!r}, expected a finite number of steps >= 0")


@dataclass(frozen=True)
class Constant(Schedule):
    """The layer's own bounds from the first step; what `schedule=None` means."""

    def bounds(self, step: int, r_max: float, d_max: float) -> Bounds:
        """Return the layer's own bounds."""
        return r_max, d_max

    def bounds_on_device(self, step: Tensor, r_max: float, d_max: float) -> tuple[Tensor, Tensor]:
        """Return the layer's own bounds."""
        t = float64(step)
        return torch.full_like(t, r_max), torch.full_like(t, d_max)


@dataclass(frozen=True)
class Ramp(Schedule):
    """Plain batch normalization first, then a straight line to each bound.

    Source: Ioffe 2017 (arXiv:1702.03275), section 4, whose experiment is `PAPER`: 5,000 steps of batch normalization,
    then r_max to 3 at step 40,000 and d_max to 5 at step 25,000::

        r_max(t) = 1 + (r_max - 1) * clip((t - start) / (r_end - start), 0, 1)
        d_max(t) =      d_max      * clip((t - start) / (d_end - start), 0, 1)

    >>> PAPER(5_000), PAPER(25_000), PAPER(40_000), PAPER(400_000)
    ((1.0, 0.0), (2.142857142857143, 5.0), (3.0, 5.0), (3.0, 5.0))

    Args:
        start: Last step of plain batch normalization.
        r_end: Step at which r_max is reached, after `start`.
        d_end: Step at which d_max is reached, after `start`.

    Raises:
        InputError: A step is negative or not finite, or an end is not after the start.
    """

    start: float = 5_000
    r_end: float = 40_000
    d_end: float = 25_000

    def __post_init__(self) -> None:
        _check_steps("Ramp", start=self.start, r_end=self.r_end, d_end=self.d_end)
        if not (self.start < self.r_end and self.start < self.d_end):
            raise InputError(
                f"Ramp: start={self.start!r}, r_end={self.r_end!r}, d_end={self.d_end!r}, expected both ends after the "
                "start; for a jump use HardSwitch"
            )

    def bounds(self, step: int, r_max: float, d_max: float) -> Bounds:
        """Return the point of each line at `step`."""
        if step <= self.start:
            return 1.0, 0.0
        r = min((step - self.start) / (self.r_end - self.start), 1.0)
        d = min((step - self.start) / (self.d_end - self.start), 1.0)
        return 1 + (r_max - 1) * r, d_max * d

    def bounds_on_device(self, step: Tensor, r_max: float, d_max: float) -> tuple[Tensor, Tensor]:
        """Return the point of each line at `step`."""
        since = float64(step) - self.start
        r = (since / (self.r_end - self.start)).clamp(0, 1)
        d = (since / (self.d_end - self.start)).clamp(0, 1)
        return 1 + (r_max - 1) * r, d_max * d


@dataclass(frozen=True)
class HardSwitch(Schedule):
    """Plain batch normalization before step `at`, the layer's own bounds from it on.

    Source: CrossQ (Bhatt et al. 2024, arXiv:1902.05605v4) and its implementations in sbx and stable-baselines3-contrib,
    with `at=100_000`.

    Args:
        at: First step with the layer's own bounds.

    Raises:
        InputError: `at` is negative or not finite.
    """

    at: float = 100_000

    def __post_init__(self) -> None:
        _check_steps("HardSwitch", at=self.at)

    def bounds(self, step: int, r_max: float, d_max: float) -> Bounds:
        """Return (1, 0) before the switch, the layer's bounds after it."""
        return (r_max, d_max) if step >= self.at else (1.0, 0.0)

    def bounds_on_device(self, step: Tensor, r_max: float, d_max: float) -> tuple[Tensor, Tensor]:
        """Return (1, 0) before the switch, the layer's bounds after it."""
        on = float64(step >= self.at)
        return 1 + (r_max - 1) * on, d_max * on


@dataclass(frozen=True)
class Sigmoid(Schedule):
    """The curve of the reference Keras implementation, driven by `t_delta`.

    Source: titu1994/BatchRenormalization, `batch_renorm.py`, which starts at (1, 0) and after each batch sets::

        r_max(t) = r_max / (1 + (r_max - 1) * exp(-t))
        d_max(t) = d_max / (1 + (d_max / 1e-3 - 1) * exp(-2 t)),    then t += t_delta

    so step k > 0 uses t = (k - 1) * t_delta.

    Args:
        t_delta: Advance of t per step.

    Raises:
        InputError: `t_delta` is not a finite positive number.
    """

    t_delta: float = 1e-3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.t_delta) and self.t_delta > 0):
            raise InputError(f"Sigmoid: t_delta={self.t_delta!r}, expected a finite number > 0")

    def bounds(self, step: int, r_max: float, d_max: float) -> Bounds:
        """Return the point of each curve at `step`."""
        if step == 0 or d_max == 0:
            d_now = 0.0
        else:
            d_now = d_max / (1 + (d_max / 1e-3 - 1) * math.exp(-2 * (step - 1) * self.t_delta))
        return r_max / (1 + (r_max - 1) * math.exp(-max(step - 1, 0) * self.t_delta)), d_now

    def bounds_on_device(self, step: Tensor, r_max: float, d_max: float) -> tuple[Tensor, Tensor]:
        """Return the point of each curve at `step`."""
        t = (float64(step) - 1).clamp(min=0) * self.t_delta
        d_now = d_max / (1 + (d_max / 1e-3 - 1) * torch.exp(-2 * t)) if d_max else torch.zeros_like(t)
        return r_max / (1 + (r_max - 1) * torch.exp(-t)), torch.where(step > 0, d_now, 0.0)


# Opaque to the compiler: calls a Python function on the host. Built-in schedules never come here.
_FUNCTIONS: "WeakValueDictionary[int, FromFunction]" = WeakValueDictionary()


def _new_key() -> int:
    """Return a number for a graph to hold, which fits an int64 and is no other function's, not in any process.

    A saved program keeps the number; one that another process could have given would find another layer's function.
    """
    return secrets.randbits(62)


@dataclass(frozen=True)
class FromFunction(Schedule):
    """Any function of the step that returns (r_max, d_max); the layer's own bounds are not applied to it.

    In a compiled graph the step is read back to the host each time (on CUDA: a synchronization, and no graph capture),
    because an arbitrary function cannot be traced. Nor is it part of what is captured: it lives in its process, as long
    as the layer does, and a saved program that looks for it later is refused. A subclass of `Schedule` with
    `bounds_on_device` avoids both.

    Args:
        function: Called with the step as an int.

    Raises:
        InputError: `function` cannot be called.
    """

    function: Callable[[int], Bounds]
    key: int = field(default_factory=_new_key, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(f"FromFunction: function={self.function!r}, expected a function of the step")
        _FUNCTIONS[self.key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register the copy under its own key."""
        self.__dict__.update(state, key=_new_key())
        _FUNCTIONS[self.key] = self

    def bounds(self, step: int, r_max: float, d_max: float) -> Bounds:
        """Return what the function returns at `step`."""
        return self.function(step)

    def bounds_on_device(self, step: Tensor, r_max: float, d_max: float) -> tuple[Tensor, Tensor]:
        """Return what the function returns at `step`, asked when the graph runs."""
        pair: Tensor = torch.ops.renorm_onnx.scheduled_bounds(step, self.key)
        return pair[0], pair[1]


@torch.library.custom_op("renorm_onnx::scheduled_bounds", mutates_args=())
def _scheduled_bounds(step: Tensor, key: int) -> Tensor:
    schedule = _FUNCTIONS.get(key)
    if schedule is None:
        raise InputError(
            "batch renorm layer: the function that is this captured layer's schedule is not in this process, where it "
            "lives as long as the layer that was captured; to save a program use a built-in schedule, or a Schedule "
            "with bounds_on_device"
        )
    found = schedule.checked(int(step), 1.0, 0.0, "batch renorm layer")
    return torch.tensor(found, dtype=float64(step[None][:0]).dtype, device=step.device)


@_scheduled_bounds.register_fake
def _(step: Tensor, key: int) -> Tensor:
    return torch.empty(2, dtype=float64(step[None][:0]).dtype, device=step.device)


PAPER = Ramp()
CONSTANT = Constant()


def stretched(total_steps: float) -> Ramp:
    """Return the paper's schedule with its 40,000 steps stretched or squeezed to `total_steps`.

    r_max is reached at `total_steps`, d_max at 5/8 of it, and plain batch normalization lasts 1/8 of it. For a run
    counted in epochs, `stretched(epochs * len(loader))`.

    Args:
        total_steps: Step at which the relaxation is complete.

    Returns:
        The schedule.

    Raises:
        InputError: `total_steps` is not a finite positive number.
    """
    if not (math.isfinite(total_steps) and total_steps > 0):
        raise InputError(f"stretched: total_steps={total_steps!r}, expected a finite number > 0")
    scale = total_steps / PAPER.r_end
    return Ramp(PAPER.start * scale, PAPER.r_end * scale, PAPER.d_end * scale)


def linear(start: float, end: float) -> Ramp:
    """Return a schedule that relaxes both bounds together, from step `start` to step `end`.

    Raises:
        InputError: A step is negative or not finite, or `end` is not after `start`.
    """
    return Ramp(start, end, end)


def as_schedule(given: "str | Schedule | Callable[[int], Bounds] | None", who: str) -> Schedule:
    """Return the schedule that a layer's `schedule=` argument names.

    Args:
        given: `"paper"`, None (the bounds hold from the first step), a `Schedule`, or a function of the step.
        who: Name of the layer, for the message.

    Raises:
        InputError: None of these.
    """
    if given is None:
        return CONSTANT
    if isinstance(given, Schedule):
        return given
    if given == "paper":
        return PAPER
    if isinstance(given, type):
        raise InputError(f"{who}: schedule={given.__name__}, a class; expected a Schedule: {given.__name__}(…)")
    if not callable(given):
        raise InputError(f"{who}: schedule={given!r}, expected 'paper', None, a Schedule or a function of the step")
    return FromFunction(given)

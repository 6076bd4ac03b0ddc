"""How far two runs of a model are from a third, element by element and as a whole."""

import math
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from renorm_onnx.runtime.comparison import index_of, peak, rms, same_finiteness
from renorm_onnx.runtime.judging.error_spread import Spread, spread_of

Array = npt.NDArray[Any]

# What is so near the largest number of its type, rounding may carry beyond it: 20 units in the last place of float16.
_EDGE = 0.98


@dataclass(frozen=True)
class Errors:
    """How far U and F are from R on one output of one set of inputs.

    Attributes:
        elements: How many were compared: those finite in R and F.
        size_rms: RMS(R); this and the next five are over those elements, zero elsewhere.
        size_max: max|R|.
        unfused_rms: RMS(U - R), where U is finite.
        unfused_max: max|U - R|.
        fused_rms: RMS(F - R).
        fused_max: max|F - R|.
        index: Index of the element where F is furthest from R.
        values: R, U and F there.
        problem: What rules F out whatever its values: shape, type, finiteness; empty if nothing.
        discrete: The output is integer, boolean or text: the errors are shares of differing elements, and `fused_max`
            is the share of those where F is neither R nor U.
        near_rms: Largest RMS(N - R) of the neighbours N that were run (`beside`); 0 if none was.
        near_max: Largest max|N - R|.
        left_out: How many elements were not compared.
        spread: How the errors of F are spread, for the report.
    """

    elements: int
    size_rms: float
    size_max: float
    unfused_rms: float
    unfused_max: float
    fused_rms: float
    fused_max: float
    index: tuple[int, ...]
    values: tuple[Any, Any, Any]
    problem: str = ""
    discrete: bool = False
    near_rms: float = 0.0
    near_max: float = 0.0
    left_out: int = 0
    spread: Spread | None = None

    @property
    def own_rms(self) -> float:
        """RMS error of the original and its neighbours, whichever is largest."""
        return max(self.unfused_rms, self.near_rms)

    @property
    def own_max(self) -> float:
        """Largest error of the original and its neighbours."""
        return max(self.unfused_max, self.near_max)

    def beside(self, want: Array, neighbour: Array) -> "Errors":
        """Return these errors with those of one more neighbour of U taken in.

        Args:
            want: R.
            neighbour: N. One of another shape is left out.
        """
        if self.problem or neighbour.shape != want.shape or not want.size:
            return self
        if self.discrete:
            share = float(np.mean(want != neighbour))
            return replace(self, near_rms=max(self.near_rms, share), near_max=max(self.near_max, share))
        r, n = (np.asarray(array, np.float64) for array in (want, neighbour))
        error = _masked(n, r, np.isfinite(r) & np.isfinite(n))
        return replace(self, near_rms=max(self.near_rms, rms(error)), near_max=max(self.near_max, peak(error)))


def errors_of(want: Array, unfused: Array, fused: Array) -> Errors:
    """Measure U and F against R.

    Args:
        want: R, float64 (or integer, boolean, text).
        unfused: U.
        fused: F.
    """
    if fused.shape != unfused.shape or want.shape != unfused.shape:
        return _ruled_out(f"shape {fused.shape}, the unfused model gives {unfused.shape}, the reference {want.shape}")
    if fused.dtype != unfused.dtype:
        return _ruled_out(f"type {fused.dtype}, the unfused model gives {unfused.dtype}")
    if unfused.dtype.kind in "biuSUO":
        return _discrete_errors(want, unfused, fused)
    r, u, f = (np.asarray(array, np.float64) for array in (want, unfused, fused))
    fits = _class_ok(r, u, f, float(ml_dtypes.finfo(unfused.dtype).max))  # type: ignore[no-untyped-call]
    problem = "" if fits.all() else f"{int((~fits).sum())} elements are not finite where they should be, or the reverse"
    compared = np.isfinite(r) & np.isfinite(f)
    r0, du, df = np.where(compared, r, 0.0), _masked(u, r, compared & np.isfinite(u)), _masked(f, r, compared)
    flat = int(np.argmax(np.abs(df))) if df.size else 0
    if problem and df.size:
        flat = int(np.argmin(fits))
    index = index_of(flat, r.shape) if df.size else ()
    values = (r[index].item(), u[index].item(), f[index].item()) if df.size else (None, None, None)
    sizes = rms(r0), peak(r0), rms(du), peak(du), rms(df), peak(df)
    elements = int(compared.sum())
    spread = None if problem else spread_of(want, unfused, fused)
    return Errors(elements, *sizes, index, values, problem, left_out=r.size - elements, spread=spread)


def _masked(got: Array, want: Array, where: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.subtract(got, want, out=np.zeros_like(want), where=where)


def _class_ok(r: Array, u: Array, f: Array, largest: float) -> Array:
    # Where U leaves the range of its type and R does not, F may do either; where R is at its edge, either may.
    edge = np.isfinite(r) & (np.abs(r) > _EDGE * largest) & np.isinf(f) & (np.sign(r) == np.sign(f))
    return np.asarray(same_finiteness(r, f) | same_finiteness(u, f) | edge)


def _discrete_errors(r: Array, u: Array, f: Array) -> Errors:
    unfused, both = np.asarray(r != u), np.asarray((f != r) & (f != u))
    fused = np.asarray(f != r)
    flat = int(np.argmax(both if both.any() else fused)) if f.size else 0
    index = index_of(flat, f.shape) if f.size else ()
    values = (r.item(index), u.item(index), f.item(index)) if f.size else (None, None, None)  # of text too
    us, fs, neither = (float(wrong.mean()) if f.size else 0.0 for wrong in (unfused, fused, both))
    return Errors(f.size, 1.0, 1.0, us, us, fs, neither, index, values, discrete=True)


def _ruled_out(problem: str) -> Errors:
    return Errors(0, 0.0, 0.0, 0.0, 0.0, math.inf, math.inf, (), (None, None, None), problem)


def together(members: list[Errors]) -> Errors:
    """Return the errors of several sets of inputs as if they had been one.

    Args:
        members: At least one, none of them with a problem.
    """
    elements = sum(e.elements for e in members)
    furthest = max(members, key=lambda e: e.fused_max)

    def mean(values: list[float]) -> float:
        squares = sum(e.elements * value**2 for e, value in zip(members, values, strict=True))
        return math.sqrt(squares / elements) if elements else 0.0

    return Errors(
        elements,
        mean([e.size_rms for e in members]),
        max(e.size_max for e in members),
        mean([e.unfused_rms for e in members]),
        max(e.unfused_max for e in members),
        mean([e.fused_rms for e in members]),
        furthest.fused_max,
        furthest.index,
        furthest.values,
        near_rms=mean([e.near_rms for e in members]),
        near_max=max(e.near_max for e in members),
        left_out=sum(e.left_out for e in members),
        spread=furthest.spread,
    )

"""How errors are spread over the elements of an output: reported with every row, and decides nothing.

The worst element of a deep network is off by thousands of units in the last place however it is written, for it has
cancelled to almost nothing; a limit on ulps or on elementwise relative errors would say no to every correct fold.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Spread:
    """What one output's errors look like on one set of inputs.

    Attributes:
        p50: Median of |F - R|.
        p99: 99th percentile of |F - R|.
        ulps: Largest |F - R| in units in the last place of R, in the type of F.
        cosine: 1 - cos(F, R).
        flips: Positions whose largest entry along axis 1 is another in F than in R; 0 without such an axis.
        unfused_flips: The same of U.
        positions: How many positions there are.
    """

    p50: float
    p99: float
    ulps: float
    cosine: float
    flips: int
    unfused_flips: int
    positions: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "p50": self.p50,
            "p99": self.p99,
            "ulps": self.ulps,
            "one_minus_cosine": self.cosine,
            "argmax_flips": self.flips,
            "unfused_argmax_flips": self.unfused_flips,
            "argmax_positions": self.positions,
        }

    def __str__(self) -> str:
        text = (
            f"|error| p50 {self.p50:.1e}, p99 {self.p99:.1e}, up to {self.ulps:.3g} ulp; 1 - cosine {self.cosine:.1e}"
        )
        if self.positions:
            text += f"; argmax differs at {self.flips} of {self.positions} (unfused: {self.unfused_flips})"
        return text


def spread_of(want: Array, unfused: Array, fused: Array) -> Spread | None:
    """Describe the errors of F.

    Args:
        want: R, float64.
        unfused: U, floating.
        fused: F, of the same shape and type as U.

    Returns:
        None if no element is finite in all three.
    """
    r, u, f = (np.asarray(array, np.float64) for array in (want, unfused, fused))
    finite = np.isfinite(r) & np.isfinite(u) & np.isfinite(f)
    if not finite.any():
        return None
    error = np.abs(f[finite] - r[finite])
    p50, p99 = (float(value) for value in np.quantile(error, (0.5, 0.99), method="higher"))
    ulps = float(np.max(error / _ulp(r[finite], fused.dtype)))
    flips, unfused_flips, positions = 0, 0, 0
    if r.ndim > 1 and r.shape[1] > 1 and finite.all():
        best = [array.argmax(1) for array in (r, u, f)]
        flips, unfused_flips = int((best[2] != best[0]).sum()), int((best[1] != best[0]).sum())
        positions = best[0].size
    return Spread(p50, p99, ulps, _one_minus_cosine(f[finite], r[finite]), flips, unfused_flips, positions)


def _ulp(values: Array, dtype: np.dtype[Any]) -> Array:
    """Return the distance between neighbouring numbers of a type at each value."""
    info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    _, exponents = np.frexp(np.abs(values))
    smallest = int(np.log2(float(info.smallest_subnormal))) if dtype.itemsize < 8 else -1074
    return np.asarray(np.ldexp(1.0, np.maximum(exponents - 1 - info.nmant, smallest)))


def _one_minus_cosine(a: Array, b: Array) -> float:
    sizes = float(np.abs(a).max()), float(np.abs(b).max())
    if 0.0 in sizes:
        return 0.0 if sizes == (0.0, 0.0) else 1.0
    a, b = a / sizes[0], b / sizes[1]
    a, b = a / np.sqrt(np.vdot(a, a)), b / np.sqrt(np.vdot(b, b))
    # 1 - cos = |a - b|^2 / 2 for unit vectors, without the cancellation of 1 - a . b.
    return float(np.vdot(a - b, a - b)) / 2

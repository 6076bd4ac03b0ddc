"""Two sets of tensors, compared as everywhere in this project: names, shapes, types, finiteness, then values.

Errors are measured against the size of the whole tensor, not of each element: elements near zero have cancelled, and
their relative error says nothing about the computation (MobileNetV2 is off by 30 to 330,000 ulp in its worst element,
folded or not).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from renorm_onnx.errors import InputError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tolerance:
    """How far a tensor may be from the one wanted.

    Attributes:
        rms: Bound on RMS(got - want) / RMS(want), no unit.
        peak: Bound on max|got - want| / max|want|, no unit.
    """

    rms: float
    peak: float


class _ByDtype(Mapping[Any, Tolerance]):
    """Tolerances looked up by anything that numpy takes as a dtype: `np.float32`, "float32", an array's dtype."""

    def __init__(self, table: Mapping[Any, Tolerance]) -> None:
        self._table = {np.dtype(key): value for key, value in table.items()}

    def __getitem__(self, key: Any) -> Tolerance:
        dtype = np.dtype(key)
        return self._table[dtype] if dtype in self._table else _exact(dtype)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def _exact(dtype: np.dtype[Any]) -> Tolerance:
    if dtype.kind in "biuSUO":
        return Tolerance(0.0, 0.0)
    raise KeyError(dtype)


TOLERANCES: Mapping[Any, Tolerance] = _ByDtype(
    {
        np.float64: Tolerance(1e-13, 1e-12),
        np.float32: Tolerance(2e-6, 1e-5),
        np.float16: Tolerance(4e-3, 2e-2),
        ml_dtypes.bfloat16: Tolerance(3e-2, 1e-1),
    }
)
"""For two computations of a small network or of one layer in that type; integers, booleans and strings: exact."""


@dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`.

    Attributes:
        ok: Everything was there, and close enough.
        problem: The first thing that is wrong, a sentence; empty if nothing.
        output: Name of the output that is furthest from what was wanted, in units of its tolerance.
        index: Index of its worst element.
        want: The value wanted there.
        got: The value that came.
        rms: RMS(got - want) / RMS(want) of that output, of its unit where that is larger.
        peak: max|got - want| / max|want| of that output, likewise.
        elements: How many elements were compared.
        tolerance: What was allowed.
    """

    ok: bool
    problem: str
    output: str
    index: tuple[int, ...]
    want: Any
    got: Any
    rms: float
    peak: float
    elements: int
    tolerance: Tolerance | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        fields = asdict(self)
        values = {name: json_value(fields[name]) for name in ("want", "got", "rms", "peak")}
        return {**fields, **values, "index": list(self.index)}

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        head = "equal within tolerance" if self.ok else f"differs: {self.problem}"
        if not self.output:
            return head
        limits = f" (allowed {self.tolerance.rms:.1e}, {self.tolerance.peak:.1e})" if self.tolerance else ""
        return (
            f"{head}; worst output {self.output!r}: rms {self.rms:.2e}, peak {self.peak:.2e}{limits}, at index "
            f"{self.index} wanted {self.want!r}, got {self.got!r}; {self.elements} elements compared"
        )


def compare(
    want: Any, got: Any, tolerance: Tolerance | None = None, *, units: Mapping[str, Array] | None = None
) -> Comparison:
    """Compare outputs with what was wanted.

    Order: names as sets, shapes, types, finiteness (NaN with NaN, infinities with their sign), values. Comparing
    nothing is a failure.

    Args:
        want: An array, a sequence of arrays, or a mapping from names to arrays.
        got: The same, with the same names.
        tolerance: One for all; None: `TOLERANCES` by the type of each output.
        units: By output, of its shape: an element counts as at least that large, where its own size says nothing. A
            mean that is 0 but for rounding is measured in standard deviations.

    Returns:
        What was found, false if anything differs; never raises for a difference.

    Raises:
        InputError: `want` or `got` is neither arrays nor a mapping of arrays, or there is no tolerance for the type.
    """
    wanted, given = _named(want), _named(got)
    if set(wanted) != set(given):
        missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
        return _failure(f"outputs differ: missing {missing}, unexpected {extra}")
    for name, array in wanted.items():
        if array.shape != given[name].shape:
            return _failure(f"output {name!r} has shape {given[name].shape}, wanted {array.shape}")
        if array.dtype != given[name].dtype:
            return _failure(f"output {name!r} has type {given[name].dtype}, wanted {array.dtype}")
    elements = sum(array.size for array in wanted.values())
    if elements == 0:
        return _failure("nothing was compared: no output has an element")
    found = [
        _compare_one(name, wanted[name], given[name], tolerance, elements, (units or {}).get(name))
        for name in wanted
        if wanted[name].size
    ]
    return max(found, key=lambda one: (not one.ok, _excess(one)))


def _compare_one(
    name: str, want: Array, got: Array, tolerance: Tolerance | None, elements: int, unit: Array | None
) -> Comparison:
    try:
        allowed = tolerance or TOLERANCES[want.dtype]
    except KeyError:
        raise InputError(f"compare: no tolerance for type {want.dtype} of output {name!r}; pass one") from None
    if want.dtype.kind in "SUO":
        wrong = np.asarray(want != got)
        index = index_of(int(np.argmax(wrong)), want.shape)
        problem = f"output {name!r} differs" if wrong.any() else ""
        return Comparison(not problem, problem, name, index, want[index], got[index], 0.0, 0.0, elements, allowed)
    w, g = want.astype(np.float64), got.astype(np.float64)
    same_class = same_finiteness(w, g)
    if not same_class.all():
        index = index_of(int(np.argmin(same_class)), want.shape)
        problem = f"output {name!r} is not finite where it should be, or the reverse"
        return Comparison(
            False, problem, name, index, want[index].item(), got[index].item(), np.inf, np.inf, elements, allowed
        )
    error = np.where(np.isfinite(w), np.abs(np.subtract(g, w, where=np.isfinite(w), out=np.zeros_like(w))), 0.0)
    size = np.where(np.isfinite(w), np.abs(w), 0.0)
    if unit is not None:
        size = np.fmax(size, np.where(np.isfinite(unit), unit, 0.0))
    off, most = ratio(rms(error), rms(size)), ratio(peak(error), peak(size))
    index = index_of(int(np.argmax(error)), want.shape)
    problem = ""
    if off > allowed.rms or most > allowed.peak:
        problem = f"output {name!r} is off by more than its tolerance"
    return Comparison(
        not problem, problem, name, index, want[index].item(), got[index].item(), off, most, elements, allowed
    )


def same_finiteness(want: Array, got: Array) -> Array:
    """Return, per element, whether both are finite, both NaN, or both the same infinity."""
    finite = np.isfinite(want)
    return np.where(finite, np.isfinite(got), (np.isnan(want) & np.isnan(got)) | (want == got))


def _named(values: Any) -> dict[str, Array]:
    if isinstance(values, Mapping):
        return {str(name): np.asarray(value) for name, value in values.items()}
    if isinstance(values, np.ndarray | np.generic | int | float):
        return {"output": np.asarray(values)}
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        return {f"output {position}": np.asarray(value) for position, value in enumerate(values)}
    raise InputError(f"compare: got {type(values).__name__}, expected an array, a sequence or a mapping of arrays")


def _failure(problem: str) -> Comparison:
    return Comparison(False, problem, "", (), None, None, float("inf"), float("inf"), 0, None)


def _excess(one: Comparison) -> float:
    allowed = one.tolerance or Tolerance(1.0, 1.0)
    return max(one.rms / max(allowed.rms, 1e-300), one.peak / max(allowed.peak, 1e-300))


def rms(values: Array) -> float:
    """Return the root mean square, also of values whose squares leave the range of float64; 0 of none."""
    largest = peak(values)
    if largest == 0.0:
        return 0.0
    scaled = values / largest
    return largest * math.sqrt(float(np.vdot(scaled, scaled)) / values.size)


def peak(values: Array) -> float:
    """Return the largest absolute value; 0 of none."""
    return float(np.abs(values).max()) if values.size else 0.0


def ratio(error: float, size: float) -> float:
    """Return error / size, where no error is 0 whatever the size."""
    return 0.0 if error == 0 else error / size if size > 0 else math.inf


def index_of(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the index of the element that is number `flat` of an array of that shape."""
    return tuple(int(i) for i in np.unravel_index(flat, shape))


def json_value(value: Any) -> Any:
    """Return a JSON value; what JSON has no number for becomes its name."""
    if isinstance(value, float) and not np.isfinite(value):
        return repr(value)
    return value if isinstance(value, bool | int | float | str | type(None)) else repr(value)

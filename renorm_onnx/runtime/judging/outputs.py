"""What models give, as tensors by name; and whether what they give depends on what they are fed."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from renorm_onnx.runtime.judging.verdict import ENOUGH

Array = npt.NDArray[Any]


def tensors_of(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Return the tensors of outputs, those of a sequence as name[0] and so on; absent optionals are left out."""
    found: dict[str, Array] = {}
    for name, value in outputs.items():
        if isinstance(value, list | tuple):
            found |= tensors_of({f"{name}[{position}]": part for position, part in enumerate(value)})
        elif value is not None:
            found[name] = np.asarray(value)
    return found


def largest_difference(once: Array, again: Array) -> float:
    """Return the largest difference of two runs; of text 1 if anything differs."""
    if once.shape != again.shape:
        return math.inf
    if once.dtype.kind in "SUO":
        return float(np.any(once != again))
    a, b = once.astype(np.float64), again.astype(np.float64)
    different = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    return float(np.max(np.abs(a[different] - b[different]), initial=0.0))


class Variation:
    """Whether an output of the reference ever changed: one that is dead or saturated hides what is wrong before it."""

    def __init__(self) -> None:
        self._first: dict[tuple[int, ...], Array] = {}
        self._low, self._high, self._elements = math.inf, -math.inf, 0
        self._varied = self._compared = False

    def add(self, array: Array) -> None:
        """Take in the output for one more set of inputs, another than before.

        Labels and masks, of few values, may well be all the same.
        """
        if array.dtype.kind != "f":
            self._varied = True
        if self._varied:
            return
        finite = array[np.isfinite(array)]
        if not finite.size:
            return
        self._low, self._high = min(self._low, finite.min()), max(self._high, finite.max())
        self._elements += finite.size
        if array.shape not in self._first:
            self._first[array.shape] = array.copy()
        else:
            self._compared = True
            self._varied = not np.array_equal(self._first[array.shape], array, equal_nan=True)
            if self._varied:
                self._first.clear()

    @property
    def is_dead(self) -> bool:
        """Whether it was the same for all inputs, or one value in so many elements that it is no chance."""
        if self._varied or not self._elements:
            return False
        return self._compared or (self._low == self._high and self._elements >= ENOUGH)

"""Whether a folded operand, or value, still fits its type: neither too large for it, nor with the digits of a row lost.

A stored infinity, such as that of an attention mask, is no overflow: a scale keeps it or turns it over, a shift leaves
it. Scaled by zero it would be no number any more, and is refused.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.carrier import AddAfter, Desk, SetInput
from renorm_onnx.fusion.fact_rounding import FLOATS
from renorm_onnx.fusion.parameters import Array, Parameter, largest, smallest_normal
from renorm_onnx.fusion.report import Reason
from renorm_onnx.fusion.sources import Norm

NO_NUMBER = "holds an infinity, which a scale of zero would turn into no number"


class Ranges:
    """Looks at operands as they will be, and remembers how large the stored ones are.

    Args:
        desk: Knows the operands as they are.
        max_kappa: How many standard deviations from zero a value may lie that is rounded to a narrower type.
        max_weight: Largest absolute value that a folded parameter may have, besides the limit of its type.
    """

    def __init__(self, desk: Desk, max_kappa: float, max_weight: float) -> None:
        self._desk = desk
        self._max_kappa = max_kappa
        self._max_weight = max_weight
        self._magnitudes: dict[tuple[int, tuple[int, ...]], tuple[object, Array]] = {}

    def objection(self, edit: SetInput | AddAfter) -> tuple[Reason, str] | None:
        """Whether rounding to the type would overflow, or leave a whole row of a weight without its digits.

        Returns:
            The reason, and the end of a sentence that the operator's label begins; None if nothing is wrong.
        """
        parameter = edit.parameter
        if parameter.dtype not in FLOATS:
            return None  # whoever moves integers keeps them within their range, whose two ends differ
        limit = min(largest(parameter.dtype), self._max_weight)
        if not parameter.factors:
            base = parameter.base
            if not isinstance(base, np.ndarray) or np.abs(base).max(initial=0.0) <= limit:
                return None
            return _beyond(
                base, self._desk.parameter(edit.node, edit.index) if isinstance(edit, SetInput) else None, limit
            )
        factor = np.abs(functools.reduce(np.multiply, parameter.factors))
        keep = tuple(i for i, size in enumerate(factor.shape) if i == 0 or size > 1)
        before = self._magnitudes_of(parameter, keep)
        after = before * factor.reshape([factor.shape[i] for i in keep])
        tiny = smallest_normal(parameter.dtype)
        if np.count_nonzero((after >= tiny) & (after <= limit)) == after.size > 0:
            return None
        if not (after <= limit).all() and (after[np.isfinite(before)] > limit).any():
            return Reason.OVERFLOW, _too_large(float(after[np.isfinite(before)].max()), limit)
        if (np.isinf(before) & np.isnan(after)).any():
            return Reason.NON_FINITE, NO_NUMBER
        if (after < tiny).any():
            rows = tuple(range(1, after.ndim))
            lost = (after.max(axis=rows) < tiny) & (before.max(axis=rows) >= tiny) & (after.max(axis=rows) > 0)
            if lost.any():
                return Reason.UNDERFLOW, f"would get a row of parameters below {tiny:.3g}"
        return None

    def objection_to_cast(self, node: ir.Node, norm: Norm) -> tuple[Reason, str] | None:
        """Whether what a norm computes is too large for the type that a widening Cast reads, or far from zero there.

        Before the fold only the wider type held it. What was rounded near zero is then rounded at its distance from it.

        Returns:
            As `objection`.
        """
        narrow, wide = (self._desk.fact(v).dtype for v in (node.inputs[0], node.outputs[0]))
        if narrow is None or narrow == wide:
            return None
        limit = largest(narrow)
        if narrow == ir.DataType.FLOAT16 and norm.reach(limit) > limit:
            return Reason.OVERFLOW, f"reads {narrow.name}, which may not hold what {norm.name!r} computes"
        if norm.offset > self._max_kappa:
            return (
                Reason.CANCELLATION,
                f"reads {narrow.name}, and {norm.name!r} lies {norm.offset:.3g} standard deviations from zero, more "
                f"than {self._max_kappa:g}: rounded there, that part of the precision would be lost",
            )
        return None

    def _magnitudes_of(self, parameter: Parameter, keep: tuple[int, ...]) -> Array:
        base = parameter._replace(factors=())
        if isinstance(parameter.base, np.ndarray):
            return base.magnitudes(keep)
        key = (id(parameter.base), keep)
        known = self._magnitudes.get(key)
        if known is None:
            known = self._magnitudes[key] = (parameter.base, base.magnitudes(keep))
        return known[1]


def _beyond(array: Array, old: Parameter | None, limit: float) -> tuple[Reason, str] | None:
    """The objection to numbers of which some exceed the limit, unless those are infinities that stood there before."""
    stood = np.zeros((), bool) if old is None else np.isinf(old.float64())
    if (stood & np.isnan(array)).any():
        return Reason.NON_FINITE, NO_NUMBER
    beyond = ~(np.abs(array) <= limit) & ~(np.isinf(array) & stood)
    return (Reason.OVERFLOW, _too_large(float(np.abs(array[beyond]).max()), limit)) if beyond.any() else None


def _too_large(top: float, limit: float) -> str:
    return f"would get a parameter of {top:.3g}, more than {limit:.3g}"

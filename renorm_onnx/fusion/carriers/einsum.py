"""Einsum: absorbs a scale into a constant factor; a shift becomes an Add behind it.

Before:
    ``y = s * einsum("bchw,oc->bohw", x, W) + t``          ``y = einsum("bchw,oc->bohw", s * x + t, W)``
After:
    ``y = einsum("bchw,oc->bohw", x, s W) + t``            ``y = einsum("bchw,oc->bohw", x, W s) + W t``
Formula:
    Each term of the sum is a product of one element of every factor. So a number for each value of a letter is drawn
    into any factor that has the letter; out of a factor it goes into another one that has the letter, or to the
    output if that has it. A shift t of a factor adds the same sum with t in its place, times the size of each letter
    that only this factor has and the output lacks. Source: ONNX Einsum-12, with one letter for each axis.
Refuses when:
    the equation has an ellipsis, a diagonal or no arrow; no factor is proven to vary along the letter; a shift meets
    a computed factor, or is summed over a letter of open size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import AddAfter, Carrier, Desk, Step, refuse
from renorm_onnx.fusion.carriers.addition import has_channels
from renorm_onnx.fusion.carriers.gemm import element_type
from renorm_onnx.fusion.carriers.matmul import following_add
from renorm_onnx.fusion.carriers.quantized import weight_of
from renorm_onnx.fusion.fact_dims import einsum_terms
from renorm_onnx.fusion.parameters import Array, Parameter
from renorm_onnx.fusion.report import Reason, Refusal


class Einsum(Carrier):
    """A sum of products, whose axes have letters."""

    operators = ("Einsum",)

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale one factor; add the shift behind."""
        demand, found = maps[0], einsum_terms(node)
        if found is None:
            return _refuse_equation(node)
        terms, output = found
        constant = [desk.parameter(node, i) is not None for i in range(len(terms))]
        onward: dict[int, AffineMap] = {}
        if demand.has_scale:
            target = self._scaled_factor(node, demand, terms, output, constant, desk)
            if isinstance(target, Refusal):
                return target
            onward[target[0]] = target[1]
        if not demand.has_shift:
            return Step((), onward)
        dtype = element_type(node, desk)
        if (not onward and not any(constant)) or dtype is None:
            return refuse(Reason.SHIFT, node, "has no constant factor, and the shift would stay an Add")
        shift = demand.along(len(output))[1]
        return Step((AddAfter(node, Parameter.new(_without_leading_ones(shift), dtype)),), onward)

    def _scaled_factor(
        self,
        node: ir.Node,
        demand: AffineMap,
        terms: Sequence[str],
        output: str,
        constant: Sequence[bool],
        desk: Desk,
    ) -> tuple[int, AffineMap] | Refusal:
        """The factor that takes the scale, a constant one if possible, and what is asked of it."""
        fits = []
        for index, term in enumerate(terms):
            letter = "" if demand.axis is None else output[demand.axis]
            if letter in term:
                own = demand.without_shift().on_axis(term.index(letter))
                if has_channels(node.inputs[index], own, desk):
                    fits.append((index, own))
        if not fits:
            return refuse(Reason.SHAPE, node, f"has no factor that is proven to vary along axis {demand.axis}")
        return next((f for f in fits if constant[f[0]]), fits[-1])

    def forward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale another factor that has the letter, or hand the scale on; add what the shift contributes behind."""
        found = einsum_terms(node)
        if found is None:
            return _refuse_equation(node)
        if len(maps) != 1:
            return refuse(Reason.WEIGHT, node, "gets more than one of its factors from the norm")
        terms, output = found
        [(side, given)] = maps.items()
        letter = "" if given.axis is None else terms[side][given.axis]
        weights = {i: w for i in range(len(terms)) if i != side and (w := weight_of(node, i, desk)) is not None}
        total = self._contribution(node, side, given, terms, output, weights, desk) if given.has_shift else None
        if isinstance(total, Refusal):
            return total
        target = next((i for i in weights if letter in terms[i]), None)
        if given.has_scale and target is None and (letter not in output or total is not None):
            return refuse(Reason.WEIGHT, node, "has no constant factor that varies along the map")
        if given.has_scale and target is None:
            return Step((), {0: given.on_axis(output.index(letter))})
        demands: dict[int, AffineMap] = {}
        if given.has_scale and target is not None:
            own = given.on_axis(terms[target].index(letter))
            if any(weights[target].shape[a] != own.channels for a in own.axes):
                return refuse(Reason.SHAPE, node, f"has factor {target} that is not proven to vary along the map")
            demands[target] = own.without_shift()
        if total is None:
            return Step((), {}, demands)
        wide = [i for i, n in enumerate(total.shape) if n > 1]
        if len(wide) < 2 and following_add(node, desk):
            return Step((), {0: AffineMap.of(1.0, total.reshape(-1), wide[0] if wide else None)}, demands)
        dtype = element_type(node, desk)
        if dtype is None:
            return refuse(Reason.DTYPE, node, "has an unknown element type")
        return Step((AddAfter(node, Parameter.new(_without_leading_ones(total), dtype)),), {}, demands)

    def _contribution(
        self,
        node: ir.Node,
        side: int,
        given: AffineMap,
        terms: Sequence[str],
        output: str,
        weights: Mapping[int, Parameter],
        desk: Desk,
    ) -> Array | Refusal:
        """What the shift of one factor adds to the output; of the output's rank, to be broadcast."""
        if len(weights) < len(terms) - 1:
            return refuse(Reason.WEIGHT, node, "has a weight that is not constant", structural=True)
        dims, others = desk.dims(node.inputs[side]), [terms[i] for i in weights]
        own = "" if given.axis is None else terms[side][given.axis]
        # A letter of size one in a weight is broadcast, and says nothing of how many elements are summed.
        known = {own, *(a for i, w in weights.items() for a, n in zip(terms[i], w.shape, strict=True) if n != 1)}
        lone = [i for i, letter in enumerate(terms[side]) if letter not in known and letter not in output]
        sizes = [dims[i] if dims is not None else None for i in lone]
        if not all(isinstance(n, int) for n in sizes):
            return refuse(Reason.SHIFT, node, "sums a number of elements that is not fixed")
        left = "".join(letter for letter in output if letter in known)
        shift = given.shift if own else given.shift.reshape(())
        total = np.einsum(f"{','.join([own, *others])}->{left}", shift, *(w.float64() for w in weights.values()))
        count = math.prod(n for n in sizes if isinstance(n, int))
        lengths = dict(zip(left, np.shape(total), strict=True))
        return np.reshape(total * count, [lengths.get(letter, 1) for letter in output])


def _refuse_equation(node: ir.Node) -> Refusal:
    return refuse(Reason.SHAPE, node, "has an equation with an ellipsis, a diagonal or no arrow", structural=True)


def _without_leading_ones(array: Array) -> Array:
    """The array without the axes of length one that broadcasting adds again."""
    first = next((i for i, n in enumerate(array.shape) if n > 1), array.ndim)
    return array.reshape(array.shape[first:])


CARRIERS = (Einsum(),)

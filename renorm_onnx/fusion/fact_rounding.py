"""What a runtime rounds, and what is known all the same: rules of `fact_rules`, wrapped.

Contents are evaluated in float64. A runtime rounds them at every step, which moves them little, but not where they
jump.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx.fusion.fact import Content, Fact, Rule, to_float64

# Half a unit in the last place of a number around one, by type.
UNIT_ROUNDOFF = {
    ir.DataType.FLOAT: 2.0**-24,
    ir.DataType.FLOAT16: 2.0**-11,
    ir.DataType.BFLOAT16: 2.0**-8,
    ir.DataType.DOUBLE: 2.0**-53,
}
# The types that folds compute in; to those of 8 bits and fewer runtimes round in ways of their own.
FLOATS = tuple(UNIT_ROUNDOFF)


def rounding(rule: Rule, *, once: bool = False) -> Rule:
    """A rule of which a runtime rounds the floats, so that they are exact only if nothing was there to round.

    Args:
        rule: Of an operator in float64.
        once: Whether a runtime rounds the exact result, and nothing else on the way.
    """

    def rounding_rule(node: ir.Node, inputs: Sequence[Fact], opset: int) -> Sequence[Fact]:
        return [
            found
            if found.content is None or found.content.dtype.kind != "f" or (once and _fits(found))
            else found._replace(exact=False)
            for found in rule(node, inputs, opset)
        ]

    return rounding_rule


def _fits(fact: Fact) -> bool:
    """Whether the type of a fact holds every element of its content as it is."""
    if fact.content is None or fact.dtype not in FLOATS:
        return False
    return np.array_equal(rounded(fact.content, fact.dtype), fact.content)


def exactly(rule: Rule) -> Rule:
    """A rule that tells one number from all others, and has no content where a runtime may have that number."""

    def exactly_known(node: ir.Node, inputs: Sequence[Fact], opset: int) -> Sequence[Fact]:
        exact = all(i.exact for i in inputs)
        return [found if exact else found._replace(content=None) for found in rule(node, inputs, opset)]

    return exactly_known


def jumping(rule: Rule) -> Rule:
    """A rule that steps up or down, and has no content where a runtime may stand on the other side of a step."""

    def stepping(node: ir.Node, inputs: Sequence[Fact], opset: int) -> Sequence[Fact]:
        found = rule(node, inputs, opset)
        for signs in () if all(i.exact for i in inputs) else itertools.product((-1, 1), repeat=len(inputs)):
            moved = rule(node, [_moved(i, sign) for i, sign in zip(inputs, signs, strict=True)], opset)
            for place, (one, two) in enumerate(zip(found, moved, strict=True)):
                if one.content is None or two.content is None or not np.array_equal(one.content, two.content):
                    found = [*found[:place], one._replace(content=None), *found[place + 1 :]]
        return found

    return stepping


def _moved(fact: Fact, sign: int) -> Fact:
    """A fact whose inexact floats lie where a runtime may have them at most.

    A few roundings move a number by some units of its last place, and a difference by those of what was subtracted,
    which is not known any more: sizes and what they are made of stay below 2^13.
    """
    if fact.exact or fact.content is None or fact.content.dtype.kind != "f":
        return fact
    unit = UNIT_ROUNDOFF.get(fact.dtype or ir.DataType.UNDEFINED, 1.0)
    return fact._replace(content=fact.content + sign * 64 * unit * (np.abs(fact.content) + 2.0**13))


def holds(to: ir.DataType | None, source: ir.DataType | None) -> bool:
    """Whether every number of one type of `FLOATS` is one of another."""
    return to in FLOATS and source in FLOATS and (to == source or to.bitwidth > source.bitwidth)


def rounded(content: Content, to: ir.DataType) -> npt.NDArray[np.float64]:
    """Numbers in a type of `FLOATS`, as float64: those of 16 bits onnxruntime makes of those of 32."""
    with np.errstate(over="ignore"):
        near = content if to == ir.DataType.DOUBLE else content.astype(np.float32)
        return to_float64(near.astype(to.numpy()))

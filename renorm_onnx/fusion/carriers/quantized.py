"""DequantizeLinear: its scale absorbs a scale, so that a quantized weight stays quantized; its integers a whole shift.

Also `weight_of`, by which operators that absorb a map at their input read their weight, be it stored as it is or
quantized.

Before:
    ``y = s * ((q - zero_point) scale) + t``
After:
    ``y = (q + t / (s scale) - zero_point) (s scale)``
Formula:
    A scale per channel needs one number for each channel in DequantizeLinear: scale has shape (D,) along `axis`,
    or, in blocks, the rank of q with blocks along `axis`. One number for the whole tensor takes a uniform map, and
    becomes one for each channel otherwise, with its zero point. Blocks take any map that changes between them only.
    What q is made of, whole or broken numbers of 2 to 32 bits, does not matter: it stays as it is. A shift is a bias
    that is quantized: it is added to the integers if it is a whole number of steps, and within their range. Source:
    ONNX DequantizeLinear-10, 13, 19, 21, 23, 24.
Refuses when:
    the shift is no whole number of steps, or q is not constant; the map runs along another axis than the scales, or
    changes within a block; one scale would have to become many before opset 13; a channel is dead, and what reads the
    weight reads codes too: onnxruntime then makes 32-bit integers of the bias, whose step is that of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Edit, SetAttribute, SetInput, Step, refuse
from renorm_onnx.fusion.fact import Dims, Fact
from renorm_onnx.fusion.fact_dims import CONSTANT_OPERATORS, RULES
from renorm_onnx.fusion.fact_rounding import FLOATS
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.parameters import Array, Parameter, numpy_type
from renorm_onnx.fusion.report import Reason, Refusal

# Those that a shift can be added to; the others hold the codes of weights, which it never has to be.
INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.INT32)
# A channel is dead where the map makes less of it than this part of the largest. A sum of 2**15 steps or so, as an
# ordinary channel adds up to, would be 2**31 of its own, where 32 bits end.
DEAD = 2.0**-16


def weight_of(node: ir.Node, index: int, desk: Desk) -> Parameter | None:
    """The numbers of a weight that is stored, or computed from what DequantizeLinear makes; None if it is neither.

    Formula::

        rearranged((q - zero_point) * scale)        per tensor, per channel or in blocks
    """
    stored = desk.parameter(node, index)
    chain = [] if stored is not None else _dequantized(node, index, desk)
    if not chain:
        return stored
    numbers = _numbers(chain[-1], desk)
    for maker in chain[-2::-1]:
        if numbers is None or maker in desk.facts.changed:
            return None
        fact = Fact(numbers.shape, numbers, None, desk.fact(maker.inputs[0]).dtype)
        [found] = RULES[maker.op_type](maker, [fact, *desk.inputs(maker)[1:]], desk.opset)
        numbers = found.content
    dtype = desk.fact(node.inputs[index]).dtype
    return None if numbers is None or dtype not in FLOATS else Parameter.new(numbers, dtype)


def no_weight(node: ir.Node, index: int, desk: Desk) -> Refusal:
    """Why `weight_of` found no numbers: the weight is computed, or dequantized from what is."""
    chain = _dequantized(node, index, desk)
    if chain:
        why = "makes a weight of codes, scales or zero points that are not constant, or too many to compute with"
        return refuse(Reason.WEIGHT, chain[-1], why, structural=True)
    return refuse(Reason.WEIGHT, node, "has a weight that is not constant", structural=True)


def _dequantized(node: ir.Node, index: int, desk: Desk) -> list[ir.Node]:
    """The operators that make an operand, the last first, down to a DequantizeLinear; none if that is not how."""
    chain: list[ir.Node] = []
    while index < len(node.inputs) and (value := node.inputs[index]) is not None:
        maker = value.producer()
        if maker is None or maker.domain != "":
            return []
        chain.append(maker)
        if maker.op_type == "DequantizeLinear":
            return chain
        if maker.op_type not in CONSTANT_OPERATORS:
            return []
        node, index = maker, 0
    return []


def _numbers(maker: ir.Node, desk: Desk) -> Array | None:
    """What a DequantizeLinear of constants makes."""
    codes, scale = _codes(maker, 0, desk), desk.parameter(maker, 1)
    zero = _codes(maker, 2, desk) if desk.has_input(maker, 2) else None
    if codes is None or scale is None or (zero is None and desk.has_input(maker, 2)):
        return None
    offsets = 0.0 if zero is None else _along_codes(maker, zero.float64(), codes.shape)
    return np.asarray((codes.float64() - offsets) * _along_codes(maker, scale.float64(), codes.shape))


def _along_codes(maker: ir.Node, numbers: Array, shape: tuple[int, ...]) -> Array:
    """Scales or zero points shaped to broadcast against codes of that shape, those of blocks repeated."""
    axis = int(attribute(maker, "axis", 1))
    if block := int(attribute(maker, "block_size", 0)):
        return np.repeat(numbers, block, axis=axis).take(range(shape[axis]), axis=axis) if numbers.ndim else numbers
    if numbers.size == 1:
        return numbers.reshape([1] * len(shape))
    return numbers.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


class DequantizeLinear(Carrier):
    """Integers made numbers by a scale and a zero point."""

    operators = ("DequantizeLinear",)
    many_axes = True

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale the scale, move the integers."""
        demand = maps[0]
        scale = desk.parameter(node, 1)
        if _is_factor_of_codes(node) and (dead := _dead_channels(demand)):
            return refuse(Reason.SCALE, node, f"would get {dead} of a step too small for a bias of 32-bit integers")
        if scale is None and desk.is_constant(node, 1):
            return refuse(Reason.DTYPE, node, "has scales of a type that holds powers of two only", structural=True)
        if scale is None:
            return refuse(Reason.WEIGHT, node, "has a scale that is not constant", structural=True)
        step = self._scaled(node, demand.without_shift().reduced(), scale, desk.dims(node.inputs[0]), desk)
        if isinstance(step, Refusal) or not demand.has_shift:
            return step
        added = _shifted_integers(node, demand, scale, desk)
        return added if isinstance(added, Refusal) else Step((*step.edits, added), step.onward)

    def _scaled(
        self, node: ir.Node, demand: AffineMap, scale: Parameter, dims: Dims | None, desk: Desk
    ) -> Step | Refusal:
        """Scale the scale, which becomes one for each channel where it must."""
        if demand.is_uniform:
            return Step((), {1: demand})
        lengths = zip(demand.axes, demand.scale.shape, strict=True)
        if dims is None or demand.periodic or any(dims[a] != n for a, n in lengths):
            return refuse(Reason.SHAPE, node, "is not proven to vary along the map")
        axis = int(attribute(node, "axis", 1)) % len(dims)
        if block := int(attribute(node, "block_size", 0)):
            return _scaled_blocks(node, demand, axis, block)
        if demand.axes == (axis,) and scale.shape == demand.scale.shape:
            return Step((), {1: demand.on_axis(0)})
        if any(n != 1 for n in scale.shape):
            return refuse(Reason.AXIS, node, f"has its scales along axis {axis}, the map runs along {_named(demand)}")
        if len(demand.axes) > 1:
            return refuse(Reason.AXIS, node, f"takes scales along one axis, the map runs along {_named(demand)}")
        if desk.opset < 13:
            return refuse(Reason.OPSET, node, "has one scale for all channels, as always before opset 13")
        many = Parameter.new(scale.float64().reshape(-1) * demand.scale, scale.dtype)
        edits: list[Edit] = [SetInput(node, 1, many), SetAttribute(node, ir.AttrInt64("axis", demand.axes[0]))]
        if desk.has_input(node, 2):
            zero = _codes(node, 2, desk)
            if zero is None:
                return refuse(Reason.SCALE, node, "has one zero point for all channels, which is not known")
            edits.append(SetInput(node, 2, Parameter.new(np.full(demand.channels, zero.float64().flat[0]), zero.dtype)))
        return Step(tuple(edits))


def _dead_channels(demand: AffineMap) -> str:
    """The channels of which a map leaves nothing, or next to nothing, as a person counts them; empty if there are none.

    onnxruntime (WeightBiasQuantization) divides a bias by the steps of input and weight: what a dead channel has left,
    its shift, would be lost there.
    """
    size = np.abs(demand.scale)
    count = int(np.count_nonzero(size <= DEAD * size.max(initial=0.0)))
    return f"{count} channel{'s' if count > 1 else ''}" if count else ""


def _is_factor_of_codes(node: ir.Node) -> bool:
    """Whether what reads these numbers reads others that are dequantized, so that a runtime computes with the codes."""
    number = node.outputs[0]
    others = (i.producer() for user, _ in number.uses() for i in user.inputs[:2] if i is not None and i is not number)
    return any(maker is not None and maker.op_type == "DequantizeLinear" for maker in others)


def _scaled_blocks(node: ir.Node, demand: AffineMap, axis: int, block: int) -> Step | Refusal:
    """Scale one scale for each block of `block` elements along `axis`, by a map that does not change within any."""
    if axis not in demand.axes:
        return Step((), {1: demand})
    place = demand.axes.index(axis)
    size = demand.scale.shape[place]
    each = demand.take(slice(0, size, block), axis)
    if not np.array_equal(np.repeat(each.scale, block, place).take(range(size), place), demand.scale):
        return refuse(Reason.AXIS, node, f"has one scale for each {block} along axis {axis}, the map more")
    return Step((), {1: each})


def _named(given: AffineMap) -> str:
    return ", ".join(map(str, given.axes))


def _codes(node: ir.Node, index: int, desk: Desk) -> Parameter | None:
    """A constant operand of whatever is dequantized, as it will be; None where it is not constant or too large."""
    if (node, index) in desk.pending:
        return desk.pending[node, index]
    fact = desk.fact(node.inputs[index])
    found = fact.elements()
    if found is None or found.dtype == object or fact.dtype is None:
        return None
    return Parameter.new(found.astype(np.float64), fact.dtype)


def _shifted_integers(node: ir.Node, demand: AffineMap, scale: Parameter, desk: Desk) -> Edit | Refusal:
    """The integers, moved by the steps that make up the shift."""
    integers = _codes(node, 0, desk)
    if integers is None or integers.dtype not in INTEGERS or attribute(node, "block_size", 0):
        return refuse(Reason.SHIFT, node, "is not made of constant integers, to which a shift is added")
    gain, shift = demand.along(len(integers.shape))
    step = gain * _along_codes(node, scale.float64(), integers.shape)
    with np.errstate(all="ignore"):
        moved = integers.float64() + np.rint(shift / step)
    limits = np.iinfo(numpy_type(integers.dtype))
    exact = (np.rint(shift / step) * step == shift).all()
    if not exact or not ((moved >= limits.min) & (moved <= limits.max)).all():
        return refuse(Reason.SHIFT, node, "holds integers, and the shift is no whole number of their steps")
    return SetInput(node, 0, Parameter.new(moved, integers.dtype))


CARRIERS = (DequantizeLinear(),)

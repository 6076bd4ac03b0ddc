"""DequantizeLinear: its scale absorbs a scale, so that a quantized weight stays quantized; its integers a whole shift.

Also `weight_of`, `scaled_weight` and `added_bias`, by which operators that absorb a map at their input read and change
their weight and bias, whether those are stored as they are or quantized.

Before:
    ``y = s * ((q - zero_point) scale) + t``
After:
    ``y = (q + t / (s scale) - zero_point) (s scale)``
Formula:
    A scale per channel needs one number for each channel in DequantizeLinear: scale has shape (D,) along `axis`,
    or, in blocks, the rank of q with blocks along `axis`. One number for the whole tensor takes a uniform map, and
    becomes one for each channel otherwise, with its zero point. A shift is a bias that is quantized: it is added to
    the integers if it is a whole number of steps, and within their range. Source: ONNX DequantizeLinear-10, 13, 19,
    21, 23.
Refuses when:
    the shift is no whole number of steps, or q is not constant; the map runs along another axis than the scales, or
    within blocks; one scale would have to become many before opset 13.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from renorm_onnx.fusion.affine import AffineMap
from renorm_onnx.fusion.carrier import Carrier, Desk, Edit, SetAttribute, SetInput, Step, refuse
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.facts import Dims
from renorm_onnx.fusion.parameters import Array, Parameter, numpy_type
from renorm_onnx.fusion.report import Reason, Refusal

INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.INT32)


def weight_of(node: ir.Node, index: int, desk: Desk) -> Parameter | None:
    """The numbers of a weight that is stored, or that DequantizeLinear makes of stored integers; None if it is neither.

    Formula::

        (q - zero_point) * scale        per tensor, per channel or in blocks
    """
    maker = _dequantizer(node, index, desk)
    if maker is None:
        return desk.parameter(node, index)
    integers, scale = _integers(maker, 0, desk), desk.parameter(maker, 1)
    dtype = desk.fact(node.inputs[index]).dtype
    if integers is None or scale is None or dtype is None:
        return None
    zero = _integers(maker, 2, desk) if desk.has_input(maker, 2) else Parameter.new(0.0, integers.dtype)
    if zero is None:
        return None
    steps, offsets = (_along_integers(maker, p.float64(), integers.shape) for p in (scale, zero))
    return Parameter.new((integers.float64() - offsets) * steps, dtype)


def no_weight(node: ir.Node, index: int, desk: Desk) -> Refusal:
    """Why `weight_of` found no numbers: the weight is computed, or dequantized for others too, or of other integers."""
    value = node.inputs[index] if index < len(node.inputs) else None
    maker = None if value is None else value.producer()
    if maker is not None and maker.op_type == "DequantizeLinear" and desk.is_constant(maker, 0):
        if _dequantizer(node, index, desk) is None:
            return refuse(Reason.CONSUMER, maker, "makes a weight that is read elsewhere too", structural=True)
        kinds = f"constant {', '.join(kind.name for kind in INTEGERS)} with constant scales"
        return refuse(Reason.DTYPE, maker, f"makes a weight of something else than {kinds}", structural=True)
    return refuse(Reason.WEIGHT, node, "has a weight that is not constant", structural=True)


def scaled_weight(node: ir.Node, index: int, factor: Array, desk: Desk) -> tuple[Edit, ...] | Refusal:
    """Multiply the weight that `weight_of` returned by `factor`, of the same rank; a quantized one stays quantized."""
    maker = _dequantizer(node, index, desk)
    if maker is None:
        weight = desk.parameter(node, index)
        assert weight is not None, "the caller has read it"
        return (SetInput(node, index, weight.scaled(factor)),)
    axes = tuple(i for i, n in enumerate(factor.shape) if n > 1)
    wanted = AffineMap(factor.squeeze() if axes else factor.reshape(1), np.zeros(1), axes)
    wanted = wanted.with_shift(np.zeros(wanted.scale.shape)).reduced()
    if not wanted.is_simple:
        return refuse(Reason.AXIS, maker, "has scales along one axis, and the weight would need them along two")
    return _answered(maker, wanted, desk)


def added_bias(node: ir.Node, index: int, total: Array, dtype: ir.DataType, desk: Desk) -> tuple[Edit, ...] | Refusal:
    """Add `total`, of shape (C,), to the bias; one that is absent becomes a constant of type `dtype`."""
    maker = _dequantizer(node, index, desk)
    if maker is not None:
        return _answered(maker, AffineMap.of(1.0, total, 0), desk)
    bias = desk.parameter(node, index)
    if bias is None and desk.has_input(node, index):
        return refuse(Reason.WEIGHT, node, "has a bias that is not constant", structural=True)
    if bias is not None:
        total, dtype = total + bias.float64(), bias.dtype
    return (SetInput(node, index, Parameter.new(total, dtype)),)


def _dequantizer(node: ir.Node, index: int, desk: Desk) -> ir.Node | None:
    """The DequantizeLinear that makes an operand for `node` alone."""
    value = node.inputs[index] if index < len(node.inputs) else None
    maker = None if value is None else value.producer()
    if value is None or maker is None or maker.op_type != "DequantizeLinear" or maker.domain not in ("", "ai.onnx"):
        return None
    alone = len(value.uses()) == 1 and not value.is_graph_output() and maker.graph is node.graph
    return maker if alone and (node, index) not in desk.pending else None


def _answered(maker: ir.Node, wanted: AffineMap, desk: Desk) -> tuple[Edit, ...] | Refusal:
    """What makes a DequantizeLinear of constants deliver ``wanted(output)``."""
    step = DequantizeLinear().backward(maker, {0: wanted}, desk)
    if isinstance(step, Refusal):
        return step
    edits = list(step.edits)
    for index, onward in step.onward.items():
        operand = desk.parameter(maker, index)
        assert operand is not None, "the scale is constant"
        edits.append(SetInput(maker, index, operand.mapped(*onward.along(len(operand.shape)))))
    return tuple(edits)


def _along_integers(maker: ir.Node, numbers: Array, shape: tuple[int, ...]) -> Array:
    """Scales or zero points shaped to broadcast against integers of that shape, those of blocks repeated."""
    axis = int(attribute(maker, "axis", 1))
    if block := int(attribute(maker, "block_size", 0)):
        return np.repeat(numbers, block, axis=axis).take(range(shape[axis]), axis=axis) if numbers.ndim else numbers
    if numbers.size == 1:
        return numbers.reshape([1] * len(shape))
    return numbers.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


class DequantizeLinear(Carrier):
    """Integers made numbers by a scale and a zero point."""

    operators = ("DequantizeLinear",)

    def backward(self, node: ir.Node, maps: Mapping[int, AffineMap], desk: Desk) -> Step | Refusal:
        """Scale the scale, move the integers."""
        demand = maps[0]
        scale, dims = desk.parameter(node, 1), desk.dims(node.inputs[0])
        if scale is None:
            return refuse(Reason.WEIGHT, node, "has a scale that is not constant", structural=True)
        step = self._scaled(node, demand.without_shift(), scale, dims, desk)
        if isinstance(step, Refusal) or not demand.has_shift:
            return step
        added = _shifted_integers(node, demand, scale, desk)
        return added if isinstance(added, Refusal) else Step((*step.edits, added), step.onward)

    def _scaled(
        self, node: ir.Node, demand: AffineMap, scale: Parameter, dims: Dims | None, desk: Desk
    ) -> Step | Refusal:
        """Scale the scale, which becomes one for each channel where it must."""
        if demand.axis is None or demand.channels == 1:
            return Step((), {1: demand.reduced()})
        if dims is None or dims[demand.axis] != demand.channels:
            return refuse(Reason.SHAPE, node, "is not proven to vary along the map")
        axis = int(attribute(node, "axis", 1)) % len(dims)
        if attribute(node, "block_size", 0):
            if scale.shape[demand.axis] != demand.channels:
                return refuse(Reason.AXIS, node, f"has one scale for each block along axis {axis}")
            return Step((), {1: demand})
        if len(scale.shape) == 1 and scale.shape[0] == demand.channels and axis == demand.axis:
            return Step((), {1: demand.on_axis(0)})
        if any(n != 1 for n in scale.shape):
            return refuse(Reason.AXIS, node, f"has its scales along axis {axis}, the map runs along {demand.axis}")
        if desk.opset < 13:
            return refuse(Reason.OPSET, node, "has one scale for all channels, as always before opset 13")
        many = Parameter.new(scale.float64().reshape(-1) * demand.scale, scale.dtype)
        edits: list[Edit] = [SetInput(node, 1, many), SetAttribute(node, ir.AttrInt64("axis", demand.axis))]
        if desk.has_input(node, 2):
            zero = _integers(node, 2, desk)
            if zero is None:
                return refuse(Reason.SCALE, node, "has one zero point for all channels, which is not a known integer")
            edits.append(SetInput(node, 2, Parameter.new(np.full(demand.channels, zero.float64().flat[0]), zero.dtype)))
        return Step(tuple(edits))


def _integers(node: ir.Node, index: int, desk: Desk) -> Parameter | None:
    """A constant integer operand, as it will be; None where it is not constant or of a type that is no integer here."""
    if (node, index) in desk.pending:
        return desk.pending[node, index]
    fact = desk.fact(node.inputs[index])
    found = fact.elements()
    if found is None or found.dtype == object or fact.dtype not in INTEGERS:
        return None
    return Parameter.new(found.astype(np.float64), fact.dtype)


def _shifted_integers(node: ir.Node, demand: AffineMap, scale: Parameter, desk: Desk) -> Edit | Refusal:
    """The integers, moved by the steps that make up the shift."""
    integers = _integers(node, 0, desk)
    if integers is None or attribute(node, "block_size", 0):
        return refuse(Reason.SHIFT, node, "holds integers that are not constant, which do not take a shift")
    gain, shift = demand.along(len(integers.shape))
    step = gain * _along_integers(node, scale.float64(), integers.shape)
    with np.errstate(all="ignore"):
        moved = integers.float64() + np.rint(shift / step)
    limits = np.iinfo(numpy_type(integers.dtype))
    exact = (np.rint(shift / step) * step == shift).all()
    if not exact or not ((moved >= limits.min) & (moved <= limits.max)).all():
        return refuse(Reason.SHIFT, node, "holds integers, and the shift is no whole number of their steps")
    return SetInput(node, 0, Parameter.new(moved, integers.dtype))


CARRIERS = (DequantizeLinear(),)

"""Which nodes *are* an affine map: BatchNormalization, and chains of Mul, Add, Sub, Div and Neg with constants.

Formulas::

    BatchNormalization    y = scale * (x - mean) / sqrt(var + epsilon) + B          ONNX BatchNormalization-6 .. 15
    chain                 the composition of x * c, x + c, x - c, c - x, x / c, -x

Every batch-renorm layer of today is exported as such a chain. A constant belongs to a chain only if its numbers vary
along one axis of x at most, and x is proven to have as many elements as it wherever it is longer than one: a constant
that broadcasts x, or raises its rank, is no map of channels.

kappa measures how much of the input cancels in ``x - mean``: |mean| / sigma, as the root mean square over channels
weighted by their gain, which is what the rounding of a fold adds to the next operator's sum. What is known of sigma:

* a BatchNormalization says it, and so does a chain that divides by it in a step of its own;
* a chain that subtracts and then multiplies by ``gamma / sigma`` as one constant, as constant folding leaves it, says
  only the quotient. Its gamma is taken for 1, so that kappa is ``|mean * gamma| / sigma``: too large where gamma is
  larger than 1, too small where it is smaller. The file does not tell them apart, nor what x will be;
* a chain that scales first says no mean, for its shift may be any. It rounds x at its full size itself, so that what a
  fold adds does not grow with the mean: kappa is 0. (Measured, 2048 inputs: 10 times the error of the chain, for means
  of 30 to 3000 standard deviations alike.)

A fold into a norm that stays changes its numbers: a BatchNormalization then has the statistics of its new input, and
for the first scale of a chain, which has no room for that, the factor is remembered (`units`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx.fusion.affine import IDENTITY, AffineMap
from renorm_onnx.fusion.carrier import Desk, refuse
from renorm_onnx.fusion.fact import MALFORMED
from renorm_onnx.fusion.fact_rounding import FLOATS
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.parameters import Parameter
from renorm_onnx.fusion.report import Reason, Refusal
from renorm_onnx.fusion.units import unit_of
from renorm_onnx.fusion.unproven import completes_product, only_reader, unproven_chain

CONSTANT_OPERATORS = ("Add", "Sub", "Mul", "Div", "Neg")
_STARTS = frozenset({"BatchNormalization", *CONSTANT_OPERATORS})
_ZERO = np.zeros(1)
_STATISTICS = ((1, "scale"), (2, "B"), (3, "mean"), (4, "var"))
# A constant as large as the data is read to see whether it varies along one axis only; larger ones are not.
MAX_SEARCHED_ELEMENTS = 1 << 22
OLDEST_OPSET = 6  # BatchNormalization-1 to -5 have consumed_inputs and other defaults.


@dataclass(eq=False, slots=True)
class Norm:
    """A run of nodes that computes one affine map.

    Args:
        nodes: In graph order; each reads the one before and nobody else does.
        input: The value it maps.
        map: What it computes, or why that is not known.
        ratios: How many standard deviations the input lies from zero: |mean| / sigma, per channel or one number, as
            far as that is known.
        gains: What the output of each channel is multiplied by after that division.
        kind: "norm", or "affine" for a constant operator that normalizes nothing by itself.
        form: "BatchNormalization" or "chain".
    """

    nodes: tuple[ir.Node, ...]
    input: ir.Value
    map: AffineMap | Refusal
    ratios: npt.NDArray[np.float64]
    gains: npt.NDArray[np.float64]
    kind: str
    form: str

    @property
    def output(self) -> ir.Value:
        """The value it computes."""
        return self.nodes[-1].outputs[0]

    @property
    def name(self) -> str:
        """How reports call it: the name of its output."""
        return self.output.name or ""

    @property
    def kappa(self) -> float:
        """The factor by which a forward fold may multiply the rounding error of the operator that absorbs it.

        Formula::

            sqrt(sum of (ratio * gain)^2 / sum of gain^2)       over channels
        """
        ratios, gains = np.broadcast_arrays(self.ratios, self.gains)
        total = float(np.sum(gains**2))
        return float(np.sqrt(np.sum((ratios * gains) ** 2) / total)) if total > 0 else 0.0

    @property
    def offset(self) -> float:
        """How many standard deviations the output lies from zero, as root mean square over channels.

        Formula::

            sqrt(sum of shift_B^2 / sum of gain^2 (1 + ratio^2))        shift_B = shift + ratio * gain

        The input of an affine operator that normalizes nothing is taken for one of mean 0 and variance 1. Nothing is
        known of a norm that scales first; and what does not vary has nothing to lose.
        """
        gains, ratios, shift = self._spread()
        total = float(np.sum(gains**2 * (1 + ratios**2)))
        far = float(np.sum((shift + ratios * gains) ** 2))
        return float(np.sqrt(far / total)) if total > 0 and self._is_known() else 0.0

    def reach(self, limit: float) -> float:
        """How large the output may become: 64 standard deviations beyond its mean, or as far as that of `limit` itself.

        Args:
            limit: The largest absolute value of the input of an affine operator; of a norm that scales first nothing
                is known, and 0 returned.
        """
        gains, ratios, shift = self._spread()
        if not self._is_known():
            return 0.0
        if not self.gains.any():
            return float(np.max(np.abs(gains), initial=0.0)) * limit
        return float(np.max(np.abs(shift + ratios * gains) + 64 * np.abs(gains), initial=0.0))

    def _is_known(self) -> bool:
        """Whether anything is known of the input: not where a norm scales first, as constant folding leaves it."""
        return bool(self.gains.any()) or self.kind == "affine"

    def _spread(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The gains, the ratios and the shift of all channels; the scale where no gain is known."""
        assert isinstance(self.map, AffineMap)
        gains = self.gains if self.gains.any() else self.map.scale.reshape(-1)
        shift = self.map.shift.reshape(-1)
        gains, ratios, shift = np.broadcast_arrays(gains.reshape(-1), self.ratios.reshape(-1), shift)
        return gains, ratios, shift


def find_norms(nodes: Sequence[ir.Node], desk: Desk) -> Iterator[Norm]:
    """All norms among `nodes`, which are in graph order, each node in one norm at most."""
    taken: set[ir.Node] = set()
    for node in nodes:
        if node.op_type not in _STARTS or node in taken or node.domain != "":
            continue
        try:
            found = _norm_from(node, desk)
        except MALFORMED:
            continue  # an operator that breaks its specification computes no map
        if found is not None:
            taken.update(found.nodes)
            yield found


def _norm_from(node: ir.Node, desk: Desk) -> Norm | None:
    if node.op_type == "BatchNormalization":
        return batch_normalization(node, desk)
    return _chain(node, desk)


def batch_normalization(node: ir.Node, desk: Desk) -> Norm:
    """The map of one BatchNormalization, with the refusals that hold whatever stands around it."""
    data = node.inputs[0]
    assert data is not None
    found = _batch_normalization_map(node, desk)
    if isinstance(found, Refusal):
        return Norm((node,), data, found, _ZERO, _ZERO, "norm", "BatchNormalization")
    return Norm((node,), data, *found, "norm", "BatchNormalization")


def _batch_normalization_map(
    node: ir.Node, desk: Desk
) -> tuple[AffineMap, npt.NDArray[np.float64], npt.NDArray[np.float64]] | Refusal:
    """The map, the ratios |mean| / sigma and the gains; or why they are not known."""
    if desk.opset < OLDEST_OPSET:
        return refuse(Reason.OPSET, node, f"is of opset {desk.opset}; folding starts at opset {OLDEST_OPSET}")
    if why := _training(node, desk.opset):
        return refuse(Reason.TRAINING, node, why)
    if len(node.outputs) > 1 and any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return refuse(Reason.OUTPUTS, node, "has further outputs that are used")
    numbers = []
    for index, name in _STATISTICS:
        parameter = desk.parameter(node, index)
        if parameter is not None:
            numbers.append(parameter.float64())
        elif desk.is_overridable(node, index):
            return refuse(Reason.OVERRIDABLE, node, f"has a {name} that is an input of the model with a default")
        else:
            return refuse(Reason.NOT_CONSTANT, node, f"has a {name} that is not constant")
    scale, bias, mean, var = numbers
    if scale.ndim > 1 and not attribute(node, "spatial", 1):
        return refuse(Reason.AXIS, node, "normalizes every position by itself (spatial=0)")
    epsilon = float(attribute(node, "epsilon", np.float32(1e-5)))
    if np.count_nonzero(var < 0):
        return refuse(Reason.NEGATIVE_VARIANCE, node, f"has a negative variance in channel {int(np.argmax(var < 0))}")
    sigma = np.sqrt(var + epsilon)
    gain = scale / sigma
    shift = bias - mean * gain
    finite = np.isfinite(shift)  # a gain that is not finite makes the shift so too: 0 * inf is no number
    if np.count_nonzero(finite) < finite.size:
        channel = int(np.argmin(finite))
        return refuse(Reason.NON_FINITE, node, f"has parameters that are not finite in channel {channel}")
    return AffineMap.of(gain, shift, 1), mean / sigma, scale


def _training(node: ir.Node, opset: int) -> str:
    """Why the node normalizes by batch statistics, as the end of a sentence; empty if it does not."""
    if opset >= 14:
        return "has training_mode=1" if attribute(node, "training_mode", 0) else ""
    if opset < 7:
        return "" if attribute(node, "is_test", 0) else "is in training mode (is_test=0)"
    # Opsets 7 to 13: one output means inference, five mean training.
    return "is in training mode (it has the outputs of training)" if any(o.name for o in node.outputs[1:]) else ""


@dataclass(frozen=True, eq=False)
class _Link:
    node: ir.Node
    data: ir.Value
    map: AffineMap


def _chain(first: ir.Node, desk: Desk) -> Norm | None:
    """The longest run of constant operators that starts at `first`."""
    link = constant_operator(first, desk)
    if link is None:
        found = unproven_chain(first, desk)
        return None if found is None else Norm(*found, _ZERO, _ZERO, "norm", "chain")
    if not link.map.has_scale and completes_product(link.data, desk):
        return None
    links = [link]
    total = link.map
    while (following := only_reader(links[-1].node.outputs[0])) is not None:
        link = constant_operator(following, desk)
        if link is None or link.data is not links[-1].node.outputs[0]:
            break
        if None not in (total.axis, link.map.axis) and total.axis != link.map.axis:
            break
        links.append(link)
        total = total.then(link.map)
    return _as_norm(links, total, desk)


def _as_norm(links: Sequence[_Link], total: AffineMap, desk: Desk) -> Norm:
    operators = {link.node.op_type for link in links}
    per_channel = any(not link.map.is_uniform and link.map.channels > 1 for link in links)
    both = bool(operators & {"Mul", "Div"}) and bool(operators & {"Add", "Sub"})
    kind = "norm" if per_channel and both else "affine"
    values: AffineMap | Refusal = total
    if not total.is_finite:
        values = refuse(Reason.NON_FINITE, links[-1].node, "computes with constants that are not finite")
    nodes = tuple(link.node for link in links)
    return Norm(nodes, links[0].data, values, *_ratios_and_gains(links, total, desk), kind, "chain")


def _ratios_and_gains(
    links: Sequence[_Link], total: AffineMap, desk: Desk
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """``mean / sigma`` of a chain that subtracts first, its first scale taken for 1 / sigma, and the gain; or zeros."""
    shift, rest = IDENTITY, list(links)
    while rest and (not rest[0].map.has_scale or (rest[0].map.scale == -1).all()):
        shift = shift.then(rest.pop(0).map)
    if not rest or not shift.has_shift:
        return _ZERO, _ZERO
    gain = functools.reduce(AffineMap.then, (link.map for link in rest[1:]), IDENTITY).scale
    unit = unit_of(rest[0].node, desk.units) or IDENTITY
    fits = unit.is_simple and (unit.is_uniform or total.is_uniform or unit.axes == total.axes)
    factor = unit.scale if fits else IDENTITY.scale
    return -shift.shift * rest[0].map.scale * factor, gain / factor  # x - mean, whichever way it is spelled


def constant_operator(node: ir.Node, desk: Desk) -> _Link | None:
    """The map of one Mul, Add, Sub, Div or Neg, if exactly one operand is constant and runs along one axis."""
    if node.domain != "" or node.op_type not in CONSTANT_OPERATORS or None in node.inputs:
        return None
    if node.op_type == "Neg":
        data = node.inputs[0]
        is_float = data is not None and not desk.facts.is_constant(data) and desk.fact(data).dtype in FLOATS
        return _Link(node, data, AffineMap.of(-1.0, 0.0, None)) if is_float and data is not None else None
    constant = [desk.is_constant(node, i) for i in range(len(node.inputs))]
    if sum(constant) != 1:
        return None
    position = constant.index(True)
    data, parameter = node.inputs[1 - position], desk.parameter(node, position)
    if parameter is None or data is None or (node.op_type == "Div" and position == 0):
        return None
    dims = desk.dims(data)
    shape = aligned_shape(node, position, parameter.shape, None if dims is None else len(dims))
    found = None if shape is None else along_one_axis(parameter, shape, dims)
    if found is None:
        return None
    values = _operator_map(node.op_type, position, found[0])
    return _Link(node, data, AffineMap.of(*values, found[1]))


def aligned_shape(node: ir.Node, position: int, shape: tuple[int, ...], rank: int | None) -> tuple[int, ...] | None:
    """The shape of a constant operand as it broadcasts from the right; None where that is not known.

    Before opset 7 an attribute says at which axis of the first operand the second one begins (ONNX Add-6).
    """
    begin = attribute(node, "axis")
    if begin is None:
        return shape
    behind = None if rank is None else rank - int(begin) % rank - len(shape)
    return (*shape, *[1] * behind) if behind is not None and behind >= 0 and position == 1 else None


def along_one_axis(
    parameter: Parameter, shape: tuple[int, ...], dims: Sequence[object] | None
) -> tuple[np.ndarray, int | None] | None:
    """The numbers of a constant and the axis of x that they run along, if they vary along one at most.

    Args:
        parameter: The constant.
        shape: Its dimensions, counted from the right against those of x.
        dims: Those of x; the constant must not be longer anywhere, or it would broadcast x.
    """
    if not shape:
        return parameter.float64().reshape(-1), None
    if dims is None or len(shape) > len(dims):
        return None
    offset = len(dims) - len(shape)
    wide = [i for i, n in enumerate(shape) if n != 1]
    if any(dims[offset + i] != shape[i] for i in wide) or (len(wide) > 1 and math.prod(shape) > MAX_SEARCHED_ELEMENTS):
        return None
    numbers = parameter.float64().reshape(shape)
    varies = [i for i in wide if len(wide) == 1 or (numbers != numbers.take([0], axis=i)).any()]
    if len(varies) > 1:
        return None
    index = tuple(slice(None) if i in varies else slice(1) for i in range(len(shape)))
    return numbers[index].reshape(-1), offset + varies[0] if varies else None


def _operator_map(operator: str, position: int, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    one, zero = np.ones_like(c), np.zeros_like(c)
    if operator == "Mul":
        return c, zero
    if operator == "Div":
        return 1.0 / c, zero
    if operator == "Add":
        return one, c
    return (-one, c) if position == 0 else (one, -c)

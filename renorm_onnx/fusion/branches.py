"""Parallel linear branches over one input become one convolution (RepVGG, MobileOne, ACNet; residual ``x + Conv(x)``).

Before:
    ``y = (W1 conv x + b1) + (W2 conv x + b2)``; a branch may also be x itself, or a norm of x
After:
    ``y = W conv x + (b1 + b2)``
Formula:
    An output at position o of a convolution with stride s, dilation d and leading pad p reads x at ``o s + d i - p``.
    So kernels with the same stride are added where their offsets ``d i - p`` agree, zero elsewhere. x itself is the
    1x1 kernel with the identity matrix, a norm of x that with its scales on the diagonal and its shift as bias.
    Source: Ding et al. 2021 (arXiv:2101.03697), section 3.3.
Refuses when:
    strides, groups or dilations differ; the branches' sizes are not equal for every size of x; a branch is read
    elsewhere; weights are not constant; the joint kernel would be much larger than the kernels it replaces.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx.fusion.affine import IDENTITY, AffineMap
from renorm_onnx.fusion.carrier import Desk
from renorm_onnx.fusion.fact import MALFORMED
from renorm_onnx.fusion.fact_rules import attribute
from renorm_onnx.fusion.parameters import Array, Parameter, largest
from renorm_onnx.fusion.sources import Norm, find_norms

# The joint kernel may hold this many times the elements of the kernels it replaces: 3x1 + 1x3 yes, 7x1 + 1x7 no.
MAX_GROWTH = 1.5
# Output -> norm, of the norms that are in the graph; found when first asked for.
Norms = Callable[[], Mapping[ir.Value, Norm]]


@dataclass(frozen=True, eq=False)
class Branch:
    """One operand of an Add, as a convolution of `source`.

    Args:
        node: The Conv, if it is one.
        source: What it reads.
        norm: The norm, where it is one.
        weight: Shape (C_out, C_in/group, *k) in float64, or the AffineMap of an identity branch.
        bias: Shape (C_out,), or None.
        geometry: Of a Conv: strides, dilations, leading and trailing pads, group; None fits any.
    """

    node: ir.Node | None
    source: ir.Value
    norm: Norm | None
    weight: Parameter | AffineMap
    bias: Parameter | None
    geometry: Geometry | None


@dataclass(frozen=True)
class Geometry:
    """Where a convolution reads, one number for each spatial dimension."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    group: int

    @property
    def growth(self) -> tuple[int, ...]:
        """How much longer than x the output is before striding; equal growth means equal sizes for every x."""
        return tuple(
            b + e - d * (k - 1) for b, e, d, k in zip(self.begin, self.end, self.dilations, self.kernel, strict=True)
        )

    @property
    def volume(self) -> int:
        """Number of taps."""
        return math.prod(self.kernel)


@dataclass(frozen=True, eq=False)
class Merge:
    """Two branches of `add` that become the convolution `keep`.

    Args:
        add: The Add that disappears.
        keep: The Conv that stays, with new operands and geometry.
        norm: The other branch, if it is a norm.
        weight, bias: The new operands; the bias is None where neither branch has one.
        geometry: The new geometry.
    """

    add: ir.Node
    keep: ir.Node
    norm: Norm | None
    weight: Parameter
    bias: Parameter | None
    geometry: Geometry


def find_merges(graph: ir.Graph, desk: Desk) -> Iterator[Merge]:
    """Every Add of `graph` whose operands are convolutions of one value, as the graph stands when it is reached.

    Args:
        graph: May be changed between two results, as the results say.
        desk: Facts and pending operands.
    """
    nodes = list(graph)

    @functools.cache
    def norms() -> dict[ir.Value, Norm]:
        return {norm.output: norm for norm in find_norms([n for n in nodes if n.graph is not None], desk)}

    for node in nodes:
        if node.op_type not in ("Add", "Sum") or node.domain != "" or len(node.inputs) != 2:
            continue
        try:
            merge = None if node.graph is None else _merge(node, desk, norms)
        except MALFORMED:
            continue
        if merge is not None:
            yield merge


def _merge(add: ir.Node, desk: Desk, norms: Norms) -> Merge | None:
    left, right = add.inputs
    if left is None or right is None or left is right or not (_is_convolved(left) or _is_convolved(right)):
        return None
    lefts, rights = list(_branches(left, add, desk, norms)), list(_branches(right, add, desk, norms))
    for first, second in [(a, b) for a in lefts for b in rights if a.source is b.source]:
        convolution, other = (first, second) if first.geometry is not None else (second, first)
        if convolution.geometry is None:
            continue
        if other.geometry is not None and other.geometry.volume > convolution.geometry.volume:
            convolution, other = other, convolution
        found = _joined(add, convolution, other)
        if found is not None:
            return found
    return None


def _is_convolved(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Conv"


def _branches(value: ir.Value, add: ir.Node, desk: Desk, norms: Norms) -> Iterator[Branch]:
    """What an operand of the Add may be: the convolution or norm that computes it, or the value itself."""
    node = value.producer()
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    if node is not None and alone and node.graph is add.graph and node.domain == "":
        if node.op_type == "Conv":
            yield from _convolution(node, desk)
        elif (norm := norms().get(value)) is not None and isinstance(norm.map, AffineMap):
            yield Branch(None, norm.input, norm, norm.map, None, None)
    yield Branch(None, value, None, IDENTITY, None, None)


def _convolution(node: ir.Node, desk: Desk) -> Iterator[Branch]:
    weight, source = desk.parameter(node, 1), node.inputs[0]
    bias = desk.parameter(node, 2)
    if weight is None or source is None or (bias is None and desk.has_input(node, 2)):
        return
    n = len(weight.shape) - 2
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return
    pads = attribute(node, "pads") if attribute(node, "auto_pad", "NOTSET") == "NOTSET" else None
    pads = tuple(pads or [0] * (2 * n))
    geometry = Geometry(
        tuple(weight.shape[2:]),
        tuple(attribute(node, "strides") or [1] * n),
        tuple(attribute(node, "dilations") or [1] * n),
        pads[:n],
        pads[n:],
        int(attribute(node, "group", 1)),
    )
    yield Branch(node, source, None, weight, bias, geometry)


def _joined(add: ir.Node, first: Branch, other: Branch) -> Merge | None:
    geometry, weight = first.geometry, first.weight
    assert geometry is not None
    assert isinstance(weight, Parameter)
    assert first.node is not None
    if isinstance(other.weight, AffineMap):
        identity = _as_convolution(other.weight, weight, geometry)
        if identity is None:
            return None
        second, kernel, bias = identity
    else:
        if other.geometry is None or other.weight.dtype != weight.dtype or other.weight.shape[:2] != weight.shape[:2]:
            return None
        second, kernel, bias = other.geometry, other.weight.float64(), other.bias
    joint = _joint_geometry(geometry, second)
    if joint is None or joint.volume > MAX_GROWTH * (geometry.volume + second.volume):
        return None
    total = _place(weight.float64(), geometry, joint) + _place(kernel, second, joint)
    biases = [b.float64() for b in (first.bias, bias) if b is not None]
    if not np.abs(total).max(initial=0.0) <= largest(weight.dtype):
        return None
    dtype = weight.dtype if first.bias is None else first.bias.dtype
    shift = Parameter.new(np.sum(biases, axis=0), dtype) if biases else None
    return Merge(add, first.node, other.norm, Parameter.new(total, weight.dtype), shift, joint)


def _as_convolution(
    values: AffineMap, like: Parameter, geometry: Geometry
) -> tuple[Geometry, Array, Parameter | None] | None:
    """``scale * x + shift`` as a 1x1 convolution with the groups of another one."""
    out, per_group = like.shape[:2]
    n = len(geometry.kernel)
    if out != per_group * geometry.group or (values.axis not in (None, 1)):
        return None
    full = values.spread(out, 1)
    if full.channels != out:
        return None
    kernel = np.zeros((out, per_group, *[1] * n))
    rows = np.arange(out)
    kernel.reshape(out, per_group)[rows, rows % per_group] = full.scale
    ones, zeros = (1,) * n, (0,) * n
    bias = Parameter.new(full.shift, like.dtype) if full.has_shift else None
    return Geometry(ones, ones, ones, zeros, zeros, geometry.group), kernel, bias


def _joint_geometry(a: Geometry, b: Geometry) -> Geometry | None:
    """The smallest window that covers both; None where they do not read x at the same steps, or differ in size."""
    if a.group != b.group or a.strides != b.strides or a.growth != b.growth:
        return None
    kernel, dilations, begin, end = [], [], [], []
    for i in range(len(a.kernel)):
        wide = [g for g in (a, b) if g.kernel[i] > 1]
        if len({g.dilations[i] for g in wide}) > 1:
            return None
        d = wide[0].dilations[i] if wide else 1
        first = max(a.begin[i], b.begin[i])
        if (a.begin[i] - b.begin[i]) % d:
            return None
        last = max(g.dilations[i] * (g.kernel[i] - 1) - g.begin[i] for g in (a, b))
        kernel.append((first + last) // d + 1)
        dilations.append(d)
        begin.append(first)
        end.append(a.growth[i] + d * (kernel[-1] - 1) - first)
    if min(end, default=0) < 0:
        return None
    return Geometry(tuple(kernel), a.strides, tuple(dilations), tuple(begin), tuple(end), a.group)


def _place(kernel: npt.NDArray[np.float64], own: Geometry, joint: Geometry) -> Array:
    """The kernel at its offsets within the joint window, zero elsewhere."""
    result = np.zeros((*kernel.shape[:2], *joint.kernel))
    where = tuple(
        slice((jb - b) // d, (jb - b) // d + k)
        for jb, b, d, k in zip(joint.begin, own.begin, joint.dilations, own.kernel, strict=True)
    )
    result[(slice(None), slice(None), *where)] = kernel
    return result

"""Constant operands as they will be: a stored tensor with the factors still to be multiplied in.

Folding into a weight only records a factor, float64 and as small as the map it came from. The weight itself is read
when it is written out, block by block, and rounded once::

    W' = round(W * factor_1 * factor_2 * ...)        all products in float64

so BN -> Conv -> BN rounds once, and a model of any size is folded within the memory of one block. A tensor in a data
file is read block by block as well: mapped into memory, it would count as the memory of this process.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from types import EllipsisType
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import TensorProto

from renorm_onnx.files.external_data import read_rows
from renorm_onnx.fusion.fact import Fact, layout, to_float64
from renorm_onnx.fusion.fact_rounding import FLOATS

Array = npt.NDArray[np.float64]
# Some rows of an operand, or all of it.
Rows = slice | EllipsisType

# One block and its float64 products stay in a processor's cache; larger tensors are computed while they are written.
BLOCK_ELEMENTS = 1 << 17
# Item size -> the unsigned integers of that size, and all of their bits but the sign.
_BITS = {size: (np.dtype(f"u{size}"), np.dtype(f"u{size}").type(2 ** (8 * size - 1) - 1)) for size in (2, 4, 8)}
# How `raw_data` holds the floats.
_LITTLE_ENDIAN = {kind.value: kind.numpy().newbyteorder("<") for kind in FLOATS}


class Parameter(NamedTuple):
    """A constant operand: ``base * factors[0] * factors[1] * ...``, to be rounded to `dtype`.

    Args:
        base: A stored tensor, read only when needed, or a float64 array.
        dtype: Element type it is to be written in.
        shape: Its dimensions.
        factors: Float64 arrays of the same rank, broadcastable to `shape`.
    """

    base: ir.TensorProtocol | Array
    dtype: ir.DataType
    shape: tuple[int, ...]
    factors: tuple[Array, ...] = ()

    @classmethod
    def stored(cls, tensor: ir.TensorProtocol) -> Parameter | None:
        """The operand that is stored as `tensor`; None unless its type is a float type."""
        dims, dtype = layout(tensor)
        return cls(tensor, dtype, dims) if dtype in FLOATS else None

    @classmethod
    def of(cls, fact: Fact) -> Parameter | None:
        """The operand that `fact` describes; None unless it is a constant of a float type."""
        if fact.tensor is not None:
            return cls.stored(fact.tensor)
        if fact.dtype not in FLOATS or fact.content is None or fact.content.dtype.kind != "f":
            return None
        return cls(to_float64(fact.content), fact.dtype, fact.content.shape)

    @classmethod
    def new(cls, array: npt.ArrayLike, dtype: ir.DataType) -> Parameter:
        """An operand with the given elements."""
        base = np.asarray(array, np.float64)
        return cls(base, dtype, base.shape)

    def scaled(self, factor: npt.ArrayLike) -> Parameter:
        """This operand times `factor`, which has the same rank and broadcasts to its shape."""
        array = np.asarray(factor, np.float64)
        assert array.ndim == len(self.shape), (array.shape, self.shape)
        factors = [*self.factors, array]
        for i, known in enumerate(self.factors):
            if known.shape == array.shape:
                factors[i] = known * factors.pop()
                break
        return Parameter(self.base, self.dtype, self.shape, tuple(factors))

    def mapped(self, scale: Array, shift: Array) -> Parameter:
        """``scale * self + shift``; both have the operand's rank and broadcast to its shape."""
        if not np.count_nonzero(shift):
            return self.scaled(scale)
        return Parameter.new(self.float64() * scale + shift, self.dtype)

    def float64(self) -> Array:
        """All elements as products in float64. Shape `shape`; not to be written to."""
        return self._multiplied(self._stored(), ...)

    def blocks(self) -> Iterator[tuple[Rows, Array]]:
        """The products in float64, in blocks of whole rows along axis 0, for tensors too large to hold twice."""
        for part, block in self._stored_blocks():
            yield part, self._multiplied(block, part)

    def _stored(self) -> npt.NDArray[Any]:
        if isinstance(self.base, np.ndarray):
            return self.base
        if isinstance(self.base, ir.serde.TensorProtoTensor):
            return _read(self.base, self.shape)
        if isinstance(self.base, ir.ExternalTensor) and self.shape:
            return read_rows(self.base, 0, self.shape[0])
        return self.base.numpy()

    def _stored_blocks(self) -> Iterator[tuple[Rows, npt.NDArray[Any]]]:
        """The elements as they are stored, without factors, in blocks of whole rows, or all at once."""
        if math.prod(self.shape) <= BLOCK_ELEMENTS:
            yield ..., self._stored()
            return
        rows = max(1, BLOCK_ELEMENTS // math.prod(self.shape[1:]))
        # A tensor in a message is copied out of it each time it is asked for; one in a file is read piece by piece.
        whole = None if isinstance(self.base, ir.ExternalTensor) else self._stored()
        for start in range(0, self.shape[0], rows):
            part = slice(start, min(start + rows, self.shape[0]))
            if whole is not None:
                yield part, whole[part]
            elif isinstance(self.base, ir.ExternalTensor):
                yield part, read_rows(self.base, part.start, part.stop)

    def _multiplied(self, block: npt.NDArray[Any], part: Rows) -> Array:
        for factor in self.factors:  # of float64, as is a product with one
            block = block * (factor if part is ... or factor.shape[0] == 1 else factor[part])
        return block.astype(np.float64, copy=False)

    def contract(self, vector: Array, axis: int) -> Array:
        """``sum over axis of self * vector``: what a shift at the input adds to the output.

        Args:
            vector: Broadcastable to `shape`, of the same rank.
            axis: Summed over; so is every axis from 2 on.
        """
        pieces: list[Array] = []
        axes = (axis, *range(2, len(self.shape)))
        for part, block in self.blocks():
            piece = (block * (vector[part] if vector.shape[0] != 1 else vector)).sum(axis=axes)
            pieces = [pieces[0] + piece] if axis == 0 and pieces else [*pieces, piece]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def magnitudes(self, keep: tuple[int, ...]) -> Array:
        """Largest absolute value over all axes but `keep`, NaN where one is. Shape: the kept axes."""
        axes = tuple(i for i in range(len(self.shape)) if i not in keep)
        # Without factors, the stored elements are compared as they are.
        if math.prod(self.shape) <= BLOCK_ELEMENTS:
            return _magnitude(self.float64() if self.factors else self._stored(), axes)
        blocks = (block for _, block in (self.blocks() if self.factors else self._stored_blocks()))
        tops = [_magnitude(block, axes) for block in blocks]
        return np.concatenate(tops) if 0 in keep else np.asarray(np.max(tops, axis=0))

    def rounded(self) -> npt.NDArray[Any]:
        """The elements in their type, each rounded once. Shape `shape`."""
        if math.prod(self.shape) <= BLOCK_ELEMENTS:
            return rounded(self.float64(), self.dtype)
        result = np.empty(self.shape, numpy_type(self.dtype))
        for part, block in self.blocks():
            result[part] = rounded(block, self.dtype)
        return result

    def narrowed(self) -> Parameter:
        """The operand with length 1 along every axis on which its elements only repeat themselves, to be expanded."""
        elements = self.float64()
        for axis, size in enumerate(self.shape):
            first = elements.take([0], axis=axis) if size else elements
            elements = first if np.array_equal(elements, np.broadcast_to(first, elements.shape)) else elements
        return Parameter.new(elements, self.dtype)

    def tensor(self, name: str) -> ir.TensorProtocol:
        """What goes into the file: the elements themselves, or for a large stored tensor a recipe that streams them."""
        if not isinstance(self.base, np.ndarray) and math.prod(self.shape) > BLOCK_ELEMENTS:
            return StreamedTensor(self, name)
        elements = self.rounded()
        if self.dtype.bitwidth < 8:  # several to a byte
            return ir.Tensor(elements, dtype=self.dtype, name=name)
        if sys.byteorder == "big":
            elements = elements.byteswap()
        # A message, as a tensor that was read is: written as it is.
        proto = TensorProto(name=name, data_type=self.dtype.value, dims=self.shape, raw_data=elements.tobytes())
        return ir.serde.TensorProtoTensor(proto)


class StreamedTensor(ir.LazyTensor):
    """A large folded weight that is computed block by block while it is written."""

    __slots__ = ("_parameter",)

    def __init__(self, parameter: Parameter, name: str) -> None:
        """Take over `parameter`; nothing is read yet."""
        super().__init__(
            lambda: _held(parameter),
            dtype=parameter.dtype,
            shape=ir.Shape(parameter.shape),
            name=name,
        )
        self._parameter = parameter

    def tofile(self, file: BinaryIO) -> None:  # type: ignore[override]
        """Write the elements to an open binary file, one block in memory at a time."""
        with np.errstate(all="ignore"):
            for _, block in self._parameter.blocks():
                file.write(rounded(block, self._parameter.dtype).reshape(-1).view(np.uint8).data)


def _held(parameter: Parameter) -> ir.TensorProtocol:
    with np.errstate(all="ignore"):
        return ir.Tensor(parameter.rounded(), dtype=parameter.dtype)


def rounded(array: Array, dtype: ir.DataType) -> npt.NDArray[Any]:
    """Float64 numbers in another float type, to nearest, ties to even, each rounded once.

    ml_dtypes makes a bfloat16 of a float32, so a float64 number would be rounded twice. Rounded to odd first (towards
    zero, with the last bit set where digits were lost), a float32 still tells on which side of a tie it lies.
    Source: Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded sums", theorem 2 (24 >= 8 + 2 digits).
    """
    if dtype != ir.DataType.BFLOAT16:
        return array.astype(numpy_type(dtype))
    near = np.asarray(array.astype(np.float32))
    bits = near.view(np.uint32)
    lost = near != array
    bits -= np.abs(near) > np.abs(array)
    bits |= lost
    return near.astype(ml_dtypes.bfloat16)


def _read(tensor: ir.serde.TensorProtoTensor, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The elements of a tensor in a message; not to be written to.

    onnx-ir finds out anew how each is kept, which for a row of statistics takes longer than the fold.
    """
    proto = tensor.raw
    dtype, data = _LITTLE_ENDIAN.get(proto.data_type), proto.raw_data
    return np.ndarray(shape, dtype, data) if dtype is not None and data else tensor.numpy()


def _magnitude(block: npt.NDArray[Any], axes: tuple[int, ...]) -> Array:
    """Largest absolute value over some axes: without their sign, IEEE 754 numbers are ordered as integers are."""
    unsigned, positive = _BITS[block.itemsize]
    tops = np.bitwise_and(block.view(unsigned), positive).max(axis=axes, initial=0)
    return np.asarray(tops).view(block.dtype).astype(np.float64)


@functools.cache
def numpy_type(dtype: ir.DataType) -> np.dtype[Any]:
    """The numpy element type of a float type of ONNX."""
    return np.dtype(ml_dtypes.bfloat16) if dtype == ir.DataType.BFLOAT16 else dtype.numpy()


@functools.cache
def largest(dtype: ir.DataType) -> float:
    """The largest finite number of a float type."""
    return float(ml_dtypes.finfo(numpy_type(dtype)).max)  # type: ignore[no-untyped-call]


@functools.cache
def smallest_normal(dtype: ir.DataType) -> float:
    """The smallest positive number that a float type holds with all its digits."""
    return float(ml_dtypes.finfo(numpy_type(dtype)).smallest_normal)  # type: ignore[no-untyped-call]

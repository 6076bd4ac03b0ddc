"""Constant operands as they will be: a stored tensor with the factors still to be multiplied in.

Folding into a weight only records a factor, float64 and as small as the map it came from. The weight itself is read
when it is written out, block by block, and rounded once::

    W' = round(W * factor_1 * factor_2 * ...)        all products in float64

so BN -> Conv -> BN rounds once, and a model of any size is folded within the memory of one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx.fusion.facts import Fact, to_float64

Array = npt.NDArray[np.float64]

BLOCK_ELEMENTS = 1 << 21  # 16 MiB of float64 at a time
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True, eq=False)
class Parameter:
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
    def of(cls, fact: Fact, dtype: ir.DataType | None = None) -> Parameter | None:
        """The operand that `fact` describes; None unless it is a constant of a float type."""
        dtype = fact.dtype if dtype is None else dtype
        if not fact.is_constant or dtype not in FLOATS:
            return None
        if fact.tensor is not None:
            assert fact.dims is not None
            return cls(fact.tensor, dtype, tuple(d for d in fact.dims if isinstance(d, int)))
        assert fact.content is not None
        return None if fact.content.dtype.kind != "f" else cls(to_float64(fact.content), dtype, fact.content.shape)

    @classmethod
    def new(cls, array: npt.ArrayLike, dtype: ir.DataType) -> Parameter:
        """An operand with the given elements."""
        base = np.asarray(array, np.float64)
        return cls(base, dtype, base.shape)

    def scaled(self, factor: npt.ArrayLike) -> Parameter:
        """This operand times `factor`, which has the same rank and broadcasts to its shape."""
        array = np.asarray(factor, np.float64)
        assert array.ndim == len(self.shape), (array.shape, self.shape)
        for i, known in enumerate(self.factors):
            if known.shape == array.shape:
                return replace(self, factors=(*self.factors[:i], known * array, *self.factors[i + 1 :]))
        return replace(self, factors=(*self.factors, array))

    def mapped(self, scale: Array, shift: Array) -> Parameter:
        """``scale * self + shift``; both have the operand's rank and broadcast to its shape."""
        if (shift == 0).all():
            return self.scaled(scale)
        return Parameter.new(self.float64() * scale + shift, self.dtype)

    def float64(self) -> Array:
        """All elements, exact products in float64. Shape `shape`."""
        result = self.base if isinstance(self.base, np.ndarray) else to_float64(self.base.numpy())
        for factor in self.factors:
            result = result * factor
        return result

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """The elements in blocks of whole rows along axis 0, for tensors too large to hold twice; exact in float64."""
        if not self.shape:
            yield slice(None), self.float64()
            return
        source = self.base if isinstance(self.base, np.ndarray) else self.base.numpy()
        rows = max(1, BLOCK_ELEMENTS // max(1, math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], rows):
            part = slice(start, start + rows)
            block: Array = source[part] if self._is_single() else to_float64(source[part])  # type: ignore[assignment]
            for factor in self.factors:
                block = block * (factor[part] if factor.shape[0] != 1 else factor)
            yield part, block

    def _is_single(self) -> bool:
        """Whether the stored elements can be compared as they are, without a float64 copy."""
        return self.dtype == ir.DataType.FLOAT and not self.factors

    def contract(self, vector: Array, axis: int) -> Array:
        """``sum over axis of self * vector``: what a shift at the input adds to the output.

        Args:
            vector: Broadcastable to `shape`.
            axis: Summed over; so is every axis from 2 on.
        """
        total: list[Array] = []
        axes = (axis, *range(2, len(self.shape)))
        for part, block in self.blocks():
            weights = vector[part] if vector.shape[0] != 1 else vector
            total.append((to_float64(block) * weights).sum(axis=axes))
        result: Array = np.sum(total, axis=0) if axis == 0 else np.concatenate(total)
        return result

    def magnitudes(self, keep: tuple[int, ...]) -> Array:
        """Largest absolute value over all axes but `keep`, NaN where one is. Shape: the kept axes."""
        axes = tuple(i for i in range(len(self.shape)) if i not in keep)
        tops = []
        for _, block in self.blocks():
            # Two reductions need no array of absolute values; both propagate NaN.
            tops.append(np.maximum(block.max(axis=axes, initial=0.0), -block.min(axis=axes, initial=0.0)))
        if len(tops) == 1:
            return to_float64(tops[0])
        if not tops:
            return np.zeros([self.shape[i] for i in keep])
        return to_float64(np.concatenate(tops) if 0 in keep else np.max(tops, axis=0))

    def rounded(self) -> npt.NDArray[Any]:
        """The elements in their type, each rounded once. Shape `shape`."""
        with np.errstate(over="ignore", under="ignore"):
            return self.float64().astype(numpy_type(self.dtype))

    def tensor(self, name: str) -> ir.TensorProtocol:
        """What goes into the file: the elements themselves, or for a large stored tensor a recipe that streams them."""
        if isinstance(self.base, np.ndarray) or math.prod(self.shape) <= BLOCK_ELEMENTS:
            return ir.Tensor(self.rounded(), dtype=self.dtype, name=name)
        return StreamedTensor(self, name)


class StreamedTensor(ir.LazyTensor):
    """A large folded weight that is computed block by block while it is written."""

    __slots__ = ("_parameter",)

    def __init__(self, parameter: Parameter, name: str) -> None:
        """Take over `parameter`; nothing is read yet."""
        super().__init__(
            lambda: ir.Tensor(parameter.rounded(), dtype=parameter.dtype),
            dtype=parameter.dtype,
            shape=ir.Shape(parameter.shape),
            name=name,
        )
        self._parameter = parameter

    def tofile(self, file: BinaryIO) -> None:  # type: ignore[override]
        """Write the elements to an open binary file, one block in memory at a time."""
        target = numpy_type(self._parameter.dtype)
        with np.errstate(over="ignore", under="ignore"):
            for _, block in self._parameter.blocks():
                file.write(block.astype(target).tobytes())


def numpy_type(dtype: ir.DataType) -> np.dtype[Any]:
    """The numpy element type of a float type of ONNX."""
    return np.dtype(ml_dtypes.bfloat16) if dtype == ir.DataType.BFLOAT16 else dtype.numpy()


def largest(dtype: ir.DataType) -> float:
    """The largest finite number of a float type."""
    return float(ml_dtypes.finfo(numpy_type(dtype)).max)  # type: ignore[no-untyped-call]


def smallest_normal(dtype: ir.DataType) -> float:
    """The smallest positive number that a float type holds with all its digits."""
    return float(ml_dtypes.finfo(numpy_type(dtype)).smallest_normal)  # type: ignore[no-untyped-call]

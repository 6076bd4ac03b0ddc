"""What one value is proven to be: its dimensions, and its content where that does not depend on the inputs.

A size that is not fixed is a `Dimension`, equal only to itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

# Computed constants, not stored ones, stop here: a model of a few bytes can ask for 2**40 elements.
MAX_COMPUTED_ELEMENTS = 1 << 25
MAX_REMEMBERED_ELEMENTS = 1 << 27

# What rules and carriers run into when an operator breaks its own specification (an operand is missing, an axis is out
# of range, sizes do not fit): nothing is proven about its outputs then, and nothing moves through it.
MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, TypeError, ValueError)


_TYPES = {kind.value: kind for kind in ir.DataType}


class Dimension:
    """A size that is known only at run time; equal to itself and to nothing else."""

    __slots__ = ()


Dims = tuple["int | Dimension", ...]
Content = npt.NDArray[Any]


class Fact(NamedTuple):
    """What is proven about one value.

    Args:
        dims: Its dimensions, or None where even the rank is unknown.
        content: Its elements where they are constant and computed, float64 for any float type; else None.
        tensor: The stored tensor where the value is one; its elements are read only on demand.
        dtype: Its element type where known.
        unexpanded: Of an Expand, the fact about what is repeated; equal to this one for who broadcasts anyway.
        exact: Whether a runtime has these very elements: none of them comes of a float that it rounded on the way.
    """

    dims: Dims | None = None
    content: Content | None = None
    tensor: ir.TensorProtocol | None = None
    dtype: ir.DataType | None = None
    unexpanded: Fact | None = None
    exact: bool = True

    @property
    def rank(self) -> int | None:
        """Number of dimensions, or None."""
        return None if self.dims is None else len(self.dims)

    @property
    def is_constant(self) -> bool:
        """Whether the elements are known."""
        return self.tensor is not None or self.content is not None

    def elements(self) -> Content | None:
        """The elements, floats as float64; None where they are not constant or too many to compute with."""
        if self.content is not None:
            return self.content
        if self.tensor is None or self.tensor.size > MAX_COMPUTED_ELEMENTS:
            return None
        return to_float64(self.tensor.numpy()) if self.tensor.dtype.is_floating_point() else self.tensor.numpy()

    def integers(self) -> list[int | Dimension] | None:
        """The elements of a small integer vector or scalar; entries may be dimensions."""
        found = self.elements()
        if found is None or found.dtype.kind == "f" or found.ndim > 1:
            return None
        return [e if isinstance(e, Dimension) else int(e) for e in np.atleast_1d(found).tolist()]

    def fixed_integers(self) -> list[int] | None:
        """As `integers`; None where one of them is a dimension."""
        found = self.integers()
        fixed = [e for e in found or () if isinstance(e, int)]
        return None if found is None or len(fixed) < len(found) else fixed


UNKNOWN = Fact()
Rule = Callable[[ir.Node, Sequence[Fact], int], "Sequence[Fact]"]


def to_float64(array: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Any float array, bfloat16 included, as float64."""
    return np.asarray(array).astype(np.float64)


def stored(tensor: ir.TensorProtocol) -> Fact:
    """The fact about a value that is stored in the file."""
    dims, dtype = layout(tensor)
    return Fact(dims, None, tensor, dtype)


def layout(tensor: ir.TensorProtocol) -> tuple[tuple[int, ...], ir.DataType]:
    """The dimensions and the element type of a stored tensor."""
    # onnx-ir builds a new shape each time it is asked for that of a tensor in a message.
    if isinstance(tensor, ir.serde.TensorProtoTensor):
        proto = tensor.raw
        return tuple(proto.dims[:]), _TYPES[proto.data_type]
    return tuple(tensor.shape.numpy()), tensor.dtype


def computed(content: Content, dtype: ir.DataType | None) -> Fact:
    """The fact about a value whose elements were worked out; an element taken from an object array is no array yet."""
    content = np.asarray(content)
    if content.dtype == object and not any(isinstance(e, Dimension) for e in content.flat):
        content = content.astype(np.int64)
    return Fact(tuple(content.shape), content, None, dtype)


def product(dims: Sequence[int | Dimension]) -> tuple[int, frozenset[tuple[Dimension, int]]]:
    """A product of dimensions in a form that is equal only when the products are proven equal.

    Returns:
        The product of the fixed sizes, and for each run-time size how often it occurs.
    """
    fixed = math.prod(d for d in dims if isinstance(d, int))
    open_sizes = [d for d in dims if isinstance(d, Dimension)]
    return fixed, frozenset((d, open_sizes.count(d)) for d in open_sizes)

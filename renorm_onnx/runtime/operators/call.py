"""One operator call as the reference sees it: promoted inputs, plain attributes, the opset.

Promotion is the whole idea of the reference: float16, bfloat16, float32 and float64 all become float64 (complex
likewise), so a value is what the model would compute with unlimited precision from the weights it stores. Integers,
booleans, strings and the storage types of quantization (int4, float8, ...) keep their type and their semantics.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx.errors import InputError

Array: TypeAlias = npt.NDArray[Any]
"""A tensor: float64, complex128, or any type that is not promoted."""

Result: TypeAlias = Any
"""One value (an `Array`, a sequence as a list, an optional as None), or a tuple with one entry per output."""

_PROMOTED = {"float16": np.float64, "bfloat16": np.float64, "float32": np.float64, "complex64": np.complex128}


class UnusableError(Exception):
    """Raised by an operator that cannot be evaluated as called; `reference.evaluate` makes it an `InputError`."""


@dataclass(frozen=True, slots=True)
class Call:
    """What an operator's function may see.

    Attributes:
        op_type: The operator's name.
        opset: The version of its domain that the model imports.
        inputs: Promoted values; None for an optional input left out. Never to be written to.
        outputs: Names of the outputs, "" for those left out.
        attributes: Values by name; floats already rounded to float32, as the file stores them.
        run_body: Evaluates an attribute's graph on a list of inputs and returns the list of its outputs.
    """

    op_type: str
    opset: int
    inputs: Sequence[Any]
    outputs: Sequence[str]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    run_body: Callable[[ir.Graph, Sequence[Any]], list[Any]] | None = None

    def input(self, index: int) -> Any:
        """Input `index`, or None if it was left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def wants(self, index: int) -> bool:
        """Whether output `index` exists and has a name."""
        return index < len(self.outputs) and bool(self.outputs[index])

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        return int(self.attributes.get(name, default))

    def number(self, name: str, default: float) -> float:
        """A float attribute; the default is rounded to float32 as the specification's own is."""
        return float(np.float32(self.attributes.get(name, default)))

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        return str(self.attributes.get(name, default))

    def integers(self, name: str) -> tuple[int, ...] | None:
        """A list of integers, or None if the attribute is absent."""
        value = self.attributes.get(name)
        return None if value is None else tuple(int(v) for v in value)

    def body(self, name: str, inputs: Sequence[Any]) -> list[Any]:
        """Run the graph held by attribute `name`."""
        assert self.run_body is not None
        return self.run_body(self.attributes[name], inputs)


Kernel: TypeAlias = Callable[[Call], Result]
"""What evaluates one operator."""


def promoted_type(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The type that a tensor of `dtype` has in the reference."""
    dtype = np.dtype(dtype)
    return np.dtype(_PROMOTED.get(dtype.name, dtype))


def promoted_onnx_type(code: int) -> np.dtype[Any]:
    """Like `promoted_type`, from ONNX's own number for a type.

    Raises:
        InputError: The number names no tensor type.
    """
    try:
        return promoted_type(ir.DataType(code).numpy())
    except (ValueError, TypeError) as error:
        raise InputError(f"evaluate: {code!r} is not the number of an ONNX tensor type") from error


def promote(array: Array) -> Array:
    """`array` in its promoted type, read-only where it still shares memory with the original; text as `str`."""
    result = np.asarray(array).astype(promoted_type(array.dtype), copy=False).view()
    if result.dtype.kind in "OS":  # a file stores bytes, and runtimes return text
        texts = [each.decode("utf-8", "replace") if isinstance(each, bytes) else each for each in result.flat]
        result = np.array(texts, object).reshape(result.shape)
    result.flags.writeable = False
    return result


def is_floating(array: Array) -> bool:
    """Whether the tensor takes part in float64 arithmetic (storage types of quantization do not)."""
    return array.dtype.kind in "fc" and array.dtype.itemsize >= 8


def normalize_axis(axis: int, rank: int) -> int:
    """`axis` counted from the front.

    Raises:
        InputError: It lies outside a tensor of that rank.
    """
    if not -rank <= axis < max(rank, 1):
        raise InputError(f"evaluate: axis {axis!r} of a tensor of rank {rank}")
    return axis % rank if rank else 0


def as_integers(value: Array) -> list[int]:
    """The elements of an integer tensor, as Python integers."""
    return [int(v) for v in np.ravel(value)]

"""Tensors on their way into onnxruntime and out of it: numpy arrays, and tensors of other libraries without a copy."""

import ctypes
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from renorm_onnx.errors import InputError

# onnxruntime's name of an element type -> numpy's.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "bool": np.dtype(np.bool_),
    **{name: np.dtype(name) for sign in ("", "u") for bits in (8, 16, 32, 64) for name in (f"{sign}int{bits}",)},
}

_ONNX_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_DLPACK_CUDA = 2  # kDLCUDA


@dataclass(frozen=True)
class TensorSpec:
    """What a session says of an input or output.

    Attributes:
        name: Its name in the model.
        kind: onnxruntime's type, such as "tensor(float)".
        shape: One entry per axis: a size, or the name of a size that varies (None: unnamed).
    """

    name: str
    kind: str
    shape: tuple[int | str | None, ...]

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The element type, or None where numpy has no such array (strings, sequences)."""
        return DTYPES.get(self.kind.removeprefix("tensor(").removesuffix(")"))

    @property
    def is_static(self) -> bool:
        """Whether every size is known and there is an element type."""
        return self.dtype is not None and all(isinstance(size, int) for size in self.shape)


class _Booleans:
    """A tensor of booleans as bytes that are declared to be booleans: onnxruntime knows no DLPack type for them."""

    dtype = np.dtype(np.bool_)

    def __init__(self, value: Any) -> None:
        library = sys.modules[type(value).__module__.partition(".")[0]]
        self._bytes = value.view(getattr(library, "uint8", np.uint8))

    def __dlpack__(self) -> Any:
        return self._bytes.__dlpack__()


def to_ort_value(ort: Any, spec: TensorSpec, value: Any) -> Any:
    """Wrap an array or a DLPack tensor as an OrtValue; a DLPack tensor is never copied if it is contiguous.

    Args:
        ort: The onnxruntime module.
        spec: The input that it is for.
        value: numpy array, or an object with `__dlpack__` such as a torch tensor on any device.

    Raises:
        InputError: The element type is not the one that the input has.
    """
    if is_foreign(value):
        if hasattr(value, "detach"):
            value = value.detach()
        if hasattr(value, "is_contiguous") and not value.is_contiguous():
            value = value.contiguous()
        synchronize(value)
        boolean = str(value.dtype).rpartition(".")[2] == "bool"
        wrapped = ort.OrtValue.from_dlpack(_Booleans(value) if boolean else value)
    else:
        array = np.ascontiguousarray(value).reshape(np.shape(value))
        if array.dtype == DTYPES["bfloat16"]:
            wrapped = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
        else:
            wrapped = ort.OrtValue.ortvalue_from_numpy(array)
    if wrapped.data_type() != spec.kind:
        given, expected = (kind.removeprefix("tensor(").removesuffix(")") for kind in (wrapped.data_type(), spec.kind))
        raise InputError(f"Session: input {spec.name!r} has type {given}, expected {expected}")
    return wrapped


def to_numpy(value: Any) -> npt.NDArray[Any]:
    """Copy an OrtValue that lies in CPU memory into a numpy array, bfloat16 included."""
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    raw = ctypes.string_at(value.data_ptr(), 2 * math.prod(shape))
    return np.frombuffer(raw, DTYPES["bfloat16"]).reshape(shape).copy()


def to_library_of(example: Any, value: Any) -> Any:
    """Return an OrtValue as a tensor of the library that `example` is from, sharing its memory.

    Raises:
        InputError: That library has no `from_dlpack`.
    """
    library = sys.modules.get(type(example).__module__.partition(".")[0])
    if not hasattr(library, "from_dlpack"):
        raise InputError(f"Session: cannot return a {type(example).__name__}: its library has no from_dlpack")
    tensor = library.from_dlpack(value)  # type: ignore[union-attr]
    if value.data_type() == "tensor(bool)":
        # DLPack as onnxruntime speaks it has no booleans: they arrive as bytes 0 and 1.
        return tensor.view(getattr(library, "bool", bool))
    return tensor


def ones(spec: TensorSpec) -> npt.NDArray[Any]:
    """Return ones of an input's shape, sizes that vary being 1.

    Raises:
        InputError: The input is no tensor that numpy has.
    """
    if spec.dtype is None:
        raise InputError(f"Session.warm_up: input {spec.name!r} is {spec.kind}, pass a value for it")
    return np.ones([size if isinstance(size, int) else 1 for size in spec.shape], spec.dtype)


def is_foreign(value: Any) -> bool:
    """Tell whether a value is a tensor of another library than numpy."""
    return hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray | np.generic)


def synchronize(value: Any) -> None:
    """Wait until the library that owns a CUDA tensor has written it: onnxruntime reads on a stream of its own."""
    torch = sys.modules.get("torch")
    if torch is not None and getattr(value, "is_cuda", False):
        torch.cuda.current_stream(value.device).synchronize()


def device_of(value: Any) -> tuple[str, int]:
    """Return where a tensor lies, ("cpu", 0) or ("cuda", n)."""
    if not is_foreign(value):
        return "cpu", 0
    kind, number = value.__dlpack_device__()
    return ("cuda", int(number)) if int(kind) == _DLPACK_CUDA else ("cpu", 0)

"""Is a tensor what it says it is? Judges one `onnx.TensorProto`, and makes sparse ones dense.

onnx-ir trusts a tensor's dims until somebody reads its values, and reads a tensor without any data as zeros;
onnxruntime says ``Initializer data size mismatch`` without naming the tensor. Here every element is accounted for.
"""

import math
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, numpy_helper

from renorm_onnx.errors import ModelFileError

# 2**48 bits are 32 TB: beyond it sizes are attacks, and products of dims leave 64 bits.
_MAX_BITS: Final = 2**48
# numpy before 2.0 knows no higher rank.
_MAX_RANK: Final = 32

_BITS: Final[dict[int, int]] = {
    kind.value: kind.bitwidth for kind in ir.DataType if kind not in (ir.DataType.UNDEFINED, ir.DataType.STRING)
}
# onnx.proto, message TensorProto: which field holds a type's elements when raw_data does not. The rest: int32_data.
_FIELDS: Final[dict[int, str]] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.STRING: "string_data",
}
_PAIRS: Final = frozenset({TensorProto.COMPLEX64, TensorProto.COMPLEX128})


def quoted(name: object) -> str:
    """`name` as it is shown in a message: on one line, and short even where the file's author meant otherwise."""
    text = repr(name[:120] if isinstance(name, str | bytes) else name)
    return text if len(text) <= 100 else f"{text[:96]}...{text[0]}"


def tensor_bytes(tensor: TensorProto) -> int:
    """The number of bytes that a tensor's values take, from its dims and type; 0 for strings.

    Raises:
        ModelFileError: The type is unknown, a dim is negative, or the size is out of all proportion.
    """
    dims: tuple[int, ...] = tuple(tensor.dims[:])  # a list first: a tuple alone takes twice the time
    bits = _BITS.get(tensor.data_type, 0)
    size = math.prod(dims) * bits
    if 0 < size <= _MAX_BITS and len(dims) < 8 and (not dims or min(dims) > 0):
        return (size + 7) // 8
    if not bits and tensor.data_type != TensorProto.STRING:
        raise ModelFileError(
            f"tensor {quoted(tensor.name)} has data type {tensor.data_type}, which onnx {onnx.__version__} does not "
            "know; the file is damaged or needs a newer onnx"
        )
    if dims and min(dims) < 0:
        raise ModelFileError(f"tensor {quoted(tensor.name)} has dims {dims}; expected none below 0")
    if len(dims) > _MAX_RANK or math.prod(max(dim, 1) for dim in dims) * max(bits, 8) > _MAX_BITS:
        raise ModelFileError(
            f"tensor {quoted(tensor.name)} has {len(dims)} dims {quoted(dims)}; "
            f"expected at most {_MAX_RANK} dims and {_MAX_BITS // 8:,} bytes"
        )
    return (size + 7) // 8


def check_tensor(tensor: TensorProto) -> int:
    """Judge a tensor whose values are in the message itself.

    Source: onnx.proto, message TensorProto, fields `data_type`, `dims`, `raw_data`, `*_data`, `segment`.

    Args:
        tensor: Its `data_location` is not EXTERNAL.

    Returns:
        The number of bytes its values take.

    Raises:
        ModelFileError: As `tensor_bytes`, or the values are not exactly as many as the dims say, or in a wrong field.
    """
    if tensor.HasField("segment"):
        raise ModelFileError(f"tensor {quoted(tensor.name)} is one segment of a larger one; expected whole tensors")
    size = tensor_bytes(tensor)
    kind = tensor.data_type
    field = _FIELDS.get(kind, "int32_data")
    values = len(getattr(tensor, field))
    if tensor.HasField("raw_data"):
        found = len(tensor.raw_data)
        if found != size or values or kind == TensorProto.STRING:
            raise ModelFileError(
                f"tensor {quoted(tensor.name)} of type {ir.DataType(kind).name} and shape {tuple(tensor.dims)} has "
                f"{found:,} bytes of raw data{f' and {values:,} values in {field}' if values else ''}; "
                + ("strings cannot be raw" if kind == TensorProto.STRING else f"expected {size:,} bytes and no more")
            )
        return size
    expected = math.prod(tensor.dims)
    if kind in _PAIRS:
        expected *= 2
    elif _BITS.get(kind) in (2, 4):
        expected = size
    if values != expected:
        raise ModelFileError(
            f"tensor {quoted(tensor.name)} of type {ir.DataType(kind).name} and shape {tuple(tensor.dims)} has "
            f"{values:,} values in {field}; expected {expected:,}"
        )
    return size


def densified(sparse: onnx.SparseTensorProto, *, budget: int) -> TensorProto:
    """Make a sparse tensor dense.

    Source: onnx.proto, message SparseTensorProto: `values` of shape (nnz,), `indices` of shape (nnz,) into the
    flattened tensor or (nnz, rank); all other elements are 0.

    Args:
        sparse: Its values bear the name of the result.
        budget: The most bytes that the result may take.

    Raises:
        ModelFileError: Values and indices do not agree, an index is outside or listed twice, or the result is too big.
    """
    values, indices = sparse.values, sparse.indices
    who = f"sparse tensor {quoted(values.name)}"
    if TensorProto.EXTERNAL in (values.data_location, indices.data_location):
        raise ModelFileError(f"{who} keeps its parts in a data file; expected them in the model")
    check_tensor(values)
    check_tensor(indices)
    if _BITS.get(values.data_type, 0) < 8:
        raise ModelFileError(f"{who} has type {ir.DataType(values.data_type).name}; expected one of at least 8 bits")
    dense = TensorProto(name=values.name, data_type=values.data_type, dims=sparse.dims)
    size = tensor_bytes(dense)
    if size > budget:
        raise ModelFileError(
            f"{who} of shape {tuple(sparse.dims)} takes {size:,} bytes dense; at most {budget:,} are left"
        )
    stored, shape = tuple(values.dims), tuple(sparse.dims)
    listed = tuple(indices.dims)
    if indices.data_type != TensorProto.INT64 or len(stored) != 1 or listed not in (stored, (*stored, len(shape))):
        raise ModelFileError(
            f"{who} of shape {shape} has values of shape {stored} and {ir.DataType(indices.data_type).name} indices of "
            f"shape {listed}; expected (n,) and INT64 (n,) or (n, {len(shape)})"
        )
    where = numpy_helper.to_array(indices)
    limits = np.array(shape if where.ndim == 2 else [math.prod(shape)], np.int64)
    if where.size and ((where < 0).any() or (where >= limits).any()):
        raise ModelFileError(f"{who} of shape {shape} has an index outside of it")
    flat = where if where.ndim == 1 else np.ravel_multi_index(tuple(where.T), shape)
    if len(np.unique(flat)) != len(flat):
        raise ModelFileError(f"{who} lists one index twice; expected each once")
    result = np.zeros(math.prod(shape), ir.DataType(values.data_type).numpy())
    result[flat] = ir.serde.deserialize_tensor(values).numpy()
    dense.raw_data = result.astype(result.dtype.newbyteorder("<"), copy=False).tobytes()
    return dense

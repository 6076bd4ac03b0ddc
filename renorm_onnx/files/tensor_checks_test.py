"""Tensors that are not what they say."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from renorm_onnx.errors import ModelFileError
from renorm_onnx.files.tensor_checks import check_tensor, densified, quoted


def tensor(dims: list[int], kind: int = TensorProto.FLOAT, **fields: object) -> TensorProto:
    return TensorProto(name="w", dims=dims, data_type=kind, **fields)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (tensor([4], raw_data=b"123"), r"type FLOAT and shape \(4,\) has 3 bytes of raw data; expected 16 bytes"),
        (tensor([1], raw_data=bytes(16)), r"has 16 bytes of raw data; expected 4 bytes and no more"),
        (tensor([4], raw_data=bytes(16), float_data=[1.0]), r"16 bytes of raw data and 1 values in float_data"),
        (tensor([4]), r"shape \(4,\) has 0 values in float_data; expected 4"),
        (tensor([4], double_data=[1.0] * 4), r"0 values in float_data; expected 4"),
        (tensor([1], float_data=[1.0] * 4), r"4 values in float_data; expected 1"),
        (tensor([3], TensorProto.COMPLEX64, float_data=[1.0] * 3), r"3 values in float_data; expected 6"),
        (tensor([3], TensorProto.INT4, int32_data=[1] * 3), r"3 values in int32_data; expected 2"),
        (tensor([2], TensorProto.STRING, raw_data=b"ab"), r"strings cannot be raw"),
        (tensor([-1, 2]), r"tensor 'w' has dims \(-1, 2\); expected none below 0"),
        (
            tensor([2**62, 4], raw_data=b""),
            r"tensor 'w' has 2 dims .* expected at most 32 dims and 35,184,372,088,832 bytes",
        ),
        (tensor([0, 2**62], raw_data=b""), r"expected at most 32 dims and 35,184,372,088,832 bytes"),
        (tensor([1] * 33, raw_data=bytes(4)), r"has 33 dims .* expected at most 32 dims"),
        (tensor([1], 999, raw_data=bytes(4)), r"has data type 999, which onnx .* does not know"),
        (tensor([1], TensorProto.UNDEFINED, raw_data=bytes(4)), r"has data type 0, which onnx .* does not know"),
        (
            tensor([1], float_data=[1.0], segment=TensorProto.Segment(begin=0, end=1)),
            r"tensor 'w' is one segment of a larger one; expected whole tensors",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_its_values_is_refused(bad: TensorProto, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        check_tensor(bad)


def test_every_type_is_accepted_with_exactly_its_bytes() -> None:
    for kind in TensorProto.DataType.values():
        if kind in (TensorProto.UNDEFINED, TensorProto.STRING):
            continue
        typed = onnx.helper.make_tensor("w", kind, [3], [1, 0, 1])
        raw = onnx.helper.make_tensor("w", kind, [3], numpy_helper.to_array(typed), raw=True)
        assert check_tensor(typed) == check_tensor(raw) == len(raw.raw_data) > 0
    assert check_tensor(tensor([2], TensorProto.STRING, string_data=[b"a", b"b"])) == 0
    assert check_tensor(tensor([0], raw_data=b"")) == 0
    assert check_tensor(tensor([], float_data=[1.0])) == 4


def sparse(values: list[float], indices: object, dims: list[int]) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(
        values=numpy_helper.from_array(np.array(values, np.float32), "w"),
        indices=numpy_helper.from_array(np.array(indices, np.int64)),
        dims=dims,
    )


@pytest.mark.parametrize("indices", [[1, 5], [[0, 1], [1, 2]]])
def test_a_sparse_tensor_becomes_the_dense_one_it_stands_for(indices: object) -> None:
    dense = densified(sparse([2.0, 3.0], indices, [2, 3]), budget=1000)
    np.testing.assert_array_equal(numpy_helper.to_array(dense), [[0, 2, 0], [0, 0, 3]])
    assert dense.name == "w"
    check_tensor(dense)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (sparse([1.0], [6], [2, 3]), r"sparse tensor 'w' of shape \(2, 3\) has an index outside of it"),
        (sparse([1.0], [-1], [2, 3]), r"has an index outside of it"),
        (sparse([1.0], [[0, 3]], [2, 3]), r"has an index outside of it"),
        (sparse([1.0, 2.0], [1, 1], [2, 3]), r"lists one index twice; expected each once"),
        (sparse([1.0, 2.0], [1], [2, 3]), r"values of shape \(2,\) and INT64 indices of shape \(1,\)"),
        (sparse([1.0], [0], [2**40]), r"takes 4,398,046,511,104 bytes dense; at most 1,000 are left"),
        (sparse([1.0], [0], [-4]), r"has dims \(-4,\); expected none below 0"),
    ],
)
def test_a_sparse_tensor_without_sense_is_refused(bad: onnx.SparseTensorProto, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        densified(bad, budget=1000)


def test_a_sparse_tensor_of_strings_or_of_external_parts_is_refused() -> None:
    strings = sparse([1.0], [0], [2])
    strings.values.CopyFrom(tensor([1], TensorProto.STRING, string_data=[b"a"]))
    with pytest.raises(ModelFileError, match=r"has type STRING; expected one of at least 8 bits"):
        densified(strings, budget=1000)
    external = sparse([1.0], [0], [2])
    external.indices.data_location = TensorProto.EXTERNAL
    with pytest.raises(ModelFileError, match=r"keeps its parts in a data file; expected them in the model"):
        densified(external, budget=1000)


def test_a_name_is_shown_on_one_short_line() -> None:
    assert quoted("a\nb") == r"'a\nb'"
    assert len(quoted("x" * 10_000)) <= 101

"""Operands with pending factors: every element rounded once, by blocks exactly what the whole would be."""

from __future__ import annotations

import io
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from renorm_onnx.fusion import parameters
from renorm_onnx.fusion.fact import computed, stored
from renorm_onnx.fusion.parameters import Parameter, StreamedTensor, rounded

# Digits of the significand, exponent of the smallest normal number and of the largest number.
FORMATS = {
    ir.DataType.FLOAT16: (11, -14, 15),
    ir.DataType.BFLOAT16: (8, -126, 127),
    ir.DataType.FLOAT: (24, -126, 127),
    ir.DataType.DOUBLE: (53, -1022, 1023),
}


def nearest(number: Fraction, dtype: ir.DataType) -> float:
    """The nearest number of a format, ties to even, in exact arithmetic (IEEE 754-2019, section 4.3.1)."""
    digits, lowest, highest = FORMATS[dtype]
    if number == 0:
        return 0.0
    size = abs(number)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    unit = Fraction(2) ** (max(exponent, lowest) - digits + 1)
    result = round(size / unit) * unit
    if result > (2 - Fraction(2) ** (1 - digits)) * Fraction(2) ** highest:
        return math.copysign(math.inf, number)
    return math.copysign(float(result), number)


def tricky(dtype: ir.DataType, rng: np.random.Generator) -> np.ndarray:
    """Float64 numbers on, just above and just below ties of a format, and at both ends of its range."""
    digits, lowest, highest = FORMATS[dtype]
    tie = (2 * rng.integers(2 ** (digits - 1), 2**digits, 200) + 1) * 2.0**-digits
    near = [tie * (1 + sign * 2.0**-shift) for sign in (-1, 0, 1) for shift in (26, 40, 52)]
    scales = [0, 1, -3, lowest, lowest - digits + 1, highest - 1]
    numbers = np.concatenate([group * 2.0**scale for group in near for scale in scales])
    top = 2.0**highest * (2 - 2.0 ** (1 - digits))
    extremes = [top, top * (1 + 2.0 ** -(digits + 2)), 2.0 ** (lowest - digits + 1), 2.0 ** (lowest - digits), 0.0]
    return np.concatenate([numbers, -numbers, extremes])


@pytest.mark.parametrize("dtype", [t for t in FORMATS if t != ir.DataType.DOUBLE])
def test_every_type_is_rounded_once(dtype: ir.DataType) -> None:
    numbers = tricky(dtype, np.random.default_rng(0))
    found = rounded(numbers, dtype).astype(np.float64)
    wanted = np.array([nearest(Fraction(x), dtype) for x in numbers.tolist()])
    wrong = np.flatnonzero(found != wanted)
    assert wrong.size == 0, (numbers[wrong[0]].hex(), found[wrong[0]], wanted[wrong[0]])


def test_bfloat16_rounded_through_float32_would_be_wrong() -> None:
    just_above_tie = np.array([1 + 2.0**-8 + 2.0**-40])
    assert just_above_tie.astype(np.float32).astype(ml_dtypes.bfloat16) == 1.0
    assert rounded(just_above_tie, ir.DataType.BFLOAT16) == 1.0 + 2.0**-7


@pytest.mark.parametrize("dtype", FORMATS)
def test_numbers_that_are_none_and_signs_of_zero_survive_rounding(dtype: ir.DataType) -> None:
    found = rounded(np.array([np.nan, np.inf, -np.inf, -0.0]), dtype).astype(np.float64)
    assert np.isnan(found[0])
    assert found[1:3].tolist() == [np.inf, -np.inf]
    assert np.signbit(found[3])


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_product_of_factors_is_within_half_a_unit(dtype: ir.DataType) -> None:
    rng = np.random.default_rng(1)
    weight = rounded(rng.normal(size=(6, 5)), dtype)
    rows, columns = rng.uniform(0.2, 5, (6, 1)), rng.uniform(0.2, 5, (1, 5))
    parameter = Parameter(ir.Tensor(weight, dtype=dtype), dtype, (6, 5)).scaled(rows).scaled(columns).scaled(rows)
    assert len(parameter.factors) == 2
    found = parameter.rounded().astype(np.float64)
    for (i, j), value in np.ndenumerate(found):
        exact = Fraction(float(weight[i, j])) * Fraction(rows[i, 0]) ** 2 * Fraction(columns[0, j])
        # Three products in float64 come before the one rounding.
        digits = FORMATS[dtype][0]
        unit = Fraction(2) ** (math.frexp(value)[1] - digits)
        assert abs(Fraction(value) - exact) <= unit / 2 + abs(exact) * Fraction(2) ** -51


def external(tmp_path: Path, array: np.ndarray, dtype: ir.DataType) -> ir.ExternalTensor:
    """`array` in a data file, after 32 other bytes."""
    (tmp_path / "data").write_bytes(bytes(32) + array.tobytes())
    shape = ir.Shape(array.shape)
    return ir.ExternalTensor("data", 32, array.nbytes, dtype, shape=shape, name="w", base_dir=str(tmp_path))


@pytest.fixture(params=["message", "data file", "float64"])
def scaled(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Parameter, np.ndarray]:
    """A weight with factors along both axes, of seven rows to a block, and its elements as float64."""
    monkeypatch.setattr(parameters, "BLOCK_ELEMENTS", 7 * 10 * 4)
    rng = np.random.default_rng(2)
    array = rng.normal(size=(40, 10, 2, 2))
    if request.param == "float64":
        base: Any = array
    else:
        array = array.astype(np.float32)
        is_file = request.param == "data file"
        base = external(tmp_path, array, ir.DataType.FLOAT) if is_file else ir.Tensor(array, name="w")
    rows, columns = rng.uniform(0.2, 5, (40, 1, 1, 1)), rng.uniform(0.2, 5, (1, 10, 1, 1))
    parameter = Parameter(base, ir.DataType.FLOAT, array.shape).scaled(rows).scaled(columns)
    return parameter, array.astype(np.float64) * rows * columns


def test_blocks_are_whole_rows_and_together_the_whole(scaled: tuple[Parameter, np.ndarray]) -> None:
    parameter, whole = scaled
    parts = list(parameter.blocks())
    assert [b.shape[0] for _, b in parts] == [7, 7, 7, 7, 7, 5]
    assert np.array_equal(np.concatenate([b for _, b in parts]), whole)
    for part, block in parts:
        assert np.array_equal(whole[part], block)
    assert np.array_equal(parameter.float64(), whole)


def test_the_largest_magnitude_is_found_across_blocks(scaled: tuple[Parameter, np.ndarray]) -> None:
    parameter, whole = scaled
    for keep in ((), (0,), (1,), (0, 1), (0, 1, 2, 3)):
        gone = tuple(i for i in range(4) if i not in keep)
        assert np.array_equal(parameter.magnitudes(keep), np.abs(whole).max(axis=gone)), keep


@pytest.mark.parametrize("axis", [0, 1])
def test_contraction_across_blocks_sums_over_one_channel_axis_and_the_kernel(
    scaled: tuple[Parameter, np.ndarray], axis: int
) -> None:
    parameter, whole = scaled
    vector = np.random.default_rng(3).normal(size=(1, 10, 1, 1) if axis else (40, 1, 1, 1))
    wanted = (whole * vector).sum(axis=(axis, 2, 3))
    np.testing.assert_allclose(parameter.contract(vector, axis), wanted, rtol=1e-12)


def test_a_contraction_takes_a_vector_for_each_row(scaled: tuple[Parameter, np.ndarray]) -> None:
    parameter, whole = scaled
    vector = np.random.default_rng(4).normal(size=(40, 10, 1, 1))
    np.testing.assert_allclose(parameter.contract(vector, 1), (whole * vector).sum(axis=(1, 2, 3)), rtol=1e-12)


class _Blocks:
    """Takes what a tensor writes, and remembers in what pieces."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.content = io.BytesIO()

    def write(self, data: Any) -> int:
        self.sizes.append(memoryview(data).nbytes)
        return self.content.write(data)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_large_weight_is_streamed_and_equals_the_whole(
    dtype: ir.DataType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    array = rounded(rng.normal(size=(33, 20)), dtype)
    factor = rng.uniform(0.2, 5, (33, 1))
    small = Parameter(external(tmp_path, array, dtype), dtype, (33, 20)).scaled(factor)
    whole = small.rounded()
    monkeypatch.setattr(parameters, "BLOCK_ELEMENTS", 100)
    tensor = small.tensor("w2")
    assert isinstance(tensor, StreamedTensor)
    assert (tensor.name, tensor.dtype, tuple(tensor.shape.numpy())) == ("w2", dtype, (33, 20))
    blocks = _Blocks()
    tensor.tofile(blocks)  # type: ignore[arg-type]
    assert max(blocks.sizes) == 100 * array.itemsize
    assert blocks.content.getvalue() == whole.tobytes() == tensor.numpy().tobytes() == tensor.tobytes()
    assert tensor.nbytes == sum(blocks.sizes)


def test_a_data_file_is_read_and_never_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(ir.ExternalTensor, "numpy", lambda self: pytest.fail("mapped"))
    array = np.random.default_rng(6).normal(size=(33, 20)).astype(np.float32)
    parameter = Parameter(external(tmp_path, array, ir.DataType.FLOAT), ir.DataType.FLOAT, (33, 20))
    doubled = parameter.scaled(np.full((1, 1), 2.0))
    assert np.array_equal(parameter.magnitudes((0,)), np.abs(array).max(axis=1))
    assert np.array_equal(doubled.contract(np.ones((1, 20)), 1), 2 * array.astype(np.float64).sum(axis=1))
    assert np.array_equal(doubled.rounded(), 2 * array)


@pytest.mark.parametrize("dtype", FORMATS)
def test_magnitudes_of_every_type_are_exact_and_hand_on_what_is_no_number(dtype: ir.DataType) -> None:
    array = rounded(np.array([[1.5, -2.5, 0.0], [-np.inf, 3.0, 1.0], [np.nan, -np.inf, 1.0], [-0.0, 0.0, 0.0]]), dtype)
    found = Parameter(ir.Tensor(array, dtype=dtype), dtype, (4, 3)).magnitudes((0,))
    np.testing.assert_array_equal(found, [2.5, np.inf, np.nan, 0.0])
    assert found.dtype == np.float64
    assert not np.signbit(found).any()


def test_empty_and_scalar_operands_have_blocks_and_magnitudes() -> None:
    empty = Parameter.new(np.zeros((0, 3)), ir.DataType.FLOAT)
    assert [b.shape for _, b in empty.blocks()] == [(0, 3)]
    assert empty.magnitudes((1,)).tolist() == [0, 0, 0]
    assert empty.contract(np.ones((1, 3)), 1).shape == (0,)
    number = Parameter.new(-2.5, ir.DataType.FLOAT).scaled(np.float64(2.0))
    assert [float(b) for _, b in number.blocks()] == [-5.0]
    assert number.magnitudes(()) == 5.0
    assert number.rounded() == np.float32(-5.0)


def test_a_shift_is_added_before_the_one_rounding() -> None:
    bias = Parameter(ir.Tensor(np.array([1.0, 3.0], np.float32)), ir.DataType.FLOAT, (2,))
    moved = bias.mapped(np.array([1 / 3, 1 / 7]), np.array([2.0, 0.0]))
    assert moved.rounded().tolist() == [np.float32(1 / 3 + 2), np.float32(3 / 7)]


def test_only_constants_of_a_float_type_are_operands() -> None:
    whole = ir.Tensor(np.arange(3))
    assert Parameter.of(stored(whole)) is None
    assert Parameter.of(computed(np.arange(3), ir.DataType.INT64)) is None
    found = Parameter.of(computed(np.array([0.5, 2.0]), ir.DataType.FLOAT16))
    assert found is not None
    assert (found.dtype, found.shape, found.rounded().dtype) == (ir.DataType.FLOAT16, (2,), np.float16)

"""Patterns of quantized weights: they stay as they are behind DequantizeLinear, of which the scales take the map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from renorm_onnx.fusion.report import Reason
from runtime_tests.pattern_models import Net, Pattern

C = 6
IMAGE = ("n", 4, 6, 7)


def _integers(n: Net, shape: Sequence[int], kind: type, scale: Any, zero: Any, axis: int | None) -> Any:
    inputs = [n.k(n.rng.integers(-90, 90, shape).astype(kind)), n.k(np.asarray(scale))]
    inputs += [] if zero is None else [n.k(np.asarray(zero, kind))]
    return n.op("DequantizeLinear", *inputs, **({} if axis is None else {"axis": axis}))


def _whole_steps(n: Net, steps: float) -> Any:
    weight = _integers(n, (5, 4, 1, 1), np.int8, np.full(5, 2.0**-7), None, 0)
    bias = _integers(n, (5,), np.int32, np.full(5, 2.0**-10), None, 0)
    return n.op("Add", n.op("Conv", "x", weight, bias), n.k(np.arange(1.0, 6).reshape(5, 1, 1) * steps * 2.0**-10))


def _quantized_weight(n: Net, axis: int | None, *, zero: bool) -> Any:
    weight = n.k(n.rng.integers(-90, 90, (C, 4, 3, 3)).astype(np.int8))
    shape = () if axis is None else (C,)
    inputs = [weight, n.k(n.rng.uniform(0.005, 0.02, shape))]
    if zero:
        inputs.append(n.k(n.rng.integers(-3, 3, shape).astype(np.int8)))
    return n.op("DequantizeLinear", *inputs, **({} if axis is None else {"axis": axis}))


def _quantized_gemm(n: Net) -> Any:
    weight = n.k(n.rng.integers(-90, 90, (C, 4)).astype(np.int8))
    dequantized = n.op("DequantizeLinear", weight, n.k(n.rng.uniform(0.005, 0.02, C)), axis=0)
    return n.bn(n.op("Gemm", "x", dequantized, n.rand(C), transB=1), C)


def behind_a_weight() -> Iterator[Pattern]:
    """A norm behind an operator with a quantized weight, or with a quantized bias."""
    for axis, zero in ((0, False), (0, True), (None, False), (None, True)):
        yield Pattern(
            f"quantized weight, axis {axis}, zero point {zero}, norm",
            IMAGE,
            lambda n, a=axis, z=zero: n.bn(n.op("Conv", "x", _quantized_weight(n, a, zero=z), n.rand(C)), C),
        )
    yield Pattern("quantized gemm, norm", (3, 4), _quantized_gemm)
    yield Pattern("quantized bias, whole steps", IMAGE, lambda n: _whole_steps(n, 3.0))
    yield Pattern("quantized bias, broken steps", IMAGE, lambda n: _whole_steps(n, 3.5), 1)
    for zero in (0, 3):
        yield Pattern(
            f"one scale, zero point {zero}, norm",
            IMAGE,
            lambda n, z=zero: n.bn(n.op("Conv", "x", _integers(n, (5, 4, 1, 1), np.int8, 0.01, z, None)), 5),
        )


def before_a_weight() -> Iterator[Pattern]:
    """A norm before an operator with a quantized weight."""
    for axis, left in ((1, 0), (0, 1)):
        scales = np.full(4 if axis else 5, 2.0**-7)
        yield Pattern(
            f"norm, quantized weight with scales along axis {axis}",
            IMAGE,
            lambda n, a=axis, s=scales: n.op("Conv", n.bn("x", 4), _integers(n, (5, 4, 1, 1), np.int8, s, None, a)),
            left,
            None if axis else Reason.GRAPH_INPUT,
        )


# What stands between the codes, (6, 8) or (8, 6), and the operator that reads a weight of 8 inputs and 6 outputs.
Write = Callable[[Net, str, str], Any]
LAYOUTS: Mapping[str, tuple[tuple[int, ...], Write]] = {
    "transposed, MatMul": (("n", 8), lambda n, x, w: n.op("MatMul", x, n.op("Transpose", w, perm=[1, 0]))),
    "transposed, Gemm": (("n", 8), lambda n, x, w: n.op("Gemm", x, n.op("Transpose", w), n.rand(6))),
    "Gemm with transB": (("n", 8), lambda n, x, w: n.op("Gemm", x, w, n.rand(6), transB=1)),
    "reshaped, Conv": (("n", 8, 3, 3), lambda n, x, w: n.op("Conv", x, n.op("Reshape", w, n.ints(6, 8, 1, 1)))),
    "unsqueezed, Conv": (("n", 8, 3), lambda n, x, w: n.op("Conv", x, n.op("Unsqueeze", w, n.ints(2)))),
    "turned, ConvTranspose": (
        ("n", 8, 3),
        lambda n, x, w: n.op("ConvTranspose", x, n.op("Unsqueeze", n.op("Transpose", w), n.ints(2))),
    ),
}
CODES = {"int8": np.int8, "uint8": np.uint8, "int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4}
CODES |= {"float8e4m3": ml_dtypes.float8_e4m3fn, "float8e5m2": ml_dtypes.float8_e5m2}


def _weight(n: Net, kind: str, scales: Sequence[int] = (), *, zero: bool = False, **attributes: int) -> Any:
    """Codes of 6 outputs and 8 inputs, made numbers."""
    low = 0 if kind.startswith("u") else -7
    inputs = [n.k(n.rng.integers(low, 8, (6, 8)).astype(CODES[kind])), n.k(n.rng.uniform(0.05, 0.2, scales))]
    inputs += [n.k(n.rng.integers(0, 3, scales).astype(CODES[kind]))] if zero else []
    return n.op("DequantizeLinear", *inputs, **attributes)


def layouts() -> Iterator[Pattern]:
    """The weight behind a change of layout, one scale for all, for each output, for each input; norm on either side."""
    for name, (shape, read) in LAYOUTS.items():
        for many, scales, attributes in (
            ("one scale", (), {}),
            ("scales of outputs", (6,), {"axis": 0}),
            ("scales of inputs", (8,), {"axis": 1}),
        ):
            weight = lambda n, s=scales, a=attributes: _weight(n, "int8", s, zero=True, **a)  # noqa: E731
            stays = "inputs" in many
            yield Pattern(
                f"{many}, {name}, norm",
                shape,
                lambda n, r=read, w=weight: n.bn(r(n, "x", w(n)), 6),
                int(stays),
                Reason.AXIS if stays else None,
            )
            stays = "outputs" in many
            yield Pattern(
                f"norm, {many}, {name}",
                shape,
                lambda n, r=read, w=weight: r(n, n.bn("x", 8), w(n)),
                int(stays),
                Reason.GRAPH_INPUT if stays else None,
            )


def codes() -> Iterator[Pattern]:
    """Codes of few bits and of broken numbers, with zero points of their own type."""
    gemm = LAYOUTS["Gemm with transB"][1]
    for kind in CODES:
        for zero in (False, True):
            weight = lambda n, k=kind, z=zero: _weight(n, k, zero=z)  # noqa: E731
            what = f"{kind}, zero point {zero}"
            # Of these, onnxruntime has the first on the CPU, where its zero point is zero.
            runs = not kind.startswith("float8") or (kind == "float8e4m3" and not zero)
            yield Pattern(
                f"{what}, norm", ("n", 8), lambda n, w=weight: n.bn(gemm(n, "x", w(n)), 6), opset=21, runs=runs
            )
            yield Pattern(
                f"norm, {what}", ("n", 8), lambda n, w=weight: gemm(n, n.bn("x", 8), w(n)), opset=21, runs=runs
            )


def blocks() -> Iterator[Pattern]:
    """One scale for each block of inputs, as weights of 4 bits have it."""
    read = LAYOUTS["transposed, MatMul"][1]
    halves = lambda n: n.op("Mul", "x", n.k(np.repeat([0.5, -2.0], 4)))  # noqa: E731
    weight = lambda n: _weight(n, "int4", (6, 2), zero=True, axis=1, block_size=4)  # noqa: E731
    rows = lambda n: n.op(  # noqa: E731
        "Reshape",
        n.op("DequantizeLinear", n.k(n.rng.integers(-7, 8, (12, 4)).astype(np.int8)), n.rand(12), axis=0),
        n.ints(6, 8),
    )
    for name, make in (("blocks", weight), ("blocks as rows of a matrix", rows)):
        yield Pattern(f"{name}, norm", ("n", 8), lambda n, w=make: n.bn(read(n, "x", w(n)), 6), opset=21)
        yield Pattern(f"a scale for each block, {name}", ("n", 8), lambda n, w=make: read(n, halves(n), w(n)), opset=21)
        yield Pattern(
            f"norm, {name}",
            ("n", 8),
            lambda n, w=make: read(n, n.bn("x", 8), w(n)),
            1,
            Reason.GRAPH_INPUT,
            opset=21,
        )


def quantized() -> Iterator[Pattern]:
    """All patterns of this file."""
    for rows in (behind_a_weight, before_a_weight, layouts, codes, blocks):
        yield from rows()

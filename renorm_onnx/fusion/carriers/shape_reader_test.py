"""Who reads only the shape or the type of a value is no obstacle."""

from __future__ import annotations

import numpy as np
import pytest

from renorm_onnx.fusion.carriers.exact_folding_test import assert_fuses, bn, build, norm, operators, quarters


@pytest.mark.parametrize("reader", ["Shape(c)", "Size(c)"])
def test_a_reader_of_the_shape_alone_takes_no_part(reader: str) -> None:
    text = f"c = Conv(x, W) y = {bn('c')} z = {reader}"
    fused = assert_fuses(build(text, "double[N,3,H,W] x", "y, z", W=quarters([4, 3, 1, 1]), **norm(4)))
    assert operators(fused)["BatchNormalization"] == 0
    text = f"c = {bn('x')} y = Conv(c, W) z = {reader}"
    fused = assert_fuses(build(text, "double[N,4,H,W] x", "y, z", W=quarters([3, 4, 1, 1]), **norm(4)))
    assert operators(fused)["BatchNormalization"] == 0


def test_a_reader_of_the_type_alone_takes_no_part() -> None:
    text = f"c = Conv(x, W) y = {bn('c')} z = CastLike(k, c)"
    weights = {"W": quarters([4, 3, 1, 1]), "k": np.array([1, 2])}
    fused = assert_fuses(build(text, "double[N,3,H,W] x", "y, z", **weights, **norm(4)))
    assert operators(fused)["BatchNormalization"] == 0

"""Copies of a tensor take copies of a map."""

from __future__ import annotations

import numpy as np
import pytest

from renorm_onnx.fusion.carriers.exact_folding_test import assert_fuses, backward, bn, build, forward, norm, quarters
from renorm_onnx.fusion.report import Reason


@pytest.mark.parametrize("repeats", [[1, 1, 2, 3], [2, 1, 1, 1]])
def test_a_map_passes_copies_along_other_axes(repeats: list[int]) -> None:
    backward("d = Tile(c, p)", 4, p=np.array(repeats))
    forward("d = Tile(c, p)", 4, p=np.array(repeats))


def test_copies_of_the_channels_take_copies_of_the_map() -> None:
    forward("d = Tile(c, p)", 8, p=np.array([1, 2, 1, 1]))
    backward("d = Tile(c, p)", 8, [Reason.CONFLICT], p=np.array([1, 2, 1, 1]))
    text = f"c = Conv(x, W) d = Tile(c, p) y = {bn('d')}"
    twice = {k: np.tile(v, 2) for k, v in norm(4).items()}
    assert_fuses(build(text, "double[N,3,H,W] x", "y", W=quarters([4, 3, 1, 1]), p=np.array([1, 2, 1, 1]), **twice))


def test_copies_that_are_counted_at_run_time_are_refused() -> None:
    text = f"s = Shape(z) c = Conv(x, W) d = Tile(c, s) y = {bn('d')}"
    model = build(text, "double[N,3,H,W] x, double[1,N,1,1] z", "y", W=quarters([2, 3, 1, 1]), **norm(4))
    assert_fuses(model, [Reason.SHAPE])


def test_constants_may_be_tiled() -> None:
    text = "c = Conv(x, W) k = Tile(m, p) y = Sub(c, k)"
    constants = {"W": quarters([4, 3, 1, 1]), "m": quarters([1, 4, 1, 1]), "p": np.array([1, 1, 4, 5])}
    fused = assert_fuses(build(text, "double[N,3,4,5] x", "y", **constants))
    assert [n.op_type for n in fused.graph.node] == ["Conv"]

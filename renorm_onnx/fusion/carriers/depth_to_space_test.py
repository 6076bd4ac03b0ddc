"""Blocks of channels share one map."""

from __future__ import annotations

import numpy as np
import pytest

from renorm_onnx.fusion.carriers.exact_folding_test import assert_fuses, backward, build, forward, operators, quarters
from renorm_onnx.fusion.report import Reason


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_a_norm_behind_depth_to_space_is_repeated_for_the_block(mode: str) -> None:
    backward(f'd = DepthToSpace<blocksize=2, mode="{mode}">(c)', 3, filters=12)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_a_norm_before_depth_to_space_passes_if_the_block_agrees(mode: str) -> None:
    lines = f'd = DepthToSpace<blocksize=2, mode="{mode}">(c)'
    forward(lines, 1, [Reason.AXIS])
    scale = np.array([2.0, -0.5])
    full = np.repeat(scale, 4) if mode == "CRD" else np.tile(scale, 4)
    body = f"c = Mul(x, k) {lines} y = Conv(d, W)"
    constants = {"k": full.reshape(8, 1, 1), "W": quarters([3, 2, 1, 1])}
    fused = assert_fuses(build(body, "double[N,8,H,W] x", "y", **constants))
    assert operators(fused) == {"DepthToSpace": 1, "Conv": 1}


def test_a_norm_before_space_to_depth_is_repeated_for_the_block() -> None:
    forward("d = SpaceToDepth<blocksize=2>(c)", 16, inputs="double[N,4,4,6] x")


def test_a_norm_behind_space_to_depth_passes_if_the_block_agrees() -> None:
    backward("d = SpaceToDepth<blocksize=2>(c)", 16, [Reason.AXIS], inputs="double[N,3,4,6] x")
    body = "c = Conv(x, W) d = SpaceToDepth<blocksize=2>(c) y = Mul(d, k)"
    constants = {"k": np.tile([2.0, -0.5, 3.0], 4).reshape(12, 1, 1), "W": quarters([3, 3, 1, 1])}
    assert_fuses(build(body, "double[N,3,4,6] x", "y", **constants))


def test_a_map_along_the_width_is_refused() -> None:
    body = "c = Conv(x, W) d = DepthToSpace<blocksize=2>(c) y = Mul(d, k)"
    constants = {"k": quarters([6]), "W": quarters([4, 3, 1, 1])}
    assert_fuses(build(body, "double[N,3,3,3] x", "y", **constants), [Reason.AXIS])


def test_a_block_of_three_times_three_has_nine_channels() -> None:
    backward("d = DepthToSpace<blocksize=3>(c)", 2, filters=18)
    forward("d = SpaceToDepth<blocksize=3>(c)", 36, inputs="double[N,4,3,6] x")

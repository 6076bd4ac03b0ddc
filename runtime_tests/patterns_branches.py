"""Patterns of branches: residuals, gates, and parallel linear branches that become one operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from runtime_tests.pattern_models import Net, Pattern

C = 4
IMAGE = ("n", C, 8, 8)


def branches() -> Iterator[Pattern]:
    """Residuals, and parallel linear branches that become one operator."""
    yield Pattern("RepVGG block", IMAGE, lambda n: _rep_vgg(n))
    yield Pattern("RepVGG block in groups", IMAGE, lambda n: _rep_vgg(n, group=2))
    yield Pattern("RepVGG block with the identity first", IMAGE, lambda n: _rep_vgg(n, first=True))
    yield Pattern("MobileOne depthwise block", IMAGE, lambda n: _rep_vgg(n, group=4, copies=3))
    yield Pattern("asymmetric branches", IMAGE, _asymmetric)
    yield Pattern("x + conv", IMAGE, lambda n: n.op("Add", "x", n.conv("x", C, C, pads=[1] * 4)))
    yield Pattern("x + norm of conv", IMAGE, lambda n: n.op("Add", n.bn(n.conv("x", C, C, pads=[1] * 4), C), "x"))
    yield Pattern("norm of x + conv", IMAGE, lambda n: n.bn(n.op("Add", n.conv("x", C, C, pads=[1] * 4), "x"), C))
    yield Pattern(
        "norm of two convs", IMAGE, lambda n: n.bn(n.op("Add", n.conv("x", C, 6), n.conv(n.relu("x"), C, 6)), 6)
    )
    yield Pattern(
        "norm of a difference", IMAGE, lambda n: n.bn(n.op("Sub", n.conv("x", C, 6), n.conv(n.relu("x"), C, 6)), 6)
    )
    yield Pattern(
        "norm of a sum of three", IMAGE, lambda n: n.bn(n.op("Sum", *(n.conv(n.relu("x"), C, 6) for _ in range(3))), 6)
    )
    yield Pattern(
        "norm of a mean of two", IMAGE, lambda n: n.bn(n.op("Mean", *(n.conv(n.relu("x"), C, 6) for _ in range(2))), 6)
    )
    yield Pattern("residual block", IMAGE, _residual)
    yield Pattern("residual through the same value", IMAGE, _pooled_residual, 1)
    yield Pattern("inverted residual", IMAGE, _inverted)
    yield Pattern("gated conv", IMAGE, lambda n: _gated(n))
    yield Pattern("norm of a gated conv", IMAGE, lambda n: n.bn(_gated(n), 6, shift=False))
    yield Pattern("learnable affine block", IMAGE, _affine_block)
    yield Pattern("hard sigmoid", IMAGE, _hard_sigmoid)
    yield Pattern(
        "transposed conv, add, norm", IMAGE, lambda n: n.bn(n.op("Add", n.deconv("x", C, 6), n.rand(1, 6, 1, 1)), 6)
    )
    yield Pattern("dense block", IMAGE, _dense_block, 1)


def _rep_vgg(n: Net, *, group: int = 1, copies: int = 1, first: bool = False) -> Any:
    r = n.relu("x")
    wide = [n.bn(n.conv(r, C, C, 3, pads=[1] * 4, group=group), C) for _ in range(copies)]
    total = wide[0]
    for other in [*wide[1:], n.bn(n.conv(r, C, C, 1, group=group), C), n.bn(r, C)]:
        total = n.op("Add", *((other, total) if first else (total, other)))
    return n.relu(total)


def _asymmetric(n: Net) -> Any:
    square = n.bn(n.conv("x", C, 6, pads=[1] * 4), 6)
    flat = n.bn(n.op("Conv", "x", n.rand(6, C, 1, 3), pads=[0, 1, 0, 1]), 6)
    tall = n.bn(n.op("Conv", "x", n.rand(6, C, 3, 1), pads=[1, 0, 1, 0]), 6)
    return n.op("Add", n.op("Add", square, flat), tall)


def _residual(n: Net) -> Any:
    r = n.relu(n.bn(n.conv("x", C, 6, pads=[1] * 4), 6))
    h = n.relu(n.bn(n.conv(r, 6, 6, pads=[1] * 4), 6))
    return n.relu(n.op("Add", n.bn(n.conv(h, 6, 6, pads=[1] * 4), 6), r))


def _pooled_residual(n: Net) -> Any:
    h = n.conv("x", C, 6)
    pooled = n.op("MaxPool", h, kernel_shape=[3, 3], pads=[1] * 4)
    return n.bn(n.op("Mul", h, pooled), 6)


def _inverted(n: Net) -> Any:
    h = n.op("Clip", n.bn(n.conv("x", C, 12, 1), 12), n.scalar(0.0), n.scalar(6.0))
    h = n.op("Clip", n.bn(n.conv(h, 12, 12, pads=[1] * 4, group=12), 12), n.scalar(0.0), n.scalar(6.0))
    return n.op("Add", "x", n.bn(n.conv(h, 12, C, 1), C))


def _gated(n: Net) -> Any:
    gate = n.op("Sigmoid", n.bn(n.conv("x", C, 6), 6))
    return n.op("Mul", n.bn(n.conv("x", C, 6), 6), gate)


def _affine_block(n: Net) -> Any:
    h = n.op("Add", n.op("Mul", n.k(np.array([1.3])), n.conv("x", C, 6, bias=True)), n.k(np.array([0.2])))
    return n.conv(n.op("Add", n.op("Mul", n.k(np.array([0.8])), n.relu(h)), n.k(np.array([0.1]))), 6, 3)


def _hard_sigmoid(n: Net) -> Any:
    h = n.op("Clip", n.op("Add", n.conv("x", C, 6), n.scalar(3.0)), n.scalar(0.0), n.scalar(6.0))
    return n.op("Tanh", n.op("Mul", n.op("Relu", n.op("Div", h, n.scalar(6.0))), n.scalar(2.0)))


def _dense_block(n: Net) -> Any:
    h = n.relu(n.bn(n.conv("x", C, 6, pads=[1] * 4), 6))
    both = n.op("Concat", "x", h, axis=1)
    return n.conv(n.relu(n.bn(both, C + 6)), C + 6, 3)

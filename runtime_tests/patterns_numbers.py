"""Patterns of numbers: values at which folding must stop, or need not; and sizes that are odd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from renorm_onnx.fusion.engine import FuseOptions
from renorm_onnx.fusion.report import Reason
from runtime_tests.pattern_models import Net, Pattern

C = 4
IMAGE = ("n", C, 8, 8)
STATS = ("s", "b", "m", "v")


def _special(**changes: Callable[[Any], Any]) -> Callable[[Net], Any]:
    """Conv, norm with some statistics changed."""

    def write(n: Net) -> Any:
        values = {
            "weight": n.rng.normal(size=(5, C, 3, 3)),
            "s": n.rng.uniform(0.5, 2, 5),
            "b": n.rng.normal(size=5),
            "m": n.rng.normal(size=5),
            "v": n.rng.uniform(0.5, 2, 5),
        }
        names = {k: n.k(np.asarray(changes[k](v) if k in changes else v)) for k, v in values.items()}
        return n.op("BatchNormalization", n.op("Conv", "x", names["weight"]), *(names[k] for k in STATS))

    return write


def _at(value: float) -> Callable[[Any], Any]:
    return lambda a: np.where(np.arange(5) == 2, value, a)


def _shifted(mean: float) -> Callable[[Net], Any]:
    def write(n: Net) -> Any:
        stats = [n.k(v) for v in (np.full(C, 0.7), np.full(C, 0.1), np.full(C, mean), np.ones(C))]
        return n.conv(n.op("BatchNormalization", "x", *stats), C, 5)

    return write


def _chain(scale: float) -> Callable[[Net], Any]:
    """Conv, Mul, Add, with one scale of the Mul replaced."""

    def write(n: Net) -> Any:
        scales = _at(scale)(n.rng.uniform(0.5, 2, 5)).reshape(5, 1, 1)
        return n.op("Add", n.op("Mul", n.conv("x", C, 5), n.k(scales)), n.rand(5, 1, 1))

    return write


def numbers() -> Iterator[Pattern]:
    """Values at which folding must stop, or need not."""
    far = {"runs": False}
    yield Pattern("NaN in a mean", IMAGE, _special(m=_at(np.nan)), 1, Reason.NON_FINITE, **far)
    yield Pattern("infinite scale", IMAGE, _special(s=_at(np.inf)), 1, Reason.NON_FINITE, **far)
    yield Pattern("infinite scale in a chain", IMAGE, _chain(np.inf), 2, Reason.NON_FINITE, **far)
    yield Pattern("NaN in a chain", IMAGE, _chain(np.nan), 2, Reason.NON_FINITE, **far)
    yield Pattern("infinite variance", IMAGE, _special(v=_at(np.inf)), 0, **far)
    yield Pattern("negative variance", IMAGE, _special(v=_at(-1e-3)), 1, Reason.NEGATIVE_VARIANCE, **far)
    yield Pattern("variance zero", IMAGE, _special(v=_at(0.0)))
    yield Pattern("scale zero", IMAGE, _special(s=_at(0.0)))
    yield Pattern("all scales zero", IMAGE, _special(s=lambda s: s * 0))
    yield Pattern("overflow", IMAGE, _special(s=_at(3e38), v=_at(1e-6)), 1, Reason.OVERFLOW, **far)
    yield Pattern(
        "underflow of a channel", IMAGE, _special(s=_at(1e-38), weight=lambda w: w * 1e-3), 1, Reason.UNDERFLOW, **far
    )
    yield Pattern(
        "overflow of half", IMAGE, _special(s=_at(6e4), v=_at(1e-4)), 1, Reason.OVERFLOW, dtype="float16", **far
    )
    yield Pattern("mean of 3 deviations forward", IMAGE, _shifted(3.0))
    yield Pattern("mean of 30 deviations forward", IMAGE, _shifted(30.0), 1)
    yield Pattern("mean of 30 deviations, allowed", IMAGE, _shifted(30.0), options=FuseOptions(allow_cancellation=True))
    yield Pattern("mean of 3 deviations for tf32", IMAGE, _shifted(3.0), 1, options=FuseOptions(target="tf32"))
    yield Pattern(
        "NaN in a weight",
        IMAGE,
        _special(weight=lambda w: np.where(np.arange(5)[:, None, None, None] == 1, np.nan, w)),
        **far,
    )
    yield Pattern("batch of zero", (0, C, 8, 8), lambda n: n.bn(n.conv("x", C, 5), 5))
    yield Pattern(
        "norm of an input of zero width", ("n", C, 8, 0), lambda n: n.bn(n.chain("x", (C, 1, 1)), C), 1, runs=False
    )
    yield Pattern("a number as input", (), lambda n: n.tanh(n.chain("x", (), "Mul Add")), 2, runs=False)
    yield Pattern(
        "no name for any size", ("a", "b", "c", "d"), lambda n: n.bn(n.op("Conv", "x", n.rand(5, 2, 1, 1)), 5)
    )
    yield Pattern("one channel", ("n", C, 8, 8), lambda n: n.bn(n.conv("x", C, 1), 1))

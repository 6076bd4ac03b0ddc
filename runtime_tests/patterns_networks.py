"""Patterns as whole networks write them: shuffles, heads, windows, old arithmetic, recurrent layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from renorm_onnx.fusion.report import Reason
from runtime_tests.pattern_models import Body, Net, Pattern

C = 4
IMAGE = ("n", C, 8, 8)
TOKENS = ("n", 5, 8)


def _regrouped(n: Net, x: str, split: Sequence[int], perm: Sequence[int], joined: Sequence[int]) -> Any:
    return n.op("Reshape", n.op("Transpose", n.op("Reshape", x, n.ints(*split)), perm=list(perm)), n.ints(*joined))


def _heads(n: Net, x: str) -> Any:
    return n.op("Transpose", n.op("Reshape", x, n.ints(0, 0, 2, 4)), perm=[0, 2, 1, 3])


def _attention(n: Net, q: str, k: str, v: str) -> Any:
    weights = n.op("Softmax", n.op("MatMul", q, n.op("Transpose", k, perm=[0, 1, 3, 2])))
    mixed = n.op("Transpose", n.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    return n.op("Reshape", mixed, n.ints(0, 0, 8))


def _separate(n: Net) -> list[str]:
    return [n.op("MatMul", "x", n.rand(8, 8)) for _ in range(3)]


def _attention_scaled(n: Net) -> Any:
    return n.tanh(n.op("Mul", _attention(n, *(_heads(n, v) for v in _separate(n))), n.away(8)))


def _packed_scaled(n: Net) -> Any:
    packed = n.op("Reshape", n.op("MatMul", "x", n.rand(8, 24)), n.ints(0, 0, 3, 2, 4))
    turned = n.op("Transpose", packed, perm=[2, 0, 3, 1, 4])
    q, k, v = (n.op("Gather", turned, n.k(np.array(i)), axis=0) for i in range(3))
    return _attention(n, n.op("Mul", q, n.scalar(0.5)), k, v)


def _split_scaled(n: Net) -> Any:
    q, k, _ = n.op("Split", n.op("MatMul", "x", n.rand(8, 24)), outs=3, axis=-1)
    keys = n.op("Transpose", n.op("Mul", _heads(n, k), n.away(2, 1, 1)), perm=[0, 1, 3, 2])
    return n.op("MatMul", _heads(n, n.op("Div", q, n.scalar(2.0))), keys)


def _windows(n: Net) -> Any:
    parts = _regrouped(n, n.chain("x", (C,), "Mul Add"), (0, 2, 4, 2, 4, C), (0, 1, 3, 2, 4, 5), (-1, 16, C))
    return n.chain(n.op("MatMul", parts, n.rand(C, 6)), (6,))


def _slices(n: Net) -> list[str]:
    h = n.conv("x", C, 6)
    parts = [n.op("Slice", h, n.ints(i), n.ints(i + 3), n.ints(1)) for i in (0, 3)]
    return [n.tanh(n.bn(parts[0], 3)), n.tanh(n.bn(parts[1], 3))]


def _unit(n: Net) -> Any:
    left, right = n.op("Split", n.relu(n.bn(n.conv("x", C, 8, 1), 8)), outs=2, axis=1)
    right = n.bn(n.conv(right, 4, 4, 3, pads=[1] * 4, group=4), 4)
    right = n.relu(n.bn(n.conv(right, 4, 4, 1), 4))
    both = n.op("Concat", left, right, axis=1)
    return n.conv(_regrouped(n, both, (0, 2, 4, 8, 8), (0, 2, 1, 3, 4), (0, 8, 8, 8)), 8, 4, 1)


def layouts() -> Iterator[Pattern]:
    """Channels that are split over several axes, or joined to others, on the way."""
    shuffle: dict[str, tuple[int, Any]] = {
        "shuffle in groups": (6, lambda n, x: _regrouped(n, x, (0, 2, 3, 8, 8), (0, 2, 1, 3, 4), (0, -1, 8, 8))),
        "pixels unshuffled": (6, lambda n, x: _regrouped(n, x, (0, 6, 4, 2, 4, 2), (0, 1, 3, 5, 2, 4), (0, 24, 4, 4))),
        "turned to rows": (6, lambda n, x: n.op("Transpose", n.op("Reshape", x, n.ints(0, 6, -1)), perm=[0, 2, 1])),
    }
    for name, (channels, write) in shuffle.items():
        rows = name == "turned to rows"
        width = 24 if "pixels" in name else channels
        yield Pattern(
            f"conv, {name}, constants",
            IMAGE,
            lambda n, w=write, c=width, r=rows: n.chain(w(n, n.conv("x", C, 6, 1)), (c,) if r else (c, 1, 1)),
            # Pixels of one channel get different constants.
            4 if "pixels" in name else 0,
        )
        yield Pattern(
            f"norm, {name}, layer",
            ("n", 6, 8, 8),
            lambda n, w=write, c=width, r=rows: (
                n.op("MatMul", w(n, n.bn("x", 6)), n.rand(c, 3)) if r else n.conv(w(n, n.bn("x", 6)), c, 3, 1)
            ),
        )
    for order in ((0, 1, 4, 2, 5, 3), (0, 3, 4, 1, 5, 2)):
        split = (0, 3, 2, 2, 8, 8) if order[1] == 1 else (0, 2, 2, 3, 8, 8)
        yield Pattern(
            f"conv, pixels shuffled by {list(order)}, norm",
            IMAGE,
            lambda n, s=split, o=order: n.bn(_regrouped(n, n.conv("x", C, 12, 1), s, o, (0, 3, 16, 16)), 3),
        )
    yield Pattern("shuffled unit", IMAGE, _unit)
    yield Pattern("scale behind attention", TOKENS, _attention_scaled)
    yield Pattern("scale of packed queries", TOKENS, _packed_scaled)
    yield Pattern("scales of split queries and keys", TOKENS, _split_scaled)
    yield Pattern("constants around windows", (2, 8, 8, C), _windows)
    yield Pattern("norms of two slices of one conv", IMAGE, _slices)
    yield Pattern("conv, repeated, norm", IMAGE, lambda n: n.bn(n.op("Tile", n.conv("x", C, 6), n.ints(1, 1, 2, 2)), 6))


def _large(n: Net, operator: str, shape: Sequence[int], *, varies: bool) -> Any:
    numbers = n.rng.uniform(0.5, 2, (5, 1, 1)) * np.ones(shape)
    numbers[..., 0, 0] *= 1.5 if varies else 1
    return n.op(operator, n.conv("x", C, 5, 1), n.k(numbers))


def _old(operator: str, axis: int | None, shape: Sequence[int]) -> Body:
    more = {} if axis is None else {"axis": axis}
    return lambda n: n.op(operator, n.conv("x", C, 8, 1), n.away(*shape), broadcast=1, **more)


def constants() -> Iterator[Pattern]:
    """Constants as large as the data, at an axis as before opset 7, and worked out in the graph."""
    for operator in ("Add", "Sub", "Mul", "Div"):
        for shape in ((1, 5, 8, 8), (5, 8, 8), (2, 5, 8, 8)):
            for varies in (False, True):
                kind = "varying" if varies else "constant over space"
                write: Body = lambda n, o=operator, s=shape, v=varies: _large(n, o, s, varies=v)  # noqa: E731
                yield Pattern(f"conv, {operator} by {list(shape)} {kind}", (2, C, 8, 8), write, int(varies))
        yield Pattern(f"{operator} at axis 1", (2, C, 8, 8), _old(operator, 1, (8,)), opset=6, runs=False)
        yield Pattern(f"{operator} at no axis", (2, C, 8, 8), _old(operator, None, (8,)), 1, opset=6, runs=False)
        yield Pattern(f"{operator} at axis 2", (2, C, 8, 8), _old(operator, 2, (8,)), 1, opset=6, runs=False)
    yield Pattern(
        "matmul, norm before opset 7", (3, C), lambda n: n.bn(n.op("MatMul", "x", n.rand(C, 5)), 5), opset=6, runs=False
    )
    for function in ("Tanh", "Sigmoid", "Softplus", "Exp", "Abs"):
        yield Pattern(
            f"scale by {function} of a constant",
            IMAGE,
            lambda n, f=function: n.op("Mul", n.conv("x", C, 5), n.op(f, n.away(5, 1, 1))),
        )
    yield Pattern("standardized weight", IMAGE, _standardized, opset=18)
    yield Pattern("normalized weight", IMAGE, _normalized, opset=18)
    yield Pattern("weight from a product", ("n", C), _product_weight)
    yield Pattern(
        "weights that are split",
        ("n", C),
        lambda n: n.bn(n.op("Gemm", "x", n.op("Split", n.rand(C, 10), outs=2, axis=1)[1]), 5),
    )


def _product_weight(n: Net) -> Any:
    return n.bn(n.op("Gemm", "x", n.op("MatMul", n.rand(C, 3), n.rand(3, 5))), 5)


def _standardized(n: Net) -> Any:
    weight = n.rand(5, C, 3, 3)
    centred = n.op("Sub", weight, n.op("ReduceMean", weight, n.ints(1, 2, 3)))
    var = n.op("ReduceMean", n.op("Mul", centred, centred), n.ints(1, 2, 3))
    return n.bn(n.op("Conv", "x", n.op("Div", centred, n.op("Sqrt", n.op("Add", var, n.scalar(1e-5))))), 5)


def _normalized(n: Net) -> Any:
    weight = n.rand(5, C, 3, 3)
    size = n.op("ReduceL2", weight, n.ints(1, 2, 3))
    return n.bn(n.op("Conv", "x", n.op("Mul", n.op("Div", weight, size), n.away(5, 1, 1, 1))), 5)


def bending() -> Iterator[Pattern]:
    """Operators that keep order or bounds."""
    for operator in ("Max", "Min"):
        for positive in (True, False):
            yield Pattern(
                f"{operator} of convs, {'positive ' if positive else ''}norm",
                IMAGE,
                lambda n, o=operator, p=positive: n.bn(n.op(o, n.conv("x", C, 6), n.conv("x", C, 6)), 6, positive=p),
                int(not positive),
                None if positive else Reason.SIGN,
            )
        yield Pattern(
            f"positive norm, {operator} with a constant, conv",
            IMAGE,
            lambda n, o=operator: n.conv(n.op(o, n.bn("x", C, positive=True), n.rand(C, 1, 1)), C, 6),
        )
    clips: dict[str, tuple[float | None, float | None]] = {
        "zero and above": (0.0, None),
        "zero and below": (None, 0.0),
        "no bounds": (None, None),
        "six": (0.0, 6.0),
    }
    for name, (low, high) in clips.items():
        wide = high is not None and low is not None
        yield Pattern(
            f"conv, Clip to {name}, positive scales",
            IMAGE,
            lambda n, a=low, b=high: n.bn(_clip(n, n.conv("x", C, 6), a, b), 6, positive=True, shift=False),
            int(wide),
            Reason.SCALE if wide else None,
        )
    yield Pattern(
        "conv, Clip, a negative number",
        IMAGE,
        lambda n: n.op("Mul", _clip(n, n.conv("x", C, 6), -0.5, 2.0), n.scalar(-1.5)),
    )
    yield Pattern("shift before Softmax", ("n", 5), lambda n: n.op("Softmax", n.op("Add", "x", n.scalar(0.7))))
    yield Pattern(
        "conv, Abs, positive scales",
        IMAGE,
        lambda n: n.bn(n.op("Abs", n.conv("x", C, 6)), 6, positive=True, shift=False),
    )
    yield Pattern("scales, Abs, conv", IMAGE, lambda n: n.conv(n.op("Abs", n.bn("x", C, shift=False)), C, 3))
    yield Pattern(
        "norm of a rectified and a linear branch",
        IMAGE,
        lambda n: n.bn(n.op("Add", n.relu(n.conv("x", C, 6)), n.conv("x", C, 6)), 6, positive=True),
    )


def _clip(n: Net, x: str, low: float | None, high: float | None) -> Any:
    bounds = ["" if b is None else n.scalar(b) for b in (low, high)]
    while bounds and not bounds[-1]:
        bounds.pop()
    return n.op("Clip", x, *bounds)


def layers() -> Iterator[Pattern]:
    """Layers that read sequences."""
    for operator, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
        yield Pattern(
            f"constants, {operator}",
            (3, 2, C),
            lambda n, o=operator, g=gates: n.op(
                o, n.chain("x", (C,), "Mul Add"), n.rand(1, 3 * g, C), n.rand(1, 3 * g, 3), hidden_size=3, outs=2
            )[0],
        )


def products() -> Iterator[Pattern]:
    """Einsum and DeformConv."""
    sum_over_channels = {"equation": "bchw,oc->bohw"}
    yield Pattern("einsum, norm", IMAGE, lambda n: n.bn(n.op("Einsum", "x", n.rand(5, C), **sum_over_channels), 5))
    yield Pattern("norm, einsum", IMAGE, lambda n: n.op("Einsum", n.bn("x", C), n.rand(5, C), **sum_over_channels))
    yield Pattern(
        "einsum with an ellipsis, norm",
        IMAGE,
        lambda n: n.bn(n.op("Einsum", "x", n.rand(8, 8), equation="...w,wv->...v"), C),
        1,
        Reason.SHAPE,
    )
    yield Pattern(
        "deformable convolution, norm",
        (2, C, 8, 8),
        lambda n: n.bn(n.op("DeformConv", "x", n.rand(5, C, 3, 3), n.rand(2, 18, 6, 6)), 5),
        opset=19,
        runs=False,
    )


def networks() -> Iterator[Pattern]:
    """All patterns of this file."""
    for rows in (layouts, constants, bending, layers, products):
        yield from rows()

"""Patterns in which operators stand between the norm and what absorbs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from renorm_onnx.fusion.report import Reason
from runtime_tests.pattern_models import Net, Pattern

C = 4
IMAGE = ("n", C, 8, 8)

# What stands between, with C on axis 1, and which maps pass it: "all", "scale" (without a shift), "order" (with
# positive scales), "positive" (both), "none".
BETWEEN: dict[str, tuple[str, Any]] = {
    "Identity": ("all", lambda n, x: n.op("Identity", x)),
    "Dropout": ("all", lambda n, x: n.op("Dropout", x)),
    "Dropout with a ratio": ("all", lambda n, x: n.op("Dropout", x, n.scalar(0.3))),
    "Cast to itself": ("all", lambda n, x: n.op("Cast", x, to=1)),
    "Neg": ("all", lambda n, x: n.op("Neg", n.op("Identity", x))),
    "Transpose there and back": ("all", lambda n, x: n.op("Transpose", _transposed(n, x), perm=[0, 3, 1, 2])),
    "Reshape there and back": (
        "all",
        lambda n, x: n.op("Reshape", n.op("Reshape", x, n.ints(0, C, -1)), n.ints(0, 0, 8, 8)),
    ),
    "Unsqueeze and Squeeze": ("all", lambda n, x: n.op("Squeeze", n.op("Unsqueeze", x, n.ints(0)), n.ints(0))),
    "Flatten of an open batch": ("all", lambda n, x: n.op("Reshape", n.op("Flatten", x, axis=2), n.ints(-1, C, 8, 8))),
    "Expand": ("all", lambda n, x: n.op("Expand", x, n.ints(2, C, 8, 8))),
    "Slice of columns": ("all", lambda n, x: n.op("Slice", x, n.ints(1), n.ints(7), n.ints(3))),
    "Slice backwards": ("all", lambda n, x: n.op("Slice", x, n.ints(-1), n.ints(-100), n.ints(1), n.ints(-1))),
    "Gather of channels": ("all", lambda n, x: n.op("Gather", x, n.ints(2, 0, 3, 1), axis=1)),
    "Gather of rows": ("all", lambda n, x: n.op("Gather", x, n.ints(0, 2, 4, 6), axis=2)),
    "Split and Concat": ("all", lambda n, x: n.op("Concat", *n.op("Split", x, n.ints(1, 3), outs=2, axis=1), axis=1)),
    "Split and Concat of rows": ("all", lambda n, x: n.op("Concat", *n.op("Split", x, outs=2, axis=2), axis=2)),
    "channel shuffle": ("all", lambda n, x: _shuffle(n, x)),
    "Pad by reflection": ("all", lambda n, x: n.op("Pad", x, n.ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect")),
    "Pad by edges": ("all", lambda n, x: n.op("Pad", x, n.ints(0, 0, 1, 1, 0, 0, 1, 1), mode="edge")),
    "Pad by zeros": ("scale", lambda n, x: n.op("Pad", x, n.ints(0, 0, 1, 1, 0, 0, 1, 1))),
    "Pad of nothing": ("all", lambda n, x: n.op("Pad", x, n.ints(0, 0, 0, 0, 0, 0, 0, 0))),
    "MaxPool": ("order", lambda n, x: n.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])),
    "MaxPool with pads": ("order", lambda n, x: n.op("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])),
    "AveragePool": ("all", lambda n, x: n.op("AveragePool", x, kernel_shape=[2, 2])),
    "AveragePool with pads": ("all", lambda n, x: n.op("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])),
    "AveragePool with counted pads": (
        "scale",
        lambda n, x: n.op("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    ),
    "GlobalAveragePool": ("all", lambda n, x: n.op("GlobalAveragePool", x)),
    "GlobalMaxPool": ("order", lambda n, x: n.op("GlobalMaxPool", x)),
    "ReverseSequence": ("all", lambda n, x: _reversed(n, x)),
    "Where with an infinity": ("all", lambda n, x: n.op("Where", n.k(np.arange(8) % 3 == 0), n.scalar(-np.inf), x)),
    "Where with a constant": ("all", lambda n, x: n.op("Where", n.k(np.arange(8) % 3 == 0), n.scalar(0.5), x)),
    "GridSample of repeated borders": ("all", lambda n, x: _sampled(n, x, "border")),
    "GridSample of zeros": ("scale", lambda n, x: _sampled(n, x, "zeros")),
    "LpPool": ("positive", lambda n, x: n.op("LpPool", x, kernel_shape=[2, 2])),
    "ReduceMean": ("all", lambda n, x: n.op("ReduceMean", x, axes=[2, 3], keepdims=1)),
    "ReduceSum": ("all", lambda n, x: n.op("ReduceSum", x, n.ints(3), keepdims=1)),
    "ReduceMax": ("order", lambda n, x: n.op("ReduceMax", x, axes=[3], keepdims=1)),
    "ReduceMin": ("order", lambda n, x: n.op("ReduceMin", x, axes=[2], keepdims=1)),
    "Resize nearest": (
        "all",
        lambda n, x: n.op("Resize", x, "", n.k(np.float32([1, 1, 2, 2]), dtype="float32"), mode="nearest"),
    ),
    "Resize linear": (
        "all",
        lambda n, x: n.op("Resize", x, "", n.k(np.float32([1, 1, 2, 1.5]), dtype="float32"), mode="linear"),
    ),
    "Resize cubic": (
        "all",
        lambda n, x: n.op("Resize", x, "", n.k(np.float32([1, 1, 2, 2]), dtype="float32"), mode="cubic"),
    ),
    "Resize by sizes": ("all", lambda n, x: n.op("Resize", x, "", "", n.ints(2, C, 16, 12), mode="linear")),
    "Relu": ("positive", lambda n, x: n.relu(x)),
    "LeakyRelu": ("positive", lambda n, x: n.op("LeakyRelu", x, alpha=0.2)),
    "PRelu": ("positive", lambda n, x: n.op("PRelu", x, n.k(n.rng.uniform(0.1, 0.5, (C, 1, 1))))),
    "Mul by a number": ("all", lambda n, x: n.op("Mul", n.op("Identity", x), n.scalar(0.7))),
    "Sigmoid": ("none", lambda n, x: n.op("Sigmoid", x)),
    "Softmax": ("none", lambda n, x: n.op("Softmax", x)),
    "Round": ("none", lambda n, x: n.op("Round", x)),
}


def _transposed(n: Net, x: str) -> str:
    return str(n.op("Transpose", x, perm=[0, 2, 3, 1]))


def _shuffle(n: Net, x: str) -> Any:
    h = n.op("Transpose", n.op("Reshape", x, n.ints(0, 2, C // 2, 8, 8)), perm=[0, 2, 1, 3, 4])
    return n.op("Reshape", h, n.ints(0, C, 8, 8))


def between() -> Iterator[Pattern]:
    """Conv, operator, norm; and norm, operator, Conv; with maps of each kind."""
    kinds = {
        "norm": ("all", {}),
        "positive norm": ("order", {"positive": True}),
        "scaling norm": ("scale", {"shift": False}),
        "positive scaling norm": ("positive", {"positive": True, "shift": False}),
    }
    accepts = {
        "all": {"all", "order", "scale", "positive"},
        "order": {"order", "positive"},
        "scale": {"scale", "positive"},
        "positive": {"positive"},
        "none": set(),
    }
    for name, (passes, write) in BETWEEN.items():
        for kind, (asks, more) in kinds.items():
            own = int(name in ("Neg", "Mul by a number"))  # folds itself
            left = int(asks not in accepts[passes])
            if own and left:
                continue
            yield Pattern(
                f"conv, {name}, {kind}",
                IMAGE,
                lambda n, w=write, m=more: n.bn(w(n, n.conv("x", C, C, pads=[1, 1, 1, 1])), C, **m),
                left,
            )
            yield Pattern(
                f"{kind}, {name}, conv",
                IMAGE,
                lambda n, w=write, m=more: n.conv(w(n, n.bn("x", C, **m)), C, 3, 1),
                left,
            )


def after_layout() -> Iterator[Pattern]:
    """The channel axis moves, or is spread over a longer one, before the norm is absorbed."""
    yield Pattern(
        "norm, Flatten, Gemm", (2, C, 3, 3), lambda n: n.op("Gemm", n.op("Flatten", n.bn("x", C)), n.rand(C * 9, 5))
    )
    yield Pattern(
        "norm, Flatten, MatMul, Add",
        (2, C, 3, 3),
        lambda n: n.op("Add", n.op("MatMul", n.op("Flatten", n.bn("x", C)), n.rand(C * 9, 5)), n.rand(5)),
    )
    yield Pattern(
        "norm, Reshape, Gemm",
        ("n", C, 3, 3),
        lambda n: n.op("Gemm", n.op("Reshape", n.bn("x", C), n.ints(-1, C * 9)), n.rand(5, C * 9), transB=1),
    )
    yield Pattern("norm, GlobalAveragePool, Flatten, Gemm", IMAGE, lambda n: _head(n, n.bn("x", C)))
    yield Pattern(
        "norm, ReduceMean, Gemm",
        IMAGE,
        lambda n: n.op("Gemm", n.op("ReduceMean", n.bn("x", C), axes=[2, 3], keepdims=0), n.rand(C, 5)),
    )
    yield Pattern(
        "conv, GlobalAveragePool, Flatten, norm",
        IMAGE,
        lambda n: n.bn(n.op("Flatten", n.op("GlobalAveragePool", n.conv("x", C, 6))), 6),
    )
    yield Pattern(
        "gemm, Reshape, norm",
        ("n", C),
        lambda n: n.bn(n.op("Reshape", n.op("Gemm", "x", n.rand(C, 36)), n.ints(-1, 4, 3, 3)), 4),
    )
    yield Pattern(
        "gemm, Unsqueeze, norm",
        (3, C),
        lambda n: n.bn(n.op("Unsqueeze", n.op("Gemm", "x", n.rand(C, 6)), n.ints(2)), 6),
    )
    yield Pattern(
        "matmul, Transpose, norm",
        ("n", 8, C),
        lambda n: n.bn(n.op("Transpose", n.op("MatMul", "x", n.rand(C, 8)), perm=[0, 2, 1]), 8),
    )
    yield Pattern(
        "matmul, Transpose of rows, norm",
        (8, C),
        lambda n: n.bn(n.op("Transpose", n.op("MatMul", "x", n.rand(C, 8))), 8),
        1,
    )
    yield Pattern(
        "matmul, Reshape to other channels, norm",
        (8, 8),
        lambda n: n.bn(n.op("Reshape", n.op("MatMul", "x", n.rand(8, 8)), n.ints(1, 8, 8)), 8),
        1,
    )
    yield Pattern(
        "conv, DepthToSpace, norm", IMAGE, lambda n: n.bn(n.op("DepthToSpace", n.conv("x", C, 16), blocksize=2), 4)
    )
    yield Pattern(
        "conv, SpaceToDepth, norm of all",
        IMAGE,
        lambda n: n.chain(n.op("SpaceToDepth", n.conv("x", C, 3, 1), blocksize=2), ()),
    )
    yield Pattern(
        "number, DepthToSpace, conv",
        ("n", 16, 4, 4),
        lambda n: n.conv(n.op("DepthToSpace", n.chain("x", (), "Mul Add"), blocksize=2), 4, 3),
    )
    yield Pattern(
        "norm, SpaceToDepth, conv", IMAGE, lambda n: n.conv(n.op("SpaceToDepth", n.bn("x", C), blocksize=2), 16, 3)
    )
    yield Pattern(
        "conv, Upsample, norm, opset 9",
        IMAGE,
        lambda n: n.bn(n.op("Upsample", n.conv("x", C, 6), n.k(np.float32([1, 1, 2, 2])), mode="nearest"), 6),
        opset=9,
    )
    yield Pattern(
        "convs, Concat, norm", IMAGE, lambda n: n.bn(n.op("Concat", n.conv("x", C, 3), n.conv("x", C, 5), axis=1), 8)
    )
    yield Pattern(
        "conv and input, Concat, norm",
        IMAGE,
        lambda n: n.bn(n.op("Concat", n.conv("x", C, 3, 1), "x", axis=1), 7),
        1,
        Reason.GRAPH_INPUT,
    )
    yield Pattern("conv, Split, norm of one part", IMAGE, lambda n: _split_norm(n))
    yield Pattern(
        "norms, Concat, conv", IMAGE, lambda n: n.conv(n.op("Concat", n.bn("x", C), n.bn(n.relu("x"), C), axis=1), 8, 3)
    )
    yield Pattern(
        "conv, Clip, number",
        IMAGE,
        lambda n: n.op("Mul", n.op("Clip", n.conv("x", C, 3), n.scalar(-0.5), n.scalar(0.8)), n.scalar(2.5)),
    )
    yield Pattern(
        "conv, Clip, number, opset 9",
        IMAGE,
        lambda n: n.op("Mul", n.op("Clip", n.conv("x", C, 3), min=-0.5, max=0.8), n.scalar(2.5)),
        opset=9,
    )
    yield Pattern(
        "number, Clip, conv",
        IMAGE,
        lambda n: n.conv(n.op("Clip", n.chain("x", (), "Mul", first=True), n.scalar(-0.5), n.scalar(0.8)), C, 3),
    )
    yield Pattern("conv, Cast wider, norm", IMAGE, _cast_wider, dtype="float16", runs=False)
    yield Pattern("conv, Cast narrower, norm", IMAGE, _cast_narrower, 1, Reason.DTYPE, runs=False)
    yield Pattern("norms of a pyramid", IMAGE, _pyramid)
    yield Pattern("conv, relu, norm", IMAGE, lambda n: n.bn(n.relu(n.conv("x", C, 6)), 6), 1)
    yield Pattern("MaxPool with its indices", IMAGE, _indices, 1)


def _head(n: Net, x: str) -> Any:
    return n.op("Gemm", n.op("Flatten", n.op("GlobalAveragePool", x)), n.rand(C, 5), n.rand(5))


def _split_norm(n: Net) -> list[str]:
    a, b = n.op("Split", n.conv("x", C, 6), outs=2, axis=1)
    return [n.bn(a, 3), n.relu(b)]


def _cast_wider(n: Net) -> Any:
    h = n.op("Cast", n.conv("x", C, 6), to=1)
    n.dtype = "float32"
    h = n.bn(h, 6)
    n.dtype = "float16"
    return n.op("Cast", h, to=10)


def _cast_narrower(n: Net) -> Any:
    h = n.op("Cast", n.conv("x", C, 6), to=10)
    n.dtype = "float16"
    h = n.bn(h, 6)
    n.dtype = "float32"
    return n.op("Cast", h, to=1)


def _pyramid(n: Net) -> Any:
    big = n.conv("x", C, 6, 1)
    small = n.conv(n.op("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2]), C, 6, 1)
    up = n.op("Resize", small, "", n.k(np.float32([1, 1, 2, 2])), mode="nearest")
    return n.bn(n.op("Add", big, up), 6)


def _indices(n: Net) -> list[str]:
    pooled, where = n.op("MaxPool", n.conv("x", C, 6), kernel_shape=[2, 2], outs=2)
    return [n.bn(pooled, 6), n.op("Cast", where, to=1)]


def consumers() -> Iterator[Pattern]:
    """Several readers, of the operator or of the norm."""
    yield Pattern("norm read by two convs", IMAGE, lambda n: _two_convs(n, n.bn("x", C)))
    yield Pattern("norm read by three convs in groups", IMAGE, lambda n: _three(n, n.bn("x", C)))
    yield Pattern("norm read by a conv and a Tanh", IMAGE, lambda n: _conv_and(n, n.bn("x", C)), 1)
    yield Pattern("conv read by its norm and another", IMAGE, _read_twice, 1, Reason.CONSUMER)
    yield Pattern("conv is an output too", IMAGE, _output_too, 1, Reason.GRAPH_OUTPUT)
    yield Pattern("norm is an output and read by a conv", IMAGE, _norm_output, 1)
    yield Pattern("conv, norm that is an output and read on", IMAGE, _norm_read_on)
    yield Pattern("two norms of one conv", IMAGE, _two_norms, 2)
    yield Pattern("conv read by its norm and a Shape", IMAGE, _shape_reader)
    yield Pattern("norm twice in one Add", IMAGE, lambda n: _double(n))


def _two_convs(n: Net, h: str) -> list[str]:
    return [n.conv(h, C, 5), n.conv(h, C, 6, 1)]


def _three(n: Net, h: str) -> list[str]:
    return [n.conv(h, C, 4, group=4), n.conv(h, C, 6, 1, group=2), n.conv(h, C, 2)]


def _conv_and(n: Net, h: str) -> list[str]:
    return [n.conv(h, C, 5), n.tanh(h)]


def _reversed(n: Net, x: Any) -> Any:
    first = n.op("Slice", x, n.ints(0), n.ints(2), n.ints(0))
    return n.op("ReverseSequence", first, n.ints(1, 2, 2, 1), time_axis=0, batch_axis=1)


def _sampled(n: Net, x: Any, outside: str) -> Any:
    first = n.op("Slice", x, n.ints(0), n.ints(2), n.ints(0))
    return n.op("GridSample", first, n.rand(2, 3, 3, 2), padding_mode=outside)


def _read_twice(n: Net) -> list[str]:
    h = n.conv("x", C, 6)
    return [n.bn(h, 6), n.tanh(h)]


def _output_too(n: Net) -> list[str]:
    h = n.conv("x", C, 6)
    return [n.bn(h, 6), h]


def _norm_output(n: Net) -> list[str]:
    h = n.bn("x", C)
    return [h, n.conv(h, C, 5)]


def _norm_read_on(n: Net) -> list[str]:
    h = n.bn(n.conv("x", C, 6), 6)
    return [h, n.tanh(h)]


def _two_norms(n: Net) -> list[str]:
    h = n.conv("x", C, 6)
    return [n.tanh(n.bn(h, 6)), n.tanh(n.bn(h, 6))]


def _shape_reader(n: Net) -> Any:
    h = n.conv("x", C, 6)
    return n.op("Reshape", n.relu(n.bn(h, 6)), n.op("Shape", h))


def _double(n: Net) -> Any:
    h = n.bn("x", C)
    return n.conv(n.op("Add", h, h), C, 5)


def passing() -> Iterator[Pattern]:
    """All patterns of this file."""
    for rows in (between, after_layout, consumers):
        yield from rows()

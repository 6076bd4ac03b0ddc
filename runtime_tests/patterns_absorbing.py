"""Patterns in which the operator beside the norm absorbs it: every operator, source, opset, attribute and type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnx import helper

from renorm_onnx.fusion.report import Reason
from runtime_tests.pattern_models import Body, Net, Pattern

OPSETS = (6, 7, 8, 9, 10, 11, 13, 14, 15, 17, 18, 20, 21, 22, 24, 25, 26)
C = 8
IMAGE = (
    2,
    4,
    C + 2,
    C + 2,
)  # a 3x3 kernel leaves C columns: an axis that is mistaken for the channels has their length


def _conv(rank: int, **more: Any) -> Body:
    return lambda n: n.bn(n.conv("x", 4, C, 3, rank, **more), C)


def _deconv(group: int) -> Body:
    return lambda n: n.bn(n.deconv("x", 4, C // group, group=group), C)


def _gemm_bn(n: Net) -> str:
    return n.bn(n.op("Gemm", "x", n.rand(4, C), n.rand(C)), C)


def _matmul_bn(n: Net) -> str:
    return n.bn(n.op("MatMul", "x", n.rand(4, C)), C)


def _matmul_add_bn(n: Net) -> str:
    return n.bn(n.op("Add", n.op("MatMul", "x", n.rand(4, C)), n.rand(C)), C)


SWEPT: dict[str, tuple[tuple[int, ...], Body]] = {
    "conv1d": ((2, 4, 9), _conv(1)),
    "conv2d": (IMAGE, _conv(2)),
    "conv3d": ((1, 4, 5, 5, 5), _conv(3)),
    "conv with groups": (IMAGE, _conv(2, group=2)),
    "depthwise conv": (IMAGE, _conv(2, group=4, bias=True)),
    "transposed conv": (IMAGE, _deconv(1)),
    "transposed conv with groups": (IMAGE, _deconv(2)),
    "gemm": ((3, 4), _gemm_bn),
    "matmul": ((3, 4), _matmul_bn),
    "matmul, add": ((3, 4), _matmul_add_bn),
    "two norms": (IMAGE, lambda n: n.bn(n.bn(n.conv("x", 4, C), C), C)),
    "norm before conv": (IMAGE, lambda n: n.conv(n.bn("x", 4), 4, C)),
}


def swept() -> Iterator[Pattern]:
    """Norms beside every linear operator at every opset; broadcasting arithmetic begins at opset 7."""
    for name, (shape, body) in SWEPT.items():
        for opset in OPSETS:
            if opset == 6 and name in ("gemm", "matmul, add", "matmul"):
                continue
            yield Pattern(f"{name}, opset {opset}", shape, body, opset=opset, runs=opset >= 7)


def chains() -> Iterator[Pattern]:
    """Constant arithmetic behind Conv, in each order, shape and position."""
    shapes = {"number": (), "one": (1,), "ones": (1, 1, 1), "channels": (C, 1, 1), "batch of channels": (1, C, 1, 1)}
    for form, shape in shapes.items():
        for operators in ("Sub Div Mul Add", "Mul Add", "Mul", "Add", "Sub Mul", "Div", "Neg Sub", "Add Mul Neg Div"):
            for first in (False, True):
                yield Pattern(
                    f"conv, {operators} by {form}" + (" on the left" if first else ""),
                    IMAGE,
                    lambda n, s=shape, o=operators, f=first: n.chain(n.conv("x", 4, C, bias=True), s, o, first=f),
                )
    for name, body in {"deconv": _deconv_out, "gemm": _gemm_out, "matmul": _matmul_out}.items():
        wide = (C, 1, 1) if name == "deconv" else (C,)
        for shape in ((), (1,), wide, (1, *wide)):
            yield Pattern(
                f"{name}, Sub Div Mul Add by {list(shape)}",
                IMAGE if name == "deconv" else (3, 4),
                lambda n, b=body, s=shape: n.chain(b(n), s),
            )
    for wrong in ((C,), (1, 1, C), (C, 1), (1, 1, C, 1), (1, 2, 1, 1, 1), (C, C, 1), (2, 1, 1, 1)):
        yield Pattern(f"conv, Mul by {list(wrong)}", IMAGE, lambda n, s=wrong: n.chain(n.conv("x", 4, C), s, "Mul"), 1)
    yield Pattern("a number divided by conv", IMAGE, lambda n: n.op("Div", n.scalar(2.0), n.conv("x", 4, C)), 1)


def _deconv_out(n: Net) -> str:
    return str(n.deconv("x", 4, C // 2, group=2))


def _gemm_out(n: Net) -> str:
    return str(n.op("Gemm", "x", n.rand(4, C), n.rand(C)))


def _matmul_out(n: Net) -> str:
    return str(n.op("MatMul", "x", n.rand(4, C)))


def geometry() -> Iterator[Pattern]:
    """Attributes of convolutions, which a fold at the output never minds and one at the input sometimes does."""
    several: dict[str, dict[str, Any]] = {
        "strides": {"strides": [2, 2]},
        "dilations": {"dilations": [2, 2]},
        "pads": {"pads": [1, 1, 1, 1]},
        "uneven pads": {"pads": [0, 1, 2, 0]},
        "auto_pad SAME_UPPER": {"auto_pad": "SAME_UPPER"},
        "auto_pad SAME_LOWER": {"auto_pad": "SAME_LOWER"},
        "auto_pad VALID": {"auto_pad": "VALID"},
        "kernel_shape": {"kernel_shape": [3, 3]},
    }
    for name, more in several.items():
        yield Pattern(f"conv with {name}, norm", IMAGE, _conv(2, **more))
        seen = "pad" in name and "VALID" not in name
        reason = Reason.GRAPH_INPUT if seen else None
        yield Pattern(
            f"norm, conv with {name}", IMAGE, lambda n, m=more: n.conv(n.bn("x", 4), 4, C, **m), int(seen), reason
        )
        yield Pattern(
            f"norm without shift, conv with {name}",
            IMAGE,
            lambda n, m=more: n.conv(n.bn("x", 4, shift=False), 4, C, **m),
        )
    yield Pattern("conv with an empty bias, norm", IMAGE, lambda n: n.bn(n.op("Conv", "x", n.rand(C, 4, 3, 3), ""), C))
    yield Pattern("norm, conv with an empty bias", IMAGE, lambda n: n.op("Conv", n.bn("x", 4), n.rand(C, 4, 3, 3), ""))
    for more in (
        {"strides": [2, 2]},
        {"pads": [1, 1, 1, 1]},
        {"output_padding": [1, 1], "strides": [2, 2]},
        {"dilations": [2, 2]},
    ):
        yield Pattern(f"deconv with {more}, norm", IMAGE, lambda n, m=more: n.bn(n.deconv("x", 4, C, 3, **m), C))
        yield Pattern(
            f"scale, deconv with {more}",
            IMAGE,
            lambda n, m=more: n.deconv(n.chain("x", (4, 1, 1), "Mul"), 4, C, 3, **m),
        )
    yield Pattern(
        "norm, deconv whose border is cropped", IMAGE, lambda n: n.deconv(n.bn("x", 4), 4, 3, 3, pads=[2] * 4)
    )
    yield Pattern("norm, deconv", IMAGE, lambda n: n.deconv(n.bn("x", 4), 4, 3, 3), 1, Reason.GRAPH_INPUT)
    for group in (2, 4):
        yield Pattern(f"norm, conv in {group} groups", IMAGE, lambda n, g=group: n.conv(n.bn("x", 4), 4, C, group=g))
    yield Pattern("norm, conv1d", (2, 4, 9), lambda n: n.conv(n.bn("x", 4), 4, C, 3, 1, bias=True))
    yield Pattern("norm, conv3d", (1, 4, 5, 5, 5), lambda n: n.conv(n.bn("x", 4), 4, C, 3, 3, group=2))


def _gemm(n: Net, c: tuple[int, ...] | None, *, at_input: bool, **more: Any) -> Any:
    """A Gemm of x, (C, C) so that no transposition shows in a length, with a norm at one side."""
    x = n.bn("x", C) if at_input and not more.get("transA") else "x"
    y = n.op("Gemm", x, n.rand(C, C), *([] if c is None else [n.rand(*c)]), **more)
    return y if at_input else n.bn(y, C)


def products() -> Iterator[Pattern]:
    """Gemm with every attribute and shape of C, MatMul with the weight on either side and batches."""
    for c in (None, (), (1,), (C,), (1, C), (C, 1), (C, C), (1, 1)):
        for more in ({}, {"alpha": 0.5, "beta": 2.0}, {"transB": 1, "beta": 0.5}, {"transA": 1}):
            name = f"gemm with C {c} {more}"
            yield Pattern(f"{name}, norm", (C, C), lambda n, c=c, m=more: _gemm(n, c, at_input=False, **m))
            if "transA" not in more:
                yield Pattern(f"norm, {name}", (C, C), lambda n, c=c, m=more: _gemm(n, c, at_input=True, **m))
    yield Pattern("gemm with beta 0, norm", (3, C), lambda n: _gemm(n, (C,), at_input=False, beta=0.0))
    yield Pattern("gemm with the weight on the left", (C, 3), lambda n: n.bn(n.op("Gemm", n.rand(5, C), "x"), 3), 1)
    yield Pattern("matmul in batches, chain", (2, 3, 4), lambda n: n.chain(n.op("MatMul", "x", n.rand(4, C)), (C,)))
    yield Pattern("matmul in batches, norm", (2, C, 4), lambda n: n.bn(n.op("MatMul", "x", n.rand(4, C)), C), 1)
    yield Pattern("matmul from the left, norm", (2, 4, C), lambda n: n.bn(n.op("MatMul", n.rand(C, 4), "x"), C))
    yield Pattern("batched weight, chain", (2, 3, 4), lambda n: n.chain(n.op("MatMul", "x", n.rand(2, 4, C)), (C,)))
    yield Pattern("norm, matmul from the left", (2, 4, C), lambda n: n.op("MatMul", n.rand(C, 4), n.bn("x", 4)))
    yield Pattern("norm, matmul", (3, 4), lambda n: n.op("MatMul", n.bn("x", 4), n.rand(4, C)))
    yield Pattern("chain, matmul", (2, 3, 4), lambda n: n.op("MatMul", n.chain("x", (4,), "Mul Add"), n.rand(4, C)))
    yield Pattern(
        "norm, matmul, add", (3, 4), lambda n: n.op("Add", n.op("MatMul", n.bn("x", 4), n.rand(4, C)), n.rand(C))
    )
    yield Pattern("matmul, add on the left, norm", (3, 4), lambda n: n.bn(n.op("Add", n.rand(C), _matmul_out(n)), C))
    yield Pattern("matmul of a vector, chain", (4,), lambda n: n.chain(n.op("MatMul", "x", n.rand(4, C)), (C,)))
    yield Pattern("dense to scalar chain", (3, 4), lambda n: n.chain(_matmul_out(n), ()))


def other_norms() -> Iterator[Pattern]:
    """Instance, group, layer and RMS normalization, which have a scale and a bias of their own."""
    for opset in (6, 17, 22):
        yield Pattern(
            f"instance norm, norm, opset {opset}",
            IMAGE,
            lambda n: n.bn(n.op("InstanceNormalization", "x", n.rand(4), n.rand(4)), 4),
            opset=opset,
            runs=opset > 6,
        )
    group = {"num_groups": 2}
    yield Pattern(
        "group norm, norm",
        IMAGE,
        lambda n: n.bn(n.op("GroupNormalization", "x", n.rand(4), n.rand(4), **group), 4),
        opset=21,
    )
    yield Pattern(
        "group norm, number",
        IMAGE,
        lambda n: n.chain(n.op("GroupNormalization", "x", n.rand(2), n.rand(2), **group), ()),
        opset=18,
    )
    yield Pattern(
        "group norm with one scale for a group, norm",
        IMAGE,
        lambda n: n.bn(n.op("GroupNormalization", "x", n.rand(2), n.rand(2), **group), 4),
        1,
        Reason.SCALE,
        opset=18,
    )
    for shape in ((C,), (1, 1, C), ()):
        yield Pattern(
            f"layer norm, chain {shape}",
            (2, 3, C),
            lambda n, s=shape: n.chain(n.op("LayerNormalization", "x", n.rand(C), n.rand(C)), s),
        )
    yield Pattern(
        "layer norm without bias", (2, 3, C), lambda n: n.chain(n.op("LayerNormalization", "x", n.rand(C)), (C,))
    )
    yield Pattern("layer norm, constant along another axis", (2, C, C), _layer_norm_wrong_axis, 2)
    yield Pattern("add before layer norm", (2, 3, C), _shift_before_layer_norm)
    yield Pattern(
        "RMS norm, scale", (2, 3, C), lambda n: n.chain(n.op("RMSNormalization", "x", n.rand(C)), (C,), "Mul"), opset=23
    )


def _layer_norm_wrong_axis(n: Net) -> str:
    return n.chain(n.op("LayerNormalization", "x", n.rand(C), n.rand(C)), (C, 1), "Mul Add")


def _shift_before_layer_norm(n: Net) -> str:
    return str(n.op("LayerNormalization", n.chain("x", (), "Add"), n.rand(C), n.rand(C)))


def computed() -> Iterator[Pattern]:
    """Constants that are worked out in the graph."""
    yield Pattern("sigma from a variance", IMAGE, _sigma_chain)
    yield Pattern("reciprocal of a root", IMAGE, _reciprocal_chain)
    yield Pattern("reshaped statistics", IMAGE, _reshaped_chain)
    yield Pattern("unsqueezed statistics", IMAGE, _unsqueezed_chain)
    yield Pattern("power of a variance", IMAGE, _power_chain)
    yield Pattern("clipped r", IMAGE, _clipped_chain)
    yield Pattern("weight in a Constant node", IMAGE, _constant_nodes)
    yield Pattern("weight from ConstantOfShape", IMAGE, _constant_of_shape)
    yield Pattern("bias from shapes and types", IMAGE, _raw_exporter_bias)
    yield Pattern("statistics through Identity", IMAGE, _identity_statistics)
    yield Pattern("weight through Transpose", (3, 4), _transposed_weight)
    yield Pattern("weight through Cast", IMAGE, _cast_weight)
    yield Pattern("statistics expanded", IMAGE, _expanded_statistics)
    yield Pattern("constant through Concat and Slice", IMAGE, _sliced_statistics)


def _sigma_chain(n: Net) -> Any:
    sigma = n.op("Sqrt", n.op("Add", n.k(n.rng.uniform(0.5, 2, (1, C, 1, 1))), n.scalar(1e-3)))
    h = n.op("Div", n.op("Sub", n.conv("x", 4, C), n.rand(1, C, 1, 1)), sigma)
    return n.op("Add", n.op("Mul", h, n.away(1, C, 1, 1)), n.rand(1, C, 1, 1))


def _reciprocal_chain(n: Net) -> Any:
    inverse = n.op("Reciprocal", n.op("Sqrt", n.op("Add", n.k(n.rng.uniform(0.5, 2, (C, 1, 1))), n.scalar(1e-3))))
    return n.op("Mul", n.op("Mul", n.op("Sub", n.conv("x", 4, C), n.rand(C, 1, 1)), inverse), n.away(C, 1, 1))


def _reshaped_chain(n: Net) -> Any:
    shape = n.ints(1, -1, 1, 1)
    mean, gain = (n.op("Reshape", v, shape) for v in (n.rand(C), n.away(C)))
    return n.op("Mul", n.op("Sub", n.conv("x", 4, C), mean), gain)


def _unsqueezed_chain(n: Net) -> Any:
    mean, gain = (n.op("Unsqueeze", v, n.ints(1, 2)) for v in (n.rand(C), n.away(C)))
    return n.op("Add", n.op("Mul", n.conv("x", 4, C), gain), mean)


def _power_chain(n: Net) -> Any:
    sigma = n.op("Pow", n.k(n.rng.uniform(0.5, 2, (C, 1, 1))), n.scalar(0.5))
    return n.op("Div", n.op("Sub", n.conv("x", 4, C), n.rand(C, 1, 1)), sigma)


def _clipped_chain(n: Net) -> Any:
    r = n.op("Clip", n.k(n.rng.uniform(0.2, 4, (C, 1, 1))), n.scalar(0.5), n.scalar(2.0))
    d = n.op("Min", n.op("Max", n.rand(C, 1, 1), n.scalar(-0.3)), n.scalar(0.3))
    return n.op("Add", n.op("Mul", n.conv("x", 4, C), r), d)


def _constant_nodes(n: Net) -> Any:
    weight = n.op("Constant", value=helper.make_tensor("w", 1, (C, 4, 1, 1), n.rng.normal(size=C * 4)))
    gain = n.op("Constant", value_float=0.75)
    return n.op("Mul", n.bn(n.op("Conv", "x", weight), C), gain)


def _constant_of_shape(n: Net) -> Any:
    fill = helper.make_tensor("fill", 1, [1], [0.25])
    return n.bn(n.op("Conv", "x", n.op("ConstantOfShape", n.ints(C, 4, 3, 3), value=fill)), C)


def _raw_exporter_bias(n: Net) -> Any:
    weight = n.rand(C, 4, 3, 3)
    size = n.op("Gather", n.op("Shape", weight), n.ints(0))
    zero = n.op("CastLike", n.op("Constant", value_float=0.0), "x")
    return n.bn(n.op("Conv", "x", weight, n.op("Expand", zero, size)), C)


def _identity_statistics(n: Net) -> Any:
    stats = [n.op("Identity", s) for s in n.stats(C)]
    return n.op("BatchNormalization", n.conv("x", 4, C), *stats)


def _transposed_weight(n: Net) -> Any:
    return n.bn(n.op("MatMul", "x", n.op("Transpose", n.rand(C, 4), perm=[1, 0])), C)


def _cast_weight(n: Net) -> Any:
    weight = n.k(n.rng.normal(size=(C, 4, 3, 3)), dtype="float16")
    return n.bn(n.op("Conv", "x", n.op("Cast", weight, to=1)), C)


def _expanded_statistics(n: Net) -> Any:
    wide = n.op("Expand", n.scalar(0.5), n.ints(C))
    scale, bias, mean, _ = n.stats(C)
    return n.op("BatchNormalization", n.conv("x", 4, C), scale, bias, mean, wide)


def _sliced_statistics(n: Net) -> Any:
    both = n.op("Concat", n.rand(C, 1, 1), n.away(C, 1, 1), axis=0)
    gain = n.op("Slice", both, n.ints(C), n.ints(2 * C), n.ints(0))
    return n.op("Mul", n.conv("x", 4, C), gain)


def types() -> Iterator[Pattern]:
    """Element types, and a norm in a wider type than its data."""
    for dtype in ("float16", "bfloat16", "float64"):
        more: dict[str, Any] = {"dtype": dtype, "opset": 22}
        dense = more | {"runs": dtype == "float64"}  # onnxruntime has no Conv in these types on the CPU
        yield Pattern(f"conv, norm in {dtype}", IMAGE, _conv(2), runs=False, **more)
        yield Pattern(
            f"conv, chain in {dtype}", IMAGE, lambda n: n.chain(n.conv("x", 4, C), (C, 1, 1)), runs=False, **more
        )
        yield Pattern(f"gemm, norm in {dtype}", (3, 4), _gemm_bn, **dense)
        yield Pattern(f"matmul, norm in {dtype}", (3, 4), _matmul_bn, **dense)
    yield Pattern("half data, single statistics", IMAGE, _mixed, dtype="float16", opset=15, runs=False)


def _mixed(n: Net) -> Any:
    h = n.conv("x", 4, C)
    n.dtype = "float32"
    stats = n.stats(C)
    n.dtype = "float16"
    return n.op("BatchNormalization", h, *stats)


def absorbing() -> Iterator[Pattern]:
    """All patterns of this file."""
    for rows in (swept, chains, geometry, products, other_norms, computed, types):
        yield from rows()

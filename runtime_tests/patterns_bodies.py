"""Patterns of If, Loop and Scan: norms inside their bodies, behind them, before them, and across their borders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from renorm_onnx.fusion.report import Reason
from runtime_tests.pattern_models import Net, Pattern

C = 4
IMAGE = ("n", C, 8, 8)
Write = Callable[[], Sequence[Any]]


def info(name: str, kind: int = TensorProto.FLOAT, shape: Any = None) -> onnx.ValueInfoProto:
    """The declaration of a value."""
    return helper.make_tensor_value_info(name, kind, shape)


def body_of(
    n: Net, name: str, inputs: Sequence[onnx.ValueInfoProto], write: Callable[[], Sequence[Any]]
) -> onnx.GraphProto:
    """A subgraph of the nodes that `write` adds; its constants stay outside."""
    outer, n.nodes = n.nodes, []
    results = write()
    nodes, n.nodes = n.nodes, outer
    infos = [r if isinstance(r, onnx.ValueInfoProto) else info(r) for r in results]
    return helper.make_graph(nodes, name, list(inputs), infos)


def _if(n: Net) -> Any:
    bodies = [body_of(n, f"branch{i}", [], lambda: [n.bn(n.conv("x", C, 5), 5)]) for i in range(2)]
    return n.op("If", n.k(np.array(True)), then_branch=bodies[0], else_branch=bodies[1])


def _if_inside(n: Net) -> Any:
    def write() -> list[str]:
        w = n.op("Constant", value=helper.make_tensor("w", 1, (5, C, 1, 1), n.rng.normal(size=5 * C)))
        return [n.chain(n.op("Conv", "x", w), (5, 1, 1))]

    bodies = [body_of(n, f"branch{i}", [], write) for i in range(2)]
    return n.op("If", n.k(np.array(False)), then_branch=bodies[0], else_branch=bodies[1])


def _if_nested(n: Net) -> Any:
    bodies = [body_of(n, f"outer{i}", [], lambda: [_if(n)]) for i in range(2)]
    return n.op("If", n.k(np.array(True)), then_branch=bodies[0], else_branch=bodies[1])


def _loop(n: Net) -> Any:
    given = [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("h", 1, None)]

    def write() -> list[Any]:
        go = n.op("Identity", "go")
        return [info(go, TensorProto.BOOL, []), n.op("Tanh", n.bn(n.conv("h", C, C, pads=[1] * 4), C))]

    body = body_of(n, "body", given, write)
    return n.op("Loop", n.k(np.array(3)), n.k(np.array(True)), "x", body=body)


def _scan(n: Net) -> Any:
    body = body_of(n, "body", [info("row", 1, [C, 8])], lambda: [n.chain(n.op("MatMul", "row", n.rand(8, 6)), (6,))])
    return n.op(
        "Scan",
        n.op("Squeeze", n.op("Slice", "x", n.ints(0), n.ints(1), n.ints(0)), n.ints(0)),
        num_scan_inputs=1,
        body=body,
        scan_input_axes=[1],
    )


def _is_channels(n: Net, size: int) -> Any:
    """Whether axis 1 of x is so long, as exporters ask that cannot tell."""
    return n.op("Equal", n.op("Gather", n.op("Shape", "x"), n.k(np.array(1)), axis=0), n.k(np.array(size)))


def _conv_outside_if(n: Net, condition: Callable[[Net], Any]) -> Any:
    h = n.conv("x", C, 5)
    bodies = [body_of(n, f"branch{i}", [], lambda: [n.bn(h, 5)]) for i in range(2)]
    return n.op("If", condition(n), then_branch=bodies[0], else_branch=bodies[1])


def _norm_behind_if(n: Net, condition: Callable[[Net], Any]) -> Any:
    h = n.conv("x", C, 5)
    reshape = lambda i: lambda: [n.op("Reshape", h, n.ints(0, 5, -1, 6 + 6 * i))]  # noqa: E731
    bodies = [body_of(n, f"branch{i}", [], reshape(i)) for i in (0, 1)]
    return n.bn(n.op("If", condition(n), then_branch=bodies[0], else_branch=bodies[1]), 5)


def _sequence(n: Net) -> list[Any]:
    pieces = n.op("SplitToSequence", n.conv("x", C, 8), n.ints(3, 5), axis=1)
    return [n.relu(n.bn(n.op("SequenceAt", pieces, n.k(np.array(i))), (3, 5)[i])) for i in (0, 1)]


def _any(n: Net) -> Any:
    return n.op("Greater", n.op("ReduceSum", "x", keepdims=0), n.scalar(0.5))


def within() -> Iterator[Pattern]:
    """Norms inside a body, or at an If that goes one way."""
    yield Pattern("conv, norm in an If", IMAGE, _if)
    yield Pattern("conv, chain in an If with weights inside", IMAGE, _if_inside)
    yield Pattern("conv, norm in an If in an If", IMAGE, _if_nested)
    yield Pattern("conv, norm in a Loop", IMAGE, _loop)
    yield Pattern("matmul, chain in a Scan", IMAGE, _scan)
    yield Pattern("conv outside, norms in an If", IMAGE, lambda n: _conv_outside_if(n, _any), 2)
    yield Pattern("conv, sequence of pieces, norms", IMAGE, _sequence)
    yield Pattern("conv, If, norm", IMAGE, lambda n: _norm_behind_if(n, _any))
    for size in (C, C + 1):
        ask = lambda n, size=size: _is_channels(n, size)  # noqa: E731
        yield Pattern(f"conv outside, norms in an If of C == {size}", IMAGE, lambda n, a=ask: _conv_outside_if(n, a))
        yield Pattern(f"conv, If of C == {size}, norm", IMAGE, lambda n, a=ask: _norm_behind_if(n, a))


def _either(n: Net, then: Write, other: Write) -> Any:
    """An If that may go either way."""
    both = [body_of(n, name, [], write) for name, write in (("yes", then), ("no", other))]
    return n.op("If", _any(n), then_branch=both[0], else_branch=both[1])


def _branches(n: Net, x: str) -> Any:
    return _either(n, lambda: [n.conv(x, C, 5)], lambda: [n.conv(n.relu(x), C, 5, bias=True)])


def _before(n: Net) -> Any:
    h = n.bn("x", C)
    return _either(n, lambda: [n.conv(h, C, 5)], lambda: [n.conv(h, C, 5, bias=True)])


def _for_one_branch(n: Net, *, direct: bool) -> Any:
    h = n.conv("x", C, C, pads=[1] * 4)
    then = lambda: [n.bn(h, C)] if direct else [n.relu(n.bn(h, C))]  # noqa: E731
    return _either(n, then, lambda: [n.tanh("x")])


def _rows_of(n: Net, write: Callable[[str], Any], *, axis: int = 0) -> Any:
    """What a Scan over the first axis of x makes of each (C, 8, 8), stacked along an axis."""
    body = body_of(n, "body", [info("row", 1, [C, 8, 8])], lambda: [write("row")])
    return n.op("Scan", "x", num_scan_inputs=1, body=body, scan_output_axes=[axis])


def _turns(n: Net, write: Callable[[str], tuple[Any, Any]]) -> list[Any]:
    """The last state of a Loop of three turns, and what it stacks; `write` makes both of the state."""
    given = [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("h", 1, None)]
    body = body_of(n, "body", given, lambda: [info(n.op("Identity", "go"), TensorProto.BOOL, []), *write("h")])
    return list(n.op("Loop", n.k(np.array(3)), n.k(np.array(True)), "x", body=body, outs=2))


def _stacked(n: Net) -> Any:
    def write(h: str) -> tuple[Any, Any]:
        state = n.tanh(n.conv(h, C, C, pads=[1] * 4))
        return state, n.conv(state, C, 5)

    return n.chain(_turns(n, write)[1], (5, 1, 1))


def _last(n: Net) -> Any:
    def write(h: str) -> tuple[Any, Any]:
        state = n.conv(h, C, C, pads=[1] * 4)
        return state, n.tanh(state)

    return n.bn(_turns(n, write)[0], C)


def _each_turn(n: Net) -> Any:
    h = n.conv("x", C, C, pads=[1] * 4)

    def write(state: str) -> tuple[Any, Any]:
        following = n.op("Add", state, n.relu(n.bn(h, C)))
        return following, n.tanh(following)

    return _turns(n, write)[1]


def across() -> Iterator[Pattern]:
    """Maps that enter or leave a body."""
    yield Pattern("convs in an If, norm behind", IMAGE, lambda n: n.bn(_branches(n, "x"), 5))
    yield Pattern("convs in an If, chain behind", IMAGE, lambda n: n.chain(_branches(n, "x"), (5, 1, 1)))
    yield Pattern("convs in an If, norm behind a transpose", IMAGE, lambda n: n.bn(_turned(n, _branches(n, "x")), 5))
    yield Pattern(
        "conv in one branch, Tanh in the other, norm behind",
        IMAGE,
        lambda n: n.bn(_either(n, lambda: [n.conv("x", C, C, pads=[1] * 4)], lambda: [n.tanh("x")]), C),
        1,
        Reason.OPERATOR,
    )
    yield Pattern("norm, convs in an If", IMAGE, _before)
    yield Pattern("norm, conv in one branch, Tanh in the other", IMAGE, _tanh_beside, 1, Reason.GRAPH_INPUT)
    for direct in (False, True):
        what = "handed out by" if direct else "in"
        yield Pattern(f"conv, norm {what} one branch of an If", IMAGE, lambda n, d=direct: _for_one_branch(n, direct=d))
    yield Pattern("conv, If with a norm in it, norm behind", IMAGE, lambda n: n.bn(_norm_and_conv(n), 5))
    yield Pattern("convs stacked by a Loop, chain behind", IMAGE, _stacked)
    yield Pattern("last state of a Loop, norm behind", IMAGE, _last, 1, Reason.CONSUMER)
    yield Pattern("conv, norm in each turn of a Loop", IMAGE, _each_turn)
    for axis in (0, 1, -1):
        shape = (6, 1) if axis == -1 else (6,)
        yield Pattern(
            f"matmuls stacked by a Scan along axis {axis}, chain behind",
            ("n", C, 8, 8),
            lambda n, a=axis, s=shape: n.chain(_rows_of(n, lambda r: n.op("MatMul", r, n.rand(8, 6)), axis=a), s),
        )
    yield Pattern(
        "matmuls stacked by a Scan along the axis of the norm behind",
        (5, C, 8, 8),
        lambda n: n.bn(_rows_of(n, lambda r: n.op("MatMul", r, n.rand(8, 6)), axis=1), 5),
        1,
        Reason.AXIS,
    )


def _turned(n: Net, x: str) -> Any:
    return n.op("Transpose", x, perm=[0, 1, 3, 2])


def _tanh_beside(n: Net) -> Any:
    h = n.bn("x", C)
    return _either(n, lambda: [n.conv(h, C, C, pads=[1] * 4)], lambda: [n.tanh(h)])


def _norm_and_conv(n: Net) -> Any:
    h = n.conv("x", C, 5)
    return _either(n, lambda: [n.bn(h, 5)], lambda: [n.conv("x", C, 5)])


def bodies() -> Iterator[Pattern]:
    """All patterns of this file."""
    for rows in (within, across):
        yield from rows()

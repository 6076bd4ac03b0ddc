"""Operators that break their own specification: nothing is folded through them, and nothing crashes."""

import numpy as np
import onnx
import pytest

from renorm_onnx.fusion.engine import fuse
from runtime_tests.pattern_models import Body, Net, Pattern

IMAGE = ("n", 4, 8, 8)


def _uneven_statistics(n: Net) -> str:
    scale, _, mean, var = n.stats(5)
    return n.op("BatchNormalization", n.conv("x", 4, 5), scale, n.rand(3), mean, var)


BODIES: dict[str, Body] = {
    "statistics of different lengths": _uneven_statistics,
    "norm without inputs": lambda n: n.op("BatchNormalization"),
    "norm without data": lambda n: n.op("BatchNormalization", "", *n.stats(4)),
    "conv without a weight": lambda n: n.bn(n.op("Conv", "x"), 5),
    "conv whose weight is a number": lambda n: n.bn(n.op("Conv", "x", n.scalar(1.0)), 5),
    "conv in groups that do not divide": lambda n: n.conv(n.bn("x", 4), 4, 6, group=4),
    "conv of integers": lambda n: n.bn(n.op("Conv", "x", n.k(np.ones((5, 4, 1, 1), np.int32))), 5),
    "slice with too many starts": lambda n: n.bn(
        n.op("Slice", n.conv("x", 4, 5), n.ints(0, 1), n.ints(3), n.ints(1)), 3
    ),
    "blocks of size zero": lambda n: n.bn(n.op("SpaceToDepth", n.conv("x", 4, 8), blocksize=0), 8),
}


def _build(body: Body) -> onnx.ModelProto:
    n = Net()
    result = body(n)
    n.opset = 17
    graph = onnx.helper.make_graph(
        n.nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, IMAGE)],
        [onnx.helper.make_tensor_value_info(str(result), 1, None)],
        n.initializers,
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("name", BODIES)
def test_an_operator_that_breaks_its_specification_folds_nothing(name):
    model = _build(BODIES[name])
    fused, report = fuse(model)
    assert not report.changed
    assert [n.op_type for n in fused.graph.node] == [n.op_type for n in model.graph.node]


def test_constants_that_a_few_bytes_ask_for_are_not_computed():
    def gathered(n: Net) -> str:
        table = n.op("Expand", n.scalar(0.5), n.ints(1 << 12, 1 << 12))
        index = n.op("Expand", n.ints(0), n.ints(1 << 20))
        return n.chain(n.op("MatMul", "x", n.op("Gather", table, index, axis=1)), ())

    fused, _ = fuse(Pattern("", ("n", 1 << 12), gathered).build())
    assert "Gather" in [n.op_type for n in fused.graph.node]

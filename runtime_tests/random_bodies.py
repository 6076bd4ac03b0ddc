"""Random graphs of which a stretch of operators lies in the body of an If or of a Loop, or in one inside the other.

The model is one of `random_graphs`, and computes the same with the stretch in a body: both branches of the If hold it,
under names of their own, and each turn of the Loop computes the same. So maps meet borders everywhere.

`python -m runtime_tests.random_bodies --examples 3000` tries many; a failure prints the steps that cause it.
"""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from runtime_tests.random_graphs import SHAPES, STEPS, Shape, Step, build, compare_fused, search

# Where the stretch begins, how long it is, and what holds it; a second one may hold the first.
STRETCHES = st.lists(
    st.tuples(st.integers(0, 11), st.integers(1, 6), st.sampled_from(["If", "Loop"])), min_size=1, max_size=2
)


def enclosed(model: onnx.ModelProto, start: int, length: int, operator: str) -> onnx.ModelProto:
    """The model with `length` of its nodes, from one on, in the body of an If or a Loop."""
    whole = onnx.ModelProto.FromString(model.SerializeToString())
    nodes = list(whole.graph.node)
    start %= len(nodes)
    inside, behind = nodes[start : start + length], nodes[start + length :]
    read = {name for n in behind for name in _read(n)} | {o.name for o in whole.graph.output}
    handed_out = [name for n in inside for name in n.output if name in read]
    if not handed_out:
        return model
    inferred = onnx.shape_inference.infer_shapes(whole).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}
    mark = f"b{len(whole.graph.initializer)}"
    make = _choice if operator == "If" else _repetition
    made = make(whole.graph, inside, handed_out, types, mark)
    del whole.graph.node[:]
    whole.graph.node.extend([*nodes[:start], *made, *behind])
    return whole


def _read(node: onnx.NodeProto) -> set[str]:
    """What a node reads, in bodies too."""
    return set(node.input).union(*(_read(n) for a in node.attribute for n in a.g.node))


def _body(
    inside: list[onnx.NodeProto], handed_out: list[str], types: dict[str, int], mark: str
) -> tuple[list[onnx.NodeProto], list[onnx.ValueInfoProto]]:
    """Copies of nodes, under names that begin with `mark`, and what they hand out."""
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in inside]
    for copy in copies:
        _rename(copy, {name for n in inside for name in _named(n)}, mark)
    infos = [helper.make_tensor_value_info(mark + name, types[name], None) for name in handed_out]
    return copies, infos


def _named(node: onnx.NodeProto) -> set[str]:
    """What a node computes, in bodies too, and what these are given."""
    inner = (_named(n) | {i.name for i in a.g.input} for a in node.attribute for n in a.g.node)
    return set(node.output).union(*inner)


def _rename(node: onnx.NodeProto, own: set[str], mark: str) -> None:
    for names in (node.input, node.output):
        names[:] = [mark + name if name in own else name for name in names]
    node.name = mark + node.name
    for attribute in node.attribute:
        for value in (*attribute.g.input, *attribute.g.output):
            value.name = mark + value.name if value.name in own else value.name
        for inner in attribute.g.node:
            _rename(inner, own, mark)


def _choice(
    graph: onnx.GraphProto, inside: list[onnx.NodeProto], handed_out: list[str], types: dict[str, int], mark: str
) -> list[onnx.NodeProto]:
    limit = np.array(99.0 if len(inside) % 2 else -99.0)  # one way for some, the other for others
    graph.initializer.append(numpy_helper.from_array(limit, f"{mark}limit"))
    branches = {}
    for way in ("then_branch", "else_branch"):
        nodes, infos = _body(inside, handed_out, types, mark + way[0])
        branches[way] = helper.make_graph(nodes, mark + way, [], infos)
    return [
        helper.make_node("ReduceMax", ["x"], [f"{mark}max"], keepdims=0),
        helper.make_node("Greater", [f"{mark}max", f"{mark}limit"], [f"{mark}asked"]),
        helper.make_node("If", [f"{mark}asked"], handed_out, **branches),
    ]


def _repetition(
    graph: onnx.GraphProto, inside: list[onnx.NodeProto], handed_out: list[str], types: dict[str, int], mark: str
) -> list[onnx.NodeProto]:
    """Three turns, of which the second one counts."""
    for name, value in ((f"{mark}count", 3), (f"{mark}one", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    nodes, infos = _body(inside, handed_out, types, mark)
    given = [(f"{mark}turn", TensorProto.INT64), (f"{mark}go", TensorProto.BOOL)]
    nodes.append(helper.make_node("Identity", [f"{mark}go"], [f"{mark}on"]))
    body = helper.make_graph(
        nodes,
        f"{mark}body",
        [helper.make_tensor_value_info(name, kind, []) for name, kind in given],
        [helper.make_tensor_value_info(f"{mark}on", TensorProto.BOOL, []), *infos],
    )
    stacked = [f"{mark}all{name}" for name in handed_out]
    picked = [
        helper.make_node("Gather", [s, f"{mark}one"], [name], axis=0)
        for s, name in zip(stacked, handed_out, strict=True)
    ]
    return [helper.make_node("Loop", [f"{mark}count", ""], stacked, body=body), *picked]


def check(
    steps: list[Step], shape: Shape, outputs: int, stretches: list[tuple[int, int, str]], open_batch: bool = False
) -> Counter[str]:
    """Build, enclose, fuse, compare; raise AssertionError with a readable model if they differ."""
    model = build(steps, shape, outputs, open_batch=open_batch)
    if model is None:
        return Counter()
    for stretch in stretches:
        model = enclosed(model, *stretch)
    onnx.checker.check_model(model, full_check=True)
    return compare_fused(model, shape)


if __name__ == "__main__":
    sys.exit(search(__doc__, 3_000, check, STEPS, SHAPES, st.integers(1, 3), STRETCHES, st.booleans()))

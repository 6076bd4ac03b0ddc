"""A sequence of pieces becomes the Split that it is, where norms stay otherwise."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from renorm_onnx.fusion.conftest import Builder, assert_same, operators
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.report import Reason

IMAGE = {"x": ["n", 4, 8, 8]}


def pieces(b: Builder, sizes: list[int], elements: list[int], given: int | None = None, axis: int = 1) -> list[str]:
    length = b.constant(np.array(given or sizes))
    sequence = b.node("SplitToSequence", b.conv("x", 4, sum(sizes)), length, axis=axis)
    return [b.node("SequenceAt", sequence, b.constant(np.array(i)), out=f"piece{i}") for i in elements]


@pytest.mark.parametrize("elements", [[0, 1], [1, 0], [-1], [0, -1, 1]])
def test_norms_behind_the_pieces_of_a_sequence_fold(elements):
    b = Builder()
    outs = [b.norm(p, [3, 5][i]) for i, p in zip(elements, pieces(b, [3, 5], elements), strict=True)]
    model = b.model(IMAGE, [b.node("Relu", o) for o in outs])
    fused, report = fuse(model)
    twice = len({i % 2 for i in elements}) < len(elements)
    assert bool(report.kept) == twice  # one piece that two norms read
    assert "SplitToSequence" not in operators(fused)
    assert operators(fused).count("Split") == 1
    assert_same(model, fused)
    assert not fuse(fused)[1].changed


@pytest.mark.parametrize(("sizes", "given"), [([3, 3], 3), ([3, 3, 2], 3), ([2], 5), ([1, 1, 1], 1)])
@pytest.mark.parametrize("axis", [1, -3])
def test_one_length_for_all_pieces_leaves_the_rest_to_the_last(sizes, given, axis):
    b = Builder()
    outs = [b.norm(p, n) for n, p in zip(sizes, pieces(b, sizes, list(range(len(sizes))), given, axis), strict=True)]
    model = b.model(IMAGE, [b.node("Relu", o) for o in outs])
    fused, report = fuse(model)
    assert not report.kept
    assert "SplitToSequence" not in operators(fused)
    assert_same(model, fused)
    assert not fuse(fused)[1].changed


def test_pieces_keep_their_names_and_may_be_outputs():
    b = Builder()
    first, second = pieces(b, [3, 5], [0, 1])
    model = b.model(IMAGE, [first, b.node("Relu", b.norm(second, 5))])
    fused, report = fuse(model)
    assert not report.kept
    assert first in {o for n in fused.graph.node for o in n.output}
    assert [o.name for o in fused.graph.output] == [o.name for o in model.graph.output]
    assert_same(model, fused)


def left_alone(b: Builder, sequence: str, *outputs: str) -> None:
    piece = b.node("SequenceAt", sequence, b.constant(np.array(0)))
    model = b.model(IMAGE, [b.node("Relu", b.norm(piece, 3)), *outputs])
    fused, report = fuse(model)
    assert [n.reason for n in report.kept] == [Reason.OPERATOR]
    assert "SplitToSequence" in operators(fused)
    assert_same(model, fused)


def test_sequences_that_are_read_otherwise_or_split_at_open_places_stay():
    b = Builder()
    sequence = b.node("SplitToSequence", b.conv("x", 4, 8), b.constant(np.array([3, 5])), axis=1)
    left_alone(b, sequence, b.node("ConcatFromSequence", sequence, axis=1))
    for lengths in ([np.array(2)], []):  # along the open batch, of which the count of pieces is not known
        b = Builder()
        left_alone(b, b.node("SplitToSequence", b.conv("x", 4, 3), *map(b.constant, lengths), axis=0))


def test_an_order_of_the_pieces_that_is_wrong_is_seen():
    b = Builder()
    first, second = pieces(b, [4, 4], [0, 1])
    model = b.model(IMAGE, [b.node("Tanh", b.norm(first, 4)), b.node("Relu", second)])
    fused, _ = fuse(model)
    assert_same(model, fused)
    wrong = onnx.ModelProto.FromString(fused.SerializeToString())
    split = next(n for n in wrong.graph.node if n.op_type == "Split")
    split.output[:] = split.output[::-1]
    with pytest.raises(AssertionError):
        assert_same(model, wrong)

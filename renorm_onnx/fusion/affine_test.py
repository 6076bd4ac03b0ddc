"""Maps of one tensor are composed only where both count its elements alike."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from renorm_onnx.fusion.affine import AffineMap, UnlikeAxesError, concatenate, together
from renorm_onnx.fusion.carrier import Carrier, Desk, Step, ask
from renorm_onnx.fusion.facts import Facts
from renorm_onnx.fusion.report import Reason, Refusal


def along(length: int, *, axis: int = 0, periodic: bool = False) -> AffineMap:
    return AffineMap(np.arange(1.0, length + 1), np.ones(length), (axis,), frozenset({axis} if periodic else ()))


def test_maps_along_two_axes_become_one_along_both():
    one, two = together(along(2), along(3, axis=1))
    assert one.axes == two.axes == (0, 1)
    assert one.scale.shape == two.scale.shape == (2, 3)
    np.testing.assert_array_equal(along(2).then(along(3, axis=1)).scale, [[1, 2, 3], [2, 4, 6]])


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (along(4), along(6)),
        (along(4, periodic=True), along(6, periodic=True)),
        (along(4, periodic=True), along(3, axis=1)),
    ],
)
def test_maps_that_disagree_on_an_axis_of_open_size_are_refused_by_name(one, two):
    with pytest.raises(UnlikeAxesError, match="differently"):
        together(one, two)

    class Composing(Carrier):
        many_axes = True

        def forward(self, node, maps, desk):
            return Step((), {0: maps[0].then(maps[1])})

    node = ir.Node("", "Mul", [ir.Value(name="a"), ir.Value(name="b")], outputs=[ir.Value(name="y")], name="mul")
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    desk = Desk(Facts(model, {}, ()))
    answer = ask(Composing(), "forward", node, {0: one, 1: two}, desk)
    assert isinstance(answer, Refusal)
    assert (answer.reason, answer.obstacle) == (Reason.SHAPE, "mul")
    assert isinstance(ask(Composing(), "forward", node, {0: one, 1: one}, desk), Step)


def test_a_piece_without_channels_joins_the_others_and_stays_what_it_is():
    whole = concatenate([along(0), along(3)], [0, 3], 0)
    assert whole.equals(along(3))
    assert whole.take(slice(0), 0).reduced().equals(along(0))


def test_no_numbers_are_no_identity_and_one_number_does_not_go_to_no_places():
    assert not along(0).is_identity
    assert AffineMap.of([1.0, 1.0], 0.0, 1).is_identity
    with pytest.raises(UnlikeAxesError, match="1 elements do not go to 0 places"):
        along(1).scattered(slice(-10, -11, -1), 3, 0)

"""What does not change numbers passes every map."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from renorm_onnx.fusion.carriers.exact_folding_test import assert_fuses, backward, bn, build, forward, norm, quarters
from renorm_onnx.fusion.report import Reason


@pytest.mark.parametrize("lines", ["d = Identity(c)", "d = Dropout(c)", "d, m = Dropout(c, r)", "d = Cast<to=11>(c)"])
def test_every_map_passes_on_both_sides(lines: str) -> None:
    backward(lines, 4, r=np.array(0.5))
    forward(lines, 4, r=np.array(0.5))


def test_dropout_in_training_mode_is_refused() -> None:
    backward("d = Dropout(c, r, t)", 4, [Reason.TRAINING], r=np.array(0.5), t=np.array(True))
    backward("d = Dropout(c, r, t)", 4, r=np.array(0.5), t=np.array(False))
    backward("d = Dropout(c, , t)", 4, [Reason.TRAINING], t=np.array(True))
    asked = "s = Size(x) t = Cast<to=9>(s) d = Dropout(c, r, t)"
    backward(asked, 4, [Reason.TRAINING], r=np.array(0.5))


@pytest.mark.parametrize(("attributes", "kept"), [("", [Reason.TRAINING]), ("<is_test=1>", [])])
def test_dropout_before_opset_7_is_in_training_mode_unless_it_says_so(attributes: str, kept: list[Reason]) -> None:
    body = f"c = Conv(x, W) d = Dropout{attributes}(c) y = Mul(d, k)"
    assert_fuses(build(body, "double[N,3,H,W] x", "y", opset=6, W=quarters([4, 3, 1, 1]), k=np.array(-1.5)), kept)


def test_a_cast_to_a_narrower_float_is_refused() -> None:
    text = f"c = Conv(x, W) e = Cast<to=1>(c) d = Cast<to=11>(e) y = {bn('d')}"
    model = build(text, "double[N,3,H,W] x", "y", W=quarters([4, 3, 1, 1]), **norm(4))
    assert_fuses(model, [Reason.DTYPE])


def test_a_cast_to_a_wider_float_passes_and_the_fold_is_rounded_where_it_is_absorbed() -> None:
    text = f"c = Conv(z, W) d = Cast<to=11>(c) y = {bn('d')}"
    weights = {"W": quarters([4, 3, 1, 1]).astype(np.float32)}
    text = f"z = Cast<to=1>(x) {text}"
    model = build(text, "double[N,3,H,W] x", "y", **weights, **norm(4))
    fused = assert_fuses(model)
    stored = {i.name: i.data_type for i in fused.graph.initializer}
    assert set(stored.values()) == {onnx.TensorProto.FLOAT}

"""What `inspect` says of norms that are neither folded nor kept."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from renorm_onnx.fusion.conftest import Builder
from renorm_onnx.inspection import inspect_model


def test_a_norm_that_is_never_reached_is_said_to_go_not_to_fold(tmp_path):
    b = Builder()
    parts = []
    for name in ("yes", "no"):
        b.nodes.clear()
        parts.append(b.norm("x", 4, out=name))
        info = onnx.helper.make_tensor_value_info(name, 1, None)
        parts[-1] = onnx.helper.make_graph(list(b.nodes), name, [], [info])
    b.nodes.clear()
    taken = b.node("If", b.constant(np.array(True)), then_branch=parts[0], else_branch=parts[1])
    path = tmp_path / "m.onnx"
    onnx.save(b.model({"x": ["n", 4, 8, 8]}, [b.conv(taken, 4, 4)]), path)
    said = str(inspect_model(path, explain=True))
    assert "2 norms, 1 of them can be folded, 1 never reached" in said
    (line,) = [line for line in said.splitlines() if line.startswith("no ")]
    assert line.split(maxsplit=3)[2:] == ["goes", "stands in a branch of an If that is never taken"]


@pytest.mark.parametrize(
    ("operator", "domain", "why"),
    [
        ("Covn", "", "Covn 'odd' is no operator of opset 17"),
        ("Gelu", "", "Gelu 'odd' is no operator of opset 17"),
        ("Tanh", "", "Tanh 'odd' neither absorbs nor passes a scale and shift"),
        ("Covn", "elsewhere", "elsewhere::Covn 'odd' neither absorbs nor passes a scale and shift"),
    ],
)
def test_a_mistyped_operator_in_the_way_of_a_norm_is_called_one(tmp_path, operator, domain, why):
    b = Builder()
    model = b.model({"x": ["n", 4]}, [b.norm(b.node("Tanh", "x"), 4)])
    model.graph.node[0].MergeFrom(onnx.NodeProto(op_type=operator, domain=domain, name="odd"))
    model.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    assert f"kept  {why};" in str(inspect_model(path, explain=True))

"""What `inspect` says of norms that are neither folded nor kept."""

from __future__ import annotations

import numpy as np
import onnx

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

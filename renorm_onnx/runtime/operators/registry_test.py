"""An operator that may mean something else in a later opset is unknown, and not taken for what it was."""

import onnx.defs
import pytest

from renorm_onnx.runtime.operators import registry


def test_beyond_the_newest_opset_only_unchanged_operators_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "NEWEST_OPSET", 13)
    found = {name: registry.find("", name, 20) for name in ("Abs", "Concat", "Relu", "BatchNormalization")}
    assert found == {
        "Abs": registry.OPERATORS["Abs"],
        "Concat": registry.OPERATORS["Concat"],
        "Relu": None,  # of opset 14
        "BatchNormalization": None,  # of opset 15
    }
    assert registry.find("", "Abs", onnx.defs.onnx_opset_version() + 1) is None
    assert registry.find("elsewhere", "Abs", 13) is None
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 12)  # an onnx older than the tables
    assert registry.find("", "Relu", 13) is registry.OPERATORS["Relu"]

"""`docs/json.md` names every key of the documents that the commands print."""

import json
import re
from pathlib import Path

import onnx
import onnx.parser
import pytest

from renorm_onnx import cli

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,2,3,3] x) => (float[N,2,3,3] y)
<float[2,2,1,1] w = {1.5, -0.5, 0.2, 2.0}, float[2] s = {1.5, -0.5}, float[2] b = {0.3, 0.2}, float[2] v = {0.7, 2.0}> {
  c = Conv(x, w)
  n = BatchNormalization(c, s, b, b, v)
  r = Relu(n)
  y = BatchNormalization(r, s, b, b, v)
}"""
TEXT = (Path(__file__).parents[1] / "docs" / "json.md").read_text()
NAMED = set(re.findall(r"`(\w+)`", TEXT))
ENTRIES = ("rows", "norms", "findings")  # lists of which each entry is described


def keys_of(document: dict[str, object]) -> set[str]:
    keys = set(document)
    for name in ("fusion", "verdict", "error"):
        if isinstance(inner := document.get(name), dict):
            keys |= keys_of(inner)
    for name in ENTRIES:
        if isinstance(entries := document.get(name), list):
            keys |= {key for entry in entries for key in entry}
    return keys


@pytest.mark.parametrize(
    "arguments",
    [
        ("fuse", "m.onnx"),
        ("verify", "m.onnx"),
        ("inspect", "m.onnx"),
        ("bench", "m.onnx", "--rounds", "1"),
        ("inline", "m.onnx"),
        ("doctor",),
        ("fuse", "absent.onnx"),
    ],
    ids=" ".join,
)
def test_every_key_is_described(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx.parser.parse_model(MODEL), "m.onnx")
    cli.main([*arguments, "--json"])
    # In a process of its own `doctor` keeps what onnxruntime prints to itself; pytest catches it here.
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["schema_version"] == 1
    assert keys_of(document) - {"name"} <= NAMED


def test_a_key_that_is_not_described_would_be_noticed():
    assert not {"surprise"} & NAMED
    assert {"rows", "sets", "left_behind"} <= NAMED
    assert keys_of({"fusion": {"norms": [{"surprise": 1}]}}) == {"fusion", "norms", "surprise"}

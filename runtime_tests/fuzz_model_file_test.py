"""Damaged models, and the watcher that would notice what they do."""

import random
from pathlib import Path

import pytest

from renorm_onnx import model_file
from runtime_tests import fuzz_model_file


def test_two_thousand_damaged_models_do_no_harm() -> None:
    result = fuzz_model_file.run(2000, seed=1)
    assert 200 < result["loaded"] < 1800
    assert result["messages"] > 100


def test_every_seed_loads_and_every_damage_is_reproducible(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(bytes(4096))
    for seed in fuzz_model_file.seeds():
        (tmp_path / "m.onnx").write_bytes(seed.SerializeToString())
        model_file.model_bytes(model_file.load(tmp_path / "m.onnx"))
        for i in range(20):
            first = fuzz_model_file.damaged(seed, random.Random(i))
            assert first == fuzz_model_file.damaged(seed, random.Random(i))


@pytest.mark.parametrize("harm", ["crash", "exception", "lines", "memory", "outside", "hang"])
def test_the_watcher_notices_what_it_looks_for(harm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    harms = {
        "crash": "__import__('os').abort()",
        "exception": "1 / 0",
        "lines": "(_ for _ in ()).throw(ModelFileError('a\\nb'))",
        "memory": "len(bytearray(b'x') * 600_000_000)",
        "outside": "open('/etc/hosts').close()",
        "hang": "__import__('time').sleep(60)",
    }
    expected = {"hang": "no answer within 2.0 s: seed 0", "crash": "the child ended with -6"}
    # The child is this program with another `load`.
    child = tmp_path / "child.py"
    child.write_text(
        "import sys\nfrom runtime_tests import fuzz_model_file as fuzz\nfrom renorm_onnx.errors import ModelFileError\n"
        f"fuzz.model_file.load = lambda path: {harms[harm]}\nfuzz.main()\n"
    )
    # Only the one that hangs is waited for; a busy machine takes its time for the others.
    monkeypatch.setattr(fuzz_model_file, "SECONDS", 2.0 if harm == "hang" else 60.0)
    monkeypatch.setattr(fuzz_model_file, "CHILD", [str(child)])
    with pytest.raises(RuntimeError, match=expected.get(harm, "the child ended with 1")):
        fuzz_model_file.run(3, seed=0)

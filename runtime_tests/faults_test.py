"""Faults on purpose in small networks, and that the command would notice if one got through."""

import json

import pytest

from runtime_tests import faults
from runtime_tests.faults import CORRECT, KINDS, exported, judge, main

NETWORKS = ("densenet", "repvgg", "mlp")


@pytest.fixture(scope="module")
def models():
    return dict(exported(NETWORKS, (), small=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_fault_is_refused_and_the_correct_fold_accepted(models, network, kind):
    row = judge(network, models[network], kind)
    assert row.ok, row
    assert (row.interface or row.places or row.outputs) is (kind != CORRECT), row


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ({CORRECT: faults.fused, "harmless": faults.fused}, "WRONG mlp, harmless: yes."),
        ({CORRECT: faults._swapped}, "WRONG mlp, none: no."),
        ({CORRECT: faults.fused, "swapped": faults._swapped}, "2 verdicts, 0 of them wrong"),
    ],
)
def test_the_command_returns_1_if_a_fault_is_accepted_or_a_correct_fold_refused(
    models, kinds, said, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(faults, "KINDS", kinds)
    monkeypatch.setattr(faults, "exported", lambda *_, **__: [("mlp", models["mlp"])])
    assert main(["--kinds", *kinds, "--json", str(tmp_path / "rows.json")]) == int(said.startswith("WRONG"))
    printed = capsys.readouterr()
    assert said in printed.out
    assert printed.err.startswith("mlp, none: ")
    assert [row["kind"] for row in json.loads((tmp_path / "rows.json").read_text())] == list(kinds)

"""An export prints nothing, and hides no warning of the user's own code."""

import contextlib
import logging
import sys
import warnings

import pytest
import torch
from torch import nn

from renorm_onnx.exporter import to_onnx
from renorm_onnx.exporting.conftest import X, small
from renorm_onnx.exporting.surroundings import quiet


def test_only_the_users_own_warnings_pass() -> None:
    def both() -> None:
        with quiet():
            warnings.warn_explicit("mine", UserWarning, "/home/me/torch/net.py", 1)
            warnings.warn_explicit("theirs", FutureWarning, torch.onnx.__file__, 1)

    with pytest.warns(UserWarning, match="mine") as caught:
        both()
    assert [str(w.message) for w in caught] == ["mine"]


def test_a_quiet_export_prints_nothing(capfd) -> None:
    to_onnx(small(), X)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


class Talking(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("mine", file=sys.stderr)
        return x * 2


def test_what_the_module_itself_prints_passes(capfd) -> None:
    to_onnx(Talking().eval(), X, verify=False)
    assert set(capfd.readouterr().err.split()) == {"mine"}


def test_the_users_logging_is_as_it_was_also_after_a_failure(monkeypatch) -> None:
    loud, off = logging.getLogger("torch"), logging.getLogger("torch.onnx")
    monkeypatch.setattr(loud, "level", logging.DEBUG)
    monkeypatch.setattr(off, "disabled", True)
    with contextlib.suppress(KeyError), quiet():
        assert loud.disabled
        assert not logging.getLogger("torch.imported_by_the_export").isEnabledFor(logging.CRITICAL)
        raise KeyError
    assert (loud.level, loud.disabled, off.disabled) == (logging.DEBUG, False, True)

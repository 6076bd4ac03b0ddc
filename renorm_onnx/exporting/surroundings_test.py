"""An export prints nothing, and hides no warning of the user's own code."""

import warnings

import pytest
import torch

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

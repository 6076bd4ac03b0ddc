"""Fixtures for whole models."""

from collections.abc import Iterator

import pytest

from renorm_onnx.fusion import branches, facts, plan, sources


@pytest.fixture(scope="module")
def bugs_raise() -> Iterator[None]:
    """Let what the engine takes for a malformed operator through: in a model without one, it is a bug of the engine."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (facts, plan, sources, branches):
            patch.setattr(module, "MALFORMED", ())
        yield

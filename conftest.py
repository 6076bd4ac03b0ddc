"""What holds for every test of the repository.

Those that need a GPU are skipped by name where there is none. Processes that a test starts, in whatever folder, import
this project, installed or not.
"""

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

LIBRARIES = ("torch", "onnxruntime")

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """An interrupt does here what it does in a terminal; tests that a script started in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@functools.cache
def without_cuda(library: str) -> str:
    """Why `library` cannot use a GPU here; nothing if it can."""
    if library == "torch":
        import torch

        return "" if torch.cuda.is_available() else "torch sees no CUDA device"
    from renorm_onnx.runtime.providers import provider_status

    status = provider_status("cuda")
    return "" if status.creatable else f"onnxruntime cannot use CUDA: {status.stage}: {status.detail}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("cuda")
    if marker is None:
        return
    if not marker.args or set(marker.args) - set(LIBRARIES):
        pytest.fail(f"the mark cuda{marker.args}: expected at least one of {LIBRARIES}", pytrace=False)
    reason = next(filter(None, map(without_cuda, marker.args)), "")
    if reason and os.environ.get("RENORM_REQUIRE_CUDA") == "1":
        pytest.fail(f"RENORM_REQUIRE_CUDA=1, but {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)

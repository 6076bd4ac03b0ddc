"""The tests of this folder need the packages of the extra `demo`; where one is absent, they are skipped by name."""

import importlib.util
from pathlib import Path

import pytest

PACKAGES = ("matplotlib", "sklearn", "tqdm")


def pytest_pycollect_makemodule(module_path: Path) -> None:
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"the tests of {module_path.parent.name} need {', '.join(missing)}", allow_module_level=True)

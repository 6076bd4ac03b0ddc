"""What the README shows is what a reader gets: its Python runs, its commands exist, its version is the package's."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import renorm_onnx
from renorm_onnx import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


def test_the_three_steps_run_one_after_another(tmp_path):
    python = blocks("python")
    assert len(python) >= 3
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    fuse = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("renorm-onnx fuse")]
    assert fuse
    for step, block in enumerate(python):
        code = block if "cuda" not in block else block.replace('provider="cuda"', 'provider="cpu"')
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, check=True)
        if step == 0:
            command = fuse[0].split("#")[0].split()
            # As a module: the repository's own command, which need not be installed.
            command[:1] = [sys.executable, "-m", "renorm_onnx"]
            subprocess.run(command, cwd=tmp_path, env=environment, check=True)
            assert (tmp_path / "model.fused.onnx").exists()


def test_every_command_that_the_readme_names_exists(capsys):
    named = set(re.findall(r"renorm-onnx ([a-z]+)", README)) - {"on"}
    assert {"fuse", "verify", "inspect", "bench", "doctor"} <= named
    for command in named:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert capsys.readouterr().out


def test_files_that_the_documents_name_exist():
    for name in ("README.md", "CONTRIBUTING.md"):
        for path in re.findall(r"\]\(((?!http)[^)#]+)\)", (ROOT / name).read_text()):
            assert (ROOT / path).exists(), f"{name} links to {path}"


def test_the_version_is_the_changelogs_newest():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert newest
    assert newest[1] == renorm_onnx.__version__


def test_public_names_that_the_readme_imports_exist():
    for names in re.findall(r"from renorm_onnx import ([\w, ]+)", README):
        for name in names.split(","):
            assert hasattr(renorm_onnx, name.strip())

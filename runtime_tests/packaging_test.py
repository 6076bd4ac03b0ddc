"""What is built and shipped: the wheel works alone, its metadata are true, and every command is the same one."""

import email
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import renorm_onnx

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Not installed by make: the other onnxruntime, and other projects' packages.
NOT_PINNED = {"cpu", "peers"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the wheel and the sdist, built as a release would be."""
    for package in ("build", "hatchling", "editables"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return out


@pytest.fixture(scope="module")
def wheel(built):
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An otherwise empty folder into which the wheel was installed."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True, capture_output=True, timeout=300)
    return target


@pytest.fixture
def from_wheel(installed, tmp_path):
    """Run a command in an empty folder, where Python finds the wheel first and the repository not at all."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(installed), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return run


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"renorm_onnx", f"renorm_onnx-{renorm_onnx.__version__}.dist-info"}
    assert "renorm_onnx/py.typed" in names
    assert not [name for name in names if name.endswith(("_test.py", "conftest.py", ".pyc", ".onnx"))]
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "renorm_onnx").rglob("*.py")}
    shipped = {source for source in sources if not source.endswith(("_test.py", "conftest.py"))}
    assert shipped <= set(names), "a module is missing"


def test_the_sdist_holds_what_the_wheel_is_built_from(built):
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "renorm_onnx/py.typed"} <= names
    assert not [name for name in names if name.startswith(("models/", "export/", "runtime_tests/", "build/"))]


def test_metadata_say_what_the_project_says(wheel):
    found = metadata(wheel)
    assert found["Name"] == "renorm-onnx"
    assert found["Version"] == renorm_onnx.__version__
    assert found["Requires-Python"] == ">=3.11"
    assert found["License-Expression"] == "MIT"
    assert found.get_all("License-File") == ["LICENSE"]
    assert set(found.get_all("Provides-Extra")) == set(EXTRAS)
    assert "# renorm-onnx" in found.get_payload()
    requirements = [Requirement(text) for text in found.get_all("Requires-Dist")]
    base = {r.name for r in requirements if r.marker is None}
    assert base == {"numpy", "onnx", "onnx-ir"}, "torch and onnxruntime are choices of the user"


def test_no_extra_brings_both_onnxruntimes():
    for extra, requirements in EXTRAS.items():
        names = set()
        for requirement in map(Requirement, requirements):
            names |= {requirement.name, *(Requirement(r).name for e in requirement.extras for r in EXTRAS[e])}
        assert not {"onnxruntime", "onnxruntime-gpu"} <= names, extra


def test_the_installed_command_works_from_an_empty_folder(from_wheel, installed, tmp_path):
    command = str(installed / "bin" / "renorm-onnx")
    version = from_wheel(command, "--version")
    assert (version.returncode, version.stdout.split()[-1]) == (0, renorm_onnx.__version__), version
    onnx.save(small_model(), tmp_path / "model.onnx")
    fused = from_wheel(command, "fuse", "model.onnx")
    assert fused.returncode == 0, fused
    assert [n.op_type for n in onnx.load(tmp_path / "model.fused.onnx").graph.node] == ["Gemm"]
    again = from_wheel(command, "fuse", "model.onnx")
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1


def small_model():
    """A Gemm with a norm behind it."""
    values = {"w": [[1.5, -0.5], [0.25, 2.0]], "b": [0.5, -1.0]}
    values |= {"scale": [0.5, 2.0], "shift": [1.0, -1.0], "mean": [0.25, -0.5], "var": [2.0, 0.5]}
    tensors = [numpy_helper.from_array(onnx.numpy_helper.np.array(v, "float32"), k) for k, v in values.items()]
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], "gemm"),
        helper.make_node("BatchNormalization", ["h", "scale", "shift", "mean", "var"], ["y"], "norm"),
    ]
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 2]) for name in "xy"]
    graph = helper.make_graph(nodes, "small", sides[:1], sides[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_runtime_tests_pass_against_the_wheel(from_wheel, installed, tmp_path):
    for folder in ("models", "export", "runtime_tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "origin_test.py").write_text(
        "import renorm_onnx\nfrom renorm_onnx.runtime import parity\n\n"
        "def test_the_wheel_is_what_runs():\n"
        f"    for module in (renorm_onnx, parity):\n        assert module.__file__.startswith({str(installed)!r})\n"
    )
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull, "--rootdir", "."]
    chosen = ["origin_test.py", "runtime_tests/random_graphs_test.py", "runtime_tests/frozen_test.py"]
    done = from_wheel(sys.executable, "-m", "pytest", *options, *chosen)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d+ passed", done.stdout)


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(r.name): r for r in map(Requirement, (x for x in lines if x and not x.startswith("#")))}


def declared():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    extras = [text for extra, texts in EXTRAS.items() if extra not in NOT_PINNED for text in texts]
    requirements = map(Requirement, [*PROJECT["dependencies"], *build, *extras])
    return [requirement for requirement in requirements if requirement.name != "renorm-onnx"]


def test_every_dependency_is_pinned_at_a_version_that_the_project_accepts():
    for requirement in declared():
        pin = pins().get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        (version,) = [s.version for s in pin.specifier if s.operator == "=="]
        assert requirement.specifier.contains(version), f"{requirement} does not accept {version}"


def test_what_dependencies_bring_is_pinned_too():
    pending, seen = [canonicalize_name(r.name) for r in declared()], set()
    while pending:
        name = pending.pop()
        # torch brings CUDA libraries and triton on Linux with a GPU; their versions are torch's to choose.
        if name in seen or name.startswith(("nvidia-", "cuda-")) or name in ("triton", "setuptools"):
            continue
        seen.add(name)
        assert name in pins(), f"{name} is not in constraints.txt"
        try:
            needed = map(Requirement, distribution(name).requires or [])
        except PackageNotFoundError:
            continue
        pending += [canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert len(seen) > 30


def text_of(*names):
    return "\n".join((ROOT / name).read_text() for name in names)


DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/gpu.md", "docs/json.md")


def test_the_makefile_has_every_target_that_documents_name():
    targets = set(re.findall(r"^([a-z]+):", text_of("Makefile"), flags=re.M))
    assert {"demo", "test", "clean"} <= targets
    (phony,) = re.findall(r"^\.PHONY: (.*)", text_of("Makefile"), flags=re.M)
    assert set(phony.split()) == targets
    named = set(re.findall(r"^\s*make ([a-z]+)|`make ([a-z]+)", text_of(*DOCUMENTS), flags=re.M))
    assert {a or b for a, b in named} <= targets
    assert {"demo", "test"} <= {a or b for a, b in named}


def test_options_that_the_readme_gives_to_the_demo_are_its_options():
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from export import demo

    commands = re.findall(r"make demo ARGS='([^']*)'", text_of("README.md"))
    assert commands
    for options in commands:
        demo.arguments(shlex.split(options))


def test_every_module_that_is_run_by_name_exists():
    named = set(re.findall(r"python -m ((?:export|runtime_tests|models)[\w.]*\w)", text_of(*DOCUMENTS, "Makefile")))
    assert {"export.demo", "runtime_tests.gpu"} <= named | set(re.findall(r"-m (export\.\w+)", text_of("Makefile")))
    for name in named - {"runtime_tests.bench_"}:
        found = importlib.util.find_spec(name)
        assert found is not None, name
        source = Path(found.origin or "")
        source = source.with_name("__main__.py") if source.name == "__init__.py" else source
        assert 'if __name__ == "__main__":' in source.read_text(), name


def test_continuous_integration_runs_make_test_and_nothing_else():
    lines = [line for line in text_of(".ci/run").splitlines() if line and not line.startswith("#")]
    assert lines == ["set -eu", 'cd "$(dirname "$0")/.."', "exec make test"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_make_test_runs_linters_types_and_all_tests():
    recipe = text_of("Makefile").partition("\ntest:")[2].partition("\n\n")[0]
    assert re.findall(r"-m (\w+ ?\w*)", recipe) == ["ruff check", "ruff format", "mypy renorm_onnx", "pytest "]

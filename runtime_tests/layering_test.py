"""The package is layered: each module imports only modules that stand above it, and torch stays in its own part."""

import ast
import fnmatch
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import renorm_onnx
from renorm_onnx.version import __version__

ROOT = Path(renorm_onnx.__file__).parent

# Reading order, top first. Modules that match one line may import each other's lines above, and each other as long as
# no cycle arises (another test). A module that matches no line fails: give it a place.
ORDER = [
    "version errors interrupts deferral arguments model_walk naming",
    "layers.schedules layers.clock layers.kernels layers.saving layers.recomputation",
    "layers.functional",
    "layers.masked layers.operators layers.options layers.stateless",
    "layers.step",
    "layers.direct layers.exported",
    "layers.modules",
    "layers.activated layers.lazy",
    "layers.swap",
    "layers.distributed layers.running_stats",
    "layers.convert layers.adoption layers.keras_weights",
    "files",
    "files.file_writing files.tensor_checks",
    "files.external_data files.name_checks files.model_tensors",
    "files.model_checks files.protobuf_writing",
    "model_file",
    "inlining",
    "onnx_function",
    "onnx_layers opset_lowering",
    "fusion.affine fusion.report fusion.fact",
    "fusion.facts",
    "fusion.fact_rounding",
    "fusion.fact_rules",
    "fusion.fact_layout fusion.fact_selection",
    "fusion.fact_dims",
    "fusion.parameters",
    "fusion.carrier fusion.operands",
    "fusion.rewriter",
    "fusion.unproven",
    "fusion.units",
    "fusion.sources fusion.calls fusion.conditionals fusion.sequences fusion.shadowing",
    "fusion.carriers.*",
    "fusion.carriers",
    "fusion.branches fusion.dead_ends fusion.node_queue fusion.ranges",
    "fusion.plan",
    "fusion.engine",
    "runtime.table",
    "runtime.operators.*",
    "runtime.operators",
    "runtime.shape_arithmetic runtime.stated_sizes",
    "runtime.reference",
    "runtime.*",
    "runtime.parity runtime.bench runtime.doctor",
    "runtime layers fusion",
    "delivery inspection",
    "exporting",
    "exporting.failures exporting.surroundings exporting.options exporting.other_sizes",
    "exporting.modules exporting.interface",
    "exporting.training exporting.restoring",
    "exporting.buffers",
    "exporting.verification",
    "exporter",
    "cli",
    "__main__",
]
TORCH_ALLOWED = ["layers", "layers.*", "exporter", "exporting.*"]
TORCH_ON_DEMAND = ["runtime.judging.torch_reference"]  # Imports torch in a function, for a module of the caller.


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        if path.name.endswith("_test.py") or path.name == "conftest.py":
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            found[name] = path
    return found


def rank(module: str) -> int:
    places = [i for i, line in enumerate(ORDER) if any(fnmatch.fnmatchcase(module, p) for p in line.split())]
    exact = [i for i, line in enumerate(ORDER) if module in line.split()]
    assert places, f"{module} has no place in ORDER"
    return (exact or places)[0]


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Modules of the package, and other top-level packages, that a file imports; not what only type checkers see."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    guards = [g for g in ast.walk(tree) if isinstance(g, ast.If) and "TYPE_CHECKING" in ast.dump(g.test)]
    guarded = {n for g in guards for n in ast.walk(g)}
    known = modules()
    found = set()
    for node in nodes:
        if node in guarded:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            # `from package import module` imports the module; the package's own __init__ is only on the way.
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(n if n.removeprefix("renorm_onnx.") in known else node.module for n in full)
    names = {n.removeprefix("renorm_onnx.") for n in found}
    return {n for n in names if n in known or not n.startswith("renorm_onnx")}


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_what_stands_above_it(module):
    known = modules()
    below = {n for n in imports(known[module]) if n in known and n != module and rank(n) > rank(module)}
    # A package's __init__ may name its own modules lazily.
    below = {n for n in below if not n.startswith(f"{module}.")}
    assert not below, f"{module} imports {sorted(below)}, which stand below it"


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    graph = {m: {n for n in imports(p, top_level_only=True) if n in known and n != m} for m, p in known.items()}
    done: set[str] = set()
    while len(done) < len(graph):
        free = {m for m in graph if m not in done and graph[m] <= done}
        assert free, f"an import circle among {sorted(set(graph) - done)}"
        done |= free


@pytest.mark.parametrize("module", sorted(modules()))
def test_torch_is_imported_only_where_modules_of_torch_are_handled(module):
    if any(fnmatch.fnmatchcase(module, p) for p in TORCH_ALLOWED):
        return
    top_level = module in TORCH_ON_DEMAND
    found = imports(modules()[module], top_level_only=top_level)
    assert not {n for n in found if n.split(".")[0] in ("torch", "onnxscript")}


def test_the_order_test_sees_a_wrong_import(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from renorm_onnx.fusion import engine\nimport torch\n")
    assert {"fusion.engine", "torch"} <= imports(wrong)
    assert rank("fusion.engine") > rank("fusion.plan") > rank("fusion.carriers.conv") > rank("errors")


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, renorm_onnx; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "onnx", "onnx_ir", "onnxruntime", "numpy"}


def test_a_command_loads_no_module_that_a_dependency_alone_asks_for_until_it_is_used():
    frozen = Path(__file__).parents[1] / "models" / "frozen" / __version__ / "mlp.onnx"
    code = f"""
import sys
from renorm_onnx.cli import main
sys.argv[1:] = ["fuse", "--check", {str(frozen)!r}]
main()
print("loaded:", "sympy.core" in sys.modules)
import onnx_ir, sympy
print("counted:", (onnx_ir.SymbolicDim("n") * 2 + onnx_ir.SymbolicDim("n")).value, sympy.Integer(7) // 2)
print("loaded:", "sympy.core" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-3:] == ["loaded: False", "counted: 3*n 3", "loaded: True"]


def test_every_public_name_resolves_and_is_documented():
    for name in renorm_onnx.__all__:
        value = getattr(renorm_onnx, name)
        assert name == "__version__" or value.__doc__, name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'batch_norm'"):
        renorm_onnx.batch_norm  # noqa: B018


def test_a_name_that_needs_torch_says_what_to_install_where_there_is_none():
    code = "import sys; sys.modules['torch'] = None; import renorm_onnx; renorm_onnx.BatchRenorm2d"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = "ModuleNotFoundError: renorm_onnx.BatchRenorm2d needs torch, which is not installed: pip install"
    assert said in done.stderr


def test_no_module_bears_the_name_of_a_public_function():
    assert not {m for m in modules() if "." not in m} & set(renorm_onnx.__all__)


@pytest.mark.parametrize("module", sorted(modules()))
def test_files_and_functions_stay_readable(module):
    path = modules()[module]
    text = path.read_text()
    assert text.count("\n") <= 400, f"{module} has {text.count(chr(10))} lines; split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            documented = ast.get_docstring(node) or ""
            assert length - documented.count("\n") <= 80, f"{module}.{node.name} has {length} lines; split it"

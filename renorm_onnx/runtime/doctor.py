"""What this machine can run, and what to install where it cannot.

torch is looked at through its installed metadata only: importing it takes a second, and the answer must come at once.
"""

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import renorm_onnx.runtime.providers as providers
from renorm_onnx.errors import RenormError
from renorm_onnx.runtime.comparison import TOLERANCES, compare
from renorm_onnx.runtime.providers import ProviderStatus
from renorm_onnx.runtime.session import open_session
from renorm_onnx.runtime.table import text_table
from renorm_onnx.version import __version__

SCHEMA_VERSION = 1

_PACKAGES = ("numpy", "onnx", "onnx-ir", "torch", "onnxscript")

# GPU code in the onnxruntime-gpu 1.30 and 1.31 wheels of PyPI, read from their fat binaries; there is no PTX in them,
# so that no other generation can run them. Other builds may differ.
_WHEEL_ARCHITECTURES = (75, 80, 86, 89, 90, 120)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        level: "ok", "note", "warning" or "problem".
        text: What was found.
        fix: What to do; empty if nothing.
    """

    name: str
    level: str
    text: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the fields as JSON values."""
        return {"name": self.name, "level": self.level, "text": self.text, "fix": self.fix}


@dataclass(frozen=True)
class Diagnosis:
    """The answer of `diagnose`.

    Attributes:
        findings: Everything looked at, in order.
        providers: Status per execution provider.
        asked: The provider that has to work, or None: the CPU's.
    """

    findings: tuple[Finding, ...]
    providers: tuple[ProviderStatus, ...]
    asked: str | None

    @property
    def ok(self) -> bool:
        """Whether the provider asked for works and computes rightly."""
        wanted = self.asked or "cpu"
        works = any(status.name == wanted and status.creatable for status in self.providers)
        return works and not any(
            f.level == "problem" and f.name in (f"{wanted} parity", "onnxruntime") for f in self.findings
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            "asked": self.asked,
            "findings": [finding.to_dict() for finding in self.findings],
            "providers": [status.to_dict() for status in self.providers],
        }

    def __str__(self) -> str:
        rows = [("" if f.level == "ok" else f.level, f.name, f.text) for f in self.findings]
        lines = text_table(("", "what", "found"), rows)
        lines += [f"{finding.name}: {finding.fix}" for finding in self.findings if finding.fix]
        wanted = self.asked or "cpu"
        lines.append(f"{wanted}: {'ready' if self.ok else 'not usable on this machine'}")
        return "\n".join(lines)


def diagnose(provider: str | None = None) -> Diagnosis:
    """Look at everything that running a model depends on.

    Args:
        provider: The execution provider that has to work, "cpu" or "cuda"; None: "cpu", and "cuda" is reported.

    Raises:
        InputError: The provider is unknown.
    """
    if provider is not None:
        providers.provider_of(provider)
    names = dict.fromkeys(("cpu", "cuda", *([provider] if provider else [])))
    statuses = tuple(providers.provider_status(name) for name in names)
    findings = [_system(), _packages(), *_runtime(), *_load(), *_driver(), *_architecture(), *_torch_cuda()]
    for status in statuses:
        findings.append(_provider(status, required=status.name == (provider or "cpu")))
        if status.creatable:
            findings.append(_parity(status.name))
    if any(status.creatable and status.name.startswith("cuda") for status in statuses):
        text = "on by default in the CUDA provider (10-bit operands); this package's sessions turn it off"
        findings.append(Finding("TF32", "note", text))
    return Diagnosis(tuple(findings), statuses, provider)


def _system() -> Finding:
    return Finding("system", "ok", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")


def _packages() -> Finding:
    found = [f"{name} {_version(name) or 'absent'}" for name in _PACKAGES]
    return Finding("packages", "ok", ", ".join([*found, f"renorm-onnx {__version__}"]))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _runtime() -> list[Finding]:
    installed = providers.distributions()
    listed = " and ".join(f"{name} {version}" for name, version in installed.items()) or "no package"
    try:
        ort = providers.onnxruntime()
    except RenormError as error:
        return [Finding("onnxruntime", "problem", f"installed: {listed}", str(error))]
    compiled = ", ".join(name.removesuffix("ExecutionProvider") for name in ort.get_available_providers())
    found = [Finding("compiled in", "ok", f"{compiled} (what is compiled in need not work; see below)")]
    if len(installed) > 1:
        fix = "the packages overwrite each other; " + providers.reinstall_advice()
        where = os.path.dirname(ort.__file__)
        return [Finding("onnxruntime", "warning", f"{ort.__version__} in {where}, written by {listed}", fix), *found]
    return [Finding("onnxruntime", "ok", f"{ort.__version__}, package {listed}"), *found]


def _load() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not hasattr(os, "getloadavg"):
        return [Finding("cores", "ok", str(cores))]
    load = os.getloadavg()[0]
    level = "warning" if load > cores else "ok"
    fix = "timings will be unreliable until the machine is quieter" if level == "warning" else ""
    return [Finding("cores", level, f"{cores} usable, load average {load:.1f}", fix)]


def _driver() -> list[Finding]:
    """Ask the driver itself for its version; onnxruntime need not be installed for that."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int()
        status = library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return [Finding("NVIDIA driver", "note", "none visible to this process")]
    if status != 0:
        return [Finding("NVIDIA driver", "warning", f"does not answer (cuDriverGetVersion gives {status})")]
    major, minor = version.value // 1000, version.value % 1000 // 10
    return [Finding("NVIDIA driver", "ok", f"supports CUDA up to {major}.{minor}")]


def _architecture() -> list[Finding]:
    """Compare the GPUs' generations with the code in the wheel."""
    found = []
    for line in _nvidia_smi("name,compute_cap"):
        name, _, capability = line.rpartition(",")
        digits = capability.strip().replace(".", "")
        if not digits.isdecimal():
            continue
        known = int(digits) in _WHEEL_ARCHITECTURES
        text = f"{name.strip()}, compute capability {capability.strip()}"
        if known:
            found.append(Finding("GPU", "ok", text))
        else:
            have = ", ".join(str(architecture) for architecture in _WHEEL_ARCHITECTURES)
            text += f"; the PyPI wheels of onnxruntime-gpu hold code for {have} alone"
            found.append(Finding("GPU", "warning", text, "use a wheel built for this GPU"))
    return found


def _nvidia_smi(fields: str) -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command: Sequence[str] = (program, f"--query-gpu={fields}", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _torch_cuda() -> list[Finding]:
    version = _version("torch")
    if not version:
        return []
    build = version.partition("+")[2]
    if not build.startswith("cu"):
        return []
    major = build.removeprefix("cu")[:2]
    wheel = providers.wheel_cuda_major()
    if wheel is None or not major.isdecimal() or int(major) == wheel:
        return []
    text = f"torch {version} brings CUDA {major}, onnxruntime-gpu wants CUDA {wheel}"
    return [Finding("CUDA versions", "warning", text, f"install a torch built for CUDA {wheel}")]


def _provider(status: ProviderStatus, *, required: bool) -> Finding:
    if status.creatable:
        return Finding(f"{status.name} provider", "ok", "can be created and runs")
    level = "problem" if required else "note"
    return Finding(f"{status.name} provider", level, f"{status.stage}: {status.detail}", status.fix)


def _parity(name: str) -> Finding:
    """Run one convolution on a provider and compare it with float64."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 16, 8, 8)).astype(np.float32), rng.normal(size=(8, 16, 3, 3)).astype(np.float32)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8, 6, 6])
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv")
    graph = helper.make_graph([node], "one_conv", [value], [result], [numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    try:
        got = open_session(model.SerializeToString(), name).run({"x": x})["y"]
    except RenormError as error:
        fix = "" if "Run: " in str(error) else "reinstall onnxruntime"
        return Finding(f"{name} parity", "problem", f"a convolution fails: {error}", fix)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (3, 3), axis=(2, 3))
    want = np.einsum("nchwij,ocij->nohw", windows, w.astype(np.float64)).astype(np.float32)
    found = compare(want, got, TOLERANCES[np.float32])
    text = f"one convolution, largest error {found.peak:.1e} of the largest value, against float64"
    if found.ok:
        return Finding(f"{name} parity", "ok", text)
    fix = "this provider computes wrongly here: do not use it, and report it with this output"
    return Finding(f"{name} parity", "problem", f"{text}: {found.problem}", fix)

"""What this machine can create of onnxruntime's execution providers, and what to install where it cannot.

`onnxruntime.get_available_providers()` lists what was compiled in, not what works, and a session that asks for CUDA
on a machine without it silently runs on the CPU. So a provider counts as creatable here only after a small model
ran on it; where that fails, onnxruntime's own log tells the stage apart.
"""

import contextlib
import ctypes
import functools
import glob
import importlib
import importlib.metadata
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from renorm_onnx.errors import InputError, MachineError
from renorm_onnx.interrupts import interrupts_held

_log = logging.getLogger(__name__)
_CAPTURE = threading.RLock()

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

# Every distribution that writes into the import directory `onnxruntime`; two of them destroy each other.
DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-training",
    "ort-nightly",
    "ort-nightly-gpu",
)


_NEWEST_CUDA = 13  # what wheels of onnxruntime-gpu are built for since 1.27

INSTALL_CUDA = 'pip install "onnxruntime-gpu[cuda,cudnn]"'


@dataclass(frozen=True)
class ProviderStatus:
    """Whether an execution provider can be created on this machine.

    Attributes:
        name: "cpu" or "cuda".
        creatable: A small model ran on it.
        stage: Where it stopped: "ok", "onnxruntime missing", "onnxruntime broken", "two packages installed",
            "not in this build", "libraries missing", "wrong CUDA version", "driver missing", "driver too old",
            "no device", "no kernels for this GPU" or "unknown".
        detail: onnxruntime's own words, one line.
        fix: What to do, a sentence; empty if nothing.
    """

    name: str
    creatable: bool
    stage: str
    detail: str
    fix: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        if self.creatable:
            return f"{self.name}: works ({self.detail})"
        return f"{self.name}: {self.stage}: {self.detail}. {self.fix}"


def provider_of(name: str) -> tuple[str, int]:
    """Return the short name and the device number of a provider such as "cpu", "cuda", "cuda:1".

    Raises:
        InputError: The name is none of these.
    """
    short, _, device = name.partition(":")
    for known, full in PROVIDERS.items():
        if short in (known, full) and (not device or (known == "cuda" and device.isdecimal())):
            return known, int(device or 0)
    raise InputError(f"execution provider {name!r} is unknown; expected one of {', '.join(PROVIDERS)} (or cuda:N)")


def distributions() -> dict[str, str]:
    """Return the installed onnxruntime distributions, name -> version."""
    found = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def onnxruntime() -> Any:
    """Import and return the onnxruntime module.

    Raises:
        MachineError: It is not installed, or its files were damaged by installing two of its packages.
    """
    try:
        with interrupts_held():
            module = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MachineError(
            f"onnxruntime cannot be imported ({error}); install one of: pip install onnxruntime (CPU), "
            f"{INSTALL_CUDA} (NVIDIA GPU)"
        ) from error
    if not hasattr(module, "InferenceSession"):
        raise MachineError(
            f"onnxruntime is damaged: no InferenceSession in {getattr(module, '__path__', '?')}; {reinstall_advice()}"
        )
    return module


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Collect what native code writes to stdout and stderr while the block runs.

    onnxruntime writes its log to file descriptor 2 and its "EP Error" blocks to stdout, which would corrupt
    machine-readable output. The text is in the yielded list once the block ends.
    """
    text: list[str] = []
    with _CAPTURE, tempfile.TemporaryFile() as file:
        saved: list[tuple[int, int]] = []
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.flush()
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                saved.append((descriptor, os.dup(descriptor)))
                os.dup2(file.fileno(), descriptor)
        try:
            yield text
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(AttributeError, OSError, ValueError):
                    stream.flush()
            for descriptor, copy in saved:
                os.dup2(copy, descriptor)
                os.close(copy)
            file.seek(0)
            text.append(file.read().decode("utf-8", "replace"))
            if text[0]:
                _log.debug("onnxruntime wrote: %s", text[0])


def preload_cuda() -> None:
    """Load the CUDA libraries that pip installed, so that the CUDA provider finds them.

    `onnxruntime.preload_dlls` looks only beside its own folder; packages from an overlay or another entry of
    `sys.path` are found here first. Libraries that are absent are left to the system's loader.
    """
    ort = onnxruntime()
    major = wheel_cuda_major() or _NEWEST_CUDA
    with captured():
        for library in _cuda_libraries(major):
            for folder in _nvidia_folders():
                if (folder / library).is_file():
                    with contextlib.suppress(OSError):
                        ctypes.CDLL(str(folder / library))
                    break
        with contextlib.suppress(RuntimeError, AttributeError, OSError):
            ort.preload_dlls()


def classify(log: str, *, wheel_major: int, other_majors: tuple[int, ...]) -> tuple[str, str, str]:
    """Tell the stage at which creating the CUDA provider failed, from onnxruntime's log.

    Args:
        log: What onnxruntime wrote or raised.
        wheel_major: The CUDA major version that the wheel was built for.
        other_majors: CUDA major versions whose libraries were found on this machine.

    Returns:
        Stage, the log line that shows it, and what to do.
    """
    rules = (
        (r"libcuda\.so[.\d]*: cannot open", "driver missing", _FIX_DRIVER),
        (r"CUDA (failure|error):? 35\b|driver version is insufficient", "driver too old", _FIX_OLD_DRIVER),
        (
            r"CUDA (failure|error):? 100\b|no CUDA-capable device|CUDA (failure|error):? 101\b|invalid device ordinal",
            "no device",
            "Check nvidia-smi, CUDA_VISIBLE_DEVICES and, in a container, --gpus all",
        ),
        (r"no kernel image|CUDA (failure|error):? 209\b", "no kernels for this GPU", _FIX_ARCH),
        (r"lib\S+\.so[.\d]*: cannot open", "libraries missing", f"Run: {INSTALL_CUDA}"),
    )
    for pattern, stage, fix in rules:
        match = re.search(pattern, log)
        if not match:
            continue
        if stage == "libraries missing" and other_majors:
            have = ", ".join(map(str, other_majors))
            return (
                "wrong CUDA version",
                _line_of(log, match.start()),
                f"This onnxruntime-gpu is built for CUDA {wheel_major}, the machine has CUDA {have}. Run: "
                f"{INSTALL_CUDA} (brings CUDA {wheel_major} along), or install an onnxruntime-gpu built for CUDA "
                f"{have}",
            )
        return stage, _line_of(log, match.start()), fix.format(major=wheel_major)
    first = next((line.strip() for line in log.splitlines() if line.strip()), "onnxruntime gave no reason")
    return "unknown", first, "Run onnxruntime.print_debug_info() and compare with onnxruntime.ai/docs/install"


@functools.lru_cache(maxsize=8)
def provider_status(name: str) -> ProviderStatus:
    """Run a small model on an execution provider and tell the outcome, once per process.

    Args:
        name: "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: The name is unknown.
    """
    short, device = provider_of(name)
    try:
        ort = onnxruntime()
    except MachineError as error:
        stage = "onnxruntime broken" if "damaged" in str(error) else "onnxruntime missing"
        fix = reinstall_advice() if "damaged" in str(error) else f"Run: pip install onnxruntime, or {INSTALL_CUDA}"
        return ProviderStatus(name, False, stage, str(error).partition(";")[0], fix)
    full = PROVIDERS[short]
    if full not in ort.get_available_providers():
        return _not_compiled(name, full, ort)
    if short == "cuda":
        preload_cuda()
    log, failure = _run_probe(ort, full, device)
    if failure is None:
        return ProviderStatus(name, True, "ok", f"onnxruntime {ort.__version__}", "")
    major = wheel_cuda_major() or _NEWEST_CUDA
    stage, detail, fix = classify(log + "\n" + failure, wheel_major=major, other_majors=_other_majors(major))
    if stage in ("libraries missing", "wrong CUDA version") and not driver_visible():
        fix = f"{_FIX_DRIVER}. Then run: {INSTALL_CUDA}"
    return ProviderStatus(name, False, stage, detail, fix)


def driver_visible() -> bool:
    """Tell whether this process can load NVIDIA's driver library."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _not_compiled(name: str, full: str, ort: Any) -> ProviderStatus:
    installed = distributions()
    detail = f"{full} is not compiled into onnxruntime {ort.__version__} at {Path(ort.__file__).parent}"
    if len(installed) > 1:
        listed = " and ".join(f"{key} {value}" for key, value in installed.items())
        return ProviderStatus(
            name, False, "two packages installed", f"{detail}; {listed} overwrite each other", reinstall_advice()
        )
    return ProviderStatus(
        name, False, "not in this build", detail, f"Run: pip uninstall -y onnxruntime && {INSTALL_CUDA}"
    )


def _run_probe(ort: Any, full: str, device: int) -> tuple[str, str | None]:
    """Return what onnxruntime wrote, and why the probe failed (None: it ran)."""
    import numpy as np
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"], "probe")], "probe", [value], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = 2
    options.intra_op_num_threads = 1
    failure: str | None = None
    with captured() as text:
        try:
            entry: Any = (full, {"device_id": str(device)}) if full != PROVIDERS["cpu"] else full
            session = ort.InferenceSession(model.SerializeToString(), options, providers=[entry], enable_fallback=0)
            if session.get_providers()[0] != full:
                failure = f"the session runs on {session.get_providers()[0]} instead of {full}"
            elif not np.array_equal(session.run(["y"], {"x": np.asarray([1, 2, 3], np.float32)})[0], [2, 4, 6]):
                failure = f"{full} computes 1 + 1 wrongly"
        except Exception as error:  # onnxruntime's exceptions share no base class
            failure = str(error)
    return text[0], failure


def _line_of(log: str, position: int) -> str:
    start = log.rfind("\n", 0, position) + 1
    end = log.find("\n", position)
    line = re.sub(r"\x1b\[[\d;]*m", "", log[start : end if end >= 0 else len(log)]).strip()
    found = re.search(r"(lib\S+\.so[.\d]*: cannot open[^\n]*|CUDA (failure|error)[^\n]*)", line)
    return (found.group(1) if found else line)[:300]


def reinstall_advice() -> str:
    """Return how to repair an onnxruntime that two packages wrote over."""
    return (
        f"Run: pip uninstall -y {' '.join(distributions() or ['onnxruntime', 'onnxruntime-gpu'])}, then one of "
        f"pip install onnxruntime (CPU) or {INSTALL_CUDA} (NVIDIA GPU)"
    )


def wheel_cuda_major() -> int | None:
    """Return the CUDA major version that onnxruntime was built for; None: without CUDA, or not installed."""
    try:
        version = str(getattr(onnxruntime(), "cuda_version", "") or "")
    except MachineError:
        return None
    return int(version.partition(".")[0]) if version[:1].isdigit() else None


def _cuda_libraries(major: int) -> tuple[str, ...]:
    """Return the libraries that the provider loads; each may need those before it."""
    versions = {"cudart": major, "nvJitLink": major, "nvrtc": major, "cublasLt": major, "cublas": major}
    versions |= {"curand": 10, "cufft": major - 1, "cudnn": 9}
    return tuple(f"lib{stem}.so.{version}" for stem, version in versions.items())


def _nvidia_folders() -> list[Path]:
    patterns = [f"{entry or '.'}/nvidia/*/lib" for entry in sys.path]
    return [Path(found) for pattern in patterns for found in sorted(glob.glob(pattern))]


def _other_majors(wheel_major: int) -> tuple[int, ...]:
    """Return the CUDA major versions, other than the wheel's, whose cuBLAS lies on this machine."""
    folders = [str(folder) for folder in _nvidia_folders()]
    folders += glob.glob("/usr/local/cuda*/lib64") + os.environ.get("LD_LIBRARY_PATH", "").split(":")
    majors = set()
    for folder in filter(None, folders):
        for path in glob.glob(f"{folder}/libcublasLt.so.*"):
            majors.add(int(path.rpartition(".so.")[2].partition(".")[0]))
    return () if wheel_major in majors else tuple(sorted(majors))


_FIX_DRIVER = "No NVIDIA driver is visible: install one, or pass it into the container (--gpus all)"
_FIX_OLD_DRIVER = "The NVIDIA driver is too old for CUDA {major}: update it, or install an older onnxruntime-gpu"
_FIX_ARCH = "onnxruntime-gpu's wheel has no kernels for this GPU generation: build it, or use another GPU"

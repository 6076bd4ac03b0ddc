import os
import signal
import subprocess
import sys
import types

import pytest

from renorm_onnx.errors import InputError, MachineError
from renorm_onnx.runtime import providers

# What onnxruntime-gpu 1.31.1 wrote on machines that lack one thing each.
NO_LIBRARIES = (
    "\x1b[1;31m2026-11-22 [E:onnxruntime:Default, provider_bridge_ort.cc:2374 TryGetProviderInfo_CUDA] "
    "/lib/provider_bridge_ort.cc:1985 onnxruntime::Provider& [ONNXRuntimeError] : 1 : FAIL : Failed to load library "
    "/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open "
    "shared object file: No such file or directory\n\x1b[m\n[W] Failed to create CUDAExecutionProvider."
)
NO_DRIVER = NO_LIBRARIES.replace("libcublasLt.so.13", "libcuda.so.1")
NO_DEVICE = (
    "*************** EP Error ***************\nEP Error cuda_call.cc:129 CUDA failure 100: no CUDA-capable device is "
    "detected ; GPU=-1 ; hostname=h ; file=cuda_execution_provider.cc ; expr=cudaSetDevice(info_.device_id);"
)
OLD_DRIVER = "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=0"
WRONG_ARCH = "CUDA error cudaErrorNoKernelImageForDevice:no kernel image is available for execution on the device"


@pytest.mark.parametrize(
    ("log", "others", "stage", "shown", "fix"),
    [
        (NO_LIBRARIES, (), "libraries missing", "libcublasLt.so.13: cannot open", "onnxruntime-gpu[cuda,cudnn]"),
        (NO_LIBRARIES, (12,), "wrong CUDA version", "libcublasLt.so.13", "the machine has CUDA 12"),
        (NO_DRIVER, (), "driver missing", "libcuda.so.1: cannot open", "--gpus all"),
        (NO_DEVICE, (), "no device", "CUDA failure 100: no CUDA-capable device", "nvidia-smi"),
        (OLD_DRIVER, (), "driver too old", "CUDA failure 35", "too old for CUDA 13"),
        (WRONG_ARCH, (), "no kernels for this GPU", "no kernel image", "no kernels for this GPU generation"),
        ("something new", (), "unknown", "something new", "print_debug_info"),
        ("", (), "unknown", "no reason", "print_debug_info"),
    ],
)
def test_each_stage_of_a_failing_cuda_provider_is_told_apart(log, others, stage, shown, fix):
    got_stage, detail, got_fix = providers.classify(log, wheel_major=13, other_majors=others)
    assert (got_stage, shown in detail, fix in got_fix) == (stage, True, True), (got_stage, detail, got_fix)
    assert "\n" not in detail
    assert "\x1b" not in detail


@pytest.mark.parametrize("others", [(), (12,)])
def test_without_a_driver_the_advice_is_the_driver_first_and_then_the_libraries(monkeypatch, others):
    monkeypatch.setattr(providers, "PROVIDERS", {**providers.PROVIDERS, "cuda": "CPUExecutionProvider"})
    monkeypatch.setattr(providers, "_run_probe", lambda *given: (NO_LIBRARIES, ""))
    monkeypatch.setattr(providers, "_other_majors", lambda major: others)
    monkeypatch.setattr(providers, "driver_visible", lambda: False)
    status = providers.provider_status.__wrapped__("cuda")
    assert status.fix == (
        "No NVIDIA driver is visible: install one, or pass it into the container (--gpus all). "
        'Then run: pip install "onnxruntime-gpu[cuda,cudnn]"'
    )


def test_the_cpu_provider_runs_a_model():
    status = providers.provider_status("cpu")
    assert status.creatable
    assert status.stage == "ok"
    assert "onnxruntime" in str(status)


def test_two_installed_packages_are_named_as_the_reason_for_a_provider_that_is_not_there(monkeypatch):
    ort = providers.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(providers, "distributions", lambda: {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"})
    status = providers.provider_status.__wrapped__("cuda")
    assert (status.creatable, status.stage) == (False, "two packages installed")
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1" in status.detail
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in status.fix


def test_a_cpu_only_wheel_is_told_apart_from_two_packages(monkeypatch):
    ort = providers.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(providers, "distributions", lambda: {"onnxruntime": "1.32.0"})
    status = providers.provider_status.__wrapped__("cuda")
    assert status.stage == "not in this build"
    assert "pip uninstall -y onnxruntime &&" in status.fix


def test_a_session_that_silently_fell_back_to_the_cpu_is_not_creatable(monkeypatch):
    ort = providers.onnxruntime()
    monkeypatch.setattr(providers, "preload_cuda", lambda: None)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    real = ort.InferenceSession

    def on_the_cpu(model, options, providers, enable_fallback):
        assert enable_fallback == 0
        return real(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", on_the_cpu)
    status = providers.provider_status.__wrapped__("cuda")
    assert not status.creatable
    assert "runs on CPUExecutionProvider instead of CUDAExecutionProvider" in status.detail


def test_an_absent_and_a_damaged_onnxruntime_are_machine_errors_with_a_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MachineError, match=r"cannot be imported .*pip install onnxruntime"):
        providers.onnxruntime()
    assert providers.provider_status.__wrapped__("cpu").stage == "onnxruntime missing"
    monkeypatch.setitem(sys.modules, "onnxruntime", type(sys)("onnxruntime"))
    with pytest.raises(MachineError, match=r"is damaged.*pip uninstall -y"):
        providers.onnxruntime()
    assert providers.provider_status.__wrapped__("cpu").stage == "onnxruntime broken"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:1", "", "TensorrtExecutionProvider"])
def test_an_unknown_provider_is_an_input_error_that_lists_the_known_ones(name):
    with pytest.raises(InputError, match=r"is unknown; expected one of cpu, cuda"):
        providers.provider_of(name)


def test_provider_names_may_carry_a_device_number():
    assert providers.provider_of("cuda:2") == ("cuda", 2)
    assert providers.provider_of("CPUExecutionProvider") == ("cpu", 0)


def test_native_writes_to_stdout_and_stderr_are_captured():
    code = (
        "import os\nfrom renorm_onnx.runtime.providers import captured\n"
        "with captured() as text:\n    os.write(1, b'one'); os.write(2, b'two'); print('three')\n"
        "print(text)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout == "['onetwothree\\n']\n"
    assert done.stderr == ""


def test_asking_for_cuda_without_one_writes_nothing_to_the_terminal():
    code = "from renorm_onnx.runtime.providers import provider_status as s; print(s('cuda').name)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout == "cuda\n"
    assert done.stderr == ""


def test_preloading_finds_cuda_libraries_of_any_entry_of_the_path(monkeypatch, tmp_path):
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    for library in ("libcudart.so.13", "libcublasLt.so.13", "libcublasLt.so.12", "libcudnn.so.9"):
        (folder / library).touch()
    loaded = []
    monkeypatch.setattr(sys, "path", [str(tmp_path / "empty"), str(tmp_path)])
    monkeypatch.setattr(providers.ctypes, "CDLL", lambda path, *_: loaded.append(os.path.basename(path)))
    monkeypatch.setattr(providers.onnxruntime(), "cuda_version", "13.0")
    monkeypatch.setattr(providers.onnxruntime(), "preload_dlls", lambda: None)
    providers.preload_cuda()
    assert loaded == ["libcudart.so.13", "libcublasLt.so.13", "libcudnn.so.9"]


def test_another_cuda_version_is_noticed_only_where_the_right_one_is_missing(monkeypatch, tmp_path):
    folder = tmp_path / "nvidia" / "cublas" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcublasLt.so.12").touch()
    monkeypatch.setattr(providers, "_nvidia_folders", lambda: [folder])
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    monkeypatch.setattr(
        providers.glob, "glob", lambda p: [str(folder / "libcublasLt.so.12")] if str(folder) in p else []
    )
    assert providers._other_majors(13) == (12,)
    assert providers._other_majors(12) == ()


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_until_onnxruntime_is_loaded(monkeypatch):
    loaded = types.SimpleNamespace(InferenceSession=None)

    def load(name):
        signal.raise_signal(signal.SIGINT)
        done.append(name)
        return loaded

    done: list[str] = []
    monkeypatch.setattr(providers.importlib, "import_module", load)
    with pytest.raises(KeyboardInterrupt):
        providers.onnxruntime()
    assert done == ["onnxruntime"]

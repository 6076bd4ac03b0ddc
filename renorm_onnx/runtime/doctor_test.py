import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from renorm_onnx.errors import InputError
from renorm_onnx.runtime import doctor, providers
from renorm_onnx.runtime.providers import ProviderStatus
from renorm_onnx.runtime.sessions.ort_errors import run_error
from renorm_onnx.version import __version__


def test_a_machine_that_can_run_on_its_cpu_is_healthy():
    diagnosis = doctor.diagnose()
    assert diagnosis.ok, str(diagnosis)
    by_name = {finding.name: finding for finding in diagnosis.findings}
    assert by_name["cpu parity"].level == "ok"
    assert by_name["packages"].text.endswith(f", renorm-onnx {__version__}")
    assert "against float64" in by_name["cpu parity"].text
    assert {"system", "packages", "onnxruntime", "cores", "NVIDIA driver", "cuda provider"} <= set(by_name)
    assert json.loads(json.dumps(diagnosis.to_dict()))["schema_version"] == 1
    assert str(diagnosis).splitlines()[-1] == "cpu: ready"


@pytest.fixture
def no_cuda(monkeypatch):
    real = providers.provider_status
    broken = ProviderStatus("cuda", False, "driver missing", "libcuda.so.1: cannot open", "Install a driver")
    monkeypatch.setattr(providers, "provider_status", lambda name: broken if name == "cuda" else real(name))


def test_a_missing_cuda_is_a_problem_only_if_asked_for(no_cuda):
    assert doctor.diagnose().ok
    asked = doctor.diagnose("cuda")
    assert not asked.ok
    (finding,) = [f for f in asked.findings if f.name == "cuda provider"]
    assert (finding.level, finding.fix) == ("problem", "Install a driver")
    assert "driver missing: libcuda.so.1" in str(asked)
    assert str(asked).splitlines()[-1] == "cuda: not usable on this machine"


def test_a_provider_that_computes_wrongly_is_not_healthy(monkeypatch):
    def wrong(model, name):
        return SimpleNamespace(run=lambda feeds: {"y": np.full((2, 8, 6, 6), 0.5, np.float32)})

    monkeypatch.setattr(doctor, "open_session", wrong)
    diagnosis = doctor.diagnose("cpu")
    assert not diagnosis.ok
    (finding,) = [f for f in diagnosis.findings if f.name == "cpu parity"]
    assert finding.level == "problem"
    assert "computes wrongly" in finding.fix


def test_two_onnxruntime_packages_are_warned_about_even_where_they_work(monkeypatch):
    monkeypatch.setattr(providers, "distributions", lambda: {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"})
    (finding,) = [f for f in doctor.diagnose().findings if f.name == "onnxruntime"]
    assert finding.level == "warning"
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1" in finding.text
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in finding.fix


@pytest.mark.parametrize(
    ("line", "level", "text"),
    [
        ("NVIDIA H100 80GB HBM3, 9.0", "ok", "compute capability 9.0"),
        ("Tesla V100-SXM2-16GB, 7.0", "warning", "hold code for 75, 80, 86, 89, 90, 120 alone"),
    ],
)
def test_a_gpu_that_the_wheel_has_no_code_for_is_named(monkeypatch, line, level, text):
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda fields: [line])
    (finding,) = doctor._architecture()
    assert finding.level == level
    assert text in finding.text


def test_the_drivers_answer_is_read_as_a_cuda_version(monkeypatch):
    def answer(pointer):
        pointer._obj.value = 13020
        return 0

    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=answer))
    (finding,) = doctor._driver()
    assert finding.text == "supports CUDA up to 13.2"
    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=lambda pointer: 999))
    assert doctor._driver()[0].level == "warning"


def test_a_torch_built_for_another_cuda_is_named(monkeypatch):
    monkeypatch.setattr(providers, "wheel_cuda_major", lambda: 13)
    for version, found in (("2.11.0+cu126", 1), ("2.11.0+cu130", 0), ("2.11.0+cpu", 0), ("2.11.0", 0), ("", 0)):
        monkeypatch.setattr(doctor, "_version", lambda name, version=version: version)
        assert len(doctor._torch_cuda()) == found, version


def test_a_missing_cudnn_is_named_where_a_convolution_needs_it(monkeypatch):
    def without(feeds):
        raise run_error(RuntimeError("cuDNN is not available. Install cuDNN, update the system library search path"))

    monkeypatch.setattr(doctor, "open_session", lambda model, name: SimpleNamespace(run=without))
    finding = doctor._parity("cuda")
    assert (finding.level, finding.fix) == ("problem", "")
    assert 'cuDNN is missing on this machine. Run: pip install "onnxruntime-gpu[cuda,cudnn]"' in finding.text


def test_an_unknown_provider_is_an_input_error():
    with pytest.raises(InputError, match="'tpu' is unknown"):
        doctor.diagnose("tpu")


def test_diagnosing_imports_no_torch():
    code = "import sys; from renorm_onnx.runtime.doctor import diagnose; diagnose(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert done.stderr == ""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from renorm_onnx.errors import InputError, MachineError, ModelFileError
from renorm_onnx.runtime import Session, providers
from renorm_onnx.runtime.session import open_session
from renorm_onnx.runtime.sessions import placement
from renorm_onnx.runtime.sessions.ort_errors import run_error
from renorm_onnx.runtime.sessions.placement import Placed

TWO_INPUTS = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3] a, float[N,3] b) => (float[N,3] total, bool[N,3] larger) {
  total = Add(a, b)
  larger = Greater(a, b)
}"""

CHOICE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3] x, bool[N,3] mask) => (float[N,3] y, bool[N,3] inverse) {
  negative = Neg(x)
  y = Where(mask, x, negative)
  inverse = Not(mask)
}"""


def model(text=TWO_INPUTS):
    return onnx.parser.parse_model(text)


def rows(seed=0, size=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, 3)).astype(np.float32), rng.normal(size=(size, 3)).astype(np.float32)


def test_a_session_runs_numpy_by_name_and_states_its_options():
    session = open_session(model(), "cpu", optimize="off", threads=1)
    a, b = rows()
    got = session.run({"a": a, "b": b})
    assert list(got) == ["total", "larger"]
    np.testing.assert_array_equal(got["total"], a + b)
    np.testing.assert_array_equal(session.run({"a": a, "b": b}, ["larger"])["larger"], a > b)
    assert session.run({"a": a, "b": b}, []) == {}
    assert (session.provider, session.optimize, session.threads, session.spinning) == ("cpu", "off", 1, False)
    assert {node.provider for node in session.placement} == {"CPUExecutionProvider"}
    assert {node.op_type for node in session.placement} == {"Add", "Greater"}
    assert session.on_cpu == ()


def test_a_model_may_come_as_bytes_path_or_protobuf(tmp_path):
    onnx.save(model(), tmp_path / "m.onnx")
    a, b = rows()
    for source in (model(), model().SerializeToString(), tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        np.testing.assert_array_equal(open_session(source).run({"a": a, "b": b})["total"], a + b)


def test_a_call_with_numpy_gives_numpy_in_the_order_of_the_outputs():
    session = Session(model())
    a, b = rows()
    total, larger = session(a, b=b)
    np.testing.assert_array_equal(total, a + b)
    np.testing.assert_array_equal(larger, a > b)


def test_torch_tensors_go_in_and_come_out_without_a_copy():
    torch = pytest.importorskip("torch")
    session = Session(model())
    a, b = (torch.from_numpy(array) for array in rows())
    total, larger = session(a, b)
    assert isinstance(total, torch.Tensor)
    assert larger.dtype == torch.bool
    torch.testing.assert_close(total, a + b, rtol=0, atol=0)
    assert torch.equal(larger, a > b)
    binding = session.bind({"a": a, "b": b})
    value = session._ort.OrtValue.from_dlpack(a)
    assert value.data_ptr() == a.data_ptr()
    session.run_bound(binding)
    out = binding.get_outputs()[0]
    assert torch.from_dlpack(out).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("size", [2, 0])
def test_booleans_of_torch_go_in_and_come_out(size):
    torch = pytest.importorskip("torch")
    session = Session(model(CHOICE))
    x, mask = torch.arange(3.0 * size).reshape(size, 3), torch.ones(size, 3).bool()
    mask[:, 1] = False
    y, inverse = session(x, mask)
    assert torch.equal(y, torch.where(mask, x, -x))
    assert torch.equal(inverse, ~mask)
    with pytest.raises(InputError, match="input 'mask' has type float32, expected bool"):
        session(x, x)


def test_outputs_outlive_their_session():
    torch = pytest.importorskip("torch")
    a, b = (torch.from_numpy(array) for array in rows())
    total = Session(model())(a, b)[0]
    torch.testing.assert_close(total, a + b, rtol=0, atol=0)


def test_torch_tensors_that_are_not_contiguous_or_need_gradients_are_accepted():
    torch = pytest.importorskip("torch")
    a = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).T.requires_grad_()
    b = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    total = Session(model())(a, b)[0]
    torch.testing.assert_close(total, (a + b).detach(), rtol=0, atol=0)
    with pytest.raises(InputError, match="input 'b' has type float64, expected float32"):
        Session(model())(a, b.double())


def test_warming_up_needs_no_inputs():
    session = Session(model())
    session.warm_up()
    session.warm_up(*rows(), runs=1)
    assert not session.uses_cuda_graph


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, a, b: s.run({"a": a}), r"inputs given are \['a'\], expected \['a', 'b'\]"),
        (lambda s, a, b: s.run([a, b]), "inputs given are a list, expected a mapping from names to arrays"),
        (lambda s, a, b: s.run({"a": a, "b": b[:, :2]}), r"input 'b' has shape \(4, 2\), expected \('N', 3\)"),
        (lambda s, a, b: s.run({"a": a, "b": b[0]}), r"input 'b' has shape \(3,\), expected \('N', 3\)"),
        (lambda s, a, b: s.run({"a": a, "b": b.astype(np.float64)}), "input 'b' has type float64, expected float32"),
        (lambda s, a, b: s.run({"a": a, "b": "text"}), "input 'b' has type <U4, expected float32"),
        (lambda s, a, b: s.run({"a": a, "b": [[1.0], [2.0, 3.0]]}), "input 'b' is no array: .*inhomogeneous"),
        (lambda s, a, b: s.run({"a": a, "b": b}, ["no"]), r"outputs asked for are \['no'\], the model has \["),
        (lambda s, a, b: s.run({"a": a, "b": b[:3]}), "running failed: .*3 by 4"),
        (lambda s, a, b: s(a), r"inputs given are \['a'\], expected \['a', 'b'\]"),
        (lambda s, a, b: s(a, b, b), "3 inputs given, expected 2: a, b"),
        (lambda s, a, b: s(a, a=a), r"inputs given are \['a'\]"),
        (lambda s, a, b: s.bind({"c": a}), "input 'c' is not one of"),
        (
            lambda s, a, b: s.bind({"a": a.astype(np.int32), "b": b}),
            "input 'a' has type int32, expected float",
        ),
    ],
)
def test_wrong_inputs_are_input_errors_that_say_what_came(call, message):
    with pytest.raises(InputError, match=message):
        call(Session(model()), *rows())


def test_an_input_that_may_be_left_out_is_no_stranger():
    text = model().SerializeToString()
    overridable = onnx.ModelProto.FromString(text)
    overridable.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 3), np.float32), "b"))
    session = Session(overridable)
    a, b = rows()
    np.testing.assert_array_equal(session.run({"a": a, "b": b})["total"], a + b)
    with pytest.raises(InputError, match=r"input 'a' has type int64, expected float32"):
        session.run({"a": np.ones((4, 3), np.int64), "b": b})


def test_unknown_options_are_input_errors():
    with pytest.raises(InputError, match="optimize='most', expected one of off, basic, extended, all"):
        Session(model(), optimize="most")
    with pytest.raises(InputError, match="threads=-1"):
        Session(model(), threads=-1)
    with pytest.raises(InputError, match="'gpu' is unknown"):
        Session(model(), "gpu")
    with pytest.raises(MachineError, match="cuda_graph=True is not possible: provider is 'cpu'"):
        Session(model(), cuda_graph=True)


def test_a_provider_that_cannot_be_created_is_a_machine_error_with_the_cure(monkeypatch):
    broken = providers.ProviderStatus("cuda", False, "driver missing", "libcuda.so.1: cannot open", "Install one")
    monkeypatch.setattr(providers, "provider_status", lambda name: broken)
    with pytest.raises(MachineError, match=r"'cuda' cannot be created here: driver missing: libcuda.*\. Install one"):
        Session(model(), "cuda")


def test_what_onnxruntime_refuses_is_a_model_error_and_what_it_lacks_a_machine_error():
    with pytest.raises(ModelFileError, match="refuses the model"):
        open_session(b"not a model")
    wrong = model(TWO_INPUTS.replace("Add(a, b)", "Reshape(a, b)"))
    with pytest.raises(ModelFileError, match="refuses the model"):
        open_session(wrong.SerializeToString())
    double = model(
        '<ir_version: 8, opset_import: ["" : 17]> g (double[1,1,3,3] x, double[1,1,1,1] w) => (double[1,1,3,3] y)'
        "{ y = Conv(x, w) }"
    )
    newer = model(TWO_INPUTS.replace('["" : 17]', '["" : 99]'))
    elsewhere = model(TWO_INPUTS.replace('["" : 17]', '["" : 17, "elsewhere" : 1]').replace("Add(", "elsewhere.Add("))
    for lacking in (double, newer, elsewhere):
        with pytest.raises(MachineError, match="no kernel for this model"):
            open_session(lacking)


class FailingOnTheDevice:
    """A compiled session whose device is lost at the next run."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def run(self, *_):
        raise onnxruntime.capi.onnxruntime_pybind11_state.EPFail("[ONNXRuntimeError] : 11 : EP_FAIL : device lost")


def test_a_run_that_the_provider_fails_is_not_repeated_on_another(capfd):
    session = Session(model())
    inner = session._session
    inner._sess = FailingOnTheDevice(inner._sess)
    a, b = rows()
    for _ in range(2):
        with pytest.raises(MachineError, match=r"running failed: .*device lost"):
            session.run({"a": a, "b": b})
    assert "Falling back" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            "cuDNN is not available. Install cuDNN, update the system library search path",
            MachineError,
            "cuDNN is missing",
        ),
        (
            "A cuDNN handle is required for CUDA reduction.",
            MachineError,
            "Run: pip install .onnxruntime-gpu",
        ),
        ("CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED", MachineError, "running failed: CUBLAS failure 13"),
        ("Failed to allocate memory for requested buffer of size 8", MachineError, "running failed: Failed to all"),
        ("Attempting to broadcast an axis by a dimension other than 1", InputError, "running failed: Attempting"),
    ],
)
def test_what_the_device_lacks_is_told_from_what_the_inputs_are(text, kind, message):
    error = run_error(RuntimeError(text))
    assert isinstance(error, kind)
    with pytest.raises(kind, match=message):
        raise error


class FakeCuda:
    """An onnxruntime whose CUDA provider leaves chosen operators to the CPU, as the real one does."""

    def __init__(self, real, on_cpu):
        self.real, self.on_cpu, self.made = real, on_cpu, []

    def __getattr__(self, name):
        return getattr(self.real, name)

    def InferenceSession(self, source, options, providers, enable_fallback):  # noqa: N802
        assert enable_fallback == 0
        names = [entry if isinstance(entry, str) else entry[0] for entry in providers]
        strict = options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        self.made.append((names, strict, dict(providers[0][1]) if not isinstance(providers[0], str) else {}))
        if strict and "CPUExecutionProvider" in names:
            raise RuntimeError("Conflicting session configuration")
        if strict and self.on_cpu:
            raise RuntimeError("assigned to the default CPU EP, but fallback to CPU EP has been explicitly disabled")
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
        inner = self.real.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return FakeSession(inner, self.on_cpu)


class FakeSession:
    def __init__(self, inner, on_cpu):
        self.inner, self.on_cpu = inner, on_cpu

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def get_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def fake_cuda(monkeypatch):
    real = providers.onnxruntime()

    def install(*on_cpu):
        fake = FakeCuda(real, on_cpu)
        works = providers.ProviderStatus("cuda", True, "ok", "", "")
        monkeypatch.setattr(providers, "provider_status", lambda name: works)
        monkeypatch.setattr(providers, "onnxruntime", lambda: fake)

        def placed(session):
            return tuple(
                Placed(("CPU" if n.op_type in on_cpu else "CUDA") + "ExecutionProvider", n.op_type, n.name)
                for n in placement.placement_of(session.inner)
            )

        monkeypatch.setattr("renorm_onnx.runtime.session.placement_of", placed)
        return fake

    return install


def test_cuda_is_asked_for_strictly_and_with_every_option_pinned(fake_cuda):
    fake = fake_cuda()
    session = open_session(model(), "cuda:1")
    names, strict, options = fake.made[0]
    assert names == ["CUDAExecutionProvider"]
    assert strict
    assert options["use_tf32"] == "0"
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert options["device_id"] == "1"
    assert options["enable_cuda_graph"] == "0"
    assert session.on_cpu == ()


def test_a_graph_replays_in_a_session_of_its_own(fake_cuda, monkeypatch):
    """It writes wherever its intermediate values were at capture: other runs must not keep anything there."""
    captured = []

    def graph(ort, session, inputs, outputs, device):
        captured.append(session)
        return SimpleNamespace(takes=lambda example: True, run=lambda feeds, example: ["replayed", "too"])

    monkeypatch.setattr("renorm_onnx.runtime.session.CudaGraph", graph)
    fixed = model(TWO_INPUTS.replace("N", "4"))
    fake = fake_cuda()
    session = Session(fixed, "cuda")
    assert [options["enable_cuda_graph"] for _, _, options in fake.made] == ["0", "1"]
    assert session.uses_cuda_graph
    assert captured[0] is not session._session
    a, b = rows()
    assert session(a, b) == ("replayed", "too")
    np.testing.assert_array_equal(session.run({"a": a, "b": b})["total"], a + b)


def test_what_is_bound_must_have_the_type_of_the_input(fake_cuda):
    fake_cuda()
    session = open_session(model(), "cuda")
    a, b = rows()
    with pytest.raises(InputError, match="input 'a' has type float64, expected float32"):
        session.bind({"a": a.astype(np.float64), "b": b})


SIZES = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3] x) => (float[3,N] y) {
  s = Shape(x)
  minus = Constant<value_ints=[-1]>()
  three = Constant<value_ints=[3]>()
  c = Concat<axis=0>(three, minus)
  y = Reshape(x, c)
}"""


def test_sizes_computed_on_the_cpu_are_allowed_and_listed(fake_cuda):
    fake = fake_cuda("Concat", "Shape")
    session = open_session(model(SIZES), "cuda")
    assert [names for names, _, _ in fake.made] == [
        ["CUDAExecutionProvider"],
        ["CUDAExecutionProvider", "CPUExecutionProvider"],
    ]
    assert {node.op_type for node in session.on_cpu} == {"Concat", "Shape"}


def test_an_operator_left_to_the_cpu_is_a_machine_error_unless_allowed(fake_cuda):
    fake_cuda("Softmax")
    left = model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3] x) => (float[N,3] y) { r = Relu(x) y = Softmax(r) }'
    )
    with pytest.raises(MachineError, match=r"1 operators have no kernel .* would run on the CPU: Softmax"):
        open_session(left, "cuda")
    assert [node.op_type for node in open_session(left, "cuda", strict=False).on_cpu] == ["Softmax"]


def test_float_arithmetic_is_no_size_computation(fake_cuda):
    fake_cuda("Add")
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3] x) => (float[N,3] y) { y = Add(x, x) }'
    named = model(text)
    named.graph.node[0].name = "adding"
    with pytest.raises(MachineError, match="would run on the CPU: Add 'adding'"):
        open_session(named, "cuda")


def test_a_session_on_the_wrong_provider_is_never_returned(fake_cuda, monkeypatch):
    fake_cuda()
    monkeypatch.setattr(FakeSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(MachineError, match="asked for CUDAExecutionProvider, onnxruntime created CPUExecutionProvider"):
        open_session(model(), "cuda")


def test_importing_the_package_of_the_session_is_cheap():
    code = "import sys, renorm_onnx.runtime; print({'numpy', 'onnx', 'onnxruntime', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

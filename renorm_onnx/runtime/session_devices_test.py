"""A session with tensors of torch, on each device: the same tests here on the CPU and on a GPU with CUDA."""

import copy

import numpy as np
import pytest
import torch

from renorm_onnx.errors import InputError
from renorm_onnx.runtime import Session
from renorm_onnx.runtime.parity import verify
from renorm_onnx.runtime.parity_networks_test import build
from renorm_onnx.runtime.session import open_session
from renorm_onnx.runtime.session_test import CHOICE, model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda("onnxruntime", "torch"))]


def fixed(name, dtype=np.float32, batch=4):
    """A network with a fixed batch, as a CUDA graph needs."""
    proto = copy.deepcopy(build(name, fold=True, dtype=dtype))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return proto


def batch_of(device, dtype=torch.float32, seed=0):
    return torch.randn(4, 17, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def close(got, want, dtype=torch.float32):
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return torch.allclose(
        got.cpu().double(), want.cpu().double(), rtol=tolerance, atol=tolerance * float(want.abs().max())
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("static", [False, True])
def test_tensors_come_back_where_they_came_from(device, dtype, static):
    kind = np.float16 if dtype == torch.float16 else np.float32
    proto = fixed("mlp", kind) if static else build("mlp", fold=True, dtype=kind)
    session = Session(proto, device)
    assert session.uses_cuda_graph is (static and device == "cuda")
    expected = open_session(proto, "cpu")
    for seed in range(5):
        x = batch_of(device, dtype, seed)
        want = torch.from_numpy(expected.run({"x": x.cpu().numpy()})["y"])
        y = session(x)
        assert (y.device.type, y.dtype, y.shape) == (device, dtype, want.shape)
        assert close(y, want, dtype)
        there = session(x.cpu())
        assert there.device.type == "cpu"
        assert close(there, want, dtype)
        assert close(torch.from_numpy(np.asarray(session(x.cpu().numpy()))), want, dtype)
        assert close(torch.from_numpy(session.run({"x": x.cpu().numpy()})["y"]), want, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_earlier_results_are_not_written_over_by_later_calls(device):
    session = Session(fixed("mlp"), device)
    inputs = [batch_of(device, seed=seed) for seed in range(4)]
    results = [session(x) for x in inputs]
    kept = [y.clone() for y in results]
    for x in inputs:
        session(-x)
    assert all(torch.equal(y, old) for y, old in zip(results, kept, strict=True))
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_that_are_no_contiguous_leaves_are_taken(device):
    session = Session(build("mlp", fold=True), device)
    x = batch_of(device)
    want = session(x)
    assert torch.equal(session(x.t().contiguous().t()), want)
    assert torch.equal(session(x.clone().requires_grad_()), want)
    assert device == "cuda" or session(x[:0]).shape == (0, 6)
    with torch.autocast(device):
        assert torch.equal(session(x), want)


@pytest.mark.parametrize("device", DEVICES)
def test_a_computation_that_is_still_running_is_waited_for(device):
    session = Session(build("mlp", fold=True), device)
    x = batch_of(device)
    want = session(2 * x)
    busy = torch.randn(512, 512, device=device)
    for _ in range(20):
        for _ in range(10):
            busy = busy @ busy / 512
        assert torch.equal(session(x + x), want)


@pytest.mark.parametrize("device", DEVICES)
def test_booleans_go_in_and_come_out(device):
    session = Session(model(CHOICE), device)
    x, mask = torch.arange(6.0, device=device).reshape(2, 3), torch.ones(2, 3, device=device).bool()
    mask[:, 1] = False
    y, inverse = session(x, mask)
    assert torch.equal(y, torch.where(mask, x, -x))
    assert torch.equal(inverse, ~mask)


@pytest.mark.parametrize("device", DEVICES)
def test_bound_memory_is_run_again_without_copies(device):
    session = Session(build("mlp", fold=True), device)
    x = batch_of("cpu")
    binding = session.bind({"x": x.numpy()})
    for _ in range(3):
        session.run_bound(binding)
    assert close(torch.from_numpy(binding.copy_outputs_to_cpu()[0]), session(x))


@pytest.mark.parametrize("device", DEVICES)
def test_warming_up_and_wrong_shapes(device):
    session = Session(fixed("mlp"), device)
    session.warm_up()
    session.warm_up(batch_of(device), runs=1)
    with pytest.raises(InputError, match="x"):
        session(batch_of(device)[:2])
    with pytest.raises(InputError, match="expected"):
        session(batch_of(device, torch.float64))
    assert session(batch_of(device)).shape == (4, 6)


@pytest.mark.cuda("onnxruntime", "torch")
def test_a_replay_computes_on_the_inputs_of_the_last_call():
    session = Session(fixed("mlp"), "cuda", cuda_graph=True)
    first, second = batch_of("cuda", seed=1), batch_of("cuda", seed=2)
    once, twice = session(first), session(second)
    session.replay()
    assert torch.equal(session(second), twice)
    assert not torch.equal(once, twice)


@pytest.mark.cuda("onnxruntime", "torch")
@pytest.mark.parametrize("name", ["mlp", "convnet", "upsampler"])
def test_the_verdict_holds_on_the_gpu_and_refuses_a_wrong_fold_there(name):
    assert verify(build(name), build(name, fold=True), providers=("cpu", "cuda")).ok
    verdict = verify(build(name), build(name, fold=True, eps=0.0), providers=("cuda",))
    assert verdict.outcome == "no"

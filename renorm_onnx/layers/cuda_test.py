"""The CUDA path of the layers."""

import copy

import pytest
import torch

from renorm_onnx.layers.conftest import LAYERS, make_batch, outcome, shaken, worst
from renorm_onnx.layers.schedules import HardSwitch, Ramp

pytestmark = pytest.mark.cuda("torch")


def pair(cuda, rank=4, dtype=torch.float64, **options):
    """The same layer on the CPU and on the device."""
    layer = shaken(LAYERS[rank](3, **{"momentum": 0.1, "schedule": None, "dtype": dtype, **options}))
    return layer, copy.deepcopy(layer).to(cuda)


def on_cpu(result):
    return {name: value.cpu() for name, value in result.items()}


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "options", [{}, {"schedule": "paper"}, {"stat": "var_unbiased"}, {"virtual_batch_size": 2}], ids=str
)
def test_a_step_equals_the_cpus(cuda, rank, options):
    host, device = pair(cuda, rank, **options)
    for seed in range(3):
        x = make_batch(rank, seed=seed)
        assert worst(on_cpu(outcome(device, x.to(cuda))), outcome(host, x)) < (1e-10, "")


@pytest.mark.parametrize(("rank", "memory_format"), [(4, torch.channels_last), (5, torch.channels_last_3d)])
def test_channels_last_is_kept(cuda, rank, memory_format):
    host, device = pair(cuda, rank)
    x = make_batch(rank)
    got = outcome(device, x.to(cuda).contiguous(memory_format=memory_format))
    assert got["y"].is_contiguous(memory_format=memory_format)
    assert got["x.grad"].is_contiguous(memory_format=memory_format)
    assert worst(on_cpu(got), outcome(host, x)) < (1e-10, "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_input_has_float32_statistics(cuda, dtype):
    host, device = pair(cuda, dtype=torch.float32)
    x = make_batch(4, dtype=dtype) * 300
    got, want = on_cpu(outcome(device, x.to(cuda))), outcome(host, x.float())
    assert got["y"].dtype == got["x.grad"].dtype == dtype
    torch.testing.assert_close(got["running_var"], want["running_var"], rtol=1e-4, atol=0)
    torch.testing.assert_close(got["y"].float(), want["y"], rtol=0.02, atol=0.02)


def test_second_derivatives_are_right(cuda):
    _, layer = pair(cuda)
    layer.r_max, layer.d_max = 1.0, 0.0
    x = make_batch(4)[:2, :, :2, :2].to(cuda).requires_grad_()
    state = copy.deepcopy(layer.state_dict())

    def again(x):
        layer.load_state_dict(state)
        return layer(x)

    assert torch.autograd.gradgradcheck(again, (x,))


def test_the_host_does_not_wait_for_the_device(cuda):
    host, device = pair(cuda, schedule=Ramp(1, 5, 4))
    batches = [make_batch(4, seed=seed) for seed in range(6)]
    moved = [x.to(cuda) for x in batches]
    device(moved[0])  # the one read of the counter
    host(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        ys = [device(x) for x in moved[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(batches[1:], ys, strict=True):
        torch.testing.assert_close(y.cpu(), host(x))


def test_a_captured_graph_follows_the_schedule(cuda):
    host, device = pair(cuda, schedule=HardSwitch(5))
    x = make_batch(4).to(cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        device(x)
    torch.cuda.current_stream().wait_stream(stream)
    host(make_batch(4))
    graph, static = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        y = device(static)
    for seed in range(9):
        batch = make_batch(4, seed=seed)
        static.copy_(batch)
        graph.replay()
        torch.testing.assert_close(y.cpu(), host(batch))
    assert device.num_batches_tracked.item() == host.num_batches_tracked.item()
    torch.testing.assert_close(device(x).cpu(), host(make_batch(4)))


def test_a_compiled_layer_equals_the_eager_one(cuda):
    host, device = pair(cuda, schedule=HardSwitch(1))
    compiled = torch.compile(device, fullgraph=True)
    for seed in range(3):
        x = make_batch(4, seed=seed)
        assert worst(on_cpu(outcome(device, x.to(cuda), compiled)), outcome(host, x)) < (1e-9, "")

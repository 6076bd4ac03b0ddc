"""Layers where an eager call has no native kernels: on other devices, on tensors of other types, on dual numbers."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from renorm_onnx.layers import kernels
from renorm_onnx.layers.clock import HostClock
from renorm_onnx.layers.conftest import NaiveBatchRenorm, make_batch, shaken, weights_like, worst
from renorm_onnx.layers.modules import BatchRenorm2d
from renorm_onnx.layers.recomputation_test import OPTIONS, backward, checkpointed, net

CHECKPOINTED = [lambda model, x: checkpoint(model, x, use_reentrant=False), lambda model, x: model(x)]


@pytest.fixture
def elsewhere(monkeypatch):
    """Make this a device that the native kernels do not know, as mps and xpu."""
    monkeypatch.setattr(kernels, "available", lambda x: False)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing_on_other_devices(elsewhere, options, reentrant):
    plain = net(**options)
    model = copy.deepcopy(plain)
    for seed in range(3):
        x = make_batch(4, seed=seed)
        assert worst(backward(model, x, checkpointed(model, reentrant)), backward(plain, x, plain)) < (1e-12, "")
        assert [int(model[i].num_batches_tracked) for i in (1, 4)] == [seed + 1] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_step_on_other_devices_is_the_papers(elsewhere, reentrant):
    model, formula = net(), net(NaiveBatchRenorm)
    x = make_batch(4)
    want = backward(formula, x, formula)
    assert worst(backward(model, x, checkpointed(model, reentrant)), want) < (1e-10, "")
    control = net(NaiveBatchRenorm)
    assert worst(backward(control, x, checkpointed(control, reentrant)), want) > (0.01, "")


def test_the_host_reads_no_counter_on_other_devices(elsewhere, monkeypatch):
    layer = shaken(BatchRenorm2d(3, dtype=torch.float64))
    monkeypatch.setattr(HostClock, "read", None)
    layer(make_batch(4))
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # imported by forward_ad
def test_checkpointing_changes_no_second_derivative_that_is_taken_forwards():
    x, tangent = make_batch(4), make_batch(4, seed=9)
    found = []
    for call in CHECKPOINTED:
        model = net()
        leaf = x.clone().requires_grad_()
        with forward_ad.dual_level():
            try:
                y = call(model, forward_ad.make_dual(leaf, tangent))
            except NotImplementedError as error:  # torch 2.11: its checkpoint takes no dual numbers
                pytest.skip(str(error))
            (grad,) = torch.autograd.grad((y * weights_like(y)).sum(), leaf, create_graph=True)
            found.append({"grad": grad.detach(), "second": forward_ad.unpack_dual(grad).tangent.detach()})
        assert int(model[1].num_batches_tracked) == 1
    assert found[1]["second"].abs().max() > 0.1
    assert worst(*found) < (1e-12, "")


@pytest.fixture
def mesh(tmp_path):
    """One process, as a mesh of devices."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_checkpointing_changes_nothing_on_distributed_tensors(mesh):
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    layer = shaken(BatchRenorm2d(3, momentum=0.3, schedule=None, dtype=torch.float64))
    formula, x = NaiveBatchRenorm(layer), make_batch(4)
    want = backward(formula, x, formula)
    for call in CHECKPOINTED:
        model = distribute_module(copy.deepcopy(layer), mesh)
        leaf = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
        try:
            y = call(model, leaf)
        except NotImplementedError as error:  # torch 2.11: no var_mean of them
            pytest.skip(str(error))
        (y * distribute_tensor(weights_like(x), mesh, [Shard(0)])).sum().backward()
        torch.testing.assert_close(leaf.grad.full_tensor(), want["x.grad"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.running_mean.full_tensor(), want["running_mean"], rtol=1e-12, atol=1e-12)
        assert int(model.num_batches_tracked.full_tensor()) == 1

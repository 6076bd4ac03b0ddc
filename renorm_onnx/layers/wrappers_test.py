"""What torch wraps around networks leaves the layer right: gradients those of the formula, each batch learned once."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from renorm_onnx.layers.conftest import NaiveBatchRenorm, make_batch, shaken, weights_like, worst
from renorm_onnx.layers.modules import BatchRenorm2d
from renorm_onnx.layers.schedules import Ramp


def layer_with(seed=0, **options):
    return shaken(BatchRenorm2d(3, **{"momentum": 0.1, "schedule": None, "dtype": torch.float64, **options}), seed)


def network():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 3, 1, dtype=torch.float64) for _ in range(2)]
    return nn.Sequential(convolutions[0], layer_with(0), nn.Tanh(), convolutions[1], layer_with(1), nn.Tanh())


def naive(model):
    return nn.Sequential(
        *(NaiveBatchRenorm(m) if isinstance(m, BatchRenorm2d) else copy.deepcopy(m) for m in model.children())
    )


def backward(model, x, call=None):
    """Everything one step of `model` produces, by `backward`, as wrappers want it."""
    x = x.clone().requires_grad_()
    y = (model if call is None else call)(x)
    model.zero_grad()
    (y * weights_like(y)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"y": y.detach(), "x.grad": x.grad, **grads, **{k: v.clone() for k, v in model.named_buffers()}}


def save_convolutions(context, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if "conv" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def save_norms(context, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if "batch_norm" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def save_arithmetic(context, operator, *args, **kwargs):
    """Of a residual network, say; among it is what a step does besides normalizing."""
    saved = ("add", "sub", "mul", "div", "sqrt", "lerp", "clamp", "reciprocal", "where", "lt", "relu", "stack")
    named = any(f"aten.{name}." in str(operator) for name in saved)
    return CheckpointPolicy.MUST_SAVE if named else CheckpointPolicy.PREFER_RECOMPUTE


def save_everything(context, operator, *args, **kwargs):
    return CheckpointPolicy.PREFER_SAVE


def selectively(policy):
    def call(model, x):
        def contexts():
            return create_selective_checkpoint_contexts(policy)

        return checkpoint(model, x, use_reentrant=False, context_fn=contexts)

    return call


def to_the_end(model, x):
    with set_checkpoint_early_stop(False):
        return checkpoint(model, x, use_reentrant=False)


def on_the_cpu(model, x):
    with torch.autograd.graph.save_on_cpu():
        return model(x)


def functionally(model, x):
    return functional_call(model, {**dict(model.named_parameters()), **dict(model.named_buffers())}, (x,))


CALLS = {
    "checkpoint, convolutions saved": selectively(save_convolutions),
    "checkpoint, norms saved": selectively(save_norms),
    "checkpoint, arithmetic saved": selectively(save_arithmetic),
    "checkpoint, everything saved": selectively(save_everything),
    "checkpoint without early stop": to_the_end,
    "checkpoint_sequential": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=False),
    "checkpoint_sequential, reentrant": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=True),
    "save_on_cpu": on_the_cpu,
    "functional_call": functionally,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_wrapped_call_is_the_call(call):
    model = network()
    reference = naive(model)
    for seed in range(3):
        x = make_batch(4, seed=seed)
        assert worst(backward(model, x, lambda x: call(model, x)), backward(reference, x)) < (1e-9, "")


@pytest.mark.parametrize("call", [CALLS["checkpoint_sequential"], CALLS["checkpoint without early stop"]])
def test_the_naive_layer_fails_the_same_comparison(call):
    model = naive(network())
    reference, x = copy.deepcopy(model), make_batch(4)
    assert worst(backward(model, x, lambda x: call(model, x)), backward(reference, x)) > (1e-2, "")


def test_an_averaged_model_averages_the_statistics_too():
    model = network()
    averaged = AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    averaged.update_parameters(model)
    first = model[1].running_var.clone()
    model(make_batch(4))
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module[1].running_var, first.lerp(model[1].running_var, 0.25))


def test_a_layer_made_without_memory_takes_a_state_dict_or_starts_anew():
    with torch.device("meta"):
        layers = [BatchRenorm2d(3, momentum=0.1, schedule=None, dtype=torch.float64) for _ in range(2)]
    assert layers[0](torch.empty(2, 3, 4, 4, dtype=torch.float64, device="meta")).device.type == "meta"
    trained = layer_with()
    layers[0].load_state_dict(copy.deepcopy(trained.state_dict()), assign=True)
    layers[1].to_empty(device="cpu").reset_parameters()
    fresh = BatchRenorm2d(3, momentum=0.1, schedule=None, dtype=torch.float64)
    for got, want in zip(layers, (trained, fresh), strict=True):
        x = make_batch(4)
        assert worst(backward(got, x), backward(want, x))[0] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_is_obeyed_along_the_schedule(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = BatchRenorm2d(3, schedule=Ramp(0, 3, 2))
        ys = [layer(make_batch(4, seed=seed, dtype=dtype)) for seed in range(4)]
    finally:
        torch.set_default_dtype(before)
    assert {y.dtype for y in ys} == {layer.running_var.dtype} == {dtype}
    assert all(torch.isfinite(y).all() for y in ys)
    assert layer.num_batches_tracked.item() == 4


class WithUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.unused = network(), layer_with(2)

    def forward(self, x):
        return self.body(x)


def batch_of(rank, step):
    return make_batch(4, seed=10 * step + rank)


def train(model, rank):
    for step in range(3):
        model.zero_grad()
        y = model(batch_of(rank, step))
        (y * weights_like(y, seed=rank)).sum().backward()


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for name, options in {"unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}.items():
        model = WithUnused()
        train(DistributedDataParallel(model, **options), rank)
        found[name] = [p.grad for p in model.body.parameters()], dict(model.body.named_buffers())
    mesh = init_device_mesh("cpu", (2,))
    model = network()
    for part in (model[1], model[4], model):
        fully_shard(part, mesh=mesh)
    train(model, rank)
    found["sharded"] = [p.grad.full_tensor() for p in model.parameters()], dict(model.named_buffers())
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def expected(shared):
    """Gradients of the last of three steps, averaged over two processes, and each one's statistics."""
    models = [naive(network()) for _ in range(2)]
    for step in range(3):
        if shared:  # DistributedDataParallel copies the buffers of rank 0 before each step
            for mine, theirs in zip(models[1].buffers(), models[0].buffers(), strict=True):
                mine.copy_(theirs)
        for rank, model in enumerate(models):
            model.zero_grad()
            y = model(batch_of(rank, step))
            (y * weights_like(y, seed=rank)).sum().backward()
    pairs = zip(*(model.parameters() for model in models), strict=True)
    return [(a.grad + b.grad) / 2 for a, b in pairs], [dict(model.named_buffers()) for model in models]


@pytest.mark.parametrize("name", ["unused", "static", "sharded"])
def test_two_processes_train_as_the_formula_does(found, name):
    grads, buffers = expected(shared=name != "sharded")
    for rank in range(2):
        for got, want in zip(found[rank][name][0], grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        if rank == 0 or name == "sharded":
            torch.testing.assert_close(found[rank][name][1], buffers[rank], rtol=1e-12, atol=1e-12)

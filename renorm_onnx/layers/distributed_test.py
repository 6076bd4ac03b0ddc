import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from renorm_onnx.errors import InputError
from renorm_onnx.layers.distributed import SyncBatchRenorm, convert_sync_batchrenorm
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d
from renorm_onnx.layers.running_stats import sync_running_stats

RANKS = 2
STEPS = 3


def random(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parts(x, first):
    return [x[:first], x[first:]]


def whole_batch(step):
    """Rows that drift, so that the two parts of a batch have different means and variances."""
    x = random((8, 3, 4, 2), step)
    return x * torch.linspace(0.2, 3, 8).view(8, 1, 1, 1) + torch.linspace(-2, 4, 8).view(8, 1, 1, 1) + step


def layer(kind=SyncBatchRenorm, dtype=torch.float64, **options):
    made = kind(3, dtype=dtype, **{"momentum": 0.3, "schedule": None, "r_max": 1.5, "d_max": 0.5, **options})
    with torch.no_grad():
        if made.affine:
            made.weight.copy_(random(3, 11).abs() + 0.5)
            made.bias.copy_(random(3, 12))
        if made.track_running_stats:
            made.running_mean.copy_(random(3, 13))
            made.running_var.copy_(random(3, 14).abs() + 0.5)
    return made


def trace(made, batches, cotangents):
    """Outputs, gradients and buffers of a few training steps."""
    outputs, grads = [], []
    for x, g in zip(batches, cotangents, strict=True):
        x = x.detach().clone().requires_grad_()
        y = made(x)
        wanted = [x, *made.parameters()]
        outputs.append(y.detach())
        grads.append(torch.autograd.grad(y, wanted, g.to(y.dtype)))
    return {"y": outputs, "grads": grads, "buffers": {k: v.clone() for k, v in made.named_buffers()}}


CASES = {
    "sigma": {},
    "var": {"stat": "var"},
    "var_unbiased": {"stat": "var_unbiased"},
    "cumulative": {"momentum": None},
    "without affine": {"affine": False},
    "untracked": {"track_running_stats": False},
    "paper": {"schedule": "paper"},
}


def data(dtype=torch.float64):
    batches = [whole_batch(step).to(dtype) for step in range(STEPS)]
    return batches, [random(x.shape, 50 + i, dtype) for i, x in enumerate(batches)]


def mine(pair, rank, first=5):
    return [[parts(x, first)[rank] for x in side] for side in pair]


def network(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.ReLU(), nn.Conv2d(4, 2, 1), norm(2)).double()


def loss_of(y):
    return (y**2).flatten(1).sum(1) * torch.tensor([1.0], dtype=y.dtype)


def weighted(y, rank):
    """A loss whose gradients differ between the ranks, as those of `loss_of` need not."""
    return (y * random(y.shape, 70 + rank)).sum()


def work(rank, folder):
    """Everything that needs two processes, in one start of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found = {}
    for name, options in CASES.items():
        found[name] = trace(layer(**options), *mine(data(), rank))
    found["empty"] = trace(layer(), *mine(data(), rank, first=8))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found[dtype] = trace(layer(dtype=torch.float32), *mine(data(dtype), rank))
    found["not synchronized"] = trace(layer(BatchRenorm2d), *mine(data(), rank))

    ones = [[random((2, 3), seed)[rank : rank + 1]] for seed in (5, 6)]
    found["one value each"] = trace(layer(), *ones)
    try:
        layer()(random((1 - rank, 3)))
    except InputError as error:
        found["one value in all"] = str(error)

    checkpointed = layer()
    x, g = mine(([whole_batch(0)], [random((8, 3, 4, 2), 50)]), rank)
    x = x[0].requires_grad_()
    checkpoint(checkpointed, x, use_reentrant=False).backward(g[0])
    found["checkpointed"] = (x.grad, dict(checkpointed.named_buffers()))

    try:
        found["compiled"] = trace(torch.compile(layer(), backend="aot_eager", fullgraph=True), *mine(data(), rank))
    except Exception as error:  # on every rank alike; the others' results are still wanted
        found["compiled"] = str(error)

    pair = [dist.new_group([0]), dist.new_group([1])]
    found["alone in a group"] = trace(layer(process_group=pair[rank]), *mine(data(), rank))

    model = DistributedDataParallel(convert_sync_batchrenorm(network(BatchRenorm2d)))
    x = parts(whole_batch(0), 4)[rank]
    loss_of(model(x)).mean().backward()
    found["ddp"] = {k: p.grad for k, p in model.module.named_parameters()} | dict(model.module.named_buffers())

    plain = DistributedDataParallel(layer(BatchRenorm2d))
    found["plain ddp"] = []
    for step in range(STEPS):
        plain.zero_grad()
        weighted(plain(parts(whole_batch(step), 5)[rank]), rank).backward()
        grads = {k: p.grad.clone() for k, p in plain.module.named_parameters()}
        found["plain ddp"].append((grads, {k: v.clone() for k, v in plain.module.named_buffers()}))

    apart = nn.Sequential(
        layer(BatchRenorm2d, renorm_momentum=0.3),
        nn.BatchNorm2d(3).double(),
        nn.BatchNorm2d(3, track_running_stats=False),
    )
    for step in range(rank + 2):
        apart[:2](parts(whole_batch(step), 4)[rank])
    before = {k: v.clone() for k, v in apart.named_buffers()}
    sync_running_stats(apart, process_group=pair[rank])
    found["pooled alone"] = {k: v.clone() for k, v in apart.named_buffers()}
    found["pooled"] = (before, sync_running_stats(apart), dict(apart.named_buffers()))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def on_both(work, folder):
    """What `work` saved on each process, each at the path of its rank."""
    mp.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return on_both(work, tmp_path_factory.mktemp("ranks"))


def joined(found, name, step):
    """Output and gradients of the whole batch, from the two halves."""
    y = torch.cat([each[name]["y"][step] for each in found])
    grads = [each[name]["grads"][step] for each in found]
    return y, [torch.cat([g[0] for g in grads]), *(sum(pair) for pair in zip(*(g[1:] for g in grads), strict=True))]


def algorithm_1(made, x, g, batches_before):
    """Float64 and autograd, from the paper's lines, with the variants of what is averaged."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    axes = [0, *range(2, x.dim())]
    x = x.double().requires_grad_()
    weight, bias = (p.detach().double().clone().requires_grad_() for p in (made.weight, made.bias))
    mu, var, eps = made.running_mean.double(), made.running_var.double(), made.eps
    mu_b, var_b = x.mean(axes), x.var(axes, unbiased=False)
    sigma, sigma_b = torch.sqrt(var + eps), torch.sqrt(var_b + eps)
    r = (sigma_b / sigma).clamp(1 / made.r_max, made.r_max).detach()
    d = ((mu_b - mu) / sigma).clamp(-made.d_max, made.d_max).detach()
    y = ((x - mu_b.view(shape)) / sigma_b.view(shape) * r.view(shape) + d.view(shape)) * weight.view(shape)
    y = y + bias.view(shape)
    grads = torch.autograd.grad(y, (x, weight, bias), g.double())
    alpha = made.momentum if made.momentum is not None else 1 / (batches_before + 1)
    with torch.no_grad():
        made.running_mean.copy_(mu + alpha * (mu_b - mu))
        made.running_var.copy_((sigma + alpha * (sigma_b - sigma)) ** 2 - eps)
    return y.detach(), grads


@pytest.mark.parametrize("name", ["sigma", "cumulative", "empty"])
def test_two_processes_with_unequal_parts_take_the_steps_of_algorithm_1_on_the_whole_batch(found, name):
    made = layer(BatchRenorm2d, **CASES.get(name, {}))
    for step, (x, g) in enumerate(zip(*data(), strict=True)):
        want, want_grads = algorithm_1(made, x, g, step)
        got, grads = joined(found, name, step)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        for mine_, theirs in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(mine_, theirs, rtol=1e-11, atol=1e-11)
    for each in found:
        buffers = each[name]["buffers"]
        torch.testing.assert_close(buffers["running_mean"], made.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(buffers["running_var"], made.running_var, rtol=1e-12, atol=1e-12)
        assert each[name]["buffers"]["num_batches_tracked"].item() == STEPS


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_process_with_the_whole_batch(found, name):
    one = trace(layer(BatchRenorm2d, **CASES[name]), *data())
    for step in range(STEPS):
        y, grads = joined(found, name, step)
        torch.testing.assert_close(y, one["y"][step], rtol=1e-12, atol=1e-12)
        for mine_, theirs in zip(grads, one["grads"][step], strict=True):
            torch.testing.assert_close(mine_, theirs, rtol=1e-11, atol=1e-11)
    for each in found:
        for key, value in one["buffers"].items():
            torch.testing.assert_close(each[name]["buffers"][key], value, rtol=1e-12, atol=1e-12)


def test_without_synchronization_the_same_comparison_fails(found):
    one = trace(layer(BatchRenorm2d), *data())
    y, grads = joined(found, "not synchronized", 0)
    assert (y - one["y"][0]).abs().max() > 0.1
    assert (grads[0] - one["grads"][0][0]).abs().max() > 0.01


@pytest.mark.parametrize("name", [*CASES, "empty", torch.float32, torch.bfloat16], ids=str)
def test_the_statistics_of_both_processes_are_identical_to_the_bit(found, name):
    first, second = (each[name]["buffers"] for each in found)
    for key, value in first.items():
        assert torch.equal(value, second[key])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)],  # about 4 units of the type's last place
    ids=str,
)
def test_lower_precision_keeps_its_type_and_float32_statistics(found, dtype, tolerance):
    made = layer(BatchRenorm2d)
    batches, cotangents = data(dtype)
    for step, (x, g) in enumerate(zip(batches, cotangents, strict=True)):
        want, want_grads = algorithm_1(made, x, g, step)
        y, grads = joined(found, dtype, step)
        assert y.dtype == grads[0].dtype == dtype
        torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
        for mine_, theirs in zip(grads, want_grads, strict=True):
            scale = theirs.abs().max().item()
            torch.testing.assert_close(mine_.double(), theirs, rtol=tolerance, atol=tolerance * scale)
    assert found[0][dtype]["buffers"]["running_var"].dtype == torch.float32
    torch.testing.assert_close(found[0][dtype]["buffers"]["running_var"].double(), made.running_var, rtol=1e-4, atol=0)


def test_one_value_per_process_is_a_batch_of_two(found):
    made = layer(BatchRenorm1d)
    want, want_grads = algorithm_1(made, random((2, 3), 5), random((2, 3), 6), 0)
    y, grads = joined(found, "one value each", 0)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads[0], want_grads[0], rtol=1e-11, atol=1e-11)


def test_one_value_in_all_is_refused_on_every_process(found):
    for rank, each in enumerate(found):
        assert each["one value in all"] == (
            "SyncBatchRenorm: Expected more than 1 value per channel when training, got input size "
            f"({1 - rank}, 3), on all processes together"
        )


def test_a_checkpointed_layer_repeats_itself_and_learns_once(found):
    once = layer(BatchRenorm2d)
    _, want = algorithm_1(once, whole_batch(0), random((8, 3, 4, 2), 50), 0)
    got = torch.cat([each["checkpointed"][0] for each in found])
    torch.testing.assert_close(got, want[0], rtol=1e-11, atol=1e-11)
    for each in found:
        torch.testing.assert_close(each["checkpointed"][1]["running_var"], once.running_var, rtol=1e-12, atol=1e-12)
        assert each["checkpointed"][1]["num_batches_tracked"].item() == 1


def test_ghost_batches_are_refused():
    with pytest.raises(InputError, match="SyncBatchRenorm: virtual_batch_size=4, expected None because ghost batches"):
        SyncBatchRenorm(3, virtual_batch_size=4)
    alone = SyncBatchRenorm(3)
    with pytest.raises(InputError, match="SyncBatchRenorm: virtual_batch_size=4, expected None because ghost batches"):
        alone.virtual_batch_size = 4
    assert alone.virtual_batch_size is None
    model = nn.Sequential(BatchRenorm1d(3), BatchRenorm1d(3, virtual_batch_size=4))
    with pytest.raises(InputError, match="convert_sync_batchrenorm: '1': virtual_batch_size=4"):
        convert_sync_batchrenorm(model)
    assert type(model[0]) is BatchRenorm1d


def test_a_process_alone_in_its_group_is_not_synchronized(found):
    for each in found:
        for step in range(STEPS):
            assert torch.equal(each["alone in a group"]["y"][step], each["not synchronized"]["y"][step])


def test_a_converted_network_under_ddp_has_the_gradients_of_the_whole_batch(found):
    model = network(BatchRenorm2d)
    loss_of(model(whole_batch(0))).mean().backward()
    want = {k: p.grad for k, p in model.named_parameters()} | dict(model.named_buffers())
    for each in found:
        assert each["ddp"].keys() == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(each["ddp"][key], value, rtol=1e-10, atol=1e-10)


def test_under_ddp_without_synchronization_gradients_are_averaged_and_rank_0s_statistics_hold(found):
    ranks = [layer(BatchRenorm2d) for _ in range(RANKS)]
    for step in range(STEPS):
        ranks[1].load_state_dict(ranks[0].state_dict())  # DDP broadcasts buffers before each step
        for rank, made in enumerate(ranks):
            made.zero_grad()
            weighted(made(parts(whole_batch(step), 5)[rank]), rank).backward()
        for rank, made in enumerate(ranks):
            grads, buffers = found[rank]["plain ddp"][step]
            for key, got in grads.items():
                want = sum(each.get_parameter(key).grad for each in ranks) / RANKS
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
                own = made.get_parameter(key).grad
                assert (own - want).abs().max() > 0.01  # control: the gradient of one rank would not do
            torch.testing.assert_close(buffers, dict(made.named_buffers()), rtol=1e-12, atol=1e-12)
            assert buffers["num_batches_tracked"].item() == step + 1
    with pytest.raises(AssertionError):  # control: ranks that keep their own statistics end elsewhere
        torch.testing.assert_close(found[1]["not synchronized"]["buffers"], buffers)


def test_pooled_running_statistics_obey_the_law_of_total_variance(found):
    before = [each["pooled"][0] for each in found]
    for each, own in zip(found, before, strict=True):
        torch.testing.assert_close(each["pooled alone"], own, rtol=1e-12, atol=1e-12)
    for each in found:
        _, count, after = each["pooled"]
        assert count == 2
        for name in ("0.running", "0.renorm", "1.running"):
            means = torch.stack([b[f"{name}_mean"] for b in before]).double()
            seconds = torch.stack([b[f"{name}_var"] for b in before]).double() + means**2
            torch.testing.assert_close(after[f"{name}_mean"], means.mean(0), rtol=1e-12, atol=1e-12)
            want = seconds.mean(0) - means.mean(0) ** 2
            torch.testing.assert_close(after[f"{name}_var"], want, rtol=1e-10, atol=1e-10)
            assert after[f"{name[0]}.num_batches_tracked"].item() == 3
            averaged = torch.stack([b[f"{name}_var"] for b in before]).mean(0)
            assert (want - averaged).abs().max() > 0.01  # control: an average of variances would not do


def test_without_a_process_group_it_is_the_ordinary_layer():
    alone, plain = trace(layer(), *data()), trace(layer(BatchRenorm2d), *data())
    for mine_, theirs in zip(alone["y"], plain["y"], strict=True):
        assert torch.equal(mine_, theirs)
    with pytest.raises(InputError, match="SyncBatchRenorm: Expected more than 1 value per channel"):
        layer()(torch.ones(1, 3, dtype=torch.float64))
    assert sync_running_stats(layer()) == 0


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (4, 3, 2, 2), (2, 3, 2, 2, 2)])
def test_every_rank_of_input_is_taken(shape):
    assert layer()(random(shape)).shape == shape
    with pytest.raises(InputError, match="expected 2D or 3D or 4D or 5D input"):
        layer()(random((3,)))


def test_a_step_compiled_as_one_graph_is_the_eager_step(found):
    for each in found:
        assert not isinstance(each["compiled"], str), each["compiled"]
        buffers = {f"_orig_mod.{name}": value for name, value in each["sigma"]["buffers"].items()}
        torch.testing.assert_close(each["compiled"], {**each["sigma"], "buffers": buffers}, rtol=1e-12, atol=1e-12)


def test_conversion_keeps_state_options_hooks_and_other_layers():
    model = nn.Sequential(layer(BatchRenorm2d, stat="var"), nn.BatchNorm2d(3), nn.ReLU())
    model[0].eval()
    original, weight, relu = copy.deepcopy(model[0]), model[0].weight, model[2]
    seen = []
    model[0].register_forward_hook(lambda module, *_: seen.append(module))
    assert convert_sync_batchrenorm(model) is model
    assert [type(m) for m in model] == [SyncBatchRenorm, nn.BatchNorm2d, nn.ReLU]
    assert model[0].weight is weight
    assert model[2] is relu
    assert (model[0].stat, model[0].r_max, model[0].momentum) == ("var", 1.5, 0.3)
    assert not model[0].training
    x = whole_batch(0)
    assert torch.equal(model[0](x), original(x))
    assert seen == [model[0]]
    assert convert_sync_batchrenorm(model)[0] is model[0]
    root = convert_sync_batchrenorm(original)
    assert type(root) is SyncBatchRenorm
    assert root.process_group is None

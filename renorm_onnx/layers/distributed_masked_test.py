import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from renorm_onnx.errors import InputError
from renorm_onnx.layers.distributed import convert_sync_batchrenorm
from renorm_onnx.layers.distributed_test import RANKS, STEPS, joined, layer, on_both, random
from renorm_onnx.layers.masked import length_mask
from renorm_onnx.layers.modules import BatchRenorm1d

LENGTH = 5

# Valid positions of each of 8 sequences, of which the first process has the first 5.
LENGTHS = {
    "unequal": [5, 1, 4, 2, 0, 3, 1, 2],
    "all masked": [5, 3, 0, 2, 1, 0, 0, 0],
    "one each": [0, 0, 1, 0, 0, 0, 1, 0],
    "one without a mask": [1, 2, 3, 0, 2, 5, 5, 5],
}
CASES = {
    **{name: (name, {}) for name in LENGTHS},
    "var": ("unequal", {"stat": "var"}),
    "var_unbiased": ("unequal", {"stat": "var_unbiased"}),
    "cumulative": ("all masked", {"momentum": None}),
    "without affine": ("unequal", {"affine": False}),
    "two sets": ("unequal", {"renorm_momentum": 0.2}),
    "paper": ("unequal", {"schedule": "paper"}),
    "untracked": ("all masked", {"track_running_stats": False}),
}


def data(lengths, dtype=torch.float64):
    """Sequences that drift, so that the parts of a batch differ in mean and spread; padding holds what it must not."""
    mask = length_mask(torch.tensor(LENGTHS[lengths]), LENGTH)
    found = []
    for step in range(STEPS):
        x = random((8, 3, LENGTH), step) * torch.linspace(0.2, 3, 8).view(8, 1, 1)
        x = x + torch.linspace(-2, 4, 8).view(8, 1, 1) + step
        x = torch.where(mask.unsqueeze(1), x, torch.inf).to(dtype)
        found.append((x, mask, random(x.shape, 50 + step).to(dtype)))
    return found


def mine(batches, rank, first=5):
    return [[values[:first] if rank == 0 else values[first:] for values in batch] for batch in batches]


def trace(made, batches):
    """Outputs, gradients and buffers of a few training steps."""
    outputs, grads = [], []
    for x, mask, g in batches:
        x = x.detach().clone().requires_grad_()
        y = made(x, mask)
        outputs.append(y.detach())
        grads.append(torch.autograd.grad(y, [x, *made.parameters()], g.to(y.dtype)))
    return {"y": outputs, "grads": grads, "buffers": {k: v.clone() for k, v in made.named_buffers()}}


def work(rank, folder):
    """Everything that needs two processes, in one start of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found = {}
    for name, (lengths, options) in CASES.items():
        batches = mine(data(lengths), rank)
        if name == "one without a mask" and rank == 1:
            batches = [(x, None, g) for x, _, g in batches]
        found[name] = trace(layer(**options), batches)
    found["no samples"] = trace(layer(), mine(data("unequal"), rank, first=8))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found[dtype] = trace(layer(dtype=torch.float32), mine(data("unequal", dtype), rank))
    found["converted"] = trace(convert_sync_batchrenorm(layer(BatchRenorm1d)), mine(data("unequal"), rank))
    found["not synchronized"] = trace(layer(BatchRenorm1d), mine(data("unequal"), rank))

    x, mask, g = mine(data("all masked"), rank)[0]
    checkpointed, x = layer(), x.requires_grad_()
    checkpoint(checkpointed, x, mask, use_reentrant=False).backward(g)
    found["checkpointed"] = (x.grad, dict(checkpointed.named_buffers()))
    found["evaluated"] = [
        layer().eval()(x, mask).detach(),
        layer(track_running_stats=False).eval()(x[:2], mask[:2] | True),
    ]

    found["refused"], made = [], layer()
    before = {k: v.clone() for k, v in made.named_buffers()}
    for valid in (0, 1):
        mask = torch.zeros(2, LENGTH, dtype=torch.bool)
        mask[0, : valid * rank] = True
        try:
            made(random((2, 3, LENGTH)), mask)
        except InputError as error:
            found["refused"].append(str(error))
    found["unchanged"] = all(torch.equal(v, before[k]) for k, v in made.named_buffers())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return on_both(work, tmp_path_factory.mktemp("ranks"))


def algorithm_1(made, x, mask, g):
    """The paper's lines over the valid positions of the whole batch, in float64, by autograd."""
    x = torch.where(mask.unsqueeze(1), x.double(), 0.0).requires_grad_()
    valid = x.movedim(1, -1)[mask]  # (M, C)
    weight, bias = (p.detach().double().clone().requires_grad_() for p in (made.weight, made.bias))
    mu, sigma = made.running_mean.double(), torch.sqrt(made.running_var.double() + made.eps)
    mu_b = valid.mean(0)
    sigma_b = torch.sqrt(((valid - mu_b) ** 2).mean(0) + made.eps)
    r = (sigma_b / sigma).clamp(1 / made.r_max, made.r_max).detach()
    d = ((mu_b - mu) / sigma).clamp(-made.d_max, made.d_max).detach()
    y = (((x.movedim(1, -1) - mu_b) / sigma_b * r + d) * weight + bias).movedim(-1, 1)
    grads = torch.autograd.grad(y, (x, weight, bias), g.double())
    with torch.no_grad():
        made.running_mean.copy_(mu + made.momentum * (mu_b - mu))
        made.running_var.copy_((sigma + made.momentum * (sigma_b - sigma)) ** 2 - made.eps)
    return y.detach(), [torch.where(mask.unsqueeze(1), grads[0], 0.0), *grads[1:]]


@pytest.mark.parametrize("name", [*LENGTHS, "no samples", "converted"])
def test_two_processes_take_the_steps_of_algorithm_1_on_the_valid_positions_of_both(found, name):
    made = layer(BatchRenorm1d)
    for step, batch in enumerate(data(CASES.get(name, ("unequal",))[0])):
        want, want_grads = algorithm_1(made, *batch)
        got, grads = joined(found, name, step)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grads, want_grads, rtol=1e-10, atol=1e-11)
    for each in found:
        buffers = each[name]["buffers"]
        torch.testing.assert_close(buffers["running_mean"], made.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(buffers["running_var"], made.running_var, rtol=1e-12, atol=1e-12)
        assert buffers["num_batches_tracked"].item() == STEPS


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_process_with_the_whole_batch_and_mask(found, name):
    lengths, options = CASES[name]
    one = trace(layer(BatchRenorm1d, **options), data(lengths))
    for step in range(STEPS):
        y, grads = joined(found, name, step)
        torch.testing.assert_close(y, one["y"][step], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grads, list(one["grads"][step]), rtol=1e-10, atol=1e-11)
    for each in found:
        torch.testing.assert_close(each[name]["buffers"], one["buffers"], rtol=1e-12, atol=1e-12)


def test_statistics_of_each_process_and_their_average_are_something_else(found):
    one = trace(layer(BatchRenorm1d), data("unequal"))
    y, grads = joined(found, "not synchronized", 0)
    assert (y - one["y"][0]).abs().max() > 0.1
    assert (grads[0] - one["grads"][0][0]).abs().max() > 0.01
    for key in ("running_mean", "running_var"):
        average = sum(each["not synchronized"]["buffers"][key] for each in found) / RANKS
        assert (average - one["buffers"][key]).abs().max() > 0.05


@pytest.mark.parametrize("name", [*CASES, "no samples", torch.float32, torch.bfloat16, torch.float16], ids=str)
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
    made = layer(BatchRenorm1d)
    for step, batch in enumerate(data("unequal", dtype)):
        want, want_grads = algorithm_1(made, *batch)
        y, grads = joined(found, dtype, step)
        assert y.dtype == grads[0].dtype == dtype
        torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
        for got, theirs in zip(grads, want_grads, strict=True):
            scale = theirs.abs().max().item()
            torch.testing.assert_close(got.double(), theirs, rtol=tolerance, atol=tolerance * scale)
    assert found[0][dtype]["buffers"]["running_var"].dtype == torch.float32
    torch.testing.assert_close(found[0][dtype]["buffers"]["running_var"].double(), made.running_var, rtol=1e-4, atol=0)


def test_a_checkpointed_layer_repeats_itself_and_learns_once(found):
    once = layer(BatchRenorm1d)
    _, want = algorithm_1(once, *data("all masked")[0])
    got = torch.cat([each["checkpointed"][0] for each in found])
    torch.testing.assert_close(got, want[0], rtol=1e-10, atol=1e-11)
    for each in found:
        torch.testing.assert_close(each["checkpointed"][1]["running_var"], once.running_var, rtol=1e-12, atol=1e-12)
        assert each["checkpointed"][1]["num_batches_tracked"].item() == 1


def test_evaluation_is_that_of_one_process(found):
    for rank, each in enumerate(found):
        x, mask, _ = mine(data("all masked"), rank)[0]
        want = [layer(BatchRenorm1d).eval()(x, mask)]
        want.append(layer(BatchRenorm1d, track_running_stats=False).eval()(x[:2], mask[:2] | True))
        torch.testing.assert_close(each["evaluated"], want, rtol=0, atol=0, equal_nan=True)


def test_fewer_than_two_valid_positions_in_all_are_refused_on_every_process_and_change_nothing(found):
    for each in found:
        assert each["refused"] == [
            "SyncBatchRenorm: Expected more than 1 value per channel when training, got input size (2, 3, 5), of which "
            f"masks leave {valid} valid per channel, on all processes together"
            for valid in (0, 1)
        ]
        assert each["unchanged"]


def test_without_processes_it_is_the_plain_layer_with_a_mask():
    batches = data("unequal")
    torch.testing.assert_close(trace(layer(), batches), trace(layer(BatchRenorm1d), batches), rtol=0, atol=0)
    with pytest.raises(InputError, match=r"SyncBatchRenorm: Expected more than 1 value .* the mask leaves 1 valid"):
        layer()(batches[0][0], length_mask(torch.tensor([1] + [0] * 7), LENGTH))

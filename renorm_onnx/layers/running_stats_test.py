import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import update_bn

from renorm_onnx.errors import InputError
from renorm_onnx.layers.clock import HostClock
from renorm_onnx.layers.modules import BatchRenorm1d
from renorm_onnx.layers.running_stats import sync_running_stats, update_stats
from renorm_onnx.layers.schedules import HardSwitch


def batches(count=4):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(12, 3, generator=g, dtype=torch.float64) * (1 + i) - i for i in range(count)]


def network(**options):
    torch.manual_seed(0)
    first = BatchRenorm1d(4, **{"r_max": 2.0, "d_max": 1.0, "schedule": HardSwitch(3), "stat": "var", **options})
    model = nn.Sequential(nn.Linear(3, 4), first, nn.Tanh(), nn.Linear(4, 2), BatchRenorm1d(2, stat="var")).double()
    for layer in (model[1], model[4]):
        layer.num_batches_tracked.fill_(9)
        layer.running_mean.fill_(7)
        layer.running_var.fill_(0.01)
    return model


def by_hand(model, data):
    """Mean over the batches of each layer's input statistics, every layer normalizing by its own batch alone."""
    totals = {1: [0.0, 0.0], 4: [0.0, 0.0]}
    with torch.no_grad():
        for x in data:
            for i, module in enumerate(model):
                if i in totals:
                    mean, var = x.mean(0), x.var(0, unbiased=False)
                    totals[i][0] = totals[i][0] + mean / len(data)
                    totals[i][1] = totals[i][1] + var / len(data)
                    x = (x - mean) / torch.sqrt(var + module.eps) * module.weight + module.bias
                else:
                    x = module(x)
    return totals


def assert_taken(model, want, rounding=1e-12):
    for i, (mean, var) in want.items():
        torch.testing.assert_close(model[i].running_mean, mean, rtol=rounding, atol=rounding)
        torch.testing.assert_close(model[i].running_var, var, rtol=rounding, atol=rounding)


def test_statistics_are_the_mean_over_the_batches_and_nothing_else_changes():
    model = network()
    model[4].eval()
    want = by_hand(model, batches())
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith(("_mean", "_var"))}
    assert update_stats(model, batches()) == 4
    assert_taken(model, want)
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)
    assert model[1].num_batches_tracked.item() == 9
    assert [m.training for m in model] == [True, True, True, True, False]
    assert (model[1].momentum, model[1].r_max, model[1].d_max, model[1].schedule) == (0.01, 2.0, 1.0, HardSwitch(3))
    assert not model[1].running_mean.requires_grad


def test_with_r_and_d_acting_during_the_pass_the_second_layer_would_be_wrong():
    model = network(schedule=None)
    want = by_hand(model, batches())
    for layer in (model[1], model[4]):
        layer.reset_running_stats()
        layer.momentum = None
    with torch.no_grad():
        for x in batches():
            model(x)
    torch.testing.assert_close(model[1].running_mean, want[1][0], rtol=1e-12, atol=1e-12)
    assert (model[4].running_mean - want[4][0]).abs().max() > 0.05


def test_torchs_own_pass_skips_us_and_ours_takes_its_layers_too():
    model = network()
    update_bn(batches(), model)
    assert model[1].running_mean.unique().item() == 7
    mixed, torchs = network(), network()
    for each in (mixed, torchs):
        each[1] = nn.BatchNorm1d(4).double()
        each[4] = nn.BatchNorm1d(2).double()
    mixed[4] = BatchRenorm1d(2, stat="var_unbiased").double()
    update_bn(batches(), torchs)
    update_stats(mixed, batches())
    for i in (1, 4):
        torch.testing.assert_close(mixed[i].running_mean, torchs[i].running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(mixed[i].running_var, torchs[i].running_var, rtol=1e-6, atol=1e-6)


def test_a_batch_may_be_a_pair_or_anything_that_feed_understands():
    pairs, named = network(), network()
    want = by_hand(network(), batches())
    update_stats(
        pairs, [(x.float(), "label") for x in batches()], torch.device("cpu"), feed=lambda b: pairs(b[0].double())
    )
    update_stats(named, [[x, None] for x in batches()], "cpu")
    assert_taken(named, want)
    assert_taken(pairs, want, rounding=1e-5)


def test_an_empty_or_failing_pass_leaves_the_model_as_it_was():
    model = network().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match="update_stats: batches is empty, expected at least one batch"):
        update_stats(model, [])
    with pytest.raises(RuntimeError, match="shapes"):
        update_stats(model, [*batches(1), torch.zeros(4, 9, dtype=torch.float64)])
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)
    assert not any(m.training for m in model.modules())
    assert model[1].momentum == 0.01


def test_a_model_without_statistics_is_not_run():
    model = nn.Sequential(BatchRenorm1d(3, track_running_stats=False))
    assert update_stats(model, iter([None])) == 0


def test_arguments_in_the_order_of_update_bn_are_refused_with_the_right_order():
    with pytest.raises(
        InputError, match=r"update_stats\(module, batches\): module is a list, expected a torch\.nn\.Mod"
    ):
        update_stats(batches(), network())
    with pytest.raises(InputError, match=r"sync_running_stats: module is a dict, expected a torch\.nn\.Module"):
        sync_running_stats(dict(network().state_dict()))


def test_a_second_set_of_statistics_becomes_the_same_and_survives_a_failing_pass():
    model = network(renorm_momentum=0.1)
    model[1].renorm_mean.fill_(5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match="batches is empty"):
        update_stats(model, [])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    single = network()
    assert update_stats(model, batches()) == update_stats(single, batches())
    for which in ("running", "renorm"):
        for name in ("mean", "var"):
            want = single[1].get_buffer(f"running_{name}")
            torch.testing.assert_close(model[1].get_buffer(f"{which}_{name}"), want, rtol=1e-12, atol=1e-12)


class OnADevice:
    """A counter that says it lives on a device."""

    is_cpu = is_cuda = False

    def __init__(self, counter):
        self.counter = counter

    def is_inference(self):
        return False

    def __int__(self):
        return int(self.counter)

    @property
    def _version(self):
        return self.counter._version


@pytest.mark.parametrize(("write", "believed"), [(sync_running_stats, 500), (None, 9)], ids=["ours", "control"])
def test_the_clock_of_a_layer_sees_the_step_that_synchronizing_gives_it(monkeypatch, tmp_path, write, believed):
    def another_rank_is_ahead(tensor, op=dist.ReduceOp.SUM, group=None):
        if op is dist.ReduceOp.MAX:
            tensor.data.fill_(500)  # as collectives write: without a number

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(dist, "all_reduce", another_rank_is_ahead)
    model, clock = network(), HostClock()
    steps = model[1].num_batches_tracked
    on_device = OnADevice(steps)
    assert clock.read(on_device) == 9
    try:
        if write is None:
            dist.all_reduce(steps, dist.ReduceOp.MAX)
        else:
            write(model)
    finally:
        dist.destroy_process_group()
    assert int(steps) == 500
    assert clock.read(on_device) == believed


def test_synchronizing_with_oneself_alone_changes_nothing(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    model = network()
    before = {name: value.clone() for name, value in model.named_buffers()}
    try:
        assert sync_running_stats(model) == 2
    finally:
        dist.destroy_process_group()
    for name, value in model.named_buffers():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)

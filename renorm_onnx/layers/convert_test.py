import copy
import logging
import pickle
import pickletools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from renorm_onnx.errors import InputError
from renorm_onnx.layers.adoption import adopt
from renorm_onnx.layers.convert import convert_batchnorm, to_batchnorm
from renorm_onnx.layers.distributed import SyncBatchRenorm, convert_sync_batchrenorm
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

PAIRS = [
    (nn.BatchNorm1d, BatchRenorm1d, (6, 5)),
    (nn.BatchNorm1d, BatchRenorm1d, (6, 5, 4)),
    (nn.BatchNorm2d, BatchRenorm2d, (3, 5, 4, 2)),
    (nn.BatchNorm3d, BatchRenorm3d, (3, 5, 4, 2, 2)),
    (nn.SyncBatchNorm, SyncBatchRenorm, (3, 5, 4, 2)),
]


def random(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained(norm, seed=0):
    """A norm with nothing at its initial value."""
    with torch.no_grad():
        for i, tensor in enumerate([norm.weight, norm.bias, norm.running_mean, norm.running_var]):
            if tensor is not None:
                tensor.copy_(random(tensor.shape, seed + i).abs() + 0.3)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(17)
    return norm


def in_float64(x, norm):
    """Inference by the formula, from the raw tensors."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean, var = norm.running_mean.double().view(shape), norm.running_var.double().view(shape)
    y = (x.double() - mean) / torch.sqrt(var + norm.eps)
    return y * norm.weight.double().view(shape) + norm.bias.double().view(shape)


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Harmless(nn.BatchNorm2d):
    """A subclass as people write it for another default."""

    def __init__(self, features):
        super().__init__(features, eps=1e-3, momentum=0.03)


@pytest.mark.parametrize(("theirs", "ours", "shape"), PAIRS)
def test_evaluation_is_equal_to_the_bit_and_to_the_formula(theirs, ours, shape):
    norm = trained(theirs(5, eps=1e-2, momentum=0.3)).eval()
    x = random(shape, 9) * 3 + 1
    want, exact = norm(x), in_float64(x, norm)
    got = convert_batchnorm(norm)
    assert type(got) is ours
    assert not got.training
    assert (got.eps, got.momentum) == (1e-2, 0.3)
    assert torch.equal(got(x), want)
    torch.testing.assert_close(got(x).double(), exact, rtol=1e-5, atol=1e-5)
    got.running_var.mul_(1.01)  # control: the comparison above notices one percent of a variance
    assert not torch.equal(got(x), want)


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"momentum": None},
        {"track_running_stats": False},
        {"dtype": torch.float64},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_every_option_of_batchnorm_survives_both_ways(options):
    norm = trained(nn.BatchNorm2d(5, **options)).eval()
    x = random((4, 5, 3, 3), 3, norm.weight.dtype if norm.affine else torch.float32) * 2 + 1
    want, state = norm(x), {k: v.clone() for k, v in norm.state_dict().items() if k != "num_batches_tracked"}
    ours = convert_batchnorm(norm)
    back = to_batchnorm(ours)
    for layer in (ours, back):
        assert torch.equal(layer(x), want)
        assert (layer.momentum, layer.affine, layer.track_running_stats) == (
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
        )
        assert state.keys() == layer.state_dict().keys() - {"num_batches_tracked"}
        for key, value in state.items():
            assert torch.equal(layer.state_dict()[key], value)
    assert type(back) is nn.BatchNorm2d


def test_a_batchnorm_without_bias_keeps_none():
    norm = trained(nn.BatchNorm2d(5)).eval()
    norm.bias = None
    x = random((2, 5, 3, 3))
    want = norm(x)
    assert torch.equal(convert_batchnorm(norm)(x), want)


def test_statistics_switched_off_after_construction_are_still_used_in_evaluation():
    norm = trained(nn.BatchNorm2d(5)).eval()
    norm.track_running_stats = False
    x = random((2, 5, 3, 3))
    want = norm(x)
    got = convert_batchnorm(norm)
    assert torch.equal(got(x), want)
    before = got.running_mean.clone()
    got.train()(x)
    assert torch.equal(got.running_mean, before)


def test_every_container_is_searched_and_a_shared_layer_stays_one():
    shared = trained(nn.BatchNorm1d(4))
    model = nn.ModuleDict(
        {
            "sequence": nn.Sequential(nn.Linear(4, 4), shared, nn.Sequential(nn.ReLU(), shared)),
            "list": nn.ModuleList([trained(nn.BatchNorm1d(4), 5), nn.Identity()]),
        }
    )
    twin = copy.deepcopy(model).eval()
    assert convert_batchnorm(model) is model
    model.eval()
    assert model["sequence"][1] is model["sequence"][2][1]
    assert not any(isinstance(m, nn.BatchNorm1d) for m in model.modules())
    assert sum(isinstance(m, BatchRenorm1d) for m in model.modules()) == 2
    x = random((6, 4), 2)
    assert torch.equal(model["sequence"](x), twin["sequence"](x))
    assert torch.equal(model["list"][0](x), twin["list"][0](x))
    assert model.state_dict().keys() == twin.state_dict().keys()


def test_an_optimizer_made_before_still_trains_the_model():
    model = nn.Sequential(nn.Linear(3, 4), trained(nn.BatchNorm1d(4)))
    model[1].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight, bias, mean = model[1].weight, model[1].bias, model[1].running_mean
    convert_batchnorm(model)
    assert model[1].weight is weight
    assert model[1].running_mean is mean
    assert not model[1].bias.requires_grad
    before = weight.detach().clone()
    model(random((8, 3))).square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)
    assert model[1].bias is bias


def test_frozen_layers_stay_frozen():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).train()
    model[1].eval()
    convert_batchnorm(model)
    assert [m.training for m in model] == [True, False]


def test_hooks_move_with_their_handles():
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    seen = []
    handle = model[0].register_forward_hook(lambda module, args, out: seen.append(type(module)))
    loading = model[0].register_load_state_dict_pre_hook(lambda module, *args: seen.append(module))
    convert_batchnorm(model)
    model(random((2, 3)))
    assert seen == [BatchRenorm1d]
    model.load_state_dict(model.state_dict())
    assert seen[1] is model[0]
    loading.remove()
    handle.remove()
    model(random((2, 3)))
    assert len(seen) == 2


def test_attributes_that_others_set_are_kept():
    norm = nn.BatchNorm1d(3)
    norm.qconfig = "mine"
    assert convert_batchnorm(norm).qconfig == "mine"


def test_subclasses_with_their_own_forward_are_left_alone_and_named(caplog):
    own, harmless = trained(Own(3)), trained(Harmless(3))
    model = nn.Sequential(own, harmless).eval()
    x = random((2, 3, 4, 4))
    want = model(x)
    with caplog.at_level(logging.WARNING):
        convert_batchnorm(model)
    assert "'0' (Own defines its own forward)" in caplog.text
    assert "'1'" not in caplog.text
    assert model[0] is own
    assert type(model[1]) is BatchRenorm2d
    assert (model[1].eps, model[1].momentum) == (1e-3, 0.03)
    assert torch.equal(model(x), want)


def test_reparametrized_pruned_and_patched_layers_are_left_alone_and_named(caplog):
    normed = parametrizations.weight_norm(nn.BatchNorm1d(3), dim=None)
    pruned = prune.l1_unstructured(trained(nn.BatchNorm1d(3)), "weight", 1)
    patched = nn.BatchNorm1d(3)
    patched.forward = lambda x: x + 1
    model = nn.Sequential(normed, pruned, patched).eval()
    x = random((2, 3))
    want = model(x)
    with caplog.at_level(logging.WARNING):
        convert_batchnorm(model)
    assert "'0' (it also holds parametrizations)" in caplog.text
    assert "'1' (it also holds weight_mask, weight_orig)" in caplog.text
    assert "'2' (its forward was replaced on the instance)" in caplog.text
    assert torch.equal(model(x), want)


def test_strict_refuses_before_anything_changes():
    model = nn.Sequential(trained(nn.BatchNorm2d(3)), Own(3))
    with pytest.raises(InputError, match=r"strict=True\): cannot convert '1' \(Own defines its own forward\)"):
        convert_batchnorm(model, strict=True)
    assert type(model[0]) is nn.BatchNorm2d
    assert model[0].num_batches_tracked.item() == 17


def test_a_lazy_batchnorm_is_refused_until_it_knows_its_features():
    model = nn.Sequential(trained(nn.BatchNorm1d(3)), nn.LazyBatchNorm1d())
    with pytest.raises(InputError, match=r"'1' is a LazyBatchNorm1d .* run one batch through the model first"):
        convert_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d
    model(random((4, 3)))
    assert type(convert_batchnorm(model)[1]) is BatchRenorm1d


def test_bad_options_are_refused_even_without_a_layer_to_use_them():
    with pytest.raises(InputError, match=r"r_max=0\.5, expected a finite number >= 1"):
        convert_batchnorm(nn.Identity(), r_max=0.5)
    with pytest.raises(InputError, match="affine=False, expected no such option"):
        convert_batchnorm(nn.Identity(), affine=False)
    with pytest.raises(InputError, match="'0': BatchRenorm1d: momentum=2"):
        convert_batchnorm(nn.Sequential(nn.BatchNorm1d(3, momentum=2.0)))


def test_options_reach_every_layer():
    model = convert_batchnorm(
        nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3)), r_max=2.0, d_max=1.0, stat="var", momentum=0.02
    )
    for layer in model:
        assert (layer.r_max, layer.d_max, layer.stat, layer.momentum) == (2.0, 1.0, "var", 0.02)
    assert model[0].schedule is model[1].schedule


def test_a_cumulative_average_keeps_its_count():
    layer = convert_batchnorm(trained(nn.BatchNorm1d(3, momentum=None)))
    assert layer.num_batches_tracked.item() == 17
    assert layer.schedule.bounds(17, 3.0, 5.0) == (3.0, 5.0)


@pytest.mark.parametrize(("make", "counted"), [(trained, 40_000), (lambda norm: norm, 0)])
def test_a_layer_without_a_counter_gets_one_and_trains(make, counted):
    norm = make(nn.BatchNorm1d(3))
    norm.num_batches_tracked = None
    assert copy.deepcopy(norm)(random((6, 3))).shape == (6, 3)  # control: torch trains such a layer
    layer = convert_batchnorm(norm)
    assert layer.num_batches_tracked.item() == counted
    layer(random((6, 3), 1))
    assert layer.num_batches_tracked.item() == counted + 1


def test_a_cumulative_average_of_unknown_weight_is_refused():
    norm = trained(nn.BatchNorm1d(3, momentum=None))
    norm.num_batches_tracked = None
    model = nn.Sequential(trained(nn.BatchNorm1d(3)), norm)
    with pytest.raises(InputError, match=r"'1' has momentum=None and .*_tracked=None, expected a count.*; set num_b"):
        convert_batchnorm(model)
    assert model[1] is norm
    assert model[0].num_batches_tracked.item() == 17
    assert convert_batchnorm(model, momentum=0.1)[1].num_batches_tracked.item() == 40_000


def test_what_counts_as_pretrained_is_decided_per_layer_unless_said():
    def counts(**options):
        only_statistics = nn.BatchNorm1d(3)
        only_statistics.running_var.fill_(2.0)
        model = nn.Sequential(nn.BatchNorm1d(3), trained(nn.BatchNorm1d(3)), only_statistics)
        return [layer.num_batches_tracked.item() for layer in convert_batchnorm(model, **options)]

    assert counts() == [0, 40_000, 40_000]
    assert counts(pretrained=False) == [0, 17, 0]
    assert counts(pretrained=True) == [40_000] * 3


def test_a_converted_pretrained_layer_renormalizes_at_its_first_training_step():
    norm = trained(nn.BatchNorm1d(3, dtype=torch.float64))
    x = random((16, 3), 4, torch.float64) * 1.5 + 0.5
    sigma = torch.sqrt(norm.running_var + norm.eps)
    sigma_b = torch.sqrt(x.var(0, unbiased=False) + norm.eps)
    r = (sigma_b / sigma).clamp(1 / 3, 3)
    d = ((x.mean(0) - norm.running_mean) / sigma).clamp(-5, 5)
    want = ((x - x.mean(0)) / sigma_b * r + d) * norm.weight + norm.bias
    plain = (x - x.mean(0)) / sigma_b * norm.weight + norm.bias
    got = convert_batchnorm(norm)(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert (got - plain).abs().max() > 0.1  # control: r and d act


def test_to_batchnorm_leaves_no_trace_of_this_package(caplog):
    class Own(BatchRenorm1d):
        def forward(self, x):
            return super().forward(x) + 1

    layer = trained(BatchRenorm1d(3, momentum=0.2, eps=1e-3))
    layer.mark = "kept"
    model = nn.Sequential(layer, trained(SyncBatchRenorm(3)), Own(3)).eval()
    x = random((4, 3))
    want = model(x)
    with caplog.at_level(logging.WARNING):
        assert to_batchnorm(model) is model
    assert [type(m) for m in model] == [nn.BatchNorm1d, nn.SyncBatchNorm, Own]
    assert "'2' (Own defines its own forward)" in caplog.text
    assert torch.equal(model(x), want)
    assert model[0].mark == "kept"
    assert model[0].weight is layer.weight
    names = [arg for _, arg, _ in pickletools.genops(pickle.dumps(model[:2])) if isinstance(arg, str)]
    assert not [name for name in names if "renorm" in name]


def test_a_second_set_of_statistics_starts_as_the_first_and_goes_on_the_way_back():
    layer = convert_batchnorm(trained(nn.BatchNorm1d(3)), renorm_momentum=0.5)
    assert torch.equal(layer.renorm_mean, layer.running_mean)
    assert layer.renorm_var is not layer.running_var
    x = random((8, 3), 6)
    layer(x)
    assert not torch.equal(layer.renorm_mean, layer.running_mean)
    want = layer.eval()(x)
    back = to_batchnorm(layer)
    assert torch.equal(back(x), want)
    assert "renorm_mean" not in back.state_dict()


def test_converting_twice_and_converting_nothing_change_nothing():
    model = nn.Sequential(nn.Linear(3, 3), trained(nn.BatchNorm1d(3)))
    layer = convert_batchnorm(model)[1]
    assert convert_batchnorm(model)[1] is layer
    assert to_batchnorm(nn.Identity()).training


@pytest.mark.parametrize("convert", [convert_batchnorm, to_batchnorm, convert_sync_batchrenorm, adopt])
def test_what_is_no_module_is_refused_by_name(convert):
    with pytest.raises(InputError, match=f"{convert.__name__}: module is a str, expected a torch.nn.Module"):
        convert("x")


class OwnForward(BatchRenorm2d):
    def forward(self, x):
        return super().forward(x)


def test_making_layers_synchronize_names_the_layers_that_it_leaves_alone(caplog):
    model = nn.Sequential(BatchRenorm2d(3), OwnForward(3), BatchRenorm2d(3), SyncBatchRenorm(3), nn.BatchNorm2d(3))
    prune.identity(model[2], "weight")
    convert_sync_batchrenorm(model)
    assert [type(m) for m in model] == [SyncBatchRenorm, OwnForward, BatchRenorm2d, SyncBatchRenorm, nn.BatchNorm2d]
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == (
        "convert_sync_batchrenorm: left alone '1' (OwnForward defines its own forward); "
        "'2' (it also holds weight_mask, weight_orig)"
    )
    caplog.clear()
    convert_sync_batchrenorm(nn.Sequential(BatchRenorm2d(3), nn.ReLU()))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]

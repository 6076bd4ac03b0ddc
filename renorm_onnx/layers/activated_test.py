import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)

from renorm_onnx.errors import InputError
from renorm_onnx.layers.activated import BatchRenormAct2d
from renorm_onnx.layers.convert import convert_batchnorm, to_batchnorm
from renorm_onnx.layers.distributed import SyncBatchRenormAct, convert_sync_batchrenorm
from renorm_onnx.layers.modules import BatchRenorm2d


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's layer of this name computes, by the constructor it has."""

    def __init__(self, features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, act=None):
        super().__init__(features, eps, momentum, affine, track_running_stats)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class SyncBatchNormAct(nn.SyncBatchNorm):
    """timm's too; its modules are set from outside."""

    def forward(self, x):
        x = super().forward(x)
        x = self.drop(x) if hasattr(self, "drop") else x
        return self.act(x) if hasattr(self, "act") else x


for kind in (BatchNormAct2d, SyncBatchNormAct):
    kind.__module__ = "timm.layers.norm_act"


class Derived(BatchNormAct2d):
    """Somebody's default of timm's layer."""


class Changed(BatchNormAct2d):
    def forward(self, x):
        return super().forward(x) + 1


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(norm):
    with torch.no_grad():
        norm.weight.copy_(random(5, seed=1).abs() + 0.3)
        norm.bias.copy_(random(5, seed=2))
        norm.running_mean.copy_(random(5, seed=3))
        norm.running_var.copy_(random(5, seed=4).abs() + 0.3)
    norm.num_batches_tracked.fill_(17)
    return norm.eval()


@pytest.mark.parametrize("kind", [BatchNormAct2d, Derived])
@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.PReLU(5), nn.Identity()], ids=repr)
def test_the_activation_is_kept_there_and_back_and_state_dicts_have_the_same_names(kind, act):
    model = nn.Sequential(trained(kind(5, eps=1e-3, momentum=0.2, act=act)), nn.Conv2d(5, 2, 3)).eval()
    x = random(2, 5, 4, 4, seed=9) * 2
    want, state, weight = model(x), copy.deepcopy(model.state_dict()), model[0].weight
    convert_batchnorm(model)
    layer = model[0]
    assert type(layer) is BatchRenormAct2d
    assert (layer.num_features, layer.eps, layer.momentum) == (5, 1e-3, 0.2)
    assert layer.act is act
    assert layer.weight is weight
    assert list(model.state_dict()) == list(state)
    assert torch.equal(model(x), want)
    model.load_state_dict(state, strict=True)
    to_batchnorm(model)
    assert type(model[0]) is kind
    assert not any("origin" in vars(m) or "r_max" in vars(m) for m in model.modules())
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state, strict=True)
    assert torch.equal(model(x), want)
    assert isinstance(act, nn.Identity) or (BatchRenorm2d.forward(layer, x) < 0).any()  # control: act has work


def test_a_training_step_renormalizes_and_then_activates():
    layer = convert_batchnorm(trained(BatchNormAct2d(5))).train()
    x = (random(6, 5, 3, 3, seed=7) * 1.5 + 0.5).requires_grad_()
    twin = BatchRenorm2d(5, schedule=None, momentum=0.1)
    twin.load_state_dict(layer.state_dict())
    y = layer(x)
    want = F.relu(twin(x))
    torch.testing.assert_close(y, want, rtol=0, atol=0)
    assert (y == 0).any()
    weights = random(*y.shape, seed=8)
    (mine,) = torch.autograd.grad((y * weights).sum(), x)
    (theirs,) = torch.autograd.grad((want * weights).sum(), x)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(layer.running_var, twin.running_var, rtol=0, atol=0)


def test_a_synchronized_layer_comes_from_timms_and_from_ours():
    theirs = SyncBatchNormAct(5)
    theirs.act = nn.ReLU()
    x = random(2, 5, 4, 4, seed=9)
    layer = convert_batchnorm(trained(theirs))
    assert type(layer) is SyncBatchRenormAct
    assert isinstance(layer.drop, nn.Identity)
    assert torch.equal(layer(x), theirs(x))
    assert type(to_batchnorm(layer)) is SyncBatchNormAct
    plain = convert_batchnorm(trained(BatchNormAct2d(5)))
    want = plain(x)
    pooled = convert_sync_batchrenorm(plain)
    assert type(pooled) is SyncBatchRenormAct
    assert torch.equal(pooled(x), want)
    assert torch.equal(to_batchnorm(pooled)(x), want)


def test_a_class_of_that_name_elsewhere_and_one_with_more_to_do_are_left_alone(caplog):
    def forward(self, x):
        return self.act(nn.BatchNorm2d.forward(self, x)) * 2

    # The name alone says nothing: this one belongs to another library.
    elsewhere = type("BatchNormAct2d", (nn.BatchNorm2d,), {"act": None, "forward": forward})
    model = nn.Sequential(elsewhere(5), Changed(5), trained(BatchNormAct2d(5)))
    model[2].extra = nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING):
        convert_batchnorm(model)
    assert "'0' (BatchNormAct2d defines its own forward)" in caplog.text
    assert "'1' (Changed defines its own forward)" in caplog.text
    assert "'2' (it also holds extra)" in caplog.text
    assert not any(isinstance(m, BatchRenormAct2d) for m in model.modules())


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and detectron2 have it: four buffers, no relation to torch's layer."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(3))


def test_batch_normalization_that_is_not_torchs_is_named(caplog):
    model = nn.Sequential(FrozenBatchNorm2d(), nn.InstanceNorm2d(3, track_running_stats=True), BatchRenorm2d(3))
    with caplog.at_level(logging.WARNING):
        convert_batchnorm(model)
    assert caplog.messages == [
        "convert_batchnorm: left alone '0' (FrozenBatchNorm2d does not derive from torch's BatchNorm)"
    ]
    with pytest.raises(InputError, match=r"cannot convert '0' \(FrozenBatchNorm2d does not derive"):
        convert_batchnorm(model, strict=True)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_it_can_be_scripted_traced_and_copied():
    layer = convert_batchnorm(trained(BatchNormAct2d(5)))
    x = random(2, 5, 4, 4, seed=9)
    for made in (
        torch.jit.script(layer),
        torch.jit.trace(layer, x),
        copy.deepcopy(layer),
        torch.compile(layer, backend="eager"),
    ):
        assert torch.equal(made(x), layer(x))

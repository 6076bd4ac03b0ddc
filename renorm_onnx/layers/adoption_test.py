"""Stand-ins have the names, attributes and inference formula of the foreign layers, and nothing of their code."""

import copy
import importlib.metadata
import importlib.util
import logging
import warnings

import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError
from renorm_onnx.layers.adoption import FOREIGN_LAYERS, BatchRenormNd, adopt
from renorm_onnx.layers.convert import to_batchnorm
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from renorm_onnx.layers.schedules import CONSTANT, PAPER, HardSwitch, Ramp

C = 5


def random(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def wide(x, values):
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def stand_in(row, *, name=None, box=False, **attributes):
    """A trained layer as the row describes it, that computes gamma (x - mean) / s + beta."""

    def forward(self, x):
        s = getattr(self, row.spread)
        s = torch.sqrt(s + self.eps) if row.kind == "var" else s
        x = (x - wide(x, getattr(self, row.mean))) / wide(x, s)
        if not getattr(self, "affine", True):
            return x
        return x * wide(x, getattr(self, row.weight)) + wide(x, getattr(self, row.bias))

    kind = type(row.home, (nn.Module,), {"forward": forward})
    layer = (kind if name in (None, row.home) else type(name, (kind,), {}))()
    shape = (1, C, 1, 1) if box else (C,)
    setattr(layer, row.weight, nn.Parameter(random(shape, 1).abs() + 0.5))
    setattr(layer, row.bias, nn.Parameter(random(shape, 2)))
    mean, spread = random(shape, 3) * 2, random(shape, 4).abs() * torch.logspace(-2, 1, C).view(shape) + 1e-3
    if box:
        setattr(layer, row.mean, mean)
        setattr(layer, row.spread, spread)
    else:
        layer.register_buffer(row.mean, mean)
        layer.register_buffer(row.spread, spread)
    if row.steps is not None:
        layer.register_buffer(row.steps, torch.tensor(123))
    layer.eps, layer.momentum = 1e-3, 0.02
    for key, value in attributes.items():
        setattr(layer, key, value)
    return layer


TORCHRL, TORCH_EM, SB3, AVALANCHE, MF1024, CORENET, LUDVB = FOREIGN_LAYERS
WARM = {"warmup_steps": 100, "smooth": False, "max_r": 2.5, "max_d": 4.0}
GROWN = {"r_max_inc_step": 1e-4, "max_r_max": 2.5, "max_d_max": 4.0, "r_max": torch.tensor(2.5), "d_max": 4.0}
CASES = {
    "torchrl": (lambda: stand_in(TORCHRL, **WARM), BatchRenormNd, (4, C, 3, 2), HardSwitch(100)),
    "torchrl smooth": (lambda: stand_in(TORCHRL, **WARM | {"smooth": True}), BatchRenormNd, (4, C), Ramp(0, 100, 100)),
    "torchrl at once": (lambda: stand_in(TORCHRL, **WARM | {"warmup_steps": 0}), BatchRenormNd, (4, C), CONSTANT),
    "torch_em": (
        lambda: stand_in(TORCH_EM, name="BatchRenorm3d", **WARM),
        BatchRenorm3d,
        (2, C, 3, 2, 2),
        HardSwitch(100),
    ),
    "sb3": (
        lambda: stand_in(SB3, name="BatchRenorm1d", warmup_steps=100, affine=True, rmax=2.5, dmax=4.0),
        BatchRenorm1d,
        (4, C),
        HardSwitch(101),
    ),
    "sb3 without affine": (
        lambda: stand_in(SB3, warmup_steps=100, affine=False, rmax=2.5, dmax=4.0),
        BatchRenorm1d,
        (4, C),
        HardSwitch(101),
    ),
    "avalanche": (lambda: stand_in(AVALANCHE, box=True, **GROWN), BatchRenorm2d, (4, C, 3, 2), CONSTANT),
    "avalanche young": (
        lambda: stand_in(AVALANCHE, box=True, **GROWN | {"r_max": 1.0, "momentum": torch.tensor(0.02)}),
        BatchRenorm2d,
        (4, C, 3, 2),
        PAPER,
    ),
    "mf1024": (lambda: stand_in(MF1024, box=True, **GROWN), BatchRenorm2d, (4, C, 3, 2), CONSTANT),
    "corenet": (lambda: stand_in(CORENET), BatchRenormNd, (4, C, 3), PAPER),
    "ludvb": (lambda: stand_in(LUDVB, name="BatchRenorm2d", affine=True), BatchRenorm2d, (4, C, 3, 2), PAPER),
}


@pytest.mark.parametrize("name", CASES)
def test_a_foreign_layer_is_replaced_with_equal_evaluation(name):
    make, kind, shape, schedule = CASES[name]
    foreign = make()
    x = random(shape, 9) * 3
    want = copy.deepcopy(foreign).double()
    for key, value in vars(want).items():  # avalanche's statistics are no buffers, so double() misses them
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(want, key, value.double())
    exact = want(x.double())
    weight = dict(foreign.named_parameters())
    model = nn.Sequential(nn.ModuleDict({"inner": foreign}), foreign).eval()

    assert adopt(model) is model

    layer = model[1]
    assert type(layer) is kind
    assert model[0]["inner"] is layer
    torch.testing.assert_close(layer(x).double(), exact, rtol=2e-6, atol=2e-6)
    assert (layer.momentum, layer.schedule) == (0.02, schedule)
    assert (layer.r_max, layer.d_max) == ((3.0, 5.0) if name in ("corenet", "ludvb") else (2.5, 4.0))
    counts = not name.startswith(("avalanche", "mf1024"))
    assert layer.num_batches_tracked.item() == (123 if counts else 0)
    assert all(parameter in set(weight.values()) for parameter in layer.parameters())
    assert len(list(layer.parameters())) == (0 if name == "sb3 without affine" else 2)
    assert not layer.training
    assert to_batchnorm(copy.deepcopy(layer)).state_dict().keys() == layer.state_dict().keys()
    torch.testing.assert_close(to_batchnorm(copy.deepcopy(layer))(x).double(), exact, rtol=2e-6, atol=2e-6)

    layer.running_var.mul_(1 + 1e-3)  # control: a per mille of one variance shows
    assert (layer(x).double() - exact).abs().max() > 1e-5


@pytest.mark.parametrize("wrong", ["eps added again", "eps dropped"])
def test_the_tolerance_notices_a_wrong_epsilon(wrong):
    foreign = stand_in(AVALANCHE, box=True, **GROWN)
    x = random((4, C, 3, 2), 9)
    exact = foreign(x)
    layer = adopt(foreign).eval()
    with torch.no_grad():
        layer.eps = layer.eps + 1e-3 if wrong == "eps added again" else 1e-12
    assert not torch.allclose(layer(x), exact, rtol=1e-3, atol=1e-3)


def test_parameters_of_another_shape_keep_their_optimizer():
    model = nn.Sequential(stand_in(AVALANCHE, box=True, **GROWN))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = random((4, C, 3, 2))
    model(x).sum().backward()
    adopt(model)
    assert model[0].weight.grad.shape == (C,)
    before = model[0].weight.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_training_goes_on_by_algorithm_1_from_the_adopted_statistics():
    foreign = stand_in(TORCHRL, **WARM | {"warmup_steps": 123, "max_r": 1.2, "max_d": 0.3}).double()
    x = random((16, C), 5, torch.float64) + 0.5
    sigma, sigma_b = torch.sqrt(foreign.running_var + 1e-3), torch.sqrt(x.var(0, unbiased=False) + 1e-3)
    r, d = (sigma_b / sigma).clamp(1 / 1.2, 1.2), ((x.mean(0) - foreign.running_mean) / sigma).clamp(-0.3, 0.3)
    want = ((x - x.mean(0)) / sigma_b * r + d) * foreign.weight + foreign.bias
    want_var = foreign.running_var + 0.02 * (x.var(0) - foreign.running_var)
    layer = adopt(foreign).train()
    torch.testing.assert_close(layer(x), want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.running_var, want_var, rtol=1e-11, atol=1e-11)
    early = adopt(stand_in(TORCHRL, **WARM | {"warmup_steps": 124, "max_r": 1.2, "max_d": 0.3}).double()).train()
    assert (early(x) - want).abs().max() > 0.1  # control: one step before its switch it is plain batch norm


def test_options_go_before_what_the_layer_has():
    layer = adopt(stand_in(CORENET), schedule=None, r_max=2.0, momentum=0.5, stat="sigma")
    assert (layer.schedule, layer.r_max, layer.d_max, layer.momentum, layer.stat) == (CONSTANT, 2.0, 5.0, 0.5, "sigma")
    with pytest.raises(InputError, match=r"adopt: the model itself of google-research/corenet: .*r_max=0\.5"):
        adopt(stand_in(CORENET), r_max=0.5)


def test_a_second_set_of_statistics_starts_as_the_adopted_ones():
    for foreign in (stand_in(TORCHRL, **WARM), stand_in(AVALANCHE, box=True, **GROWN)):
        layer = adopt(copy.deepcopy(foreign), renorm_momentum=0.5, schedule=None)
        assert torch.equal(layer.renorm_mean, layer.running_mean)
        assert torch.equal(layer.renorm_var, layer.running_var)
        x = random((4, C, 3, 2), 9) * 3
        one_set = adopt(foreign, schedule=None)
        assert torch.equal(layer(x), one_set(x))  # both sets are alike at the first step
        assert not torch.equal(layer.renorm_mean, layer.running_mean)
        assert not torch.equal(layer(x), one_set(x))  # control: then r and d come from the second


def test_statistics_that_were_never_learned_become_the_initial_ones():
    foreign = stand_in(AVALANCHE, box=True, **GROWN)
    foreign.running_avg_std = torch.zeros(1, C, 1, 1)
    with torch.no_grad():
        foreign.gamma.fill_(1)
        foreign.beta.fill_(0)
    layer = adopt(foreign).eval()
    x = random((4, C, 3, 2))
    torch.testing.assert_close(layer(x), x / (1 + 1e-3) ** 0.5, rtol=1e-6, atol=1e-6)


def test_lost_or_impossible_statistics_are_refused_and_nothing_changes():
    good, lost = stand_in(AVALANCHE, box=True, **GROWN), stand_in(AVALANCHE, box=True, **GROWN)
    lost.running_avg_std = torch.zeros(1, C, 1, 1)
    model = nn.Sequential(good, lost)
    with pytest.raises(
        InputError, match="adopt: '1' of avalanche: running_avg_std is 0 everywhere though gamma and beta"
    ):
        adopt(model)
    assert model[0] is good
    assert good.gamma.shape == (1, C, 1, 1)
    lost.running_avg_std = torch.linspace(-1, 1, C).view(1, C, 1, 1)
    with pytest.raises(InputError, match=r"running_avg_std lies in \[-1\.0, 1\.0\], expected numbers > 0"):
        adopt(model)


def test_a_subclass_with_its_own_forward_is_left_alone_and_named(caplog):
    def own(self, x):
        return super(type(self), self).forward(x).relu()

    base = type(stand_in(CORENET))
    derived, patched = stand_in(CORENET), stand_in(CORENET)
    derived.__class__ = type("Mine", (type(derived),), {"forward": own})
    patched.forward = lambda x: x
    model = nn.Sequential(derived, patched)
    with caplog.at_level(logging.WARNING):
        adopt(model)
    assert "'0' (Mine defines its own forward); '1' (its forward was replaced on the instance)" in caplog.text
    assert model[0] is derived
    assert base.__name__ == "BatchRenorm"


def test_ours_and_namesakes_are_not_touched_and_nothing_found_is_said(caplog):
    ours = BatchRenorm1d(3)
    namesake = type("BatchRenorm1d", (nn.Module,), {"forward": lambda self, x: x})()
    model = nn.Sequential(ours, namesake, nn.BatchNorm1d(3))
    before = list(model)
    with caplog.at_level(logging.WARNING):
        adopt(model)
    assert list(model) == before
    assert "adopt: found no layer of torchrl" in caplog.text


@pytest.mark.parametrize("name", [name for name in CASES if name.split()[0] not in ("torchrl", "torch_em", "corenet")])
def test_a_foreign_state_dict_loaded_by_mistake_names_adopt(name):
    state = CASES[name][0]().state_dict()
    with pytest.raises(RuntimeError, match=r"belongs to another library's layer; .* renorm_onnx\.adopt"):
        BatchRenorm2d(C).load_state_dict(state, strict=False)


def test_a_state_dict_with_torchs_names_loads_as_it_is():
    foreign = stand_in(TORCHRL, **WARM)
    layer = BatchRenorm1d(C, eps=1e-3).eval()
    layer.load_state_dict(foreign.state_dict())
    x = random((4, C))
    torch.testing.assert_close(layer(x), foreign(x), rtol=1e-5, atol=1e-5)


def trained(layer, shape):
    """Some steps of its own training on data with very unequal scales, and parameters off their initial values."""
    for step in range(30):
        layer.train()(random(shape, step) * wide(torch.empty(shape), torch.logspace(-2, 1, C)) + step / 10)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(random(parameter.shape, 40) * 0.3)
    return layer.eval()


def real_layers(library):
    if library == "torchrl":
        kind = pytest.importorskip("torchrl.modules", reason="torchrl is not installed").BatchRenorm1d
        return [(kind(C), (16, C)), (kind(C, smooth=True, warmup_steps=7), (4, C, 3, 3))]
    if library == "sb3-contrib":
        found = pytest.importorskip("sb3_contrib.common.torch_layers", reason="sb3-contrib is not installed")
        return [(found.BatchRenorm1d(C), (16, C)), (found.BatchRenorm1d(C, affine=False, warmup_steps=3), (16, C))]
    # Only the layer's own file: `import avalanche` needs forty more packages.
    try:
        path = importlib.metadata.distribution("avalanche-lib").locate_file("avalanche/models/batch_renorm.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("avalanche-lib is not installed")
    spec = importlib.util.spec_from_file_location("avalanche.models.batch_renorm", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [(module.BatchRenorm2D(C), (4, C, 3, 3)), (module.BatchRenorm2D(C, r_d_max_inc_step=0.1), (4, C, 3, 3))]


@pytest.mark.peers
@pytest.mark.parametrize("library", ["torchrl", "sb3-contrib", "avalanche-lib"])
def test_the_layers_of_the_real_package_are_adopted_with_equal_evaluation(library):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        layers = real_layers(library)
    for foreign, shape in layers:
        model = nn.Sequential(nn.Identity(), trained(foreign, shape)).eval()
        x = random(shape, 9)
        want = copy.deepcopy(model)(x)
        adopt(model)
        assert type(model[1]).__module__.startswith("renorm_onnx.")
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
        model.train()(random(shape, 10))
        assert not torch.allclose(model.eval()(x), want, rtol=1e-5, atol=1e-5)

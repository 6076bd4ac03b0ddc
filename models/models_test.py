"""The networks have the published sizes, and every part of them trains."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from models import MODELS, Entry
from models.densenet import densenet
from models.mlp import mlp
from models.mobilenet_v2 import mobilenet_v2
from models.repvgg import repvgg
from models.unet3d import UNet3d, unet3d
from models.wide_resnet import FirstBlock, IdentityBlock, wide_resnet
from renorm_onnx.errors import InputError

EACH_MODEL = pytest.mark.parametrize("name", sorted(MODELS))


def build_small(entry: Entry, **options: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return entry.build(**{**entry.small, **options}), entry.example_inputs(4, **entry.small_inputs)


def norms_of(network: nn.Module) -> list[_NormBase]:
    return [module for module in network.modules() if isinstance(module, _NormBase)]


def parameters_of(network: nn.Module, *, with_norms: bool = True) -> int:
    total = sum(parameter.numel() for parameter in network.parameters())
    return total if with_norms else total - sum(p.numel() for norm in norms_of(network) for p in norm.parameters())


@EACH_MODEL
def test_every_parameter_of_every_model_receives_a_gradient(name: str) -> None:
    network, inputs = build_small(MODELS[name])
    y = network(*inputs)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias in front of a batch norm is subtracted again, so its gradient is rounding, and may be exactly 0.
    assert [name for name in silent if not (name.endswith(".bias") and isinstance(network, UNet3d))] == []


@EACH_MODEL
def test_every_model_gives_finite_outputs_in_both_modes_and_depends_on_its_input(name: str) -> None:
    network, inputs = build_small(MODELS[name])
    for module in (network, network.eval()):
        first, other = module(*inputs), module(*(2 * x + 1 for x in inputs))
        assert first.shape[0] == 4
        assert torch.isfinite(first).all()
        assert not torch.allclose(first, other)


@EACH_MODEL
def test_every_model_builds_its_norms_with_the_callable_it_is_given(name: str) -> None:
    seen: list[int] = []

    class Recorded(nn.Identity):
        def __init__(self, num_features: int) -> None:
            super().__init__()
            seen.append(num_features)

    default, inputs = build_small(MODELS[name])
    swapped, _ = build_small(MODELS[name], norm=Recorded)
    assert norms_of(swapped) == []
    assert sorted(seen) == sorted(norm.num_features for norm in norms_of(default))
    assert swapped(*inputs).shape == default(*inputs).shape


@EACH_MODEL
def test_spatial_dims_of_the_table_names_the_norm_that_the_inputs_need(name: str) -> None:
    entry = MODELS[name]
    network, inputs = build_small(entry)
    fitting = {0: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[entry.spatial_dims]
    assert all(type(norm) is fitting for norm in norms_of(network))
    assert inputs[0].ndim == entry.spatial_dims + 2


@EACH_MODEL
def test_example_inputs_depend_on_their_seed_alone(name: str) -> None:
    entry = MODELS[name]
    (first,) = entry.example_inputs(3, seed=1, **entry.small_inputs)
    torch.manual_seed(5)
    (again,) = entry.example_inputs(3, seed=1, **entry.small_inputs)
    (other,) = entry.example_inputs(3, seed=2, **entry.small_inputs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def wide_resnet_parameters(depth: int, k: int, *, final_norm: bool) -> int:
    """Count layer by layer from the paper's table 1, for 3 channels and 10 classes."""
    blocks, norm_channels, total, inside = (depth - 4) // 6, 16, 3 * 16 * 9, 16
    for group, c in enumerate((16 * k, 32 * k, 64 * k)):
        total += inside * c * 9 + c * c * 9 + inside * c
        total += (blocks - 1) * 2 * c * c * 9
        norm_channels += c + (blocks - 1) * 2 * c
        norm_channels += c if final_norm or group < 2 else 0
        inside = c
    return total + 2 * norm_channels + inside * 10 + 10


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize(("depth", "width"), [(16, 4), (28, 2), (10, 1)])
def test_wide_resnet_has_the_parameters_that_the_formula_gives(depth: int, width: int, final_norm: bool) -> None:
    network = wide_resnet(depth, width, final_norm=final_norm)
    assert parameters_of(network) == wide_resnet_parameters(depth, width, final_norm=final_norm)


def test_wrn_16_4_has_13_norms_16_bias_free_convolutions_and_2_75_million_parameters() -> None:
    network = wide_resnet()
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 16
    assert all(conv.bias is None for conv in convolutions)
    assert len(norms_of(network)) == 13
    assert len(norms_of(wide_resnet(final_norm=False))) == 12
    assert parameters_of(network) == 2_748_890


def test_wide_resnet_halves_the_image_twice_and_counts_its_blocks() -> None:
    network = wide_resnet(22, 2, dropout=0.3)
    assert [type(m) for m in network[3]][:3] == [FirstBlock, IdentityBlock, IdentityBlock]
    assert [block.dropout.p for block in network.modules() if isinstance(block, IdentityBlock)] == [0.3] * 6
    sizes = [network[:index](torch.zeros(1, 3, 32, 32)).shape[1:] for index in (4, 5, 6)]
    assert [tuple(size) for size in sizes] == [(32, 32, 32), (64, 16, 16), (128, 8, 8)]


def test_wide_resnet_identity_block_is_norm_relu_conv_twice_plus_its_input() -> None:
    torch.manual_seed(0)
    block = IdentityBlock(8, 0.0, nn.BatchNorm2d).double().eval()
    for norm in norms_of(block):
        norm.running_mean = torch.randn(8).double()
        norm.running_var = torch.rand(8).double() + 0.5
    x = torch.randn(2, 8, 5, 5).double()
    convolve = torch.nn.functional.conv2d
    inner = convolve(block.norm1(x).clamp(min=0), block.conv1.weight, padding=1)
    want = x + convolve(block.norm2(inner).clamp(min=0), block.conv2.weight, padding=1)
    torch.testing.assert_close(block(x), want)


def test_mobilenet_v2_has_the_published_3_504_872_parameters_and_52_norms() -> None:
    network = mobilenet_v2()
    assert parameters_of(network) == 3_504_872
    assert len(norms_of(network)) == 52
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 52


def test_mobilenet_v2_widths_are_multiples_of_8_and_never_more_than_10_percent_below() -> None:
    for width in (0.25, 0.35, 0.75, 1.4):
        for norm in norms_of(mobilenet_v2(width)):
            assert norm.num_features % 8 == 0
    assert norms_of(mobilenet_v2(0.75))[0].num_features == 24
    assert norms_of(mobilenet_v2(0.25))[-1].num_features == 1280


def test_densenet_bc_100_12_has_the_published_769_162_parameters_and_99_norms() -> None:
    network = densenet()
    assert parameters_of(network) == 769_162
    assert len(norms_of(network)) == 99


def test_repvgg_a0_has_the_published_sizes_before_and_after_merging() -> None:
    network = repvgg()
    assert parameters_of(network) == 9_108_968
    assert len(norms_of(network)) == 61
    merged = sum(m.weight.numel() + m.out_channels for m in network.modules() if getattr(m, "kernel_size", 0) == (3, 3))
    assert merged + 1280 * 1000 + 1000 == 8_309_384


def test_3d_unet_has_the_19_069_955_parameters_of_the_paper_besides_its_norms() -> None:
    network = unet3d()
    assert parameters_of(network, with_norms=False) == 19_069_955
    assert len(norms_of(network)) == 14


def test_3d_unet_keeps_the_size_of_its_input_and_mixes_levels() -> None:
    torch.manual_seed(0)
    network = unet3d(1, 2, base=2, levels=3).eval()
    x = torch.randn(1, 1, 8, 12, 16, requires_grad=True)
    y = network(x)
    assert tuple(y.shape) == (1, 2, 8, 12, 16)
    (gradient,) = torch.autograd.grad(y[0, 0, 4, 6, 8], x)
    # Two pooled levels: one output voxel must see further than the 11 voxels that five padded 3x3x3 layers reach.
    assert (gradient[0, 0, 4, 6] != 0).sum() > 11


def test_mlp_puts_a_norm_in_front_of_every_linear() -> None:
    network = mlp(5, (7, 9), 3)
    kinds = [type(module) for module in network]
    assert kinds == [nn.BatchNorm1d, nn.Linear, nn.ReLU] * 2 + [nn.BatchNorm1d, nn.Linear]
    assert parameters_of(network) == (5 * 7 + 7) + (7 * 9 + 9) + (9 * 3 + 3) + 2 * (5 + 7 + 9)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: wide_resnet(15), r"wide_resnet: depth=15, expected 6 \* N \+ 4"),
        (lambda: wide_resnet(4), r"wide_resnet: depth=4, expected"),
        (lambda: wide_resnet(16, 0), r"wide_resnet: width=0, expected a factor of at least 1"),
        (lambda: densenet(11), r"densenet: depth=11, expected 6 \* n \+ 4"),
        (lambda: mlp(0), r"mlp: layer sizes \(0, 256, 256, 6\), expected at least 1 each"),
    ],
)
def test_impossible_sizes_are_refused_with_what_was_expected(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()


@EACH_MODEL
def test_models_can_be_copied_and_reloaded(name: str) -> None:
    network, inputs = build_small(MODELS[name])
    network(*inputs)
    twin, _ = build_small(MODELS[name])
    twin.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(twin.eval()(*inputs), copy.deepcopy(network).eval()(*inputs), rtol=0, atol=0)

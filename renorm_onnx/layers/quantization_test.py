"""Quantization with torch's own tools: of a network whose layers are torch's again."""

import copy

import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError
from renorm_onnx.layers.conftest import make_batch
from renorm_onnx.layers.convert import to_batchnorm
from renorm_onnx.layers.modules import BatchRenorm2d

pytestmark = pytest.mark.filterwarnings("ignore")  # torch calls its own tools deprecated
quantization = pytest.importorskip("torch.ao.quantization")
quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")

ENGINE = "x86"
if ENGINE not in torch.backends.quantized.supported_engines:
    pytest.skip(f"torch has no {ENGINE} engine for quantized operators here", allow_module_level=True)
FUSED = [["conv", "norm", "relu"], ["last", "last_norm"]]
# Eight bits at input, weights and two activations, with values of size 1.
TOLERANCE = 0.1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 1, bias=False), BatchRenorm2d(8, **OPTIONS), nn.ReLU()
        self.last, self.last_norm = nn.Conv2d(8, 4, 1), BatchRenorm2d(4, **OPTIONS)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(self.quant(x))))
        return self.dequant(self.last_norm(self.last(x)))


OPTIONS = {"momentum": 0.2, "schedule": None}
X = make_batch(4, dtype=torch.float32)


def trained():
    torch.manual_seed(0)
    net = Net().train()
    with torch.no_grad():
        for norm in (net.norm, net.last_norm):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        for _ in range(30):
            net(X)
    return net


def eager(net):
    net = quantization.fuse_modules(net.eval(), FUSED)
    net.qconfig = quantization.get_default_qconfig(ENGINE)
    prepared = quantization.prepare(net)
    prepared(X)
    return quantization.convert(prepared)


def eager_while_training(net):
    net.train().qconfig = quantization.get_default_qat_qconfig(ENGINE)
    prepared = quantization.prepare_qat(quantization.fuse_modules_qat(net, FUSED))
    for _ in range(3):
        prepared(X).square().sum().backward()
    assert prepared.conv.weight.grad.abs().max() > 0
    return quantization.convert(prepared.eval())


def traced(net):
    prepared = quantize_fx.prepare_fx(net.eval(), quantization.get_default_qconfig_mapping(ENGINE), (X,))
    prepared(X)
    return quantize_fx.convert_fx(prepared)


def traced_while_training(net):
    mapping = quantization.get_default_qat_qconfig_mapping(ENGINE)
    prepared = quantize_fx.prepare_qat_fx(net.train(), mapping, (X,))
    for _ in range(3):
        prepared(X).square().sum().backward()
    return quantize_fx.convert_fx(prepared.eval())


@pytest.fixture(autouse=True)
def _engine():
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    yield
    torch.backends.quantized.engine = before


@pytest.mark.parametrize("quantize", [eager, eager_while_training, traced, traced_while_training])
def test_a_network_of_torchs_layers_is_quantized_and_its_norms_disappear(quantize):
    net = trained()
    want = copy.deepcopy(net).eval()(X)
    quantized = quantize(to_batchnorm(net))
    norms = [type(module).__name__ for module in quantized.modules() if "Norm" in type(module).__name__]
    assert not norms
    assert quantized.conv.weight().dtype == torch.qint8
    error = (quantized(X) - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert 0 < error < TOLERANCE


def test_torchs_tools_know_torchs_layers_alone():
    """The negative control: what `to_batchnorm` is for."""
    with pytest.raises(AssertionError, match=r"did not find fuser method for.*BatchRenorm2d"):
        eager(trained())


def test_quantized_input_is_refused_with_the_way_out():
    x = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)
    with pytest.raises(InputError, match=r"x has dtype torch.quint8, expected .*to_batchnorm before quantizing"):
        BatchRenorm2d(3).eval()(x)

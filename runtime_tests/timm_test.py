"""Architectures of timm, not written with this project in mind, all the way: converted, calibrated, exported, fused."""

import copy
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

import onnx
import pytest
import torch
from torch import nn

from renorm_onnx.delivery import fuse_file
from renorm_onnx.exporter import to_onnx
from renorm_onnx.layers.convert import convert_batchnorm, to_batchnorm
from renorm_onnx.layers.modules import _BatchRenorm
from renorm_onnx.layers.running_stats import update_stats
from renorm_onnx.onnx_function import DOMAIN

pytestmark = pytest.mark.peers

# Pixels per side -> names.
ARCHITECTURES = {
    64: [
        "resnet18",
        "resnet50",
        "resnetv2_50",
        "seresnet50",
        "resnext50_32x4d",
        "res2net50_26w_4s",
        "densenet121",
        "dpn68",
        "dla34",
        "vgg11_bn",
        "mobilenetv2_100",
        "mobilenetv3_large_100",
        "mnasnet_100",
        "lcnet_100",
        "ghostnet_100",
        "efficientnet_b0",
        "tf_efficientnetv2_b0",
        "regnety_008",
        "repvgg_a0",
        "mobileone_s0",
        "cspdarknet53",
        "gernet_s",
        "hrnet_w18_small",
        "fastvit_t8",
        "mobilevit_xs",
        "efficientvit_b0",
    ],
    96: ["xception41"],
    128: ["inception_v3"],
    224: ["levit_128"],
}


class _Absent(type):
    """A class of a package that is not there: its attributes are their own names."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(types.ModuleType):
    """A module of a package that is not there. timm imports torchvision, and these networks use nothing of it."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name.islower() and "feature" not in name and "node" not in name:
            return importlib.import_module(f"{self.__name__}.{name}")
        return _Absent(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        here = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if here else None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def timm():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    finder = _Finder()
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(finder)
    try:
        yield importlib.import_module("timm")
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]


@torch.no_grad()  # levit keeps what it computes, and torch does not copy what needs a gradient
def outputs_of(network, images):
    """Evaluate `network`."""
    return network.eval()(images)


def calibrated(network, batches):
    """`network` with affine parameters of its own, and statistics of `batches`."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1 and name.endswith(("weight", "bias")):
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    update_stats(network, batches)
    return network.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "size"), [pytest.param(n, size, id=n) for size, names in ARCHITECTURES.items() for n in names]
)
def test_an_architecture_of_timm_keeps_its_outputs(timm, name, size, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=10)
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(1))
    before, names = outputs_of(network, images[:2]), list(network.state_dict())
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    network = convert_batchnorm(network, strict=True)
    assert torch.equal(outputs_of(network, images[:2]), before), "conversion changed the output"
    assert list(network.state_dict()) == names
    assert sum(isinstance(m, _BatchRenorm) for m in network.modules()) == norms > 0
    assert torch.equal(outputs_of(to_batchnorm(copy.deepcopy(network)), images[:2]), before), "so did the way back"
    network = calibrated(network, [images])
    model = to_onnx(network, images[:2], dynamic_shapes=({0: "batch"},), verify=False)
    calls = sum(node.domain == DOMAIN for node in model.graph.node)
    onnx.save(model, tmp_path / "model.onnx")
    fused = fuse_file(tmp_path / "model.onnx")
    report = fused.report
    print(f"{name}: {calls} calls; {report}")
    assert calls == norms
    assert len(report.folded) + len(report.kept) == len(report.norms) >= calls
    assert report.folded
    assert fused.ok, fused.verdict
    assert fused.written

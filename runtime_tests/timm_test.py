"""Architectures of timm, not written with this project in mind, all the way: converted, calibrated, exported, fused."""

import copy
import importlib.util

import onnx
import pytest
import torch
from torch import nn

from renorm_onnx.delivery import fuse_file
from renorm_onnx.exporter import to_onnx
from renorm_onnx.layers.convert import convert_batchnorm, to_batchnorm
from renorm_onnx.layers.modules import _BatchRenorm
from renorm_onnx.onnx_function import DOMAIN
from runtime_tests.timm_networks import ARCHITECTURES, calibrated, imported

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def timm():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    with imported() as module:
        yield module


@torch.no_grad()  # levit keeps what it computes, and torch does not copy what needs a gradient
def outputs_of(network, images):
    """Evaluate `network`."""
    return network.eval()(images)


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

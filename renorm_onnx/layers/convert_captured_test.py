"""Captured code holds batch norm as a call, which cannot be replaced: that is said, not passed over."""

import logging

import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError
from renorm_onnx.layers.convert import convert_batchnorm
from renorm_onnx.layers.modules import BatchRenorm2d

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()
        self.register_buffer("mean", torch.full((3,), 0.3))

    def forward(self, x):
        return nn.functional.batch_norm(self.norm(x), self.mean, self.mean)


def net(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.ReLU(), nn.Sequential(norm(3)), nn.Conv2d(3, 3, 1)).eval()


def exported(module, decomposed):
    program = torch.export.export(module, (X,))
    return (program.run_decompositions() if decomposed else program).module()


CAPTURES = {
    "scripted": (torch.jit.script, "'1.0'"),
    "traced": (lambda module: torch.jit.trace(module, X), "'1.0'"),
    "frozen": (lambda module: torch.jit.freeze(torch.jit.script(module)), "the model itself"),
    "exported": (lambda module: exported(module, False), "the model itself"),
    "exported to train": (lambda module: exported(module.train(), False), "the model itself"),
    "decomposed": (lambda module: exported(module, True), "the model itself"),
    "decomposed to train": (lambda module: exported(module.train(), True), "the model itself"),
    "in a part": (lambda module: nn.Sequential(nn.ReLU(), torch.jit.script(module)), "'1.1.0'"),
    "called": (lambda module: torch.fx.symbolic_trace(Functional()), "the model itself"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", CAPTURES)
def test_captured_batch_norm_is_named_and_refused_if_strict(name, caplog):
    capture, where = CAPTURES[name]
    model = capture(net())
    want = [v.clone() for v in model.state_dict().values()]
    with pytest.raises(InputError, match=rf"cannot convert {where} \(captured code; convert the model before it"):
        convert_batchnorm(model, strict=True)
    with caplog.at_level(logging.WARNING):
        assert convert_batchnorm(model) is model
    assert f"left alone {where} (captured code; convert" in caplog.text
    assert all(map(torch.equal, want, model.state_dict().values()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["scripted", "traced", "in a part"])
@pytest.mark.parametrize("layer", [BatchRenorm2d, lambda features: nn.Conv2d(features, 2, 1)])
def test_captured_code_without_batch_norm_is_no_matter(name, layer):
    convert_batchnorm(CAPTURES[name][0](nn.Sequential(nn.ReLU(), layer(3)).eval()), strict=True)


def test_a_traced_graph_that_calls_layers_is_converted_as_before():
    graph = torch.fx.symbolic_trace(net())
    want = graph(X)
    convert_batchnorm(graph, strict=True)
    assert type(graph.get_submodule("1.0")) is BatchRenorm2d
    assert torch.equal(graph(X), want)

"""Layers in graphs of torch.fx, and in TorchScript: what works is right, and what does not says so."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from renorm_onnx.errors import InputError
from renorm_onnx.layers.activated import BatchRenormAct2d
from renorm_onnx.layers.conftest import make_batch, outcome, shaken, worst
from renorm_onnx.layers.modules import BatchRenorm2d
from renorm_onnx.layers.schedules import Ramp


def layer_with(kind=BatchRenorm2d, **options):
    return shaken(kind(3, **{"momentum": 0.1, "schedule": None, "dtype": torch.float64, **options}))


def activated(**options):
    return layer_with(BatchRenormAct2d, origin=nn.Module, drop=nn.Identity(), act=nn.SiLU(), **options)


class Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=torch.float64), norm)

    def forward(self, x):
        return torch.relu(x + self.body(x))


@pytest.mark.parametrize("make", [layer_with, activated])
@pytest.mark.parametrize("training", [True, False])
def test_a_graph_of_fx_holds_the_layer_as_one_node_and_trains_it(make, training):
    model = Residual(make(schedule=Ramp(1, 5, 4))).train(training)
    graph = torch.fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["body.0", "body.1"]
    eager, traced = copy.deepcopy(model), copy.deepcopy(graph)
    for seed in range(4):
        x = make_batch(4, seed=seed)
        assert worst(outcome(traced, x), outcome(eager, x)) < (1e-13, "")


def test_a_graph_of_fx_follows_the_mode_of_the_layer():
    model = Residual(layer_with())
    graph = torch.fx.symbolic_trace(model.eval())
    x = make_batch(4)
    want = copy.deepcopy(model).train()(x)
    assert torch.equal(graph.train()(x), want)
    assert not torch.equal(graph.eval()(x), want)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = layer_with()

    def forward(self, x, mask):
        return self.norm(x, mask) + self.norm(x, mask=mask)


def test_a_mask_goes_with_its_layer():
    model, x = Masked(), make_batch(4)
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    mask = torch.arange(x[:, 0].numel()).view_as(x[:, 0]) % 3 > 0
    assert torch.equal(graph(x, mask), model(x, mask))


class FeatureTracer(torch.fx.Tracer):
    """Names each node by the module it comes from, as feature extractors do."""

    def __init__(self):
        super().__init__()
        self.names, self.at = {}, ""

    def call_module(self, module, forward, args, kwargs):
        before, self.at = self.at, self.path_of_module(module)
        try:
            return super().call_module(module, forward, args, kwargs)
        finally:
            self.at = before

    def create_proxy(self, kind, *args, **kwargs):
        proxy = super().create_proxy(kind, *args, **kwargs)
        self.names[self.at] = proxy.node
        return proxy


def test_a_feature_extractor_finds_the_layer_by_its_name():
    model = Residual(layer_with()).eval()
    tracer = FeatureTracer()
    graph = tracer.trace(model)
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = (tracer.names["body.1"],)
    extractor = torch.fx.GraphModule(model, graph)
    graph.eliminate_dead_code()
    extractor.recompile()
    x = make_batch(4)
    assert torch.equal(extractor(x), model.body(x))


def test_a_layer_that_is_the_whole_model_of_fx_is_refused():
    with pytest.raises(InputError, match=r"BatchRenorm2d: torch\.fx cannot trace a single layer"):
        torch.fx.symbolic_trace(layer_with())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [layer_with, activated])
def test_a_scripted_layer_refuses_to_train(make):
    scripted, x = torch.jit.script(make().train()), make_batch(4)
    with pytest.raises(torch.jit.Error, match=r"a scripted layer evaluates only; call eval\(\)"):
        scripted(x)
    assert torch.equal(scripted.eval()(x), make().eval()(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [layer_with, activated])
@pytest.mark.parametrize("affine", [True, False])
def test_a_scripted_layer_without_running_statistics_evaluates_by_the_batch(make, affine):
    layer, x = make(track_running_stats=False, affine=affine).eval(), make_batch(4)
    got = torch.jit.script(layer)(x)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    want = (x - mean) / torch.sqrt(variance + layer.eps)
    if affine:
        want = want * layer.weight.view(3, 1, 1) + layer.bias.view(3, 1, 1)
    want = torch.nn.functional.silu(want) if make is activated else want
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    with pytest.raises(torch.jit.Error, match=r"a scripted layer evaluates only; call eval\(\)"):
        torch.jit.script(layer.train())(x)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_trace_of_a_training_layer_learns_and_follows_the_schedule():
    eager = layer_with(schedule=Ramp(1, 5, 4))
    layer = copy.deepcopy(eager)
    traced = torch.jit.trace(layer, make_batch(4, seed=9), check_trace=False)
    eager(make_batch(4, seed=9))  # tracing is a step
    for seed in range(6):
        x = make_batch(4, seed=seed)
        torch.testing.assert_close(traced(x), eager(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(eager.named_buffers()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_graph_of_make_fx_learns_and_follows_the_schedule(momentum, masked):
    eager = layer_with(schedule=Ramp(1, 5, 4), momentum=momentum)
    layer = copy.deepcopy(eager)
    mask = (make_batch(4)[:, 0] < 1,) if masked else ()
    traced = make_fx(layer)(make_batch(4, seed=9), *mask)
    assert {node.op for node in traced.graph.nodes} > {"placeholder", "get_attr"}
    eager(make_batch(4, seed=9), *mask)  # tracing is a step
    for seed in range(6):
        x = make_batch(4, seed=seed)
        torch.testing.assert_close(traced(x, *mask), eager(x, *mask), rtol=1e-12, atol=1e-12)
    assert len(dict(eager.named_buffers())) == 3
    for name, value in eager.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", [None, "paper"])
def test_a_layer_tells_its_shapes_under_a_mode_of_fake_tensors(schedule):
    layer = layer_with(schedule=schedule)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(make_batch(4)))
    assert (y.shape, y.dtype) == (make_batch(4).shape, torch.float64)

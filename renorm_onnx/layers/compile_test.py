"""Under torch.compile and torch.export a layer does what it does without, gradients and statistics included."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from renorm_onnx.layers.conftest import NaiveBatchRenorm, make_batch, outcome, shaken, worst
from renorm_onnx.layers.masked import length_mask
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d
from renorm_onnx.layers.schedules import FromFunction, HardSwitch, Ramp, Sigmoid

GRAPH_BACKENDS = ["eager", "aot_eager", "aot_eager_decomp_partition"]
OPTIONS = [
    {},
    {"stat": "var"},
    {"stat": "var_unbiased"},
    {"momentum": None},
    {"renorm_momentum": 0.3},
    {"virtual_batch_size": 2},
    {"affine": False},
    {"track_running_stats": False},
]


def layer_with(**options):
    return shaken(BatchRenorm2d(3, **{"momentum": 0.1, "schedule": None, "dtype": torch.float64, **options}))


class Net(nn.Module):
    """Norms between convolutions, one of them used twice."""

    def __init__(self, norm):
        super().__init__()
        g = torch.Generator().manual_seed(4)
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64) for _ in range(2))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g))
        self.norms = nn.ModuleList(norm(i) for i in range(3))

    def forward(self, x):
        x = torch.relu(self.norms[0](self.first(x)))
        x = self.norms[1](torch.relu(self.norms[1](self.second(x))))
        return self.norms[2](x)


def ours(seed):
    return shaken(BatchRenorm2d(3, momentum=0.1, schedule=None, dtype=torch.float64), seed)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", GRAPH_BACKENDS)
def test_a_compiled_layer_equals_the_eager_one(backend, options):
    eager = layer_with(**options)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for seed in range(2):
        x = make_batch(4, seed=seed)
        assert worst(outcome(layer, x, compiled), outcome(eager, x)) < (1e-9, "")


def test_ghost_batches_compiled_by_inductor_equal_the_eager_ones():
    eager = layer_with(virtual_batch_size=2)
    layer = copy.deepcopy(eager)
    x = make_batch(4)
    assert worst(outcome(layer, x, torch.compile(layer, fullgraph=True)), outcome(eager, x)) < (1e-9, "")


@pytest.mark.parametrize("backend", [*GRAPH_BACKENDS, "inductor"])
def test_a_compiled_network_equals_the_eager_one(backend):
    eager = Net(ours)
    net = copy.deepcopy(eager)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for seed in range(2):
        x = make_batch(4, seed=seed)
        assert worst(outcome(net, x, compiled), outcome(eager, x)) < (1e-9, "")


def test_the_naive_layer_gets_wrong_gradients_when_compiled():
    """The negative control. If a new torch makes this fail, pytorch/pytorch#197039 is fixed."""
    eager = Net(lambda seed: NaiveBatchRenorm(ours(seed)))
    net = copy.deepcopy(eager)
    x = make_batch(4)
    got = outcome(net, x, torch.compile(net, backend="aot_eager", fullgraph=True))
    assert worst(got, outcome(eager, x)) > (0.01, "")


def test_a_compiled_network_obeys_a_small_memory_budget():
    eager = Net(ours)
    net = copy.deepcopy(eager)
    x = make_batch(4)
    with torch._functorch.config.patch(activation_memory_budget=1e-9):
        got = outcome(net, x, torch.compile(net, backend="aot_eager", fullgraph=True))
    assert worst(got, outcome(eager, x)) < (1e-9, "")


def test_a_memory_budget_that_saves_nothing_is_refused():
    call = torch.compile(layer_with(), backend="aot_eager_decomp_partition", fullgraph=True)
    with torch._functorch.config.patch(activation_memory_budget=0):
        with pytest.raises(Exception, match="activation_memory_budget=0, expected more"):
            call(make_batch(4).requires_grad_())
        with pytest.raises(Exception, match="activation_memory_budget=0, expected more"):
            torch.compile(layer_with())(make_batch(4).requires_grad_())
        assert torch.isfinite(torch.compile(layer_with().eval(), backend="aot_eager")(make_batch(4))).all()


SCHEDULES = [Ramp(1, 5, 4), HardSwitch(2), Sigmoid(0.5), FromFunction(lambda step: (1 + step / 4, step / 2))]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_one_compiled_graph_serves_the_whole_schedule(schedule):
    eager = layer_with(schedule=schedule)
    layer = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for step in range(7):
        x = make_batch(4, seed=step)
        assert worst(outcome(layer, x, compiled), outcome(eager, x)) < (1e-9, "")
    assert counter.frame_count == 1


def test_masked_batches_compile():
    eager = shaken(BatchRenorm1d(3, momentum=0.1, schedule=None, dtype=torch.float64))
    layer = copy.deepcopy(eager)
    x, mask = make_batch(3), length_mask(torch.tensor([5, 4, 1, 3, 0, 5]), 5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    want = outcome(eager, x, lambda x: eager(x, mask))
    assert worst(outcome(layer, x, lambda x: compiled(x, mask)), want) < (1e-9, "")


def test_steps_may_alternate_between_eager_and_compiled():
    eager = layer_with(schedule=Ramp(1, 5, 4))
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for step in range(6):
        x = make_batch(4, seed=step)
        assert worst(outcome(layer, x, compiled if step % 2 else None), outcome(eager, x)) < (1e-9, "")


def test_a_backward_pass_may_be_compiled_by_itself():
    eager = layer_with()
    layer = copy.deepcopy(eager)
    for seed in range(3):
        x = make_batch(4, seed=seed)
        with compiled_autograd._enable(torch.compile(backend="aot_eager")):
            got = outcome(layer, x)
        assert worst(got, outcome(eager, x)) < (1e-12, "")


def test_torch_is_told_of_the_writes_of_a_compiled_step():
    # The host's count of steps rests on it (clock.py).
    layer = layer_with()
    before = layer.num_batches_tracked._version
    torch.compile(layer, backend="aot_eager", fullgraph=True)(make_batch(4))
    assert layer.num_batches_tracked._version > before


def test_an_evaluating_layer_exports_to_one_batch_norm():
    program = torch.export.export(layer_with().eval(), (make_batch(4),))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["aten.batch_norm.default"]


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_training_step_equals_the_eager_one(strict):
    eager = layer_with(schedule=Ramp(1, 5, 4))
    layer = copy.deepcopy(eager)
    program = torch.export.export(layer, (make_batch(4),), strict=strict)
    assert not [node for node in program.graph.nodes if "renorm_onnx" in str(node.target)], "loads without this package"
    exported = program.module(check_guards=False)
    for step in range(4):
        x = make_batch(4, seed=step)
        torch.testing.assert_close(exported(x), eager(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(exported.named_buffers()), dict(eager.named_buffers()), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_an_evaluating_layer_can_be_scripted_and_traced():
    layer = layer_with().eval()
    x = make_batch(4)
    assert torch.equal(torch.jit.script(layer)(x), layer(x))
    assert torch.equal(torch.jit.trace(layer, x)(x), layer(x))

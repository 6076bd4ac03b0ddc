"""Training steps in onnxruntime, the statistics fed back, follow Algorithm 1 written out in float64."""

import copy

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError
from renorm_onnx.exporter import to_onnx
from renorm_onnx.exporter_training import UPDATED
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from renorm_onnx.layers.schedules import linear
from renorm_onnx.onnx_function import DOMAIN, TRAINING, TRAINING_NAMES
from renorm_onnx.onnx_layers import layers_in

STEPS = 50
SHAPES = {"rows": (8, 3), "line": (4, 3, 6), "image": (4, 3, 4, 5), "volume": (2, 3, 3, 2, 4)}
STATS = {"rows": "sigma", "line": "var", "image": "var_unbiased", "volume": "sigma"}


class Ranks(nn.Module):
    """One layer of each rank; the schedule rises during the test, so bounds that stand still would be noticed."""

    def __init__(self) -> None:
        super().__init__()
        kinds = {"rows": BatchRenorm1d, "line": BatchRenorm1d, "image": BatchRenorm2d, "volume": BatchRenorm3d}
        for name, kind in kinds.items():
            layer = kind(3, momentum=0.1, eps=1e-3, r_max=2.0, d_max=1.0, schedule=linear(5, 45), stat=STATS[name])
            nn.init.uniform_(layer.weight, 0.5, 2.0)
            nn.init.normal_(layer.bias)
            setattr(self, name, layer)

    def forward(self, rows, line, image, volume):
        return self.rows(rows), self.line(line), self.image(image), self.volume(volume)


def batches(steps: int) -> list[list[np.ndarray]]:
    """Inputs whose scale and place drift, so that r and d act."""
    rng = np.random.default_rng(0)
    return [
        [rng.normal(0.02 * t, 1 + 0.05 * t, shape).astype(np.float32) for shape in SHAPES.values()]
        for t in range(steps)
    ]


class Algorithm1:
    """One layer in float64, from the paper."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.weight, self.bias = (v.detach().double().numpy() for v in (layer.weight, layer.bias))
        self.mean, self.var, self.stat, self.step = np.zeros(3), np.ones(3), STATS[name], 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        rise = min(max((self.step - 5) / 40, 0.0), 1.0)
        r_max, d_max = 1 + 1.0 * rise, 1.0 * rise
        x = x.astype(np.float64)
        rows = np.moveaxis(x, 1, 0).reshape(3, -1)
        count, mean_b, var_b = rows.shape[1], rows.mean(1), rows.var(1)
        sigma_b, sigma = np.sqrt(var_b + 1e-3), np.sqrt(self.var + 1e-3)
        r = np.clip(sigma_b / sigma, 1 / r_max, r_max)
        d = np.clip((mean_b - self.mean) / sigma, -d_max, d_max)
        mean_b_, sigma_b_, r, d, weight, bias = (
            v.reshape(1, 3, *[1] * (x.ndim - 2)) for v in (mean_b, sigma_b, r, d, self.weight, self.bias)
        )
        y = ((x - mean_b_) / sigma_b_ * r + d) * weight + bias
        self.mean = self.mean + 0.1 * (mean_b - self.mean)
        if self.stat == "sigma":
            self.var = (sigma + 0.1 * (sigma_b - sigma)) ** 2 - 1e-3
        else:
            target = var_b * count / (count - 1) if self.stat == "var_unbiased" else var_b
            self.var = self.var + 0.1 * (target - self.var)
        self.step += 1
        return y


def session_of(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def step(session, inputs, state):
    """One step in onnxruntime: the outputs, and the state for the next."""
    names = [o.name for o in session.get_outputs()]
    result = dict(zip(names, session.run(None, {**inputs, **state}), strict=True))
    updated = {k.removesuffix(UPDATED): v for k, v in result.items() if k.endswith(UPDATED)}
    return [v for k, v in result.items() if not k.endswith(UPDATED)], updated


@pytest.fixture(scope="module")
def ranks() -> nn.Module:
    torch.manual_seed(0)
    return Ranks().train()


@pytest.fixture(scope="module")
def proto(ranks) -> onnx.ModelProto:
    before = copy.deepcopy(ranks.state_dict())
    proto = to_onnx(ranks, tuple(torch.from_numpy(x) for x in batches(1)[0]), mode="train")
    assert all(torch.equal(v, before[k]) for k, v in ranks.state_dict().items())
    assert ranks.training
    return proto


def largest_error(proto: onnx.ModelProto, ranks: nn.Module, *, feed_back: bool = True) -> float:
    session, state = session_of(proto), {}
    layers = [Algorithm1(getattr(ranks, name), name) for name in SHAPES]
    worst = 0.0
    for inputs in batches(STEPS):
        outputs, updated = step(session, dict(zip(SHAPES, inputs, strict=True)), state)
        state = updated if feed_back else {}
        for layer, x, y in zip(layers, inputs, outputs, strict=True):
            want = layer(x)
            worst = max(worst, np.abs(y - want).max() / np.abs(want).max())
    for name, layer in zip(SHAPES, layers, strict=True):
        if feed_back:
            assert state[f"{name}.num_batches_tracked"] == STEPS
            np.testing.assert_allclose(state[f"{name}.running_mean"], layer.mean, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(state[f"{name}.running_var"], layer.var, rtol=1e-5, atol=1e-5)
    return worst


def test_fifty_steps_in_onnxruntime_follow_algorithm_1_in_ranks_two_to_five(proto, ranks) -> None:
    assert largest_error(proto, ranks) < 1e-5


def test_statistics_that_are_not_fed_back_would_be_noticed(proto, ranks) -> None:
    assert largest_error(proto, ranks, feed_back=False) > 0.01


def test_each_kind_of_statistic_has_its_function_and_the_layers_can_be_listed(proto) -> None:
    assert {f.name for f in proto.functions} == set(TRAINING_NAMES.values())
    listed = {info.name: info for info in layers_in(ir.from_proto(proto))}
    assert {name: info.stat for name, info in listed.items()} == STATS
    assert all(info.training and info.r_max == 2.0 for info in listed.values())


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.frozen = nn.Conv2d(3, 4, 3, bias=False), BatchRenorm2d(4)
        self.twice = BatchRenorm2d(4, schedule=None, momentum=0.1, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(self.twice(self.frozen(self.conv(x))).relu())


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    torch.manual_seed(0)
    net = Mixed().train()
    net.frozen.eval()
    net.frozen.running_mean.fill_(0.2)
    net.frozen.num_batches_tracked.fill_(1)
    return net


@pytest.mark.parametrize(("functions", "opset"), [(True, 18), (False, 23)])
def test_modes_per_layer_are_kept_and_a_layer_used_twice_steps_twice(mixed, functions, opset, caplog) -> None:
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3)) * 2
    with caplog.at_level("INFO", logger="renorm_onnx.exporter"):
        proto = to_onnx(mixed, x, mode="train", functions=functions, opset=opset, dynamic_shapes={"x": {0: "batch"}})
    assert "3 calls, 2 of them training steps" in caplog.text
    kinds = [n.op_type for n in proto.graph.node if n.domain == DOMAIN]
    assert kinds == (["BatchRenormalization", TRAINING, TRAINING] if functions else [])
    assert functions or b"renorm_onnx" not in proto.SerializeToString()
    session, state, twin = session_of(proto), {}, copy.deepcopy(mixed).double()
    for i in range(5):
        inputs = torch.randn(3 + i, 3, 6, 6, generator=torch.Generator().manual_seed(i)) * (1 + i)
        (y,), state = step(session, {"x": inputs.numpy()}, state)
        want = twin(inputs.double()).detach().numpy()
        assert np.abs(y - want).max() < 1e-5 * np.abs(want).max()
    assert sorted(state) == [f"twice.{n}" for n in ("num_batches_tracked", "running_mean", "running_var")]
    assert state["twice.num_batches_tracked"] == 10
    np.testing.assert_allclose(state["twice.running_var"], twin.twice.running_var.numpy(), rtol=1e-5)


def test_a_schedule_that_is_a_python_function_is_refused() -> None:
    net = nn.Sequential(BatchRenorm2d(3, schedule=lambda step: (1.0 + step, 0.5))).train()
    with pytest.raises(InputError, match=r"the schedule of module '0' is a Python function, which has no ONNX form"):
        to_onnx(net, torch.randn(2, 3, 4, 4), mode="train")

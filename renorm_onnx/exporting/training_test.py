"""Training steps in onnxruntime, the statistics fed back, follow Algorithm 1 written out in float64."""

import copy
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError
from renorm_onnx.exporter import keep_ops, to_onnx
from renorm_onnx.exporting.restoring import restore
from renorm_onnx.exporting.training import UPDATED, training_state
from renorm_onnx.inlining import inline
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from renorm_onnx.layers.schedules import linear
from renorm_onnx.onnx_function import DOMAIN, TRAINING, TRAINING_NAMES, TWO_SETS
from renorm_onnx.onnx_layers import layers_in
from renorm_onnx.runtime.parity import verify

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
    """One layer in float64, from the paper; with ghost batches, a second set of statistics or a cumulative average."""

    def __init__(self, layer: nn.Module, stat: str) -> None:
        self.weight, self.bias = (v.detach().double().numpy() for v in (layer.weight, layer.bias))
        self.momentum, self.renorm_momentum, self.size = layer.momentum, layer.renorm_momentum, layer.virtual_batch_size
        self.stat, self.step = stat, 0
        self.running, self.renorm = (np.zeros(3), np.ones(3)), (np.zeros(3), np.ones(3))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        parts = [x] if self.size is None else np.array_split(x, len(x) // self.size)
        done = [self.normalized(part.astype(np.float64)) for part in parts]
        mean, spread = (np.mean([statistics[i] for _, statistics in done], axis=0) for i in (0, 1))
        self.step += 1
        momentum = 1 / self.step if self.momentum is None else self.momentum
        self.running = self.moved(*self.running, mean, spread, momentum)
        if self.renorm_momentum is not None:
            self.renorm = self.moved(*self.renorm, mean, spread, self.renorm_momentum)
        return np.concatenate([y for y, _ in done])

    def normalized(self, x: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        rise = min(max((self.step - 5) / 40, 0.0), 1.0)
        r_max, d_max = 1 + 1.0 * rise, 1.0 * rise
        mean, var = self.running if self.renorm_momentum is None else self.renorm
        rows = np.moveaxis(x, 1, 0).reshape(3, -1)
        count, mean_b, var_b = rows.shape[1], rows.mean(1), rows.var(1)
        sigma_b, sigma = np.sqrt(var_b + 1e-3), np.sqrt(var + 1e-3)
        r = np.clip(sigma_b / sigma, 1 / r_max, r_max)
        d = np.clip((mean_b - mean) / sigma, -d_max, d_max)
        mean_b_, sigma_b_, r, d, weight, bias = (
            v.reshape(1, 3, *[1] * (x.ndim - 2)) for v in (mean_b, sigma_b, r, d, self.weight, self.bias)
        )
        spread = {"sigma": sigma_b, "var": var_b, "var_unbiased": var_b * count / (count - 1)}[self.stat]
        return ((x - mean_b_) / sigma_b_ * r + d) * weight + bias, (mean_b, spread)

    def moved(self, mean, var, mean_b, spread, share: float) -> tuple[np.ndarray, np.ndarray]:
        mean = mean + share * (mean_b - mean)
        if self.stat != "sigma":
            return mean, var + share * (spread - var)
        sigma = np.sqrt(var + 1e-3)
        return mean, (sigma + share * (spread - sigma)) ** 2 - 1e-3


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


def largest_error(proto: onnx.ModelProto, net: nn.Module, *, feed_back: bool = True) -> float:
    """max|onnxruntime - float64| / max|float64| over fifty steps of every layer; statistics are compared at the end."""
    session, state = session_of(proto), {}
    layers = {name: Algorithm1(layer, layer.stat) for name, layer in net.named_children()}
    worst = 0.0
    for inputs in batches(STEPS):
        given = dict(zip(SHAPES, inputs, strict=True))
        outputs, updated = step(session, given, state)
        state = updated if feed_back else {}
        for (name, layer), y in zip(layers.items(), outputs, strict=True):
            want = layer(given.get(name, given["image"]))
            worst = max(worst, np.abs(y - want).max() / np.abs(want).max())
    for name, layer in layers.items() if feed_back else ():
        assert state[f"{name}.num_batches_tracked"] == STEPS
        sets = {"running": layer.running, "renorm": layer.renorm}
        for kind in ("running",) if layer.renorm_momentum is None else sets:
            for moment, want in zip(("mean", "var"), sets[kind], strict=True):
                np.testing.assert_allclose(state[f"{name}.{kind}_{moment}"], want, rtol=1e-5, atol=1e-5)
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


KINDS = {
    "cumulative": {"momentum": None},
    "second": {"renorm_momentum": 0.3},
    "second_var": {"renorm_momentum": 0.3, "momentum": None, "stat": "var"},
    "ghosts": {"virtual_batch_size": 1},
    "ghosts_unbiased": {"virtual_batch_size": 3, "stat": "var_unbiased"},
    "ghosts_second": {"virtual_batch_size": 2, "renorm_momentum": 0.3},
}


class Kinds(nn.Module):
    """Layers that take other steps than the usual one, all of the same images."""

    def __init__(self) -> None:
        super().__init__()
        for name, options in KINDS.items():
            usual = {"momentum": 0.1, "eps": 1e-3, "r_max": 2.0, "d_max": 1.0, "schedule": linear(5, 45)}
            layer = BatchRenorm2d(3, **{**usual, **options})
            nn.init.uniform_(layer.weight, 0.5, 2.0)
            nn.init.normal_(layer.bias)
            self.add_module(name, layer)

    def forward(self, rows, line, image, volume):
        return [layer(image) for layer in self.children()]


@pytest.fixture(scope="module")
def kinds() -> nn.Module:
    torch.manual_seed(0)
    return Kinds().train()


@pytest.fixture(scope="module")
def kinds_path(kinds, tmp_path_factory):
    path = tmp_path_factory.mktemp("kinds") / "step.onnx"
    to_onnx(kinds, tuple(torch.from_numpy(x) for x in batches(1)[0]), path, mode="train")
    return path


def test_fifty_steps_of_every_other_kind_follow_algorithm_1(kinds, kinds_path) -> None:
    proto = onnx.load(kinds_path)
    assert largest_error(proto, kinds) < 1e-5
    assert largest_error(proto, kinds, feed_back=False) > 0.01
    usual = {name: f"{TRAINING_NAMES[layer.stat]}" for name, layer in kinds.named_children()}
    called = {info.name: info.calls for info in layers_in(ir.from_proto(proto))}
    assert called == {name: 4 if name == "ghosts" else 2 if name == "ghosts_second" else 1 for name in KINDS}
    for call in (n for n in proto.graph.node if n.domain == DOMAIN):
        name = call.name.removesuffix("_1").removesuffix("_2").removesuffix("_3")
        assert call.op_type == usual[name] + (TWO_SETS if "second" in name else "")


@pytest.mark.parametrize("spoilt", [np.inf, np.nan, 1e30])  # the last one: the square overflows
def test_a_channel_that_is_not_finite_teaches_nothing_in_torch_in_the_operators_and_in_onnxruntime(
    kinds, kinds_path, spoilt
) -> None:
    session, state, twin, kept = session_of(onnx.load(kinds_path)), {}, copy.deepcopy(kinds), copy.deepcopy(kinds)
    for number, inputs in enumerate(batches(4)):
        image = inputs[2]
        if number == 2:
            before = copy.deepcopy(state)
            image[0, 1, 0, 0] = spoilt
        with torch.no_grad():
            twin(*map(torch.from_numpy, inputs))
            with keep_ops():
                kept(*map(torch.from_numpy, inputs))
        _, state = step(session, dict(zip(SHAPES, inputs, strict=True)), state)
        for net in (twin, kept):
            for name, value in net.state_dict().items():
                if name in state:
                    np.testing.assert_allclose(state[name], value.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
        if number == 2:
            for name in (name for name in state if not name.endswith("tracked")):
                np.testing.assert_allclose(state[name][1], before[name][1], rtol=1e-6, atol=1e-6, err_msg=name)
                assert np.abs(state[name] - before[name])[[0, 2]].min() > 1e-6


def test_both_sets_of_statistics_are_restored(kinds, kinds_path) -> None:
    trained = copy.deepcopy(kinds)
    with torch.no_grad():
        for inputs in batches(12):
            trained(*map(torch.from_numpy, inputs))
    path = kinds_path.with_name("trained.onnx")
    to_onnx(trained, tuple(torch.from_numpy(x) for x in batches(1)[0]), path, mode="train", verify=False)
    fresh = Kinds()
    assert restore(fresh, path) == len(KINDS)
    for inputs in batches(3):
        for mine, theirs in zip(*(net(*map(torch.from_numpy, inputs)) for net in (fresh, trained)), strict=True):
            assert torch.equal(mine, theirs)
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in fresh.state_dict().items())
    to_onnx(trained.eval(), tuple(torch.from_numpy(x) for x in batches(1)[0]), path, verify=False)
    restore(fresh, path)
    assert torch.equal(fresh.second.renorm_var, trained.second.running_var)  # a file for inference has one set
    assert not torch.equal(trained.second.renorm_var, trained.second.running_var)


def test_ghost_batches_need_a_batch_of_fixed_size() -> None:
    net = nn.Sequential(BatchRenorm2d(3, virtual_batch_size=2)).train()
    with pytest.raises(
        InputError, match="in layer '0': InputError: BatchRenorm2d: virtual_batch_size=2 splits the"
    ) as raised:
        to_onnx(net, torch.randn(4, 3, 4, 4), mode="train", dynamic_shapes=({0: "batch"},))
    assert "PyTorch" not in str(raised.value)


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


def test_the_state_of_a_layer_by_itself_bears_the_names_of_its_buffers() -> None:
    layer = BatchRenorm2d(3).train()
    names = {"running_mean", "running_var", "num_batches_tracked"}
    assert set(training_state(layer)) == names
    assert set(training_state(nn.Sequential(layer))) == {f"0.{name}" for name in names}


def test_a_schedule_that_is_a_python_function_is_refused() -> None:
    net = nn.Sequential(BatchRenorm2d(3, schedule=lambda step: (1.0 + step, 0.5))).train()
    with pytest.raises(InputError, match=r"the schedule of module '0' is a Python function, which has no ONNX form"):
        to_onnx(net, torch.randn(2, 3, 4, 4), mode="train")


def test_a_step_is_compared_with_its_inlined_form_counter_and_all() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchRenorm2d(4)).train()
    proto = to_onnx(net, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), mode="train")
    inlined = ir.from_proto(proto)
    inline(inlined)
    verdict = verify(proto, inlined)
    assert verdict.ok, verdict
    counter = f"1.num_batches_tracked{UPDATED}"
    assert counter in {row.output for row in verdict.rows}
    add = next(node for node in inlined.graph if node.outputs[0].name == counter)
    add.replace_input_with(1, add.inputs[0])
    assert counter in {row.output for row in verify(proto, inlined).rows if row.ok is False}


def test_an_output_that_is_a_layers_own_is_called_as_at_inference() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = BatchRenorm2d(3), BatchRenorm2d(3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = self.first(x)
            return torch.relu(h), self.second(torch.relu(h))

    def names(**options: Any) -> list[str]:
        proto = to_onnx(Both().train(mode="mode" in options), torch.randn(4, 3, 8, 8), verify=False, **options)
        return [value.name for value in proto.graph.output if not value.name.endswith(UPDATED)]

    with pytest.warns(UserWarning, match="statistics of 0 and 1"):
        assert names(mode="train") == names() == ["relu", "batch_renorm_1"]
    assert names(mode="train", output_names=["y", "getitem"]) == ["y", "getitem"]

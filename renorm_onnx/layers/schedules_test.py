import copy
import gc
import os
import pickle
import subprocess
import sys

import pytest
import torch

from renorm_onnx.errors import InputError
from renorm_onnx.layers.conftest import make_batch
from renorm_onnx.layers.modules import BatchRenorm1d
from renorm_onnx.layers.schedules import (
    CONSTANT,
    PAPER,
    FromFunction,
    HardSwitch,
    Ramp,
    Schedule,
    Sigmoid,
    as_schedule,
    linear,
    stretched,
)


def by_hand(step):
    return 1 + step / 8, step / 4


ALL = [CONSTANT, PAPER, Ramp(3, 11, 7), HardSwitch(5), Sigmoid(0.3), linear(0, 9), stretched(16), FromFunction(by_hand)]


@pytest.mark.parametrize(
    ("step", "bounds"),
    [
        (0, (1, 0)),
        (4_999, (1, 0)),
        (5_000, (1, 0)),
        (15_000, (1 + 2 * 10 / 35, 2.5)),
        (25_000, (1 + 2 * 20 / 35, 5)),
        (40_000, (3, 5)),
        (400_000, (3, 5)),
    ],
)
def test_the_papers_schedule_has_the_papers_values(step, bounds):
    assert PAPER(step) == pytest.approx(bounds, rel=1e-15)


def test_stretching_scales_every_edge():
    short = stretched(80)
    assert [short(step) for step in (10, 50, 80)] == [PAPER(step) for step in (5_000, 25_000, 40_000)]


def test_the_hard_switch_is_between_two_steps():
    assert (HardSwitch(5)(4), HardSwitch(5)(5)) == ((1, 0), (3, 5))


def test_the_sigmoid_repeats_the_reference_implementation():
    r_max, d_max, t = 1.0, 0.0, 0.0
    for step in range(30):
        assert Sigmoid(0.3)(step) == pytest.approx((r_max, d_max), rel=1e-12)
        # Its three updates at the end of a batch, in its order.
        r_max = 3 / (1 + (3 - 1) * torch.tensor(-t, dtype=torch.float64).exp().item())
        d_max = 5 / (1 + (5 / 1e-3 - 1) * torch.tensor(-2 * t, dtype=torch.float64).exp().item())
        t += 0.3


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
def test_host_and_device_agree(schedule):
    for step in (0, 1, 2, 5, 7, 11, 16, 4_999, 5_000, 5_001, 30_000, 400_000):
        for r_max, d_max in ((2.5, 4.0), (1.0, 4.0), (2.5, 0.0)):
            want = schedule.bounds(step, r_max, d_max)
            got = [bound.item() for bound in schedule.bounds_on_device(torch.tensor(step), r_max, d_max)]
            assert got == pytest.approx(want, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
def test_a_copy_is_the_same_schedule(schedule):
    schedule.checked(6, 3.0, 5.0, "layer")
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert twin == schedule
        assert [bound.item() for bound in twin.bounds_on_device(torch.tensor(6), 3.0, 5.0)] == [
            bound.item() for bound in schedule.bounds_on_device(torch.tensor(6), 3.0, 5.0)
        ]


def test_a_schedule_is_asked_once_per_step_and_not_per_layer():
    asked = []

    def ask(step):
        asked.append(step)
        return 2.0, 3.0

    schedule = FromFunction(ask)
    model = torch.nn.Sequential(*(BatchRenorm1d(3, schedule=schedule) for _ in range(4)))
    for _ in range(3):
        model(make_batch(2, dtype=torch.float32))
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("schedule", ["HardSwitch(0)", "lambda step: (3.0, 5.0)"])
def test_a_saved_program_never_asks_a_function_of_another_process(tmp_path, schedule):
    path = tmp_path / "program.pt2"
    opening = "import sys, torch; from renorm_onnx import BatchRenorm1d, HardSwitch; x = torch.ones(4, 3).cumsum(0); "
    # The first function of either process.
    layer, other = (f"layer = BatchRenorm1d(3, schedule={given}); " for given in (schedule, "lambda step: (1.0, 0.0)"))
    save = "torch.export.save(torch.export.export(layer, (x,)), sys.argv[1])"
    load = "print('mean', torch.export.load(sys.argv[1]).module()(x).mean().item())"
    for code in (layer + save, other + load):
        done = subprocess.run(
            [sys.executable, "-c", opening + code, path],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    said = "InputError: batch renorm layer: the function that is this captured layer's schedule is not in this process"
    if schedule.startswith("lambda"):
        assert said in done.stderr
        assert "mean" not in done.stdout
    else:  # a schedule that is part of the program
        assert done.returncode == 0, done.stderr
        assert "mean" in done.stdout


def test_a_program_outlives_its_layer_but_not_its_layers_function():
    x = make_batch(2, dtype=torch.float32)
    layer = BatchRenorm1d(3, schedule=lambda step: (3.0, 5.0))
    program = torch.export.export(layer, (x,)).module()
    program(x)
    del layer
    gc.collect()
    with pytest.raises(
        InputError, match="lives as long as the layer that was captured; to save a program use a built-"
    ):
        program(x)


def test_a_schedule_resumes_from_a_checkpoint():
    layer = BatchRenorm1d(3, schedule=Ramp(2, 10, 6), dtype=torch.float64)
    for seed in range(5):
        layer(make_batch(2, seed=seed))
    resumed = BatchRenorm1d(3, schedule=Ramp(2, 10, 6), dtype=torch.float64)
    resumed.load_state_dict(layer.state_dict())
    for seed in range(5, 9):
        assert torch.equal(resumed(make_batch(2, seed=seed)), layer(make_batch(2, seed=seed)))
    restarted = BatchRenorm1d(3, schedule=Ramp(2, 10, 6), dtype=torch.float64)
    restarted.load_state_dict({**layer.state_dict(), "num_batches_tracked": torch.tensor(0)})
    assert not torch.equal(restarted(make_batch(2)), layer(make_batch(2)))


def test_a_schedule_of_ones_own_needs_two_methods():
    class Halfway(Schedule):
        def bounds(self, step, r_max, d_max):
            return (1 + r_max) / 2, d_max / 2

        def bounds_on_device(self, step, r_max, d_max):
            return torch.tensor((1 + r_max) / 2), torch.tensor(d_max / 2)

    x = make_batch(2)
    mine = BatchRenorm1d(3, schedule=Halfway(), dtype=torch.float64)(x)
    assert torch.equal(mine, BatchRenorm1d(3, r_max=2, d_max=2.5, schedule=None, dtype=torch.float64)(x))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0.5, 1.0), r"BatchRenorm1d: schedule .* at step 0 returned r_max=0\.5, expected a finite number >= 1"),
        ((float("nan"), 1.0), "r_max=nan"),
        ((2.0, -1.0), r"d_max=-1\.0, expected a finite number >= 0"),
        ((2.0, float("inf")), "d_max=inf"),
        (3.0, r"returned 3\.0, expected a pair of numbers"),
        ((1.0, 2.0, 3.0), "expected a pair of numbers"),
        (("a", "b"), "expected a pair of numbers"),
    ],
)
def test_bounds_that_cannot_be_used_are_refused_and_change_nothing(bounds, message):
    layer = BatchRenorm1d(3, schedule=lambda step: bounds)
    with pytest.raises(InputError, match=message):
        layer(make_batch(2, dtype=torch.float32))
    assert layer.num_batches_tracked.item() == 0
    assert torch.equal(layer.running_mean, torch.zeros(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ramp(-1), "Ramp: start=-1, expected a finite number of steps"),
        (lambda: Ramp(5, 5, 9), "expected both ends after the start; for a jump use HardSwitch"),
        (lambda: linear(0, float("nan")), "r_end=nan"),
        (lambda: HardSwitch(float("inf")), "HardSwitch: at=inf"),
        (lambda: Sigmoid(0), "Sigmoid: t_delta=0, expected a finite number > 0"),
        (lambda: stretched(0), "stretched: total_steps=0, expected a finite number > 0"),
        (
            lambda: as_schedule(Sigmoid, "layer"),
            "layer: schedule=Sigmoid, a class; expected a Schedule: Sigmoid",
        ),
        (
            lambda: as_schedule(3, "layer"),
            "layer: schedule=3, expected 'paper', None, a Schedule or a function of the step",
        ),
    ],
)
def test_a_bad_schedule_is_refused_when_made(make, message):
    with pytest.raises(InputError, match=message):
        make()

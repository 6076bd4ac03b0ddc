"""Trained layers that are converted start at the schedule's end, where it has one that can be found."""

import math

import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError
from renorm_onnx.layers.convert import convert_batchnorm
from renorm_onnx.layers.convert_test import trained
from renorm_onnx.layers.schedules import CONSTANT, FromFunction, HardSwitch, Ramp, Sigmoid, linear


@pytest.mark.parametrize(
    ("schedule", "end"),
    [
        ("paper", 40_000),
        (None, 0),
        (HardSwitch(777), 777),
        (linear(5, 31), 31),
        (Ramp(0, 10, 90), 90),
        (lambda step: (1 + min(step, 50) / 50, 0.5), 50),
    ],
)
def test_a_pretrained_layer_starts_at_the_first_step_of_the_schedules_end(schedule, end):
    layer = convert_batchnorm(trained(nn.BatchNorm1d(3)), schedule=schedule)
    assert layer.num_batches_tracked.item() == max(end, 17)
    last = layer.schedule.bounds(10**9, layer.r_max, layer.d_max)
    assert layer.schedule.bounds(max(end, 17), layer.r_max, layer.d_max) == last
    if end > 0:
        assert layer.schedule.bounds(end - 1, layer.r_max, layer.d_max) != last


def test_the_sigmoid_reaches_its_end_and_a_schedule_without_end_becomes_constant():
    layer = convert_batchnorm(trained(nn.BatchNorm1d(3)), schedule=Sigmoid(0.01))
    assert layer.schedule.bounds(layer.num_batches_tracked.item(), 3.0, 5.0) == (3.0, 5.0)
    endless = convert_batchnorm(trained(nn.BatchNorm1d(3)), schedule=lambda step: (1.0 + step % 2, 0.0 + step))
    assert endless.num_batches_tracked.item() == 17
    assert endless.schedule.bounds(3, 3.0, 5.0) == (3.0, 5.0)


@pytest.mark.parametrize("period", [5, 64, 1000, 1024, 40_009])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_schedule_that_goes_in_cycles_has_no_end(period, share, flipped):
    def cycle(step):
        return (3.0, 5.0) if (step % period < share * period) != flipped else (1.0, 0.0)

    layer = convert_batchnorm(trained(nn.BatchNorm1d(3)), schedule=cycle)
    assert (layer.num_batches_tracked.item(), layer.schedule) == (17, CONSTANT)
    ending = convert_batchnorm(trained(nn.BatchNorm1d(3)), schedule=lambda step: cycle(min(step, 5 * period)))
    assert isinstance(ending.schedule, FromFunction)  # control: with an end it is found
    steps = range(5 * period + 1)
    first = next(step for step in reversed(steps) if step == 0 or cycle(step - 1) != cycle(5 * period))
    assert ending.num_batches_tracked.item() == max(first, 17)


TABLE = [(1.0, 0.0), (2.0, 1.0), (3.0, 5.0)]


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda step: TABLE[step], "raised IndexError: list index out of range"),
        (lambda step: (1 + math.exp(step / 1e3), 5.0), "raised OverflowError: math range error"),
    ],
)
def test_a_function_that_cannot_answer_at_its_end_is_refused_with_the_way_out(function, problem):
    model = nn.Sequential(trained(nn.BatchNorm1d(3)))
    with pytest.raises(
        InputError, match=rf"schedule FromFunction\(.*\) was asked for step \d+, .* {problem}; .* pretrained=False"
    ):
        convert_batchnorm(model, schedule=function)
    assert type(model[0]) is nn.BatchNorm1d
    assert model[0].num_batches_tracked.item() == 17
    model[0].num_batches_tracked.zero_()
    layer = convert_batchnorm(model, schedule=function, pretrained=False)[0]
    assert layer(torch.randn(4, 3, generator=torch.Generator().manual_seed(0))).shape == (4, 3)
    fresh = convert_batchnorm(nn.BatchNorm1d(3), schedule=function)  # nothing is asked where nothing was trained
    assert fresh.num_batches_tracked.item() == 0


def test_a_function_that_returns_no_bounds_is_refused_at_once():
    with pytest.raises(InputError, match=r"at step \d+ returned None, expected a pair of numbers \(r_max, d_max\)"):
        convert_batchnorm(trained(nn.BatchNorm1d(3)), schedule=lambda step: None)

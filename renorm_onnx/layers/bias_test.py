"""`bias=False`: a layer that learns gamma alone, as torch's own layers from 2.13 on; here under every torch."""

import copy
import inspect

import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError
from renorm_onnx.layers.adoption import FOREIGN_LAYERS, adopt
from renorm_onnx.layers.adoption_test import stand_in
from renorm_onnx.layers.conftest import NaiveBatchRenorm, make_batch, outcome, shaken, worst
from renorm_onnx.layers.convert import convert_batchnorm, to_batchnorm
from renorm_onnx.layers.distributed import SyncBatchRenorm, convert_sync_batchrenorm
from renorm_onnx.layers.functional import keep_ops
from renorm_onnx.layers.keras_weights import load_keras
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from renorm_onnx.layers.step_test import WAYS

KINDS = [BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, SyncBatchRenorm]


def layer_with(bias, kind=BatchRenorm2d, **options):
    layer = kind(3, **{"momentum": 0.1, "schedule": None, "dtype": torch.float64, **options}, bias=bias)
    whole = shaken(BatchRenorm2d(3, dtype=torch.float64))
    layer.load_state_dict({**whole.state_dict(), "bias": torch.zeros(3)}, strict=bias)
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_without_beta_has_gamma_alone(kind):
    layer = kind(3, bias=False)
    assert {name for name, _ in layer.named_parameters()} == {"weight"}
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    assert repr(layer).endswith("bias=False)")
    assert "bias" not in repr(kind(3))
    assert {name for name, _ in kind(3, bias=True).named_parameters()} == {"weight", "bias"}
    neither = kind(3, affine=False, bias=False)
    assert not list(neither.parameters())
    assert "bias" not in repr(neither)


def test_parameters_are_reset_where_there_are_any():
    for layer in (BatchRenorm2d(3, bias=False), BatchRenorm2d(3, affine=False), BatchRenorm2d(3)):
        for tensor in layer.state_dict().values():
            tensor.fill_(7)
        layer.reset_parameters()
        fresh = BatchRenorm2d(3, affine=layer.affine, bias=layer.bias is not None)
        torch.testing.assert_close(layer.state_dict(), fresh.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("schedule", [None, "paper"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_layer_without_beta_is_one_whose_beta_is_0(way, schedule):
    layer, whole = (layer_with(bias, schedule=schedule) for bias in (False, True))
    for seed in range(3):
        x = make_batch(4, seed=seed)
        if way is WAYS["the general step"]:
            torch.testing.assert_close(way(layer)(x), way(whole)(x), rtol=1e-12, atol=1e-12)
            continue
        want = outcome(whole, x, way(whole))
        del want["bias"]
        assert worst(outcome(layer, x, way(layer)), want) < (1e-12, "")
    assert torch.equal(layer.eval()(x), whole.eval()(x))


def test_a_step_without_beta_is_the_papers():
    layer = layer_with(False)
    naive = NaiveBatchRenorm(layer_with(True))
    x = make_batch(4)
    want = outcome(naive, x)
    assert want.pop("bias").abs().max() > 0.1
    assert worst(outcome(layer, x), want) < (1e-11, "")


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_without_beta_is_an_operator_too(training):
    layer, whole = (layer_with(bias).train(training) for bias in (False, True))
    x = make_batch(4)
    with keep_ops():
        torch.testing.assert_close(layer(x), whole(x))


@pytest.mark.parametrize(("bias", "count"), [(False, 1), (True, 2)])
def test_conversions_keep_what_there_is_of_beta(bias, count):
    norm = nn.BatchNorm2d(3)
    if not bias:
        norm.register_parameter("bias", None)
    there = convert_batchnorm(nn.Sequential(norm))
    assert (type(there[0]), len(list(there.parameters()))) == (BatchRenorm2d, count)
    assert ("bias=False" in repr(there)) != bias
    pooled = convert_sync_batchrenorm(copy.deepcopy(there))
    assert (type(pooled[0]), len(list(pooled.parameters()))) == (SyncBatchRenorm, count)
    back = to_batchnorm(there)
    assert (type(back[0]), len(list(back.parameters()))) == (nn.BatchNorm2d, count)
    x = make_batch(4, dtype=torch.float32)
    assert torch.equal(back.eval()(x), pooled.eval()(x))


@pytest.mark.skipif("bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="torch 2.11 has no bias=")
def test_state_dicts_without_beta_load_strictly_both_ways():
    layer, reference = layer_with(False), nn.BatchNorm2d(3, bias=False, dtype=torch.float64)
    reference.load_state_dict(layer.state_dict())
    BatchRenorm2d(3, bias=False).load_state_dict(reference.state_dict())
    converted = convert_batchnorm(nn.Sequential(copy.deepcopy(reference)))
    assert torch.equal(converted.eval()(make_batch(4)), reference.eval()(make_batch(4)))


def test_beta_is_no_option_where_the_layer_has_one_or_not_of_its_own():
    with pytest.raises(InputError, match="convert_batchnorm: bias=False, expected no such option: it is each layer's"):
        convert_batchnorm(nn.BatchNorm2d(3), bias=False)
    with pytest.raises(
        InputError, match="load_keras: bias=False, expected no such option: it follows from the weights"
    ):
        load_keras([[1.0], [0.0], [0.1], [1.0]], dims=1, bias=False)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'bias'"):
        adopt(stand_in(FOREIGN_LAYERS[-1], name="BatchRenorm2d", affine=True), bias=False)

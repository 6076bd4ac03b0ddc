"""The operators that exporters meet: opaque inside `keep_ops`, ordinary batch norm outside."""

import copy

import pytest
import torch

from renorm_onnx.errors import InputError
from renorm_onnx.layers import functional
from renorm_onnx.layers.conftest import LAYERS, algorithm_1, make_batch, shaken
from renorm_onnx.layers.functional import STATS, batch_renorm, keep_ops, keeping_ops


def layer_for(rank, **options):
    return shaken(LAYERS[rank](3, **{"momentum": 0.1, "schedule": None, "dtype": torch.float64, **options}))


def calls(program):
    return [node for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")  # torch's own copying
@pytest.mark.parametrize(
    ("rank", "affine", "strict"), [(2, True, True), (3, False, False), (4, True, False), (5, False, True)]
)
def test_an_evaluating_layer_is_one_operator_inside_keep_ops(rank, affine, strict):
    layer, x = layer_for(rank, affine=affine, r_max=2.5, d_max=4.0, stat="var").eval(), make_batch(rank)
    with keep_ops():
        program = torch.export.export(layer, (x,), strict=strict)
    (node,) = [node for node in calls(program) if "renorm_onnx" in str(node.target)]
    assert str(node.target) == "renorm_onnx.batch_renorm.default"
    assert node.args[5:] == (1e-5, 0.1, 2.5, 4.0, "var")
    torch.testing.assert_close(program.module()(x), layer(x))
    seen_through = program.run_decompositions()
    assert not [node for node in calls(seen_through) if "renorm_onnx" in str(node.target)]


def test_the_flag_holds_for_the_block_alone():
    with keep_ops(), keep_ops():
        pass
    assert not keeping_ops()
    block = keep_ops()
    block.__enter__()
    assert keeping_ops()
    assert block.__exit__(KeyError, KeyError(), None) is False
    assert not keeping_ops()


@pytest.mark.parametrize("stat", STATS)
@pytest.mark.parametrize("strict", [True, False])
def test_a_training_step_is_one_operator_inside_keep_ops(stat, strict):
    eager = layer_for(4, stat=stat)
    layer, x = copy.deepcopy(eager), make_batch(4)
    with keep_ops():
        program = torch.export.export(layer, (x,), strict=strict)
    nodes = [node for node in calls(program) if "renorm_onnx" in str(node.target)]
    assert [str(node.target) for node in nodes] == ["renorm_onnx.batch_renorm_training.default"]
    module = program.module(check_guards=False)
    for seed in range(3):
        torch.testing.assert_close(module(make_batch(4, seed=seed)), eager(make_batch(4, seed=seed)))
    torch.testing.assert_close(dict(module.named_buffers()), dict(eager.named_buffers()))


def test_the_outputs_are_algorithm_1():
    layer, x = layer_for(4), make_batch(4)
    mu, sigma = layer.running_mean, (layer.running_var + layer.eps).sqrt()
    y, new_mu, new_sigma = algorithm_1(x, layer.weight, layer.bias, mu, sigma, layer.eps, 1.5, 0.7, 0.1)
    bounds = torch.tensor(1.5), torch.tensor(0.7)
    got = torch.ops.renorm_onnx.batch_renorm_training(
        x, layer.weight, layer.bias, mu, layer.running_var, *bounds, layer.eps, 0.1, 3.0, 5.0, "sigma"
    )
    for mine, theirs in zip(got, (y, new_mu, new_sigma**2 - layer.eps), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("options", [{"momentum": None}, {"renorm_momentum": 0.2}, {"virtual_batch_size": 2}], ids=str)
def test_a_step_that_the_operator_cannot_express_is_refused(options):
    with keep_ops(), pytest.raises(InputError, match="the exported training step exists for a number, None and None"):
        layer_for(4, **options)(make_batch(4))


@pytest.mark.parametrize("stat", STATS)
def test_the_functional_form_takes_the_same_step_as_the_layer(stat):
    layer, x = layer_for(4, stat=stat), make_batch(4)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    y = batch_renorm(x, mean, var, layer.weight, layer.bias, True, 0.1, stat=stat)
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close((mean, var), (layer.running_mean, layer.running_var))
    torch.testing.assert_close(batch_renorm(x, mean, var, layer.weight, layer.bias), layer.eval()(x))


def test_the_functional_form_refuses_what_it_cannot_use():
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(InputError, match=r"batch_renorm: Expected more than 1 value per channel .* \(1, 3\)"):
        batch_renorm(torch.ones(1, 3), mean, var, training=True)
    with pytest.raises(InputError, match="batch_renorm: stat='std', expected one of"):
        functional.batch_renorm(torch.ones(4, 3), mean, var, training=True, stat="std")
    with pytest.raises(InputError, match=r"batch_renorm: r_max=nan, d_max=5\.0, expected finite r_max >= 1"):
        batch_renorm(torch.ones(4, 3), mean, var, training=True, r_max=float("nan"))

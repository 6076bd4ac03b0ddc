"""The operators that exporters meet: opaque inside `keep_ops`, ordinary batch norm outside."""

import copy

import pytest
import torch

from renorm_onnx.errors import InputError
from renorm_onnx.layers.conftest import LAYERS, algorithm_1, make_batch, shaken
from renorm_onnx.layers.functional import STATS, keep_ops, keeping_ops


def layer_for(rank, **options):
    return shaken(LAYERS[rank](3, **{"momentum": 0.1, "schedule": None, "dtype": torch.float64, **options}))


def five(seed):
    """A batch of five, which two ghost batches cannot share evenly."""
    return torch.cat([make_batch(4, seed=seed), make_batch(4, seed=seed + 50)[:1]])


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
    bounds, share = (torch.tensor(1.5), torch.tensor(0.7)), torch.tensor(0.1)
    got = torch.ops.renorm_onnx.batch_renorm_training(
        x, layer.weight, layer.bias, mu, layer.running_var, *bounds, share, layer.eps, 0.9, 3.0, 5.0, "sigma"
    )
    for mine, theirs in zip(got, (y, new_mu, new_sigma**2 - layer.eps), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("options", "operators"),
    [
        ({"momentum": None}, ["batch_renorm_training"]),
        ({"renorm_momentum": 0.3}, ["batch_renorm_training_two_sets"]),
        ({"renorm_momentum": 0.3, "momentum": None, "affine": False}, ["batch_renorm_training_two_sets"]),
        ({"virtual_batch_size": 2}, ["batch_renorm_training"] * 2),
        ({"virtual_batch_size": 2, "renorm_momentum": 0.3}, ["batch_renorm_training_two_sets"] * 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("stat", STATS)
def test_every_kind_of_step_is_what_the_layer_does(stat, options, operators):
    eager = layer_for(4, stat=stat, **options)
    if "renorm_momentum" in options:
        eager.renorm_mean.add_(0.5)
        eager.renorm_var.mul_(1.7)
    layer = copy.deepcopy(eager)
    with keep_ops():
        program = torch.export.export(layer, (five(0),), strict=False)
    found = [node for node in calls(program) if "renorm_onnx" in str(node.target)]
    assert [str(node.target) for node in found] == [f"renorm_onnx.{name}.default" for name in operators]
    module = program.module(check_guards=False)
    before = {name: buffer.clone() for name, buffer in eager.named_buffers()}
    for seed in range(3):
        torch.testing.assert_close(module(five(seed)), eager(five(seed)))
    torch.testing.assert_close(dict(module.named_buffers()), dict(eager.named_buffers()))
    assert not any(torch.equal(buffer, before[name]) for name, buffer in eager.named_buffers())


def test_ghost_batches_of_a_batch_that_may_change_are_refused():
    layer, batch = layer_for(4, virtual_batch_size=2), torch.export.Dim("batch")
    with keep_ops(), pytest.raises(InputError, match="virtual_batch_size=2 splits the batch, and a graph has a fixed"):
        torch.export.export(layer, (make_batch(4),), dynamic_shapes=({0: batch},), strict=False)

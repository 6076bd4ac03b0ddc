"""A module filled from a file is the module that was exported, also in the training that follows."""

import onnx_ir as ir
import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError, ModelFileError
from renorm_onnx.exporter import to_onnx
from renorm_onnx.exporting.restoring import restore
from renorm_onnx.layers.modules import BatchRenorm1d
from renorm_onnx.layers.schedules import linear
from renorm_onnx.onnx_function import DOMAIN
from renorm_onnx.onnx_layers import layers_in


def build(features: int = 4) -> nn.Sequential:
    """Three layers whose schedule is half way after ten steps, so the step counter matters."""
    return nn.Sequential(
        nn.Linear(3, features),
        BatchRenorm1d(features, eps=1e-3, momentum=0.1, r_max=2.5, d_max=4.0, schedule=linear(0, 20), stat="var"),
        nn.ReLU(),
        BatchRenorm1d(features, schedule=linear(0, 20), affine=False),
        BatchRenorm1d(features, momentum=None, schedule=None),
    )


def fresh(features: int = 4) -> nn.Sequential:
    """The same network with other settings in every layer, and its own random convolution."""
    return nn.Sequential(
        nn.Linear(3, features),
        BatchRenorm1d(features, schedule=linear(0, 20)),
        nn.ReLU(),
        BatchRenorm1d(features, momentum=0.5, schedule=linear(0, 20), affine=False),
        BatchRenorm1d(features, momentum=None, schedule=None),
    )


def train(net: nn.Module, steps: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(steps):
        y = net(torch.randn(16, 3, generator=generator) * 3 + 1)
    return y.detach()


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    torch.manual_seed(0)
    net = build()
    nn.init.normal_(net[1].weight, 1.5)
    train(net, 10, seed=1)
    return net.eval()


@pytest.fixture(scope="module")
def path(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("restore") / "model.onnx"
    to_onnx(trained, torch.randn(2, 3), path, metadata=False)
    return path


def test_the_restored_module_is_equal_now_and_after_three_more_steps(trained, path) -> None:
    net = fresh()
    net[0].load_state_dict(trained[0].state_dict())
    assert restore(net, path) == 3
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(9))
    assert torch.equal(net.eval()(x), trained(x))
    further = build()
    further.load_state_dict(trained.state_dict())
    assert torch.equal(train(net, 3, seed=2), train(further, 3, seed=2))
    for name, value in further.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


def test_without_the_step_counter_the_further_steps_would_differ(trained, path) -> None:
    net, further = build(), build()
    net[0].load_state_dict(trained[0].state_dict())
    restore(net, path)
    net[1].num_batches_tracked.zero_()
    further.load_state_dict(trained.state_dict())
    assert not torch.equal(train(net, 3, seed=2), train(further, 3, seed=2))


def test_the_file_tells_everything_about_each_layer(trained, path) -> None:
    layers = {info.name: info for info in layers_in(ir.load(path))}
    assert list(layers) == ["1", "3", "4"]
    first = layers["1"].to_dict()
    assert first["running_mean"] == trained[1].running_mean.tolist()
    assert (first["epsilon"], first["momentum"], first["r_max"], first["d_max"]) == (1e-3, 0.1, 2.5, 4.0)
    assert (first["stat"], first["num_batches_tracked"], first["calls"], first["training"]) == ("var", 10, 1, False)
    assert layers["1"].num_features == 4
    assert layers["4"].momentum == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(BatchRenorm1d(4)), r"only in the file: \['1', '3', '4'\]; only in the module: \['0'\]"),
        (lambda: fresh(5), r"restore: layer '1': weight has shape \(4,\) in the file, \(5,\) in the module"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_and_left_alone(path, make, message) -> None:
    net = make()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(InputError, match=message):
        restore(net, path)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(("name", "options"), [("weight", {"affine": False}), ("bias", {"bias": False})])
def test_a_layer_that_cannot_hold_what_the_file_has_learned_is_refused(name, options) -> None:
    layer = BatchRenorm1d(4)
    layer(torch.randn(8, 4))
    unlearned = to_onnx(layer.eval(), torch.randn(3, 4), verify=False)
    getattr(layer, name).data[2] = 0.5
    learned = to_onnx(layer, torch.randn(3, 4), verify=False)
    with pytest.raises(InputError, match=rf"layer '.+' of the module has no {name} \(affine, bias\), the file has one"):
        restore(BatchRenorm1d(4, **options), learned)
    assert restore(BatchRenorm1d(4, **options), unlearned) == 1


def test_a_layer_without_statistics_is_not_filled(path) -> None:
    net = fresh()
    net[4] = BatchRenorm1d(4, track_running_stats=False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(
        InputError, match="layer '4' of the module has track_running_stats=False, the file has statistics for it"
    ):
        restore(net, path)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "nor are the layers before it"


@pytest.mark.parametrize("affine", [True, False])
def test_what_a_model_computes_cannot_be_restored(trained, affine) -> None:
    model = ir.from_proto(to_onnx(trained, torch.randn(2, 3), verify=False))
    call = next(node for node in model.graph if node.name == "1")
    doubled = ir.node("Add", [call.inputs[1], call.inputs[1]])
    model.graph.insert_before(call, doubled)
    call.replace_input_with(1, doubled.outputs[0])
    net = fresh()
    message = "layer '1': weight is computed by the model in the file, not stored"
    if not affine:
        net[1] = BatchRenorm1d(4, affine=False)
        message = r"layer '1' of the module has no weight \(affine, bias\), the file has one for it"
    with pytest.raises(InputError, match=message):
        restore(net, ir.to_proto(model))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_module_that_is_a_layer_takes_the_only_layer_of_a_file(mode) -> None:
    layer = BatchRenorm1d(4)
    layer(torch.randn(8, 4))
    exported = to_onnx(layer.train(mode == "train"), torch.randn(3, 4), mode=mode)
    other = BatchRenorm1d(4)
    assert restore(other, exported) == 1
    assert torch.equal(other.running_mean, layer.running_mean)
    assert other.num_batches_tracked == 1
    assert restore(nn.Sequential(other), to_onnx(nn.Sequential(layer).eval(), torch.randn(3, 4))) == 1
    with pytest.raises(InputError, match=r"only in the module: \['0'\]"):
        restore(nn.Sequential(other), exported)
    several = to_onnx(nn.Sequential(layer, BatchRenorm1d(4)).train(), torch.randn(3, 4), mode="train", verify=False)
    with pytest.raises(InputError, match=r"only in the file: \['0', '1'\]; only in the module: \[''\]"):
        restore(other, several)


def test_a_file_without_calls_is_refused_with_advice(trained, tmp_path) -> None:
    to_onnx(trained, torch.randn(2, 3), tmp_path / "plain.onnx", functions=False, verify=False)
    with pytest.raises(InputError, match="has no batch renormalization calls; pass the file that to_onnx wrote"):
        restore(build(), tmp_path / "plain.onnx")


def test_a_model_in_memory_restores_as_its_file_does():
    net = build()
    train(net, 10, 0)
    proto = to_onnx(net.eval(), torch.randn(4, 3))
    other = fresh()
    assert restore(other, proto) == 3
    assert torch.equal(other[1].running_var, net[1].running_var)
    with pytest.raises(InputError, match="restore: the layers of the model and of Sequential differ"):
        restore(nn.Sequential(BatchRenorm1d(4)), proto)


def test_a_file_that_does_not_tell_the_step_leaves_the_counter_of_the_module(trained) -> None:
    model = ir.from_proto(to_onnx(trained, torch.randn(2, 3), verify=False))
    for call in (node for node in model.graph if node.domain == DOMAIN):
        call.attributes["num_batches_tracked"] = ir.AttrInt64("num_batches_tracked", -1)
    net = fresh()
    net[1].num_batches_tracked.fill_(7)
    restore(net, ir.to_proto(model))
    assert net[1].num_batches_tracked == 7
    assert torch.equal(net[1].running_var, trained[1].running_var)


def test_statistics_in_bfloat16_are_restored() -> None:
    layer = BatchRenorm1d(4)
    layer(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    exported = to_onnx(layer.eval().bfloat16(), torch.randn(3, 4).bfloat16(), opset=22, verify=False)
    other = BatchRenorm1d(4)
    assert restore(other, exported) == 1
    assert torch.equal(other.running_mean, layer.running_mean.float())


def test_a_link_to_weights_outside_the_folder_is_followed_only_where_that_is_allowed(tmp_path) -> None:
    folder, layer = tmp_path / "model", BatchRenorm1d(400)
    folder.mkdir()
    layer(torch.randn(8, 400, generator=torch.Generator().manual_seed(0)))
    to_onnx(layer.eval(), torch.randn(3, 400), folder / "net.onnx", external_data=True, verify=False)
    (data,) = (path for path in folder.iterdir() if path.suffix != ".onnx")
    data.rename(tmp_path / "weights")
    data.symlink_to(tmp_path / "weights")
    with pytest.raises(ModelFileError, match="symlink"):
        restore(BatchRenorm1d(400), folder / "net.onnx")
    assert restore(BatchRenorm1d(400), folder / "net.onnx", allow_symlinks=True) == 1


def test_what_is_no_module_and_what_is_no_model_are_refused():
    with pytest.raises(InputError, match=r"restore: module is a str, expected a torch\.nn\.Module"):
        restore("net", "net.onnx")
    with pytest.raises(InputError, match=r"restore: path is a int, expected a path or an onnx\.ModelProto"):
        restore(build(), 3)

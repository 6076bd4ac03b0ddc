"""Exported models: one call per layer, the values of an independent float64 network, and no surprise on the way.

The reference is the same network built of torch.nn.BatchNorm in float64; it shares the state dict, not the code.
"""

import copy
import io
import logging
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from renorm_onnx.exporter import keep_ops, to_onnx, translation_table
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from renorm_onnx.layers.running_stats import update_stats
from renorm_onnx.onnx_function import DOMAIN, INFERENCE, attach
from renorm_onnx.runtime.comparison import TOLERANCES, compare

PLAIN = {BatchRenorm1d: nn.BatchNorm1d, BatchRenorm2d: nn.BatchNorm2d, BatchRenorm3d: nn.BatchNorm3d}


class Net(nn.Module):
    """A layer inside a Sequential, one before a Linear, one used twice, one without affine parameters."""

    def __init__(self, norm2d=BatchRenorm2d, norm1d=BatchRenorm1d) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm2d(6, eps=1e-3), nn.ReLU())
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.twice = norm2d(6)
        self.bare = norm1d(6, affine=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.twice(self.conv(self.twice(x).relu())) + x
        return self.head(self.bare(x.mean((2, 3))))


def calibrated(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every layer parameters and statistics away from trivial ones, and evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in net.modules():
            if getattr(m, "running_mean", None) is not None:
                m.running_mean.copy_(torch.randn(m.num_features, generator=generator))
                m.running_var.copy_(torch.rand(m.num_features, generator=generator) * 2 + 0.3)
                m.num_batches_tracked.fill_(7)
                if m.affine:
                    m.weight.copy_(torch.randn(m.num_features, generator=generator) + 1.5)
                    m.bias.copy_(torch.randn(m.num_features, generator=generator))
    return net.eval()


def plain_twin(net: nn.Module) -> nn.Module:
    """The same network of torch's own BatchNorm, in float64."""
    twin = copy.deepcopy(net)
    for parent in list(twin.modules()):
        for name, child in parent._modules.items():
            if type(child) in PLAIN:
                norm = PLAIN[type(child)](child.num_features, child.eps, affine=child.affine)
                norm.load_state_dict(child.state_dict(), strict=True)
                parent._modules[name] = norm
    return twin.double().eval()


def images(n: int = 2, size: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def run(proto: onnx.ModelProto | str | Path, *feeds: torch.Tensor) -> list[np.ndarray]:
    """Run in onnxruntime without optimizations, feeding inputs in their order."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    source = proto.SerializeToString() if isinstance(proto, onnx.ModelProto) else str(proto)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: f.numpy() for i, f in zip(session.get_inputs(), feeds, strict=True)})


def assert_agrees(proto: onnx.ModelProto | str | Path, net: nn.Module, *feeds: torch.Tensor, dtype=np.float32) -> None:
    with torch.no_grad():
        want = plain_twin(net)(*(f.double() if f.is_floating_point() else f for f in feeds))
    want = [w.numpy().astype(dtype) for w in torch.utils._pytree.tree_leaves(want)]
    report = compare(want, run(proto, *feeds), TOLERANCES[dtype])
    assert report.ok, report


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return calibrated(Net())


@pytest.fixture(scope="module")
def exported(net: nn.Module) -> onnx.ModelProto:
    return to_onnx(net, (images(),), dynamic_shapes=({0: "batch", 2: "h", 3: "w"},))


def calls(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in proto.graph.node if n.domain == DOMAIN]


def test_every_use_of_a_layer_is_one_call_with_its_own_parameters_and_attributes(exported, net) -> None:
    found = {n.name: n for n in calls(exported)}
    assert list(found) == ["stem.1", "twice", "twice_1", "bare"]
    for name, call in found.items():
        layer = name.removesuffix("_1")
        assert call.op_type == INFERENCE
        assert call.input[1:] == [f"{layer}.{p}" for p in ("weight", "bias", "running_mean", "running_var")]
        values = {a.name: onnx.helper.get_attribute_value(a) for a in call.attribute}
        assert values == pytest.approx(
            {
                "epsilon": 1e-3 if layer == "stem.1" else 1e-5,
                "momentum": 0.01,
                "r_max": 3.0,
                "d_max": 5.0,
                "stat": b"sigma",
                "num_batches_tracked": 7,
            }
        )
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in exported.graph.initializer}
    np.testing.assert_array_equal(stored["twice.running_var"], net.twice.running_var.numpy())
    assert [f.name for f in exported.functions] == [INFERENCE]


def test_values_agree_with_the_reference_at_every_size(exported, net) -> None:
    assert_agrees(exported, net, images())
    assert_agrees(exported, net, images(5, 11, seed=2))


def test_a_changed_statistic_would_be_noticed(exported, net) -> None:
    changed = onnx.ModelProto.FromString(exported.SerializeToString())
    tensor = next(t for t in changed.graph.initializer if t.name == "bare.running_mean")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + 1e-3, tensor.name))
    with pytest.raises(AssertionError, match="is off by more than its tolerance"):
        assert_agrees(changed, net, images())


def test_untrained_layers_do_not_share_initializers() -> None:
    net = Net().eval()
    with pytest.warns(UserWarning, match=r"3 of 3 batch renorm layers have statistics of 0 and 1, 'stem.1' first"):
        proto = to_onnx(net, images())
    inputs = [name for call in calls(proto) for name in call.input[1:]]
    assert len(set(inputs)) == 12  # three layers of four, though all are ones and zeros
    assert_agrees(proto, net, images())


def test_statistics_taken_in_one_pass_are_not_called_untrained() -> None:
    net = Net()
    update_stats(net, [images()])
    assert_agrees(to_onnx(net.eval(), images()), net, images())


@pytest.mark.parametrize("opset", [15, 18, 26])
def test_the_opset_asked_for_is_reached(net, opset: int) -> None:
    proto = to_onnx(net, images(), opset=opset)
    assert {i.domain: i.version for i in proto.opset_import} == {"": opset, DOMAIN: 1}
    assert [i.version for i in proto.functions[0].opset_import] == [opset]
    onnx.checker.check_model(proto, full_check=True)
    assert_agrees(proto, net, images())


def test_operators_that_the_converter_does_not_know_reach_the_newest_opset_too() -> None:
    net = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3), BatchRenorm2d(4), nn.GELU()))
    proto = to_onnx(net, images(), opset=26)
    assert proto.opset_import[0].version == 26
    assert [n.op_type for n in proto.graph.node] == ["Conv", INFERENCE, "Gelu"]
    assert_agrees(proto, net, images())


def test_without_functions_no_trace_of_the_domain_is_left(net) -> None:
    proto = to_onnx(net, images(), functions=False)
    assert b"renorm_onnx" not in proto.SerializeToString()
    assert [n.op_type for n in proto.graph.node].count("BatchNormalization") == 4
    assert_agrees(proto, net, images())


def test_without_metadata_no_path_of_this_machine_is_left(net, tmp_path) -> None:
    path = tmp_path / "model.onnx"
    to_onnx(net, images(), path, metadata=False)
    content = path.read_bytes()
    assert str(Path(__file__).parent).encode() not in content
    assert b"pkg.torch" not in content
    assert b"namespace" not in content
    assert_agrees(path, net, images())


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm3d, self.norm1d, self.norm2d = BatchRenorm3d(3), BatchRenorm1d(3), BatchRenorm2d(3)

    def forward(self, volume: torch.Tensor, line: torch.Tensor, *, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"volume": self.norm3d(volume), "both": self.norm1d(line), "image": self.norm2d(image) + 1}


def test_ranks_three_to_five_several_inputs_and_a_dict_of_outputs() -> None:
    net = calibrated(Volume())
    feeds = torch.randn(2, 3, 2, 3, 4), torch.randn(2, 3, 5), torch.randn(2, 3, 4, 5)
    proto = to_onnx(
        net,
        feeds[:2],
        kwargs={"image": feeds[2]},
        input_names=["v", "l", "i"],
        output_names=["a", "b", "c"],
    )
    assert [i.name for i in proto.graph.input] == ["v", "l", "i"]
    assert [o.name for o in proto.graph.output] == ["a", "b", "c"]
    with torch.no_grad():
        twin = plain_twin(net)
        want = twin(feeds[0].double(), feeds[1].double(), image=feeds[2].double()).values()
    report = compare([w.numpy().astype(np.float32) for w in want], run(proto, *feeds), TOLERANCES[np.float32])
    assert report.ok, report


class Choice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = BatchRenorm2d(3), BatchRenorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.up(x), lambda x: self.down(x) * 2, (x,))


def test_layers_in_the_branches_of_a_cond() -> None:
    net = calibrated(Choice())
    proto = to_onnx(net, images())
    model = ir.from_proto(proto)
    assert sorted(n.name for n in model.graph.all_nodes() if n.domain == DOMAIN) == ["down", "up"]
    for x in (images(), -images()):
        branch = net.up(x) if x.sum() > 0 else net.down(x) * 2
        np.testing.assert_allclose(run(proto, x)[0], branch.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_a_compiled_module_is_exported_as_what_it_was_made_of(net, exported) -> None:
    proto = to_onnx(torch.compile(net, backend="eager"), images())
    assert [call.name for call in calls(proto)] == [call.name for call in calls(exported)]
    assert_agrees(proto, net, images())


class Mapped(nn.Module):
    """Takes one dict with a nested tuple; torch's exporter takes a dict at the end for keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchRenorm2d(3)

    def forward(self, given: dict[str, object], shift: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        first, (second, third) = given["first"], given["rest"]
        return self.norm(first + second), self.norm(first - third) + (0 if shift is None else shift)


def test_a_dict_as_the_last_argument_stays_one() -> None:
    net = calibrated(Mapped())
    first, *rest = (images(seed=seed) for seed in (1, 2, 3))
    proto = to_onnx(net, ({"first": first, "rest": tuple(rest)},))
    want = [v.detach().numpy() for v in plain_twin(net)({"first": first.double(), "rest": [v.double() for v in rest]})]
    report = compare([v.astype(np.float32) for v in want], run(proto, first, *rest), TOLERANCES[np.float32])
    assert report.ok, report
    proto = to_onnx(net, ({"first": first, "rest": tuple(rest)},), kwargs={"shift": first})
    assert len(proto.graph.input) == 4


def test_dynamic_axes_in_the_older_form() -> None:
    net = calibrated(nn.Sequential(BatchRenorm2d(3), nn.Conv2d(3, 4, 3)))
    proto = to_onnx(net, images(), dynamic_axes={"x": {0: "batch"}}, input_names=["x"], output_names=["y"])
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert_agrees(proto, net, images(5))


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype", "opset"),
    [
        (torch.float16, np.float16, 20),
        (torch.float64, np.float64, 20),
        (torch.bfloat16, ml_dtypes.bfloat16, 22),
    ],
)
def test_other_types(dtype, numpy_dtype, opset: int) -> None:
    exact = 2.0**-16  # an ONNX attribute is a float32; with 1e-5 the float64 model is off by 1e-13
    net = calibrated(nn.Sequential(BatchRenorm2d(3, eps=exact), nn.ReLU())).to(dtype)
    proto = to_onnx(net, images().to(dtype), opset=opset)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(numpy_dtype))
    assert {t.data_type for t in proto.graph.initializer} == {kind}
    assert proto.graph.output[0].type.tensor_type.elem_type == kind
    if dtype != torch.bfloat16:  # onnxruntime's CPU provider has no bfloat16 kernels; to_onnx evaluated in float64
        assert_agrees(proto, net, images().to(dtype), dtype=numpy_dtype)


def test_external_data_lies_beside_the_model(net, tmp_path) -> None:
    path = tmp_path / "model.onnx"
    wide = calibrated(nn.Sequential(nn.Conv2d(3, 64, 5), BatchRenorm2d(64)))
    returned = to_onnx(wide, images(), path, external_data=True)
    assert len(list(tmp_path.iterdir())) == 2
    assert any(t.external_data for t in returned.graph.initializer)
    assert_agrees(path, wide, images())


def test_the_module_is_left_as_it_was(net) -> None:
    before = copy.deepcopy(net.state_dict())
    net.conv.weight.requires_grad_(True)
    to_onnx(net, images())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m.training for m in net.modules())
    assert net.conv.weight.requires_grad


# --- what users do without us -----------------------------------------------------------------------------------------


def quietly(export, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export(*args, **options)


def assert_plain(proto: onnx.ModelProto, net: nn.Module) -> None:
    assert not proto.functions
    assert {i.domain for i in proto.opset_import} == {""}
    assert_agrees(proto, net, images())


def test_the_plain_exporter_gives_ordinary_operators(net) -> None:
    program = quietly(torch.onnx.export, net, (images(),), dynamo=True, verbose=False)
    assert_plain(program.model_proto, net)


def test_the_legacy_exporter_gives_ordinary_operators(net) -> None:
    buffer = io.BytesIO()
    quietly(torch.onnx.export, net, (images(),), buffer, dynamo=False)
    assert_plain(onnx.ModelProto.FromString(buffer.getvalue()), net)


@pytest.mark.parametrize("strict", [True, False])
def test_a_program_captured_inside_keep_ops_keeps_its_layers_after_a_reload(
    net, tmp_path, strict: bool, caplog
) -> None:
    with keep_ops():
        program = quietly(torch.export.export, net, (images(),), strict=strict)
    torch.export.save(program, tmp_path / "net.pt2")
    with caplog.at_level("INFO", logger="renorm_onnx.exporter"):
        proto = to_onnx(quietly(torch.export.load, tmp_path / "net.pt2"), (images(),))
    assert "4 calls; opset 20 asked and reached; checker ok; max error" in caplog.text
    assert len(calls(proto)) == 4
    assert_agrees(proto, net, images())


def test_a_program_captured_without_keep_ops_exports_as_plain_onnx_and_says_so(net, caplog) -> None:
    program = quietly(torch.export.export, net, (images(),))
    proto = to_onnx(program, (images(),))
    assert_plain(proto, net)
    assert "no batch renorm layer; capture the program inside keep_ops()" in caplog.text


def test_the_exporter_called_by_the_user_with_our_table(net, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)
    with keep_ops():
        program = quietly(
            torch.onnx.export,
            net,
            (images(),),
            dynamo=True,
            verbose=False,
            custom_translation_table=translation_table(),
        )
    said = [text for text in caplog.messages if "renorm" in text or "_emit" in text]
    assert not said, "torch reads the form of a call off the annotations, and warns where it cannot"
    assert attach(program.model) == 4
    onnx.checker.check_model(program.model_proto, full_check=True)
    assert_agrees(program.model_proto, net, images())


def test_a_trace_and_a_script_compute_the_same(net) -> None:
    want = net(images())
    for make in (lambda: torch.jit.trace(net, images()), lambda: torch.jit.script(net)):
        torch.testing.assert_close(quietly(make)(images()), want)

"""The float64 reference on whole networks, against torch in float64, exported at several opsets."""

import io
import warnings
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from models import MODELS
from renorm_onnx.runtime.reference import evaluate

OPSETS = (9, 11, 13, 17, 20)

# torch adds epsilon as a double, ONNX stores it as a float32: 1e-5 differs by 2.5e-13 of a variance of one.
# Constants in the modules below are multiples of 1/8, which float32 holds exactly.
RELATIVE = 2e-11


def exported(module: nn.Module, inputs: Sequence[Tensor], opset: int) -> ir.Model:
    """The module as torch's tracing exporter writes it, the only one that still writes old opsets."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so
        torch.onnx.export(module, tuple(inputs), buffer, dynamo=False, opset_version=opset, do_constant_folding=False)
    return ir.serde.deserialize_model(onnx.load_from_string(buffer.getvalue()))


def furthest(module: nn.Module, inputs: Sequence[Tensor], opset: int) -> float:
    """Largest difference between the reference and torch in float64, relative to the largest value of an output."""
    model = exported(module.eval(), inputs, opset)
    feeds = {value.name: x.numpy() for value, x in zip(model.graph.inputs, inputs, strict=True)}
    got = evaluate(model, feeds)
    with torch.no_grad():
        wide = module.double()(*(x.double() for x in inputs))
    want = [value.numpy() for value in ((wide,) if isinstance(wide, Tensor) else wide)]
    assert all(value.dtype == np.float64 for value in got.values())
    pairs = zip(want, got.values(), strict=True)
    return max(float(np.abs(one - other).max() / np.abs(one).max()) for one, other in pairs)


def with_statistics(module: nn.Module) -> nn.Module:
    """`module` with every batch norm far from the identity."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (part.running_mean, -0.5, 0.5),
                (part.running_var, 0.5, 2.0),
                (part.weight, 0.5, 2.0),
                (part.bias, -0.5, 0.5),
            ):
                nn.init.uniform_(tensor, low, high)
    return module


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", MODELS)
def test_our_networks_agree_with_torch_in_float64(name, opset):
    entry = MODELS[name]
    norm = {0: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[entry.spatial_dims]
    module = with_statistics(entry.build(norm=norm, **entry.small))
    assert furthest(module, entry.example_inputs(batch=2, **entry.small_inputs), opset) < RELATIVE


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = cell(5, 4, num_layers=2, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.375, dim=-1)
        return x + nn.functional.elu(self.out(weights @ v))


class Pyramid(nn.Module):
    """What detection and segmentation heads do to shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.shuffle = nn.Sequential(nn.Conv2d(8, 12, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        deep = nn.functional.leaky_relu(self.down(x), 0.125)
        wide = nn.functional.interpolate(deep, scale_factor=2.0, mode="bilinear", align_corners=False)
        near = nn.functional.interpolate(deep, scale_factor=2.0, mode="nearest")
        joined = torch.cat([self.up(deep), self.shuffle(deep), wide[:, ::2] * near[:, 1::2]], dim=1)
        pooled = nn.functional.avg_pool2d(joined, 3, 2, 1, ceil_mode=True, count_include_pad=False)
        return pooled.flatten(2).permute(0, 2, 1), nn.functional.pad(joined, (1, 2, 0, 1), mode="reflect").mean((2, 3))


OTHERS = {
    "lstm": (lambda: Recurrent(nn.LSTM), (6, 2, 5), OPSETS),
    "gru": (lambda: Recurrent(nn.GRU), (6, 2, 5), OPSETS),
    "attention": (Attention, (2, 7, 8), OPSETS),
    "pyramid": (Pyramid, (2, 3, 8, 8), OPSETS[1:]),
    "group_norm": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.SiLU()), (2, 3, 9, 9), OPSETS),
    "instance_norm": (lambda: nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.PReLU(3)), (2, 3, 6, 5), OPSETS),
}


@pytest.mark.parametrize(
    ("name", "opset"), [(name, opset) for name, (_, _, opsets) in OTHERS.items() for opset in opsets]
)
def test_other_networks_agree_with_torch_in_float64(name, opset):
    build, shape, _ = OTHERS[name]
    torch.manual_seed(0)
    assert furthest(build(), [torch.randn(shape)], opset) < RELATIVE


class Encoder(nn.Module):
    """Images in patches, a norm, attention, both kinds of Gelu: much that onnxruntime's optimizer has operators for."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), with_statistics(nn.BatchNorm2d(8))
        self.attention, self.wide = Attention(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(self.patches(x))).flatten(2).transpose(1, 2)
        x = nn.functional.gelu(self.wide(self.attention(x)))
        return nn.functional.layer_norm(x + nn.functional.gelu(self.wide(x), approximate="tanh"), (8,))


def test_a_file_that_onnxruntime_optimized_is_evaluated_as_its_original(tmp_path):
    torch.manual_seed(0)
    module, x = Encoder().eval(), torch.randn(2, 3, 16, 16)
    original = exported(module, [x], 17)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    source = ir.to_proto(original).SerializeToString()
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    optimized = ir.load(tmp_path / "optimized.onnx")
    own = {node.op_type for node in optimized.graph if node.domain == "com.microsoft"}
    assert own >= {"FusedMatMul", "QuickGelu", "Gelu"}
    feeds = {original.graph.inputs[0].name: x.numpy()}
    want, got = (next(iter(evaluate(model, feeds).values())) for model in (original, optimized))
    # It folds the norm, and rounds the new weights once.
    assert np.abs(got - want).max() < 1e-6 * np.abs(want).max()


def test_a_changed_weight_is_seen():
    entry = MODELS["mlp"]
    module, inputs = with_statistics(entry.build(norm=nn.BatchNorm1d, **entry.small)), entry.example_inputs(batch=2)
    model = exported(module.eval(), inputs, 17)
    feeds = {value.name: x.numpy() for value, x in zip(model.graph.inputs, inputs, strict=True)}
    before = evaluate(model, feeds)
    value = next(v for v in model.graph.initializers.values() if v.name.endswith("bias"))
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.000001))
    after = evaluate(model, feeds)
    assert any(np.abs(after[name] - before[name]).max() > RELATIVE for name in before)

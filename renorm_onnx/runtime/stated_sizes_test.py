"""Sizes that only weights tell are found, so that models of open channels are judged without being asked for them."""

import onnx
import onnx_ir as ir
import pytest

from renorm_onnx.runtime.inputs import input_specs, size_plans
from renorm_onnx.runtime.parity import verify

WEIGHTS = {
    "w": [6, 3, 3, 3],
    "grouped": [6, 2, 3, 3],
    "up": [3, 4, 2, 2],
    "f": [5, 4],
    "batched": [2, 5, 4],
    "v": [5],
    "lstm": [1, 8, 5],
    "r": [1, 8, 2],
    "c": [3, 1, 1],
    "wide": [1, 1, 1, 1, 3],
}
CASES = [
    ("y = Conv(x, w)", 4, {1: 3}),
    ("y = Conv<group=3>(x, grouped)", 4, {1: 6}),
    ("y = ConvTranspose(x, up)", 4, {1: 3}),
    ("y = BatchNormalization(x, v, v, v, v)", 2, {1: 5}),
    ("y = InstanceNormalization(x, v, v)", 3, {1: 5}),
    ("y = renorm_onnx.BatchRenormalization(x, v, v, v, v)", 3, {1: 5}),
    ("y = Gemm(x, f)", 2, {1: 5}),
    ("y = Gemm<transB=1>(x, f)", 2, {1: 4}),
    ("y = Gemm<transA=1>(x, f)", 2, {0: 5}),
    ("y = MatMul(x, f)", 3, {2: 5}),
    ("y = MatMul(x, batched)", 3, {2: 5}),
    ("y = MatMul(x, v)", 2, {1: 5}),
    ("y = MatMul(f, x)", 2, {}),
    ("y = LSTM<hidden_size=2>(x, lstm, r)", 3, {2: 5}),
    ("t = Transpose<perm=[0,3,1,2]>(x) y = Conv(t, w)", 4, {3: 3}),
    ("t = Transpose(x) y = Gemm(t, f)", 2, {0: 5}),
    ("a = Sub(x, c) b = Div(c, a) d = Relu(b) y = Conv(d, w)", 4, {1: 3}),
    ("a = Sub(x, wide) y = Conv(a, w)", 4, {}),
    ("a = Add(x, x) y = Conv(a, w)", 4, {}),
    ("y = other.Conv(x, w)", 4, {}),
    ("y = Resize(x, v)", 4, {}),
    ("a = Conv(x, w) y = Gemm(a, f)", 4, {1: 3}),
]


@pytest.mark.parametrize(("body", "rank", "stated"), CASES)
def test_a_weight_settles_the_size_of_what_it_is_multiplied_by(body, rank, stated):
    dims = ",".join(f"d{axis}" for axis in range(rank))
    text = f"""<ir_version: 8, opset_import: ["": 17, "renorm_onnx": 1, "other": 1]> g (float[{dims}] x) => (float[k] y)
        {{ {body} }}"""
    model = ir.from_onnx_text(text)
    for node in list(model.graph):
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in WEIGHTS:
                tensor = ir.tensor([0.0] * _product(WEIGHTS[value.name]), name=value.name)
                shaped = ir.Tensor(tensor.numpy().reshape(WEIGHTS[value.name]), name=value.name)
                node.replace_input_with(index, ir.Value(name=value.name, const_value=shaped))
    (spec,) = input_specs(model)
    assert spec.stated == tuple((f"d{axis}", size) for axis, size in stated.items())
    for plan in size_plans([spec], 8, {"d0": 9}):
        assert plan["d0"] == 9
        assert all(plan[f"d{axis}"] == size for axis, size in stated.items() if axis)


def _product(sizes):
    total = 1
    for size in sizes:
        total *= size
    return total


def test_a_model_of_open_channels_is_judged_without_help():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[n, c, h, w] x) => (float[n, k, h, w] y)
        <float[2, 5, 1, 1] weight = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}> { y = Conv(x, weight) }"""
    model = onnx.parser.parse_model(text)
    assert verify(model, model).outcome == "yes"

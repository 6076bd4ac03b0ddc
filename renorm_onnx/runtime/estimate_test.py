import numpy as np
import onnx.numpy_helper as onh
import onnx.parser
import onnx_ir as ir
import pytest

from renorm_onnx.runtime.estimate import estimate, inferred_shapes
from renorm_onnx.runtime.parity_networks_test import build


def model_of(inputs, outputs, body, weights=None):
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => ({outputs}) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(
        onh.from_array(np.zeros(shape, np.float32), name) for name, shape in (weights or {}).items()
    )
    return ir.from_proto(model)


@pytest.mark.parametrize(
    ("body", "inputs", "weights", "flops"),
    [
        # 2 * outputs * terms of each
        ("y = Conv(x, w)", "float[1,3,10,10] x", {"w": (8, 3, 3, 3)}, 2 * (8 * 8 * 8) * 27),
        ("y = Conv<group=4>(x, w)", "float[1,4,10,10] x", {"w": (8, 1, 3, 3)}, 2 * (8 * 8 * 8) * 9),
        ("y = ConvTranspose(x, w)", "float[1,3,5,5] x", {"w": (3, 8, 2, 2)}, 2 * (3 * 5 * 5) * 32),
        ("y = Gemm(x, w)", "float[4,7] x", {"w": (7, 5)}, 2 * (4 * 5) * 7),
        ("y = Gemm<transA=1>(x, w)", "float[7,4] x", {"w": (7, 5)}, 2 * (4 * 5) * 7),
        ("y = MatMul(x, w)", "float[2,4,7] x", {"w": (7, 5)}, 2 * (2 * 4 * 5) * 7),
        ("y = Relu(x)", "float[4,7] x", {}, 28),
    ],
)
def test_operations_are_counted(body, inputs, weights, flops):
    cost = estimate(model_of(inputs, "float y", body, weights))
    assert cost.complete
    assert cost.flops == flops


def test_memory_is_the_weights_and_the_largest_set_of_live_values_in_float64():
    cost = estimate(
        model_of("float[10] x", "float y", "a = Relu(x) b = Relu(a) c = Relu(b) y = Add(c, w)", {"w": (10,)})
    )
    assert cost.bytes == 8 * (10 + 20)
    both = estimate(model_of("float[10] x", "float y", "a = Relu(x) b = Relu(a) c = Relu(b) y = Add(c, a)"))
    assert both.bytes == 8 * 30


def test_sizes_that_vary_can_be_given():
    model = ir.from_proto(build("convnet"))
    small, large = (estimate(model, {"N": 2, "H": size, "W": size}) for size in (16, 32))
    assert large.flops == pytest.approx(4 * small.flops, rel=0.05)
    assert inferred_shapes(model, {"N": 2, "H": 16, "W": 16})["h"] == (2, 8, 8, 8)


def test_large_weights_are_not_needed_for_their_shapes():
    model = model_of("float[N,3000] x", "float y", "y = MatMul(x, w)", {"w": (3000, 2000)})
    shapes = inferred_shapes(model, {"N": 4})
    assert (shapes["y"], shapes["w"]) == ((4, 2000), (3000, 2000))
    assert estimate(model).bytes > 8 * 6e6


def test_shapes_computed_in_the_graph_are_followed():
    body = """s = Shape(x) m = Constant<value_ints=[-1]>() n = Slice(s, zero, one)
    c = Concat<axis=0>(n, m) y = Reshape(x, c)"""
    model = model_of("float[N,3,4] x, int64[1] unused", "float y", body)
    for name, value in (("zero", 0), ("one", 1)):
        tensor = ir.tensor(np.array([value]), name=name)
        model.graph.initializers[name] = ir.Value(name=name, const_value=tensor, type=ir.TensorType(ir.DataType.INT64))
    proto = ir.to_proto(model)
    assert inferred_shapes(ir.from_proto(proto), {"N": 5})["y"] == (5, 12)


def test_shapes_that_only_our_facts_follow_are_known_and_so_is_what_comes_after():
    """As torch writes a mean over computed axes; onnx follows no Reshape of a shape, our facts no GlobalLpPool."""
    body = """m = Constant<value_ints=[-1]>() a = Constant<value_ints=[2, 3]>() r = Reshape(a, m)
    h = GlobalLpPool(x) e = Expand(h, like) n = ReduceMean(e, r) f = Flatten(n) y = MatMul(f, w)"""
    model = model_of("float[N,3,8,8] x", "float y", body, {"w": (3, 5)})
    tensor = ir.tensor(np.array([1, 1, 4, 4]), name="like")
    model.graph.initializers["like"] = ir.Value(name="like", const_value=tensor, type=ir.TensorType(ir.DataType.INT64))
    model.opset_imports[""] = 18
    shapes = inferred_shapes(ir.from_proto(ir.to_proto(model)), {"N": 2})
    assert [shapes[name] for name in "hney"] == [(2, 3, 1, 1), (2, 3, 1, 1), (2, 3, 4, 4), (2, 5)]


def test_shapes_that_a_file_states_are_not_believed():
    model = model_of("float[N,3] x", "float[N,9] y", "a = Relu(x) y = Relu(a)")
    for value in (*model.graph.node(0).outputs, *model.graph.outputs):
        value.type, value.shape = ir.TensorType(ir.DataType.INT8), ir.Shape((7, 7))
    shapes = inferred_shapes(model, {"N": 2})
    assert (shapes["a"], shapes["y"]) == ((2, 3), (2, 3))
    assert model.graph.outputs[0].shape == (7, 7)


def test_what_cannot_be_inferred_is_said_to_be_a_lower_bound():
    model = model_of("float[4,7] x", "float y", "a = custom.Thing(x) y = Relu(a)")
    cost = estimate(model)
    assert not cost.complete
    assert str(cost).startswith("at least ")

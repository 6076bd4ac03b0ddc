"""The functions compute Algorithm 1, and their calls keep what belongs to each layer."""

import numpy as np
import onnx
import onnx.compose
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from renorm_onnx.errors import InputError
from renorm_onnx.inlining import inline
from renorm_onnx.onnx_function import (
    CHANGING,
    DEFAULTS,
    DOMAIN,
    INFERENCE,
    MODULE_KEY,
    SECOND,
    TRAINING_NAMES,
    TWO_SETS,
    attach,
    calls_in,
    inference_function,
    is_inference,
    is_training,
    module_of,
    training_function,
    training_name,
    unshare,
)

SHAPES = {2: (6, 3), 3: (4, 3, 5), 4: (2, 3, 4, 5), 5: (2, 3, 2, 3, 2)}
ATTRIBUTES = {**DEFAULTS, "epsilon": 0.02, "momentum": 0.9}  # momentum is only written down: the share is an input
BOUNDS = (1.5, 0.25)  # of r and d, narrow enough to act
SHARES = {"share": 0.1, "renorm_share": 0.4}


def layer_model(op_type: str, rank: int, opset: int, *, dtype: type = np.float32, **attributes: object) -> ir.Model:
    """One call with every tensor an input."""
    rng = np.random.default_rng(rank)
    shape = SHAPES[rank]
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    inputs = [ir.val(n, kind, shape if n == "x" else [3]) for n in ("x", "weight", "bias", "mean", "var")]
    outputs = 1 if op_type == INFERENCE else 5 if op_type.endswith(TWO_SETS) else 3
    if outputs >= 3:
        inputs += [ir.val(n, kind, []) for n in CHANGING]
    if outputs == 5:
        inputs += [ir.val(n, kind, [] if n == "renorm_share" else [3]) for n in SECOND]
    call = ir.node(op_type, inputs, domain=DOMAIN, num_outputs=outputs, attributes={**ATTRIBUTES, **attributes})
    for value, name in zip(call.outputs, ("y", "mean_new", "var_new", "mean_2", "var_2"), strict=False):
        value.name, value.type, value.shape = name, ir.TensorType(kind), ir.Shape(shape if name == "y" else [3])
    graph = ir.Graph(inputs, call.outputs, nodes=[call], opset_imports={"": opset}, name="layer")
    model = ir.Model(graph, ir_version=8)
    assert attach(model) == 1
    model.meta["feeds"] = {
        "x": rng.normal([[2.0], [-1.0], [0.5]], [[3.0], [0.3], [1.0]], (*shape[:1], 3, int(np.prod(shape[2:]))))
        .reshape(shape)
        .astype(dtype),
        "weight": rng.normal(1.5, 0.5, 3).astype(dtype),
        "bias": rng.normal(-0.5, 0.5, 3).astype(dtype),
        "mean": rng.normal(0.5, 1.0, 3).astype(dtype),
        "var": rng.uniform(0.2, 2.0, 3).astype(dtype),
    }
    scalars = {"r_bound": BOUNDS[0], "d_bound": BOUNDS[1], **SHARES}
    model.meta["feeds"] |= {k: np.array(v, dtype) for k, v in scalars.items() if k in {i.name for i in inputs}}
    if outputs == 5:
        model.meta["feeds"] |= {
            "renorm_mean": rng.normal(-0.5, 1.0, 3).astype(dtype),
            "renorm_var": rng.uniform(1.0, 3.0, 3).astype(dtype),
        }
    return model


def run(model: ir.Model) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return ReferenceEvaluator(proto).run(None, model.meta["feeds"])


def algorithm_1(feeds: dict[str, np.ndarray], stat: str, *, two_sets: bool = False) -> list[np.ndarray]:
    """One step in float64, written from the paper; with two sets, r and d are measured from the second."""
    x, weight, bias = (feeds[k].astype(np.float64) for k in ("x", "weight", "bias"))
    names = [("mean", "var", "share"), *([("renorm_mean", "renorm_var", "renorm_share")] if two_sets else [])]
    sets = [(feeds[m].astype(np.float64), feeds[v].astype(np.float64), SHARES[s]) for m, v, s in names]
    eps, (r_max, d_max), (mean, var, _) = ATTRIBUTES["epsilon"], BOUNDS, sets[-1]
    rows = np.moveaxis(x, 1, 0).reshape(3, -1)
    count, batch_mean, batch_var = rows.shape[1], rows.mean(1), rows.var(1)
    sigma_b, sigma = np.sqrt(batch_var + eps), np.sqrt(var + eps)
    r = np.clip(sigma_b / sigma, 1 / r_max, r_max)
    d = np.clip((batch_mean - mean) / sigma, -d_max, d_max)

    def column(v: np.ndarray) -> np.ndarray:
        return v.reshape(1, 3, *[1] * (x.ndim - 2))

    def moved(mean: np.ndarray, var: np.ndarray, share: float) -> list[np.ndarray]:
        sigma = np.sqrt(var + eps)
        new_var = {
            "sigma": (sigma + share * (sigma_b - sigma)) ** 2 - eps,
            "var": var + share * (batch_var - var),
            "var_unbiased": var + share * (batch_var * count / (count - 1) - var),
        }[stat]
        return [mean + share * (batch_mean - mean), new_var]

    y = ((x - column(batch_mean)) / column(sigma_b) * column(r) + column(d)) * column(weight) + column(bias)
    return [y, *(value for one in sets for value in moved(*one))]


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("opset", [15, 20, 26])
def test_inference_is_the_affine_map_of_the_running_statistics(rank: int, opset: int) -> None:
    model = layer_model(INFERENCE, rank, opset)
    feeds = {k: v.astype(np.float64) for k, v in model.meta["feeds"].items()}

    def column(name: str) -> np.ndarray:
        return feeds[name].reshape(1, 3, *[1] * (rank - 2))

    want = (feeds["x"] - column("mean")) / np.sqrt(column("var") + 0.02) * column("weight") + column("bias")
    np.testing.assert_allclose(run(model)[0], want, rtol=1e-5, atol=1e-5)
    assert np.abs(want - (feeds["x"] - column("mean"))).max() > 0.1


@pytest.mark.parametrize("two_sets", [False, True])
@pytest.mark.parametrize("stat", TRAINING_NAMES)
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("opset", [18, 23])
def test_training_is_one_step_of_algorithm_1(two_sets: bool, stat: str, rank: int, opset: int) -> None:
    model = layer_model(training_name(stat, two_sets=two_sets), rank, opset, stat=stat)
    feeds = model.meta["feeds"]
    want = algorithm_1(feeds, stat, two_sets=two_sets)
    for got, expected in zip(run(model), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    others = [algorithm_1(feeds, s, two_sets=two_sets)[2] for s in TRAINING_NAMES if s != stat]
    assert all(np.abs(o - want[2]).max() > 1e-4 for o in others)  # the kinds differ, so a mix-up fails
    if two_sets:
        assert np.abs(algorithm_1(feeds, stat)[0] - want[0]).max() > 0.01  # so do the sets
        assert np.abs(want[1] - want[3]).max() > 0.01


@pytest.mark.parametrize("two_sets", [False, True])
@pytest.mark.parametrize("stat", TRAINING_NAMES)
def test_a_channel_that_is_not_finite_keeps_its_statistics(two_sets: bool, stat: str) -> None:
    model = layer_model(training_name(stat, two_sets=two_sets), 4, 18, stat=stat)
    feeds = model.meta["feeds"]
    (y, *want), x = run(model), feeds["x"]
    for number in (np.inf, -np.inf, np.nan, np.float32(1e30)):
        feeds["x"] = x.copy()
        feeds["x"][0, 1, 0, 0] = number
        with np.errstate(all="ignore"):
            y_got, *got = run(model)
        assert np.array_equal(y_got[:, [0, 2]], y[:, [0, 2]])
        old = [feeds[k] for k in ("mean", "var", "renorm_mean", "renorm_var") if k in feeds]
        for new, right, kept in zip(got, want, old, strict=True):
            assert np.array_equal(new[[0, 2]], right[[0, 2]])
            assert new[1] == pytest.approx(kept[1], rel=1e-6)
            assert right[1] != pytest.approx(kept[1], rel=1e-3)


def test_training_with_float16_inputs_computes_in_the_type_of_the_statistics() -> None:
    model = layer_model(TRAINING_NAMES["sigma"], 4, 20)
    feeds = model.meta["feeds"]
    feeds["x"] = (feeds["x"] + 300).astype(np.float16)  # squares of 300 overflow float16
    model.graph.inputs[0].dtype = model.graph.outputs[0].dtype = ir.DataType.FLOAT16
    y, mean, var = run(model)
    want = algorithm_1(feeds, "sigma")
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, want[0], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(mean, want[1], rtol=1e-5)
    np.testing.assert_allclose(var, want[2], rtol=1e-4)


def test_inlining_leaves_one_ordinary_node_and_no_trace_of_the_domain() -> None:
    model = layer_model(INFERENCE, 4, 20)
    want = run(model)
    assert inline(model, domain=DOMAIN) == 1
    assert [n.op_type for n in model.graph] == ["BatchNormalization"]
    assert model.graph.node(0).attributes["epsilon"].as_float() == pytest.approx(0.02)
    proto = ir.to_proto(model)
    assert DOMAIN.encode() not in proto.SerializeToString()
    np.testing.assert_array_equal(run(model)[0], want[0])


def test_a_prefix_put_before_the_name_does_not_hide_a_norm() -> None:
    proto = onnx.compose.add_prefix(ir.to_proto(layer_model(INFERENCE, 4, 20)), "a_")
    model = ir.from_proto(proto)
    assert [f.name for f in model.functions.values()] == ["a_" + INFERENCE]
    assert [is_inference(f) for f in model.functions.values()] == [True]
    assert len(list(calls_in(model))) == 1


def test_a_call_of_the_same_name_in_another_domain_is_not_ours() -> None:
    model = layer_model(INFERENCE, 4, 20)
    model.functions.clear()
    assert len(list(calls_in(model))) == 1
    model.graph.node(0).domain = "elsewhere"
    assert list(calls_in(model)) == []
    assert attach(model) == 0


@pytest.mark.parametrize("defined", [False, True])
def test_a_call_of_another_name_in_our_domain_is_no_norm(defined: bool) -> None:
    model = layer_model(INFERENCE, 4, 20)
    (function,) = model.functions.values()
    model.functions.clear()
    model.graph.node(0).op_type = function.name = "Other"
    if defined:
        function[0].op_type = "InstanceNormalization"
        model.functions[function.identifier()] = function
    assert list(calls_in(model)) == []
    assert attach(model) == 0


def test_only_a_norm_is_taken_for_one() -> None:
    assert not is_inference(training_function(20))
    assert is_training(training_function(20, stat="var"))
    assert is_training(training_function(20, two_sets=True))
    other = inference_function(20)
    other[0].attributes["training_mode"] = ir.AttrInt64("training_mode", 1)
    assert not is_inference(other)
    assert not is_training(inference_function(20))
    assert [len(list(calls_in(layer_model(kind, 4, 20)))) for kind in (INFERENCE, TRAINING_NAMES["var"])] == [1, 1]


@pytest.mark.parametrize(
    "change",
    [
        lambda function: function[0].replace_input_with(4, None),
        lambda function: function[0].resize_inputs(4),
        lambda function: function.outputs.append(function.inputs[0]),
        lambda function: function.outputs.__setitem__(0, function.inputs[0]),
    ],
)
def test_a_body_that_does_more_or_less_than_normalize_its_inputs_is_no_norm(change) -> None:
    function = inference_function(20)
    assert is_inference(function)
    change(function)
    assert not is_inference(function)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: inference_function(8), "opset 8 given"),
        (lambda: training_function(17), "needs opset 18 or newer"),
        (lambda: training_function(20, stat="mad"), r"stat='mad' given; expected one of \('sigma', 'var'"),
    ],
)
def test_impossible_functions_are_refused(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def merged_model() -> ir.Model:
    """Two layers and a convolution as torch's exporter leaves them: equal tensors are one initializer."""
    ones, zeros = ir.tensor(np.ones(3, np.float32)), ir.tensor(np.zeros(3, np.float32))
    weight = ir.Value(name="a.weight", const_value=ones, type=ir.TensorType(ones.dtype), shape=ir.Shape([3]))
    bias = ir.Value(name="a.bias", const_value=zeros, type=ir.TensorType(zeros.dtype), shape=ir.Shape([3]))
    x = ir.val("x", ir.DataType.FLOAT, ["n", 3, "h", "w"])
    kernel_data = ir.tensor(np.full((3, 3, 1, 1), 0.5, np.float32))
    kernel = ir.Value(
        name="conv.weight",
        const_value=kernel_data,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([3, 3, 1, 1]),
    )
    conv = ir.node("Conv", [x, kernel, bias], name="conv")
    nodes, value = [conv], conv.outputs[0]
    for module in ("a", "b", "a"):
        call = ir.node(
            INFERENCE, [value, weight, bias, bias, weight], domain=DOMAIN, attributes=DEFAULTS, name=f"n{len(nodes)}"
        )
        call.metadata_props[MODULE_KEY] = module
        nodes.append(call)
        value = call.outputs[0]
    for i, node in enumerate(nodes):
        node.outputs[0].name = f"v{i}"
        node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
    graph = ir.Graph(
        [x], [value], nodes=nodes, initializers=[weight, bias, kernel], opset_imports={"": 20}, name="merged"
    )
    model = ir.Model(graph, ir_version=10)
    model.meta["feeds"] = {"x": np.random.default_rng(0).normal(1, 2, (2, 3, 4, 4)).astype(np.float32)}
    attach(model)
    return model


def test_merged_parameters_become_each_layers_own_again() -> None:
    model = merged_model()
    want = run(merged_model())
    assert unshare(model) == 8  # two modules of four; the third call is a module used twice
    for call, module in zip(calls_in(model), "aba", strict=True):
        assert [v.name for v in call.inputs[1:]] == [
            f"{module}.{p}" for p in ("weight", "bias", "running_mean", "running_var")
        ]
        assert module_of(call) == module
    conv_bias = model.graph.node(0).inputs[2]
    assert conv_bias.name == "a.bias_shared"  # no longer the layer's: feeding a.bias must not change the convolution
    assert len(model.graph.initializers) == 10
    model.graph.initializers["b.running_mean"].const_value = ir.tensor(np.full(3, 0.25, np.float32))
    changed = run(model)
    assert np.abs(changed[0] - want[0]).max() > 0.1
    model.graph.initializers["b.running_mean"].const_value = ir.tensor(np.zeros(3, np.float32))
    np.testing.assert_array_equal(run(model)[0], want[0])


def test_unsharing_twice_changes_nothing_more() -> None:
    model = merged_model()
    unshare(model)
    names = sorted(model.graph.initializers)
    unshare(model)
    assert sorted(model.graph.initializers) == names


def test_calls_of_no_module_keep_their_parameters() -> None:
    model = merged_model()
    before = sorted(model.graph.initializers)
    for value in model.graph.initializers.values():
        value.name = value.name.replace(".", "_")
    names = sorted(model.graph.initializers)
    for call in calls_in(model):
        call.metadata_props.clear()
    assert unshare(model) == 0
    assert sorted(model.graph.initializers) == names != before


def test_a_model_with_functions_is_of_an_ir_version_that_has_them() -> None:
    model = layer_model(INFERENCE, 4, 20)
    for version, reached in ((7, 8), (10, 10)):
        model.ir_version = version
        attach(model)
        assert model.ir_version == reached


def test_a_model_that_is_not_of_onnx_ir_is_refused():
    with pytest.raises(InputError, match=r"attach: model is a ModelProto, expected an onnx_ir\.Model"):
        attach(onnx.ModelProto())

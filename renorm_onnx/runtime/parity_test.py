import functools
import json
import re

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import onnx.parser
import pytest

from renorm_onnx.errors import InputError, MachineError
from renorm_onnx.runtime import providers
from renorm_onnx.runtime.estimate import Cost
from renorm_onnx.runtime.parity import verify
from renorm_onnx.runtime.parity_networks_test import NETWORKS, build


def edit(model, name, change):
    for tensor in model.graph.initializer:
        if tensor.name == name:
            array = onh.to_array(tensor).copy()
            change(array)
            tensor.CopyFrom(onh.from_array(array, name))
            return model
    raise AssertionError(name)


def add_to_first(value):
    def change(array):
        array.reshape(-1)[0] += value

    return change


def eps_dropped(name):
    return build(name, fold=True, eps=0.0)


def gamma_and_beta_swapped(name):
    return build(name, fold=True, swapped=True)


def one_bias_moved(name):
    return edit(build(name, fold=True), "h_b", add_to_first(1e-4))


def one_channel_wrong(name):
    def change(array):
        axis = 0 if array.ndim == 3 or array.shape[1] == 3 else 1
        array[(slice(None),) * axis + (0,)] *= 1.01

    return edit(build(name, fold=True), "h_w", change)


def an_output_missing(name):
    model = build(name, fold=True)
    model.graph.output.pop()
    return model


def an_extra_output(name):
    model = build(name, fold=True)
    model.graph.output.append(oh.make_empty_tensor_value_info("h"))
    return model


def an_output_renamed(name):
    model = build(name, fold=True)
    old = model.graph.output[0].name
    model.graph.output[0].name = "other"
    for node in model.graph.node:
        node.output[:] = ["other" if output == old else output for output in node.output]
    return model


def an_output_of_another_type(name):
    model = an_output_renamed(name)
    declared = onnx.ValueInfoProto()
    declared.CopyFrom(build(name).graph.output[0])
    model.graph.node.append(oh.make_node("Cast", ["other"], [declared.name], to=onnx.TensorProto.DOUBLE))
    declared.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    model.graph.output[0].CopyFrom(declared)
    return model


def an_undeclared_output_of_another_type(name):
    model = an_output_of_another_type(name)
    model.graph.output[0].ClearField("type")
    return model


def nan_in_the_candidate(name):
    return edit(build(name, fold=True), "h_b", add_to_first(np.nan))


def infinity_in_the_candidate(name):
    return edit(build(name, fold=True), "h_b", add_to_first(np.inf))


WRONG = (
    eps_dropped,
    gamma_and_beta_swapped,
    one_bias_moved,
    one_channel_wrong,
    an_output_missing,
    an_extra_output,
    an_output_renamed,
    an_output_of_another_type,
    an_undeclared_output_of_another_type,
    nan_in_the_candidate,
    infinity_in_the_candidate,
)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("wrong", WRONG)
def test_every_wrong_candidate_is_refused_on_every_network(wrong, name):
    verdict = verify(build(name), wrong(name))
    assert verdict.outcome == "no", verdict
    assert verdict.reason
    json.dumps(verdict.to_dict(), allow_nan=False)
    assert "verdict: no" in str(verdict)


@pytest.mark.parametrize("operator", ["Relu", "Sigmoid"])
def test_outputs_that_never_change_hide_everything_and_are_not_a_yes(operator):
    def shifted(shift, gain):
        body = f"s = Constant<value_float={shift}>() g = Constant<value_float={gain}>() "
        return model_of("float[N,3] x", "float[N,3] y", f"{body} a = Add(x, s) b = Mul(a, g) y = {operator}(b)")

    verdict = verify(shifted(-1e9, 1.0), shifted(-2e9, 7.0))
    assert verdict.outcome == "unusable", verdict
    assert "'y' had one value on all ordinary inputs" in verdict.reason
    assert verify(shifted(0.5, 1.0), shifted(0.5, 1.0)).ok
    with_limit = verify(shifted(-1e9, 1.0), shifted(-1e9, 1.0), limit=Cost(1e12, 1e12, True), sites=True)
    assert with_limit.outcome == "skipped", "the places that were rewritten decide then"


def test_nothing_to_compare_is_not_a_yes():
    empty = model_of("float[0,3] x", "float[0,3] y", "y = Relu(x)")
    verdict = verify(empty, empty)
    assert verdict.outcome != "yes"
    assert "nothing was compared" in verdict.reason
    nan = model_of("float[N] x", "float[N] y", "z = Sub(x, x) y = Div(z, z)")
    verdict = verify(nan, nan)
    assert verdict.outcome != "yes"
    assert "nothing was compared" in verdict.reason
    silent = model_of("float[N] x", "float[N] y", "y = Relu(x)")
    del silent.graph.output[:]
    with pytest.raises(InputError, match="the reference has no outputs, so there is nothing to compare"):
        verify(silent, silent)


def model_of(inputs, outputs, body, opset=17):
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )


def test_a_reference_that_is_itself_wrong_in_float32_is_unusable_and_never_a_yes():
    """(x + 1e8) - 1e8 has no correct digit in float32."""
    body = "big = Constant<value_float=1e8>() a = Add(x, big) y = Sub(a, big)"
    model = model_of("float[N,8] x", "float[N,8] y", body)
    verdict = verify(model, model)
    assert verdict.outcome == "unusable"
    assert not verdict.ok
    assert "the unfused model itself is off by" in verdict.reason


def test_a_candidate_that_is_more_exact_than_the_reference_is_accepted():
    body = "big = Constant<value_float=3e2>() a = Add(x, big) y = Sub(a, big)"
    verdict = verify(
        model_of("float[N,8] x", "float[N,8] y", body), model_of("float[N,8] x", "float[N,8] y", "y = Identity(x)")
    )
    assert verdict.ok, verdict
    assert verdict.rows[0].fused == 0 < verdict.rows[0].unfused


def test_a_nan_that_the_reference_has_too_is_no_difference_and_one_that_it_lacks_is():
    root = model_of("float[N,8] x", "float[N,8] y", "y = Sqrt(x)")
    assert verify(root, root).ok
    hidden = model_of("float[N,8] x", "float[N,8] y", "a = Abs(x) y = Sqrt(a)")
    verdict = verify(root, hidden)
    assert verdict.outcome == "no"
    assert "not finite where they should be" in verdict.reason


def test_overflow_in_half_precision_is_no_difference():
    model = build("convnet", dtype=np.float16)
    verdict = verify(model, build("convnet", fold=True, dtype=np.float16))
    assert verdict.ok, verdict
    assert verdict.precision == "float16"


@pytest.mark.parametrize("wrong", [gamma_and_beta_swapped, nan_in_the_candidate])
@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_hides_no_gross_error(wrong, name, monkeypatch):
    half = functools.partial(build, dtype=np.float16)
    monkeypatch.setitem(globals(), "build", half)
    assert verify(half(name), wrong(name)).outcome == "no"


def test_integer_outputs_must_be_equal():
    plain = model_of("float[N,8] x", "int64[N] y", "y = ArgMax<axis=1, keepdims=0>(x)")
    other = model_of("float[N,8] x", "int64[N] y", "y = ArgMin<axis=1, keepdims=0>(x)")
    assert verify(plain, plain).ok
    verdict = verify(plain, other)
    assert verdict.outcome == "no"
    assert "of the elements equal neither the reference nor the unfused model" in verdict.reason


def test_sequences_are_compared_part_by_part():
    body = "half = Constant<value_ints=[4, 4]>() a = Mul(x, s) y = SplitToSequence<axis=1>(a, half)"
    right, wrong = (model_of("float[N,8] x", "seq(float[N,4]) y", body) for _ in range(2))
    for model, factor in ((right, 1.5), (wrong, 1.5001)):
        model.graph.initializer.append(onh.from_array(np.float32(factor), "s"))
    verdict = verify(right, right)
    assert verdict.ok, verdict
    assert {row.output for row in verdict.rows} == {"y[0]", "y[1]"}
    assert verify(right, wrong).outcome == "no"


def test_a_fault_at_one_size_alone_is_found():
    """Right for every batch but that of one."""
    right = model_of("float[N,8] x", "float[N,8] y", "y = Relu(x)")
    text = """s = Shape(x) zero = Constant<value_ints=[0]>() n = Gather<axis=0>(s, zero)
    one = Constant<value_ints=[1]>() is_one = Equal(n, one) f = Cast<to=1>(is_one) r = Relu(x) y = Add(r, f)"""
    verdict = verify(right, model_of("float[N,8] x", "float[N,8] y", text))
    assert verdict.outcome == "no"
    assert "N=1" in verdict.reason


def test_inputs_and_outputs_are_compared_before_any_value():
    two = model_of("float[N] a, float[N] b", "float[N] y", "y = Sub(a, b)")
    cases = {
        r"inputs are in another order: \['b', 'a'\]": model_of("float[N] b, float[N] a", "float[N] y", "y = Sub(a, b)"),
        r"inputs differ: missing \['b'\]": model_of("float[N] a", "float[N] y", "y = Sub(a, a)"),
        "input 'a' has type DOUBLE, expected FLOAT": model_of(
            "double[N] a, float[N] b", "float[N] y", "c = Cast<to=1>(a) y = Sub(c, b)"
        ),
        r"input 'a' has declared shape \('1', 'N'\), expected \('N',\)": model_of(
            "float[1,N] a, float[N] b",
            "float[N] y",
            "c = Flatten<axis=0>(a) d = Sub(c, b) n = Shape(b) y = Reshape(d, n)",
        ),
    }
    for message, candidate in cases.items():
        verdict = verify(two, candidate)
        assert verdict.outcome == "no"
        assert re.search(message, verdict.reason), verdict.reason


def test_an_input_that_a_caller_may_override_must_stay():
    reference = model_of("float[N,2] x", "float[N,2] y", "y = Mul(x, w)")
    reference.graph.initializer.append(onh.from_array(np.float32([2, 3]), "w"))
    constant = onnx.ModelProto()
    constant.CopyFrom(reference)
    reference.graph.input.append(oh.make_tensor_value_info("w", 1, [2]))
    assert verify(reference, reference).ok
    verdict = verify(reference, constant)
    assert "inputs that a caller may override are missing: ['w']" in verdict.reason


def test_given_data_decide_like_ordinary_inputs(tmp_path):
    x = np.random.default_rng(3).normal(size=(16, 17)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    for inputs in ({"x": x}, tmp_path / "x.npz", str(tmp_path), [{"x": x}, {"x": x[:3]}]):
        assert verify(build("mlp"), build("mlp", fold=True), inputs=inputs).ok
        assert verify(build("mlp"), one_bias_moved("mlp"), inputs=inputs).outcome == "no"
    with pytest.raises(InputError, match="'x' has shape"):
        verify(build("mlp"), build("mlp", fold=True), inputs={"x": x[:, :5]})


def test_the_number_of_generated_inputs_can_be_chosen_and_not_be_zero():
    verdict = verify(build("mlp"), build("mlp", fold=True), inputs=2)
    assert {row.inputs.partition(",")[0] for row in verdict.rows if row.optimize == "off"} == {
        "normal",
        "image",
        "ordinary",
    }
    with pytest.raises(InputError, match="inputs=0, expected 1 to 10000 sets"):
        verify(build("mlp"), build("mlp", fold=True), inputs=0)
    with pytest.raises(InputError, match="providers='cuda' given, expected a sequence"):
        verify(build("mlp"), providers="cuda")
    with pytest.raises(InputError, match="providers is empty"):
        verify(build("mlp"), build("mlp", fold=True), providers=())


def test_a_torch_module_can_be_the_reference():
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(9, 4)

        def forward(self, x):
            return torch.relu(self.linear(x)), x.sum(1)

    torch.manual_seed(0)
    net = Net().eval()
    model = model_of(
        "float[N,9] x",
        "float[N,4] y, float[N] s",
        "a = Gemm<transB=1>(x, w, b) y = Relu(a) s = ReduceSum<keepdims=0>(x, axis)",
    )
    weights = {"w": net.linear.weight.detach().numpy(), "b": net.linear.bias.detach().numpy(), "axis": np.array([1])}
    model.graph.initializer.extend(onh.from_array(array, name) for name, array in weights.items())
    assert verify(net, model).ok
    assert next(net.parameters()).dtype == torch.float32
    assert verify(net, edit(model, "b", add_to_first(1e-4))).outcome == "no"
    with pytest.raises(InputError, match=r"in training mode; call \.eval\(\) first"):
        verify(net.train(), model)
    with pytest.raises(InputError, match="needs a candidate"):
        verify(net.eval())
    model.graph.output.pop()
    with pytest.raises(InputError, match="returns 2 tensors, the model 1"):
        verify(net.eval(), model)


def test_without_a_candidate_the_reference_is_fused_and_every_place_checked():
    verdict = verify(build("convnet"))
    assert verdict.ok, verdict
    assert len(verdict.fusion.folded) == 1
    assert len(verdict.sites.sites) == 1
    assert verdict.to_dict()["fusion"]["norms_after"] == 0


def test_layers_name_the_first_value_that_diverges():
    verdict = verify(build("convnet"), one_bias_moved("convnet"), layers=True)
    (layers,) = verdict.layers
    assert layers.first == "h"
    assert "the first that diverges is 'h'" in str(verdict)
    assert verdict.to_dict()["layers"][0]["first_divergent"] == "h"
    (layers,) = verify(build("convnet"), build("convnet", fold=True), layers=True).layers
    assert layers.ok
    assert {row.output for row in layers.rows} == {"h", "r", "p", "f", "y"}
    assert layers.uncommon == 1


def test_models_over_the_limit_are_not_run_but_still_checked_place_by_place():
    small = Cost(1.0, 1.0, complete=True)
    verdict = verify(build("convnet"), build("convnet", fold=True), limit=small, sites=True)
    assert verdict.outcome == "skipped"
    assert not verdict.ok
    assert "one run takes" in verdict.skipped[0]
    assert verdict.sites.ok
    assert str(verdict).count("one run takes") == 1
    verdict = verify(build("convnet"), one_bias_moved("convnet"), limit=small, sites=True)
    assert verdict.outcome == "no"


def test_with_a_limit_what_cannot_be_run_is_skipped_and_without_one_an_error(monkeypatch):
    unknown = model_of("float[N] x", "float[N] y", "y = custom.Thing(x)")
    unknown.opset_import.append(oh.make_opsetid("custom", 1))
    limit = Cost(5e9, 5e8, complete=True)
    with pytest.raises(MachineError, match="is not a registered function"):
        verify(unknown, unknown)
    assert verify(unknown, unknown, limit=limit).outcome == "skipped"

    def absent():
        raise MachineError("onnxruntime cannot be imported")

    monkeypatch.setattr("renorm_onnx.runtime.parity.onnxruntime", absent)
    assert verify(build("mlp"), build("mlp", fold=True), limit=limit).outcome == "skipped"
    with pytest.raises(MachineError, match="cannot be imported"):
        verify(build("mlp"), build("mlp", fold=True))
    with pytest.raises(MachineError):
        verify(build("mlp"), build("mlp", fold=True), limit=limit, providers=("cuda",))


def test_a_provider_that_is_not_there_is_never_replaced_by_another(monkeypatch):
    broken = providers.ProviderStatus("cuda", False, "driver missing", "libcuda.so.1", "Install one")
    real = providers.provider_status
    monkeypatch.setattr(providers, "provider_status", lambda name: broken if name == "cuda" else real(name))
    with pytest.raises(MachineError, match="driver missing"):
        verify(build("mlp"), build("mlp", fold=True), providers=("cpu", "cuda"))


def test_a_candidate_that_onnxruntime_refuses_is_a_no():
    broken = model_of("float[N,8] x", "float[N,8] y", "y = Relu(x)")
    broken.graph.node[0].op_type = "Reluu"
    verdict = verify(model_of("float[N,8] x", "float[N,8] y", "y = Relu(x)"), broken)
    assert verdict.outcome == "no"
    assert "cannot be run where the reference can" in verdict.reason


def test_a_candidate_that_fails_on_some_size_is_a_no():
    fixed = model_of("float[N,8] x", "float[N,8] y", "s = Constant<value_ints=[32, 8]>() y = Reshape(x, s)")
    verdict = verify(model_of("float[N,8] x", "float[N,8] y", "y = Relu(x)"), fixed)
    assert verdict.outcome == "no"
    verdict = verify(model_of("float[N,8] x", "float[N,8] y", "y = Identity(x)"), fixed)
    assert verdict.outcome == "no"
    assert "the candidate fails" in verdict.reason


def test_the_verdict_is_readable_and_says_what_was_compared():
    text = str(verify(build("two_inputs_two_outputs"), build("two_inputs_two_outputs", fold=True)))
    for part in (
        "verdict: yes.",
        "'features'",
        "ordinary, pooled",
        "reference ",
        "two fresh sessions agree bit for bit",
    ):
        assert part in text
    assert text.isascii()

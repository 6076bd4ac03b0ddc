import json

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import pytest

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

"""Small networks with a norm, each beside its version folded by hand: what the tests of the verdict are made of."""

from dataclasses import dataclass

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import pytest

from renorm_onnx.fusion.engine import fuse
from renorm_onnx.runtime.judging.verdict import POOLED
from renorm_onnx.runtime.parity import verify

EPS = float(np.float32(1e-3))


@dataclass(frozen=True)
class Norm:
    gamma: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    var: np.ndarray

    def affine(self, eps=EPS, swapped=False):
        gamma, beta = (self.beta, self.gamma) if swapped else (self.gamma, self.beta)
        scale = gamma.astype(np.float64) / np.sqrt(self.var.astype(np.float64) + eps)
        return scale, beta - self.mean * scale


def make_norm(channels, seed=0):
    rng = np.random.default_rng(seed)
    return Norm(
        rng.uniform(0.5, 1.5, channels).astype(np.float32),
        rng.uniform(0.2, 0.8, channels).astype(np.float32),
        rng.normal(0.3, 0.3, channels).astype(np.float32),
        rng.uniform(0.2, 2.0, channels).astype(np.float32),
    )


class Builder:
    """A network written once; `fold` decides whether its norm is a node or lies in the weights before it."""

    def __init__(self, fold, eps, swapped, dtype):
        self.fold, self.eps, self.swapped, self.dtype = fold, eps, swapped, dtype
        self.nodes, self.weights = [], {}

    def add(self, op, inputs, output, **attributes):
        self.nodes.append(oh.make_node(op, inputs, [output], output + "_node", **attributes))
        return output

    def weight(self, name, array):
        self.weights[name] = np.asarray(array).astype(self.dtype)
        return name

    def normed(self, op, x, weight, bias, norm, output, channel_axis=0, form="bn", **attributes):
        """Linear operator, then norm: folded into the operator, or as a node or chain behind it."""
        if self.fold:
            scale, shift = norm.affine(self.eps, self.swapped)
            shape = [1] * weight.ndim
            shape[channel_axis] = -1
            self.weight(output + "_w", weight.astype(np.float64) * scale.reshape(shape))
            self.weight(output + "_b", bias.astype(np.float64) * scale + shift)
            return self.add(op, [x, output + "_w", output + "_b"], output, **attributes)
        self.weight(output + "_w", weight)
        self.weight(output + "_b", bias)
        self.add(op, [x, output + "_w", output + "_b"], output + "_raw", **attributes)
        if form == "bn":
            names = [self.weight(f"{output}_{k}", getattr(norm, k)) for k in ("gamma", "beta", "mean", "var")]
            return self.add("BatchNormalization", [output + "_raw", *names], output, epsilon=1e-3)
        shape = (-1, *[1] * (weight.ndim - 2))
        sigma = np.sqrt(norm.var.astype(np.float64) + EPS)
        parts = {"mean": norm.mean, "sigma": sigma, "gamma": norm.gamma, "beta": norm.beta}
        previous = output + "_raw"
        for (name, value), step in zip(parts.items(), ("Sub", "Div", "Mul", "Add"), strict=True):
            target = output if step == "Add" else f"{output}_{step}"
            self.add(step, [previous, self.weight(f"{output}_{name}", value.reshape(shape))], target)
            previous = target
        return output

    def model(self, inputs, outputs, opset=17):
        graph = oh.make_graph(
            self.nodes,
            "network",
            inputs,
            outputs,
            [onh.from_array(array, name) for name, array in self.weights.items()],
        )
        built = oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=8)
        onnx.checker.check_model(built, full_check=True)
        return built


def info(name, shape, dtype=np.float32):
    return oh.make_tensor_value_info(name, oh.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def mlp(b, rng):
    b.normed("Gemm", "x", rng.normal(size=(17, 32)), rng.normal(size=32), make_norm(32), "h", channel_axis=1)
    b.add("Relu", ["h"], "r")
    b.add("Gemm", ["r", b.weight("w2", rng.normal(size=(32, 6))), b.weight("b2", rng.normal(size=6))], "y")
    return b.model([info("x", ["N", 17], b.dtype)], [info("y", ["N", 6], b.dtype)])


def convnet(b, rng):
    weight = rng.normal(size=(8, 3, 3, 3)) * 0.2
    b.normed("Conv", "x", weight, rng.normal(size=8), make_norm(8), "h", pads=[1] * 4, strides=[2, 2])
    b.add("Relu", ["h"], "r")
    b.add("GlobalAveragePool", ["r"], "p")
    b.add("Flatten", ["p"], "f")
    b.add("Gemm", ["f", b.weight("w2", rng.normal(size=(8, 5))), b.weight("b2", rng.normal(size=5))], "y")
    return b.model([info("x", ["N", 3, "H", "W"], b.dtype)], [info("y", ["N", 5], b.dtype)])


def residual_chain(b, rng):
    weight = rng.normal(size=(4, 4, 3)) * 0.3
    b.normed("Conv", "x", weight, rng.normal(size=4), make_norm(4), "h", form="chain", pads=[1, 1])
    b.add("Add", ["h", "x"], "s")
    b.add("Tanh", ["s"], "y")
    return b.model([info("x", [2, 4, "T"], b.dtype)], [info("y", [2, 4, "T"], b.dtype)])


def upsampler(b, rng):
    weight = rng.normal(size=(3, 6, 2, 2)) * 0.5
    b.normed("ConvTranspose", "x", weight, rng.normal(size=6), make_norm(6), "h", channel_axis=1, strides=[2, 2])
    b.add("LeakyRelu", ["h"], "y", alpha=0.1)
    return b.model([info("x", [1, 3, 8, 8], b.dtype)], [info("y", [1, 6, 16, 16], b.dtype)])


def scalar_output(b, rng):
    b.normed("Gemm", "x", rng.normal(size=(9, 16)), rng.normal(size=16), make_norm(16), "h", channel_axis=1)
    b.add("Sigmoid", ["h"], "r")
    b.add("Gemm", ["r", b.weight("w2", rng.normal(size=(16, 1))), b.weight("b2", rng.normal(size=1))], "y")
    return b.model([info("x", [1, 9], b.dtype)], [info("y", [1, 1], b.dtype)])


def two_inputs_two_outputs(b, rng):
    b.add("Gather", [b.weight("table", rng.normal(size=(11, 12))), "token"], "e")
    b.add("Add", ["e", "x"], "s")
    b.normed("Gemm", "s", rng.normal(size=(12, 10)), rng.normal(size=10), make_norm(10), "h", channel_axis=1)
    b.add("Relu", ["h"], "features")
    b.add("ArgMax", ["h"], "label", axis=1, keepdims=0)
    outputs = [info("features", ["N", 10], b.dtype), info("label", ["N"], np.int64)]
    return b.model([info("token", ["N"], np.int64), info("x", ["N", 12], b.dtype)], outputs)


def classifier(labels):
    """The name of the largest of five scores, and the scores."""
    rng, b = np.random.default_rng(7), Builder(False, EPS, False, np.float32)
    b.normed("Gemm", "x", rng.normal(size=(12, 5)), rng.normal(size=5), make_norm(5), "h", channel_axis=1)
    b.add("ArgMax", ["h"], "best", axis=1, keepdims=0)
    b.weights["labels"] = np.array(labels, object)
    b.add("Gather", ["labels", "best"], "label")
    text = oh.make_tensor_value_info("label", onnx.TensorProto.STRING, ["N"])
    return b.model([info("x", ["N", 12])], [info("h", ["N", 5]), text])


NETWORKS = {f.__name__: f for f in (mlp, convnet, residual_chain, upsampler, scalar_output, two_inputs_two_outputs)}


def build(name, *, fold=False, eps=EPS, swapped=False, dtype=np.float32):
    return NETWORKS[name](Builder(fold, eps, swapped, dtype), np.random.default_rng(7))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_correct_fold_is_accepted(name):
    verdict = verify(build(name), build(name, fold=True))
    assert verdict.ok, verdict
    assert all(row.elements >= 64 for row in verdict.rows if row.inputs == POOLED and row.output != "label")
    assert any(row.note == "" and row.optimize == "all" for row in verdict.rows)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_a_correct_fold_is_accepted_for_other_seeds_too(name, seed):
    verdict = verify(build(name), build(name, fold=True), seed=100 + seed)
    assert verdict.ok, verdict


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_equals_itself(name):
    assert verify(build(name), build(name)).ok


def test_names_of_classes_are_compared_as_text():
    model = classifier(["cat", "dog", "b\xe4r", "", "a longer name"])
    candidate, report = fuse(model)
    assert len(report.folded) == 1
    assert (verdict := verify(model, candidate)).ok, verdict
    renamed = next(t for t in candidate.graph.initializer if t.name == "labels")
    renamed.string_data[1] = b"hound"
    verdict = verify(model, candidate, sites=False)
    assert verdict.outcome == "no"
    assert "label" in verdict.reason
    assert "hound" in str(verdict)


@pytest.mark.parametrize("seed", [2, 3])
def test_long_sums_in_float64_are_granted_what_another_order_changes(seed):
    """Where the input is nearly constant the fold sums up into the bias what the original sums up at run time."""
    rng = np.random.default_rng(seed)
    b = Builder(False, 1e-5, False, np.float64)
    b.weight("w", rng.standard_normal((2048, 64)).astype(np.float32))
    for name, channels in (("y", 64), ("a", 2048)):
        gamma, beta, mean, var = rng.standard_normal((4, channels)).astype(np.float32).astype(np.float64)
        for key, value in {"gamma": gamma, "beta": beta, "mean": mean * 0.3, "var": np.abs(var) + 0.1}.items():
            b.weight(f"{name}_{key}", value)
    b.add("BatchNormalization", ["x", "a_gamma", "a_beta", "a_mean", "a_var"], "a")
    b.add("MatMul", ["a", "w"], "m")
    b.add("BatchNormalization", ["m", "y_gamma", "y_beta", "y_mean", "y_var"], "y")
    model = b.model([info("x", ["N", 2048], b.dtype)], [info("y", ["N", 64], b.dtype)])
    verdict = verify(model)
    assert verdict.ok, verdict
    assert len(verdict.fusion.folded) == 2
    candidate, _ = fuse(model)
    weight = next(t for t in candidate.graph.initializer if len(t.dims) == 2)
    weight.CopyFrom(onh.from_array(onh.to_array(weight) * (1 + 1e-12), weight.name))
    assert verify(model, candidate, sites=False).outcome == "no"


@pytest.mark.parametrize("seed", [2, 10, 15])
def test_a_pool_of_equal_numbers_is_granted_what_its_digits_cost(seed):
    """A fold changes the number that a pool sums 3136 times where the image is flat, and with it the rounding error."""
    rng = np.random.default_rng(seed)
    b = Builder(False, EPS, False, np.float32)
    b.normed("Conv", "x", rng.normal(size=(4, 3, 1, 1)), rng.normal(size=4), make_norm(4, seed), "c")
    b.add("GlobalAveragePool", ["c"], "p")
    b.add("Flatten", ["p"], "f")
    norm = make_norm(4, seed + 100)
    names = [b.weight(f"n_{k}", getattr(norm, k)) for k in ("gamma", "beta", "mean", "var")]
    b.add("BatchNormalization", ["f", *names], "n", epsilon=1e-3)
    b.add("Gemm", ["n", b.weight("w", rng.normal(size=(4, 3))), b.weight("bias", rng.normal(size=3))], "y")
    model = b.model([info("x", ["N", 3, 56, 56])], [info("y", ["N", 3])])
    candidate, report = fuse(model)
    assert len(report.folded) == 2
    assert (verdict := verify(model, candidate)).ok, verdict
    weight = next(t for t in candidate.graph.initializer if list(t.dims) == [4, 3])
    weight.CopyFrom(onh.from_array(onh.to_array(weight) * np.float32(1 + 1e-5), weight.name))
    assert verify(model, candidate, sites=False).outcome == "no"

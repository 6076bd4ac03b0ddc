"""Networks that amplify rounding: a correct fold is accepted there, and a wrong one is refused all the same."""

import gc
import tracemalloc

import ml_dtypes
import numpy as np
import onnx.numpy_helper as onh
import onnx_ir as ir
import pytest
import torch

from renorm_onnx.runtime.judging.neighbours import neighbour
from renorm_onnx.runtime.judging.pair import Pair
from renorm_onnx.runtime.parity import verify
from renorm_onnx.runtime.parity_networks_test import EPS, Builder, info, make_norm
from renorm_onnx.runtime.parity_test import edit

DEPTH, WIDTH = 14, 24


def deep(*, fold=False, eps=EPS, swapped=False):
    """A deep network in float16, which the CPU computes in float32: folding rounds weights that U never rounds."""
    b, rng, previous = Builder(fold, eps, swapped, np.float16), np.random.default_rng(3), "x"
    for depth in range(DEPTH):
        weight = rng.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH)
        name = "h" if depth == DEPTH - 1 else f"h{depth}"
        b.normed("Gemm", previous, weight, rng.normal(size=WIDTH), make_norm(WIDTH, depth), name, channel_axis=1)
        previous = b.add("Relu", [name], f"r{depth}")
    b.add("Gemm", [previous, b.weight("w2", rng.normal(size=(WIDTH, 4)))], "y")
    return b.model([info("x", ["N", WIDTH], np.float16)], [info("y", ["N", 4], np.float16)])


@pytest.mark.parametrize("seed", range(3))
def test_a_correct_fold_is_accepted_where_one_run_says_too_little_of_rounding(seed):
    verdict = verify(deep(), deep(fold=True), seed=seed)
    assert verdict.ok, verdict
    assert "the limits are those of 16 neighbours" in verdict.remarks[0]
    assert f"note: {verdict.remarks[0]}" in str(verdict)
    assert verdict.to_dict()["remarks"] == list(verdict.remarks)


def bias_moved(model, layer):
    def change(array):
        array[array.size // 2] += np.asarray(0.05, array.dtype)

    return edit(model, f"{layer}_b", change)


def channel_wrong(model, layer):
    def change(array):
        array[:, 0] *= np.asarray(1.05, array.dtype)

    return edit(model, f"{layer}_w", change)


@pytest.mark.parametrize("layer", ["h0", "h6", "h"])
@pytest.mark.parametrize("wrong", [bias_moved, channel_wrong])
def test_a_wrong_weight_does_not_hide_behind_bad_conditioning(wrong, layer):
    """float16: the smallest fault that a place shows is larger than in float32."""
    verdict = verify(deep(), wrong(deep(fold=True), layer))
    assert verdict.outcome == "no", verdict


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"swapped": True}])
def test_a_wrong_rule_does_not_hide_behind_bad_conditioning(options):
    assert verify(deep(), deep(fold=True, **options)).outcome == "no"


def test_neighbours_are_not_drawn_for_a_candidate_that_means_something_else():
    assert not verify(deep(), bias_moved(deep(fold=True), "h6")).remarks


def test_an_original_that_only_its_neighbours_show_to_be_badly_conditioned_is_unusable():
    """x * (2**17 + 1) - x * 2**17: exact for small integers, off by a percent where weights round otherwise."""
    large = np.full(240, 2.0**17, np.float32)
    moved = np.where(np.arange(240) % 12 == 0, np.nextafter(large + 1, np.float32(np.inf)), large + 1)

    def cancelling(weight):
        b = Builder(False, EPS, False, np.float32)
        b.add("Mul", ["x", b.weight("a", weight)], "p")
        b.add("Mul", ["x", b.weight("b", -large)], "n")
        b.add("Add", ["p", "n"], "y")
        return b.model([info("x", ["N", 240])], [info("y", ["N", 240])])

    x = np.random.default_rng(0).integers(-7, 8, (8, 240)).astype(np.float32)
    verdict = verify(cancelling(large + 1), cancelling(moved), inputs={"x": x})
    assert verdict.outcome == "unusable", verdict
    assert "the unfused model with its weights rounded otherwise is off by" in verdict.reason


def test_a_neighbour_is_as_far_as_rounding_to_nearest_and_no_further():
    weights = np.random.default_rng(0).normal(size=(200, 200)).astype(np.float32)
    b = Builder(False, EPS, False, np.float32)
    b.add("MatMul", ["x", b.weight("w", weights)], "y")
    model = ir.from_proto(b.model([info("x", ["N", 200])], [info("y", ["N", 200])]))
    other = neighbour(model, 1).graph.initializers["w"].const_value.numpy()
    ulps = (other.astype(np.float64) - weights) / np.spacing(np.abs(weights))
    assert np.abs(ulps).max() == pytest.approx(1, rel=0.5)
    assert np.sqrt(np.mean(ulps**2)) == pytest.approx(np.sqrt(1 / 12), rel=0.05)
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), weights)
    again = neighbour(model, 1).graph.initializers["w"].const_value.numpy()
    assert np.array_equal(other, again)
    assert not np.array_equal(other, neighbour(model, 2).graph.initializers["w"].const_value.numpy())


def test_what_is_no_weight_is_left_alone():
    b = Builder(False, EPS, False, np.float32)
    scales = np.array([1, 1, 2, 2, 2], np.float32)
    b.add("Resize", ["x", "", b.weight("scales", scales)], "y")
    model = ir.from_proto(b.model([info("x", [1, 1, 4, 4, 4])], [info("y", [1, 1, 8, 8, 8])]))
    for seed in range(10):
        assert np.array_equal(neighbour(model, seed).graph.initializers["scales"].const_value.numpy(), scales)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_floating_type_has_neighbours(dtype):
    b = Builder(False, EPS, False, np.float32)
    b.add("Mul", ["x", b.weight("w", np.ones(300))], "y")
    proto = b.model([info("x", ["N", 300])], [info("y", ["N", 300])])
    proto.graph.initializer[0].CopyFrom(onh.from_array(np.ones(300, dtype), "w"))
    other = neighbour(ir.from_proto(proto), 0).graph.initializers["w"].const_value.numpy()
    moved = other[other != 1].astype(np.float64)
    assert 0 < moved.size < 100
    assert len(set(moved)) == 2


def test_a_torch_module_has_neighbours_too():
    from renorm_onnx.runtime.judging.torch_reference import TorchReference

    module = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.BatchNorm1d(30)).eval()
    reference = TorchReference(module, ["x"], ["y"])
    x = {"x": np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32)}
    want, own = reference.evaluate(x)["y"], reference.run(x)["y"]
    other = reference.neighbour(0)
    assert np.array_equal(other.evaluate(x)["y"], want)
    assert 0 < np.abs(other.run(x)["y"] - own).max() < 1e-5
    assert np.array_equal(reference.run(x)["y"], own)


def test_neighbours_leave_no_weights_behind_where_nobody_looks_for_garbage():
    weights = np.random.default_rng(0).normal(size=(300, 300))
    b = Builder(False, EPS, False, np.float32)
    b.add("MatMul", ["x", b.weight("w", weights)], "y")
    model = b.model([info("x", ["N", 300])], [info("y", ["N", 300])])
    pair = Pair(model, model, allow_symlinks=False)
    pair.neighbour(0, "cpu")
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for seed in range(8):
            pair.neighbour(seed, "cpu")
        assert tracemalloc.get_traced_memory()[0] < 4 * weights.size
    finally:
        tracemalloc.stop()
        gc.enable()


def test_a_neighbour_of_the_largest_number_is_finite():
    b = Builder(False, EPS, False, np.float32)
    b.add("Add", ["x", b.weight("mask", np.full(600, np.finfo(np.float32).min, np.float32))], "y")
    model = ir.from_proto(b.model([info("x", ["N", 600])], [info("y", ["N", 600])]))
    mask = neighbour(model, 0).graph.initializers["mask"].const_value.numpy()
    assert np.isfinite(mask).all()
    assert (mask > np.finfo(np.float32).min).any()

"""What belongs to a rewritten place, which numbers it is fed, and which places are left to the check end to end."""

import json

import numpy as np
import onnx.helper as oh
import onnx.numpy_helper as onh
import pytest

from renorm_onnx.fusion.engine import fuse
from renorm_onnx.runtime.judging.sites import check_sites
from renorm_onnx.runtime.judging.sites_test import load, normed_image, onnx_parse
from renorm_onnx.runtime.parity_networks_test import build
from renorm_onnx.runtime.parity_test import add_to_first, edit


def place(body, weights=(), shape="2,4"):
    """A model of one input and one output; what it holds lies in initializers."""
    model = onnx_parse(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[{shape}] x) => (float[{shape}] y) {{ {body} }}'
    )
    model.graph.initializer.extend(onh.from_array(np.asarray(array), name) for name, array in dict(weights).items())
    return load(model)


def test_initializers_that_an_old_file_lists_among_its_inputs_are_weights():
    def old(model):
        model.ir_version = 3
        for tensor in model.graph.initializer:
            model.graph.input.append(oh.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        return load(model)

    report = check_sites(old(build("mlp")), old(build("mlp", fold=True)))
    assert report.complete, report
    assert [site.name for site in report.sites] == ["h"]
    moved = old(edit(build("mlp", fold=True), "h_b", add_to_first(1e-4)))
    assert [site.name for site in check_sites(old(build("mlp")), moved).wrong] == ["h"]


def test_a_place_in_an_image_too_large_to_be_run_is_checked_on_crops():
    model = normed_image(2048)
    fused, _ = fuse(model)
    report = check_sites(load(model), load(fused))
    assert report.complete, report
    assert 0 < report.sites[0].elements <= 16 * 20 * 20


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)", "QuantizeLinear rounds on purpose"),
        ("c = Constant<value = bool {1}>() y = If(c) <then_branch = t () => (float[2,4] a) { a = Abs(x) }, "
         "else_branch = e () => (float[2,4] b) { b = Neg(x) }>", "If holds a subgraph"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("swapped", [False, True])
def test_what_either_model_computes_there_may_keep_a_place_from_being_checked(body, reason, swapped):
    models = [place("y = Abs(x)"), place(body, {"s": np.float32(0.1)})]
    report = check_sites(*reversed(models)) if swapped else check_sites(*models)
    assert report.sites == []
    assert report.unchecked["y"].startswith(reason)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_weights_so_small_that_they_lose_digits_are_no_fault(kind):
    """Folded, they are rounded to a multiple of the smallest number of their type."""
    scale = np.sqrt(float(np.finfo(kind).smallest_subnormal)) / 3
    weight = np.random.default_rng(0).uniform(0.5, 2.0, (4, 4)) * scale * 40
    weights = {"w": weight.astype(kind), "s": np.asarray(scale, kind)}
    weights["f"] = (weights["w"].astype(np.float64) * float(weights["s"])).astype(kind)
    before, after = "a = MatMul(x, w) y = Mul(a, s)", "y = MatMul(x, f)"
    report = check_sites(place(before, weights), place(after, weights))
    assert report.complete, report
    assert report.sites[0].used > 0
    doubled = {**weights, "f": weights["f"] * kind(2)}
    assert not check_sites(place(before, weights), place(after, doubled)).ok


def test_the_answer_in_json_holds_numbers_and_words_for_what_is_none():
    weights = {"s": np.float32(1.5), "t": np.float32(1.5001), "n": np.float32(np.nan)}
    right = place("y = Mul(x, s)", weights)
    answer = check_sites(right, place("y = Mul(x, t)", weights)).to_dict()
    (site,) = json.loads(json.dumps(answer, allow_nan=False))["sites"]
    assert site["share_of_bound"] > 1
    assert site["candidate"] / site["reference"] == pytest.approx(1.5001 / 1.5, rel=1e-6)
    (site,) = check_sites(right, place("y = Mul(x, n)", weights)).to_dict()["sites"]
    assert (site["candidate"], site["share_of_bound"]) == ("nan", "inf")

import json

import numpy as np
import onnx.helper as oh
import onnx.numpy_helper as onh
import onnx_ir as ir
import pytest

from renorm_onnx.fusion.engine import fuse
from renorm_onnx.runtime.judging.cuts import GraphByNames
from renorm_onnx.runtime.judging.sites import check_sites
from renorm_onnx.runtime.parity import verify
from renorm_onnx.runtime.parity_networks_test import EPS, NETWORKS, Builder, Norm, build, info, make_norm
from renorm_onnx.runtime.parity_test import edit


def load(model):
    return ir.from_proto(model)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_each_folded_place_stays_under_the_bound_of_rounding_its_weights(name, dtype):
    report = check_sites(load(build(name, dtype=dtype)), load(build(name, fold=True, dtype=dtype)))
    assert report.ok, report
    assert [site.name for site in report.sites] == ["h"]
    (site,) = report.sites
    assert 0 < site.used < 1
    assert site.elements > 0
    assert "rewritten places checked one by one" in str(report)


DEEP = {"Conv": ["N", 256, 3, 3], "Gemm": ["N", 2048]}


def deep(op, *, fold, form="bn", offset=0.0, seed=0):
    """A linear operator that sums up many products in float64, with its norm; `offset` is taken off by the norm."""
    b = Builder(fold, EPS, False, np.float64)
    rng = np.random.default_rng(seed)
    norm, bias = make_norm(64, seed), rng.normal(size=64) + offset
    norm = Norm(norm.gamma, norm.beta, norm.mean.astype(np.float64) + offset, norm.var)
    weight = rng.normal(size=(64, 256, 1, 1) if op == "Conv" else (2048, 64))
    b.normed(op, "x", weight, bias, norm, "y", channel_axis=0 if op == "Conv" else 1, form=form)
    shape = ["N", 64, 3, 3] if op == "Conv" else ["N", 64]
    return b.model([info("x", DEEP[op], np.float64)], [info("y", shape, np.float64)])


@pytest.mark.parametrize("form", ["bn", "chain"])
@pytest.mark.parametrize("offset", [0.0, 1e8])
@pytest.mark.parametrize("op", DEEP)
def test_a_fold_of_float64_weights_stays_under_the_bound_of_summing_in_float64_too(op, offset, form):
    for seed in range(6):
        wanted = deep(op, fold=False, form=form, offset=offset, seed=seed)
        report = check_sites(load(wanted), load(deep(op, fold=True, offset=offset, seed=seed)), seed=seed)
        assert report.complete, report
        assert 0 < report.sites[0].used < 1


@pytest.mark.parametrize("op", DEEP)
@pytest.mark.parametrize("weight", ["y_w", "y_b"])
def test_a_float64_weight_off_in_the_ninth_digit_is_found(op, weight):
    def change(array):
        array.reshape(-1)[np.abs(array).argmax()] *= 1 + 1e-9

    report = check_sites(load(deep(op, fold=False)), load(edit(deep(op, fold=True), weight, change)))
    assert [site.name for site in report.wrong] == ["y"], report


@pytest.mark.parametrize("name", NETWORKS)
def test_an_unchanged_model_has_no_rewritten_place(name):
    report = check_sites(load(build(name)), load(build(name)))
    assert report.sites == []
    assert report.unchecked == {}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [1e-4, 3e-5])
def test_a_bias_moved_in_the_fifth_digit_is_found_where_it_is(name, size):
    def change(array):
        array.reshape(-1)[-1] += size

    report = check_sites(load(build(name)), load(edit(build(name, fold=True), "h_b", change)))
    assert [site.name for site in report.wrong] == ["h"], report
    assert "WRONG 'h'" in str(report)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["ok"] is False


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bias_that_is_no_number_is_found_where_it_is(value):
    report = check_sites(load(build("mlp")), load(edit(build("mlp", fold=True), "h_b", lambda a: a.fill(value))))
    assert [site.name for site in report.wrong] == ["h"], report


@pytest.mark.parametrize("name", NETWORKS)
def test_one_weight_off_in_the_fourth_digit_is_found(name):
    def change(array):
        array.reshape(-1)[np.abs(array).argmax()] *= 1.0003

    assert not check_sites(load(build(name)), load(edit(build(name, fold=True), "h_w", change))).ok


def test_a_place_is_checked_even_where_the_output_hides_it():
    """The wrong channel dies in a Relu at every input, so that no output shows it."""

    def network(shift):
        b = Builder(True, 0.0, False, np.float32)
        rng = np.random.default_rng(0)
        norm = make_norm(4)
        norm.beta[0] = -1e3 + shift
        b.normed("Gemm", "x", rng.normal(size=(3, 4)), np.zeros(4), norm, "h", channel_axis=1)
        b.add("Relu", ["h"], "y")
        return b.model([info("x", ["N", 3])], [info("y", ["N", 4])])

    assert verify(network(0), network(100.0)).rows[-1].fused == pytest.approx(0, abs=1e-3)
    verdict = verify(network(0), network(100.0), sites=True)
    assert verdict.outcome == "no"
    assert "1 rewritten place(s) compute something else, the first is 'h'" in verdict.reason


def test_values_that_only_follow_from_shapes_are_no_places_to_cut():
    """torch writes a missing bias as Expand of zero to a computed shape; that value takes no other numbers."""

    def network(fold):
        b = Builder(fold, 1e-3, False, np.float32)
        rng = np.random.default_rng(0)
        b.nodes.append(oh.make_node("Shape", ["w_raw"], ["s"], "s", start=0))
        b.nodes.append(oh.make_node("Slice", ["s", "zero", "one"], ["c"], "c"))
        b.nodes.append(oh.make_node("Expand", ["nothing", "c"], ["bias"], "bias"))
        weight, norm = rng.normal(size=(4, 2, 3)), make_norm(4)
        b.weight("w_raw", weight)
        b.weight("nothing", np.zeros(1))
        scale, shift = norm.affine(1e-3)
        if fold:
            b.weight("w", weight * scale[:, None, None])
            b.weight("b", shift)
            b.add("Conv", ["x", "w", "b"], "y")
        else:
            b.add("Conv", ["x", "w_raw", "bias"], "raw")
            names = [b.weight(f"y_{k}", getattr(norm, k)) for k in ("gamma", "beta", "mean", "var")]
            b.add("BatchNormalization", ["raw", *names], "y", epsilon=1e-3)
        built = oh.make_model(
            oh.make_graph(
                b.nodes,
                "g",
                [info("x", [1, 2, 9])],
                [info("y", [1, 4, 7])],
                [onh.from_array(a, n) for n, a in b.weights.items()]
                + [onh.from_array(np.array([i]), n) for i, n in enumerate(("zero", "one"))],
            ),
            opset_imports=[oh.make_opsetid("", 17)],
            ir_version=8,
        )
        return load(built)

    report = check_sites(network(False), network(True))
    assert report.ok, report
    assert [site.name for site in report.sites] == ["y"]
    assert report.sites[0].before == ("Shape", "Slice", "Expand", "Conv", "BatchNormalization")


def test_places_behind_a_mean_over_computed_axes_are_checked_too():
    """torch writes the axes of a mean as Reshape of a constant, which onnx's own inference does not follow."""

    def network(fold, shift=0.0):
        b = Builder(fold, 1e-3, False, np.float32)
        rng = np.random.default_rng(0)
        b.nodes.append(oh.make_node("Reshape", ["axes", "one"], ["computed"], "axes"))
        b.nodes.append(oh.make_node("ReduceMean", ["x", "computed"], ["mean"], "mean", keepdims=0))
        norm = make_norm(4)
        norm.beta[1] += shift
        b.normed("Gemm", "mean", rng.normal(size=(3, 4)), np.zeros(4), norm, "h", channel_axis=1)
        b.add("Relu", ["h"], "y")
        b.weights |= {"axes": np.array([2, 3]), "one": np.array([-1])}
        return load(b.model([info("x", ["N", 3, "H", "W"])], [info("y", ["N", 4])], opset=18))

    report = check_sites(network(False), network(True))
    assert report.complete, report
    assert [site.name for site in report.sites] == ["h"]
    assert [site.name for site in check_sites(network(False), network(True, 1e-4)).wrong] == ["h"]


def test_a_yes_says_how_many_places_could_not_be_checked_alone():
    def network(fold):
        b = Builder(fold, 1e-3, False, np.float32)
        rng = np.random.default_rng(0)
        b.normed("Gemm", "x", rng.normal(size=(3, 4)), np.zeros(4), make_norm(4), "h", channel_axis=1)
        b.nodes.append(oh.make_node("NonZero", ["h"], ["where"], "nonzero"))
        b.nodes.append(oh.make_node("Transpose", ["where"], ["rows"], "rows", perm=[1, 0]))
        b.nodes.append(oh.make_node("GatherND", ["h", "rows"], ["list"], "list"))
        b.nodes.append(oh.make_node("Unsqueeze", ["list", "second"], ["column"], "column"))
        b.normed("Gemm", "column", rng.normal(size=(1, 4)), np.zeros(4), make_norm(4), "k", channel_axis=1)
        b.add("Relu", ["k"], "y")
        b.weights["second"] = np.array([1])
        return b.model([info("x", ["N", 3])], [info("y", ["M", 4])])

    verdict = verify(network(False), network(True), sites=True)
    assert verdict.ok, verdict
    assert list(verdict.sites.unchecked) == ["k"]
    expected = "verdict: yes, but 1 of 2 rewritten places could not be checked alone. 1 output(s) on cpu, "
    assert str(verdict).startswith(expected)
    assert "not checked alone: 'k': the shape of 'column' is unknown" in str(verdict)


DEQUANTIZED = {
    "signed": (np.int8, None, "w_k = DequantizeLinear<axis=0>(q, s)"),
    "zero point": (np.int8, [7, -100, 127, -128], "w_k = DequantizeLinear<axis=0>(q, s, z)"),
    "unsigned": (np.uint8, [128, 255, 3, 0], "w_k = DequantizeLinear<axis=0>(q, s, z)"),
    "cast": (np.int8, None, "f_k = Cast<to=1>(q) w_k = Mul(f_k, s4)"),
    "reshaped": (np.int8, None, "r = Cast<to=7>(sizes) v_k = DequantizeLinear<axis=0>(q, s) w_k = Reshape(v_k, r)"),
    "constant": (
        np.int8,
        None,
        "c = Constant<value_floats=[-1.0]>() v_k = DequantizeLinear<axis=0>(q, s) w_k = Mul(v_k, c)",
    ),
    "tensor": (
        np.int8,
        None,
        "c = Constant<value = float[1] {-1.0}>() v_k = DequantizeLinear<axis=0>(q, s) w_k = Mul(v_k, c)",
    ),
}


def dequantized(form, *, gain=1.0, move=0.0, folded=True):
    """A Conv of integer weights with its norm: folded, into their scales and a bias; and weight and bias in float64."""
    kind, zero_points, body = DEQUANTIZED[form]
    rng = np.random.default_rng(3)
    limits = np.iinfo(kind)
    q = rng.integers(limits.min, limits.max, (4, 3, 2, 2), dtype=kind, endpoint=True)
    norm, scale, bias = make_norm(4), rng.uniform(1e-3, 1e-2, 4), rng.normal(size=4)
    factor, shift = norm.affine()
    scale, bias = scale.astype(np.float32), bias.astype(np.float32)
    if folded:
        scale, bias = scale * factor, bias * factor + shift
    scale[2] *= gain
    bias[1] *= 1 + move
    scale, bias = scale.astype(np.float32), bias.astype(np.float32)
    # What the fold changes needs another name: one name means one value in both models.
    body = body.replace("_k", "_folded" if folded else "_raw")
    conv = "y = Conv(x, w_folded, b)" if folded else "n = Conv(x, w_raw, b)"
    tail = "" if folded else "y = BatchNormalization<epsilon=0.001>(n, gamma, beta, mean, var)"
    header = '<ir_version: 8, opset_import: ["" : 17]> g (float[2,3,6,6] x) => (float[2,4,5,5] y)'
    model = onnx_parse(f"{header} {{ {body} {conv} {tail} }}")
    arrays = {"q": q, "s": scale, "s4": scale.reshape(4, 1, 1, 1), "b": bias, **vars(norm)}
    arrays |= {"z": np.array(zero_points or [0] * 4, kind), "sizes": np.array([4, 3, 2, -1], np.int32)}
    model.graph.initializer.extend(onh.from_array(array, name) for name, array in arrays.items())
    centred = q.astype(np.float64) - (0 if zero_points is None else np.reshape(zero_points, (4, 1, 1, 1)))
    return load(model), centred * scale.reshape(4, 1, 1, 1).astype(np.float64), bias.astype(np.float64)


@pytest.mark.parametrize("form", DEQUANTIZED)
def test_a_norm_in_the_scales_of_integer_weights_stays_under_the_bound(form):
    report = check_sites(dequantized(form, folded=False)[0], dequantized(form)[0])
    assert report.complete, report
    assert 0 < report.sites[0].used < 1


@pytest.mark.parametrize("damage", [{"gain": 1.01}, {"gain": 1 + 1e-5}, {"move": 1e-3}, {"move": 1e-5}], ids=str)
@pytest.mark.parametrize("form", DEQUANTIZED)
def test_a_wrong_scale_or_bias_of_integer_weights_is_found(form, damage):
    report = check_sites(dequantized(form, folded=False)[0], dequantized(form, **damage)[0])
    assert [site.name for site in report.wrong] == ["y"], report


@pytest.mark.parametrize("form", DEQUANTIZED)
def test_integer_weights_bound_their_products_by_their_distance_from_the_zero_point(form):
    model, weight, bias = dequantized(form)
    x = np.random.default_rng(1).normal(size=(2, 3, 6, 6))
    windows = np.lib.stride_tricks.sliding_window_view(np.abs(x), (2, 2), axis=(2, 3))
    expected = np.einsum("nchwij,ocij->nohw", windows, np.abs(weight)) + np.abs(bias).reshape(4, 1, 1)
    bound = GraphByNames(model).cut("y", set()).run({"x": np.abs(x)}, absolute=True)
    np.testing.assert_allclose(bound, expected, rtol=1e-12)


def test_control_flow_is_listed_as_unchecked_with_the_reason():
    def network(bias):
        text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x, bool c) => (float[2] y) {{
          y = If(c) <
            then_branch = t () => (float[2] a) {{ one = Constant<value_floats=[{bias}, 2.0]>() a = Add(x, one) }},
            else_branch = e () => (float[2] b) {{ b = Identity(x) }}
          >
        }}"""
        return load(onnx_parse(text))

    report = check_sites(network(1.0), network(1.5))
    assert report.sites == []
    assert report.unchecked == {"y": "If holds a subgraph"}
    assert "not checked alone: 'y': If holds a subgraph" in str(report)


def onnx_parse(text):
    import onnx.parser

    return onnx.parser.parse_model(text)


def test_a_place_behind_a_mask_is_checked_with_masks_of_both_kinds():
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(3, 4, 1, 1)), "k": np.array(0.0), "s": rng.uniform(0.5, 2, (3, 1, 1))}
    arrays |= {"t": rng.normal(size=(3, 1, 1)), "ws": arrays["w"] * arrays["s"][..., None], "half": np.array(0.5)}
    stored = [onh.from_array(a.astype(np.float32), n) for n, a in arrays.items()]
    behind = [oh.make_node("Where", ["m", "k", "c"], ["d"]), oh.make_node("Mul", ["d", "s"], ["e"])]
    folded = [oh.make_node("Where", ["m", "t", "d"], ["y"])]
    mask = oh.make_node("Greater", ["z", "half"], ["m"])
    models = []
    for weight, shift, rest in (("w", [], behind), ("ws", ["t"], folded)):
        conv = oh.make_node("Conv", ["x", weight, *(["tv"] if shift else [])], ["d" if shift else "c"])
        last = [] if shift else [oh.make_node("Add", ["e", "t"], ["y"])]
        infos = [oh.make_tensor_value_info("x", 1, [2, 4, 5, 6]), oh.make_tensor_value_info("z", 1, [2, 1, 5, 6])]
        more = [*stored, onh.from_array(arrays["t"].reshape(-1).astype(np.float32), "tv")]
        graph = oh.make_graph([mask, conv, *rest, *last], "g", infos, [oh.make_tensor_value_info("y", 1, None)], more)
        models.append(load(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)))
    models[1].graph[1].outputs[0].name = "other"
    report = check_sites(*models)
    assert report.complete, report
    assert [site.name for site in report.sites] == ["y"]
    assert 0 < report.sites[0].used < 1
    weight = models[1].graph.initializers["ws"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.001), name="ws")
    assert not check_sites(*models).ok


def normed_image(size, *, reshaped=False):
    """A convolution and a norm at a declared size, which the file states of every value."""
    rng, f = np.random.default_rng(0), np.float32
    weights = [onh.from_array(rng.normal(size=(16, 16, 3, 3)).astype(f), "w")]
    weights += [onh.from_array(rng.uniform(0.5, 1.5, 16).astype(f), name) for name in ("scale", "bias", "mean", "var")]
    weights += [onh.from_array(np.int64([1, 16, size * size]), "flat")]
    nodes = [oh.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1])]
    nodes += [oh.make_node("Reshape", ["c", "flat"], ["r"])] if reshaped else []
    nodes += [oh.make_node("BatchNormalization", ["r" if reshaped else "c", "scale", "bias", "mean", "var"], ["y"])]
    shape = [1, 16, size, size]
    outer = [info("x", shape, f)], [info("y", [1, 16, size * size] if reshaped else shape, f)]
    graph = oh.make_graph(nodes, "g", *outer, weights, value_info=[info("c", shape, f)])
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)


def test_a_place_of_declared_size_is_fed_a_crop_all_the_same():
    model = normed_image(256)
    fused, report = fuse(model)
    assert report.folded
    found = check_sites(load(model), load(fused))
    assert found.complete, found
    assert found.sites[0].elements <= 16 * 20 * 20
    (weight,) = (t.name for t in fused.graph.initializer if t.dims == [16, 16, 3, 3])

    def change(array):
        array[3, 4, 1, 1] += 1e-3

    (wrong,) = check_sites(load(model), load(edit(fused, weight, change))).wrong
    assert wrong.elements == 16 * 256 * 256  # before it is called wrong


@pytest.mark.parametrize(("size", "checked"), [(64, True), (2048, False)])
def test_a_place_that_takes_whole_images_is_run_within_the_limit(size, checked):
    model = normed_image(size, reshaped=True)
    fused, report = fuse(model)
    assert report.folded
    found = check_sites(load(model), load(fused))
    assert found.ok
    assert found.complete == checked
    assert checked or (found.unchecked["y"].startswith("one run of it takes 19.") and "and the limit is" in str(found))


@pytest.mark.parametrize(("size", "right"), [(32, True), ("h", False)])
def test_a_place_that_is_right_at_its_declared_size_alone_is_right_there(size, right):
    def mean(nodes):
        outer = [info("x", [1, 3, size, size], np.float32)], [info("y", [1, 3, 1, 1], np.float32)]
        weights = [onh.from_array(np.int64([2, 3]), "axes"), onh.from_array(np.float32(1 / 1024), "share")]
        return oh.make_model(
            oh.make_graph(nodes, "g", *outer, weights), opset_imports=[oh.make_opsetid("", 17)], ir_version=8
        )

    before = mean([oh.make_node("GlobalAveragePool", ["x"], ["y"])])
    total = oh.make_node("ReduceSum", ["x", "axes"], ["total"])
    after = mean([total, oh.make_node("Mul", ["total", "share"], ["y"])])
    assert check_sites(load(before), load(after)).complete == right


def test_a_place_of_which_crops_prove_nothing_is_not_checked_beyond_the_limit():
    """Its sum is divided by the declared size: wrong on every crop, and the image too large to be run."""

    def mean(*nodes):
        outer = [info("x", [1, 64, 400, 400], np.float32)], [info("y", [1, 64, 1, 1], np.float32)]
        weights = {"axes": np.int64([2, 3]), "share": np.float32(1 / 400**2)}
        weights["W"] = np.full((64, 64, 3, 3), 0.01, np.float32)
        stored = [onh.from_array(np.asarray(array), name) for name, array in weights.items()]
        graph = oh.make_graph([oh.make_node("Conv", ["x", "W"], [nodes[0].input[0]]), *nodes], "g", *outer, stored)
        return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)

    before = mean(oh.make_node("GlobalAveragePool", ["c"], ["y"]))
    after = mean(oh.make_node("ReduceSum", ["d", "axes"], ["total"]), oh.make_node("Mul", ["total", "share"], ["y"]))
    found = check_sites(load(before), load(after))
    assert (found.ok, found.complete) == (True, False)
    assert found.unchecked["y"].startswith("one run of it takes ")

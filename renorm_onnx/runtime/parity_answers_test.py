"""What a verdict says where a plain yes or no would hide something."""

import numpy as np
import onnx
import pytest

from renorm_onnx.delivery import fuse_file
from renorm_onnx.errors import InputError
from renorm_onnx.fusion.carriers import quantized
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.runtime.judging.verdict import POOLED
from renorm_onnx.runtime.parity import LIMIT, verify
from renorm_onnx.runtime.parity_networks_test import build
from renorm_onnx.runtime.parity_test import edit, model_of


def two_outputs(shift, gain):
    """`live` is the same whatever the arguments are; `dead` is cut off by its Relu on all ordinary inputs."""
    body = f"s = Constant<value_float={shift}>() g = Constant<value_float={gain}>() one = Constant<value_float=1.0>() "
    body += "live = Add(x, x) a = Add(x, s) b = Mul(a, g) r = Relu(b) dead = Add(r, one)"
    return model_of("float[N,3] x", "float[N,3] live, float[N,3] dead", body)


def test_a_dead_output_beside_a_live_one_is_no_yes():
    verdict = verify(two_outputs(-1e9, 1.0), two_outputs(-2e9, 7.0))
    assert verdict.outcome == "unusable", verdict
    assert "'dead' had one value on all ordinary inputs; pass inputs= that change it" in verdict.reason
    assert "not checked: 'dead' had one value on all ordinary inputs" in str(verdict)
    assert verify(two_outputs(0.5, 1.0), two_outputs(0.5, 1.0)).ok


def test_equal_sets_of_inputs_are_no_sign_of_a_dead_output():
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    for inputs in ({"x": np.stack([x, x, x])}, [{"x": x}, {"x": x.copy()}]):
        assert verify(two_outputs(0.5, 1.0), two_outputs(0.5, 1.0), inputs=inputs).ok
        verdict = verify(two_outputs(-1e9, 1.0), two_outputs(-1e9, 1.0), inputs=[{"x": x}, {"x": -x}])
        assert "'dead' had one value on all ordinary inputs" in verdict.reason


def test_a_dead_output_is_forgiven_where_every_place_was_checked_by_itself():
    verdict = verify(two_outputs(-1e9, 1.0), two_outputs(-1e9, 1.0), sites=True)
    assert verdict.ok
    assert "'dead' had one value" in verdict.skipped[0]


def test_with_a_limit_an_original_that_runs_badly_is_a_skip_where_every_place_holds():
    """(x + 1e8) - 1e8 has no correct digit in float32, which says nothing against a candidate."""
    body = "big = Constant<value_float=1e8>() a = Add(x, big) y = Sub(a, big)"
    model = model_of("float[N,8] x", "float[N,8] y", body)
    assert verify(model, model, limit=LIMIT, sites=True).outcome == "skipped"
    assert verify(model, model, limit=LIMIT).outcome == "unusable"
    assert verify(model, model, sites=True).outcome == "unusable"


def test_a_limit_excuses_no_data_that_do_not_fit():
    with pytest.raises(InputError, match="'x' has shape"):
        verify(build("mlp"), build("mlp", fold=True), inputs={"x": np.ones((4, 5), np.float32)}, limit=LIMIT)


def test_an_output_that_depends_on_no_input_is_not_called_dead():
    model = model_of(
        "float[N,3] x",
        "float[N,3] y, float[3] anchors",
        "y = Add(x, x) anchors = Constant<value_floats=[1.0, 2.0, 3.0]>()",
    )
    verdict = verify(model, model)
    assert verdict.ok, verdict
    assert verdict.skipped == ()


def scalars(limit):
    """`n` and `b` are of rank 0; `n` is 3 N + 5, and `b` tells whether that is below `limit`."""
    body = "y = Mul(x, x) m = Size(x) five = Constant<value_int=5>() n = Add(m, five) "
    body += f"limit = Constant<value_int={limit}>() b = Less(n, limit)"
    return model_of("float[N,3] x", "float[N,3] y, int64 n, bool b", body)


def test_outputs_of_rank_0_that_are_no_floats_are_compared_too():
    verdict = verify(scalars(10**6), scalars(10**6))
    assert verdict.ok, verdict
    assert {row.output for row in verdict.rows} == {"y", "n", "b"}
    verdict = verify(scalars(10**6), scalars(0))
    assert verdict.outcome == "no"
    assert {row.output for row in verdict.rows if row.ok is False} == {"b"}


def test_an_output_without_elements_is_neither_right_nor_wrong():
    body = "y = Compress(x, mask) z = Add(x, x)"
    model = model_of("float[N,3] x, bool[3] mask", "float[K] y, float[N,3] z", body)
    verdict = verify(model, model, inputs={"x": np.ones((2, 3), np.float32), "mask": np.zeros(3, bool)})
    assert verdict.outcome == "unusable"
    assert "nothing was compared: output 'y' on cpu gave no elements" in verdict.reason


def only_pairs():
    """onnxruntime resizes by cubics only where the batch stays, which is declared to vary and has to be 2."""
    body = 'sizes = Constant<value_ints=[2, 3, 4, 5]>() y = Resize<mode="cubic">(x, , , sizes)'
    return model_of("float[N,3,9,9] x", "float[M,3,4,5] y", body)


def test_where_a_provider_takes_none_of_the_inputs_nothing_is_judged_and_the_reason_is_its_own():
    message = (
        r"nothing was compared, for cpu runs the reference on none of the inputs \(.*Resize.*\); pass sizes= or inp"
    )
    with pytest.raises(InputError, match=message):
        verify(only_pairs(), only_pairs())
    limited = verify(only_pairs(), only_pairs(), limit=LIMIT)
    assert limited.outcome == "skipped"
    assert "runs the reference on none of the inputs" in limited.reason
    verdict = verify(only_pairs(), only_pairs(), sizes={"N": 2})
    assert verdict.ok, verdict


def test_data_that_were_cast_are_named():
    data = {"x": np.random.default_rng(0).normal(size=(8, 17))}
    verdict = verify(build("mlp"), build("mlp", fold=True), inputs=data)
    assert verdict.ok
    assert verdict.remarks == ("data for 'x' were cast from float64 to float32",)
    assert "note: data for 'x' were cast from float64 to float32" in str(verdict)
    assert verify(build("mlp"), build("mlp"), inputs={"x": data["x"].astype(np.float32)}).remarks == ()


@pytest.mark.parametrize(("dtype", "value"), [(np.float64, 1e300), (np.complex64, 1j)])
def test_data_that_the_models_type_cannot_hold_are_refused(dtype, value):
    with pytest.raises(InputError, match=r"'x' has type (float64 and values beyond float32|complex64, expected)"):
        verify(build("mlp"), inputs={"x": np.full((8, 17), value, dtype)})


@pytest.mark.parametrize("seed", [-1, -7])
def test_a_negative_seed_is_our_error(seed):
    with pytest.raises(InputError, match=f"verify: seed={seed}, expected a whole number, 0 or more"):
        verify(build("mlp"), seed=seed)


def test_a_file_that_we_fused_is_checked_place_by_place(tmp_path):
    source, target = tmp_path / "m.onnx", tmp_path / "f.onnx"
    onnx.save(build("mlp"), source)
    assert fuse_file(source, target).written
    verdict = verify(source, target)
    assert verdict.ok
    assert len(verdict.sites.sites) == 1
    assert verify(build("mlp"), build("mlp", fold=True)).sites is None, "nothing says what its names mean"

    def dies(array):
        array[0] -= 1e3

    # A Relu cuts off the channel in both, so that only the place itself shows the fault.
    hidden, fused = edit(build("mlp"), "h_beta", dies), tmp_path / "g.onnx"
    onnx.save(hidden, source)
    assert fuse_file(source, fused).written
    moved = onnx.load(fused)
    bias = next(t for t in moved.graph.initializer if t.dims == [32] and onnx.numpy_helper.to_array(t)[0] < -500)
    onnx.save(edit(moved, bias.name, dies), fused)
    verdict = verify(source, fused)
    assert verdict.outcome == "no"
    assert "1 rewritten place(s) compute something else" in verdict.reason


def test_the_report_says_where_the_nodes_ran():
    verdict = verify(build("mlp"), build("mlp", fold=True))
    assert verdict.environment["placement"] == {"cpu": {"CPUExecutionProvider": 3}}
    assert verdict.to_dict()["rows"][0]["spread"]["argmax_positions"] > 0


@pytest.mark.parametrize(("name", "dtype"), [("convnet", np.float16), ("two_inputs_two_outputs", np.float32)])
def test_the_sentence_takes_its_figures_from_the_output_that_uses_most_of_what_is_allowed(name, dtype):
    verdict = verify(build(name, dtype=dtype), build(name, fold=True, dtype=dtype))
    pooled = [row for row in verdict.rows if row.inputs == POOLED and row.decides]
    worst = max(pooled, key=lambda row: row.typical)
    where = f" of {worst.output!r} on cpu" if len(pooled) > 1 else ""
    said = f"{where} {worst.fused:.1e}, unfused {worst.unfused:.1e}; {worst.typical:.2f} x its yardstick"
    assert verdict.reason.endswith(f" elements: relative error{said}")


def test_a_model_in_which_nothing_folds_is_said_to_have_been_compared_with_itself():
    said = "verdict: yes, but nothing folds here, so the model was compared with itself. 2 output(s) on cpu, "
    assert str(verify(two_outputs(0.5, 1.0))).startswith(said)
    assert "compared with itself" not in str(verify(build("mlp")))


def test_a_layer_that_the_reference_itself_gets_wrong_neither_holds_nor_diverges():
    body = "huge = Constant<value_float=1e9>() none = Constant<value_float=0.0>() "
    model = model_of(
        "float[N,3] x", "float[N,3] y", body + "a = Add(x, huge) b = Sub(a, huge) c = Mul(b, none) y = Add(x, c)"
    )
    (layers,) = verify(model, model, layers=True).layers
    assert {row.output for row in layers.rows if row.ok is None} == {"b"}
    assert "none diverges" in str(layers)
    (line,) = [line for line in str(layers).splitlines() if " b " in line]
    assert line.startswith("--")


def test_many_inputs_of_one_kind_are_one_line_of_the_answer():
    text = "float[2,64] x", "float[2,64] y, int64[1] n", "y = Add(x, x) n = Shape<end=1>(x)"
    verdict = verify(model_of(*text), model_of(*text))
    labels = [(row.optimize, row.output, row.inputs) for row in verdict.rows]
    assert len(set(labels)) == len(labels)
    assert "large: worst of 64" in str(verdict)


def test_models_that_part_when_onnxruntime_optimizes_them_are_named(monkeypatch):
    """WeightBiasQuantization of onnxruntime 1.31 divides the bias of a dead channel by a step of zero."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y) {'
        "u = QuantizeLinear(x, xs, z) a = DequantizeLinear(u, xs, z) w = DequantizeLinear<axis=1>(q, qs)"
        "c = MatMul(a, w) n = BatchNormalization(c, s, b, m, v) o = QuantizeLinear(n, ys, z)"
        "y = DequantizeLinear(o, ys, z) }"
    )
    codes = {"z": np.array(128, np.uint8), "q": np.eye(4, dtype=np.int8) * 40}
    floats = {
        "xs": 0.03,
        "ys": 0.1,
        "qs": [0.02] * 4,
        "s": [0, 1, 2, 1],
        "b": [1, -1, 0.5, 0],
        "m": [0.2] * 4,
        "v": [1] * 4,
    }
    arrays = codes | {name: np.array(value, np.float32) for name, value in floats.items()}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    assert not any("the models part" in text for text in verify(model, fuse(model)[0]).remarks)
    monkeypatch.setattr(quantized, "DEAD", -1.0)
    verdict = verify(model, fuse(model)[0])
    assert verdict.ok
    assert any("the models part on cpu in output 'y': RMS error is" in text for text in verdict.remarks)
    assert "note: with all of onnxruntime's optimizations" in str(verdict)


def test_stored_codes_are_weights_like_any_other():
    """Nothing is rounded while the model runs, so an error of a thousandth is one, as in float32."""
    body = "w = DequantizeLinear(q, s) a = MatMul(x, w) y = Mul(a, k)"
    models = []
    for factor in (1.5, 1.5015):
        model = model_of("float[N,8] x", "float[N,8] y", body)
        codes = np.random.default_rng(0).integers(-99, 99, (8, 8)).astype(np.int8)
        for name, value in (("q", codes), ("s", np.float32(0.01)), ("k", np.float32(factor))):
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        models.append(model)
    verdict = verify(models[0], models[0])
    assert verdict.ok
    assert verdict.precision == "float32"
    assert verify(*models).outcome == "no"


@pytest.mark.parametrize(
    ("body", "precision"),
    [
        ("u = QuantizeLinear(x, s, z) y = DequantizeLinear(u, s, z)", "quantized"),
        ("u, s1, z1 = DynamicQuantizeLinear(x) y = DequantizeLinear(u, s1, z1)", "quantized"),
        ("h = Cast<to=10>(x) y = Cast<to=1>(h)", "float16"),
        ("h = Cast<to=16>(x) y = Cast<to=1>(h)", "bfloat16"),
        ("d = Cast<to=11>(x) y = Cast<to=1>(d)", "float32"),
    ],
)
def test_an_output_is_expected_to_be_as_exact_as_the_coarsest_type_before_it(body, precision):
    model = model_of("float[N,8] x", "float[N,8] y", body)
    for name, value in (("s", np.float32(0.05)), ("z", np.uint8(128))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    verdict = verify(model, model, inputs=2)
    assert (verdict.precision, verdict.ok) == (precision, True), verdict


def beside_a_narrow_branch(factor, of="x"):
    """`y` is computed in float32; `z`, beside it, passes through float16."""
    body = f"s = Constant<value_float={factor}>() h = Cast<to=10>(x) z = Cast<to=1>(h) y = Mul({of}, s)"
    return model_of("float[N,8] x", "float[N,8] y, float[N,8] z", body)


def test_a_narrow_type_grants_nothing_to_an_output_that_is_not_computed_from_it():
    right = beside_a_narrow_branch(1.5)
    verdict = verify(right, right)
    assert verdict.ok, verdict
    assert verdict.precision == "float16"
    verdict = verify(right, beside_a_narrow_branch(1.5001))
    assert verdict.outcome == "no"
    assert "output 'y'" in verdict.reason
    # The same error behind the narrow type is less than its rounding.
    assert verify(beside_a_narrow_branch(1.5, "z"), beside_a_narrow_branch(1.5001, "z")).ok


def counting(limit, then="f = Cast<to=1>(i)"):
    """Integers that are compared with a number, and added to what comes out."""
    body = f"k = Constant<value_int={limit}>() b = Less(i, k) h = Cast<to=1>(b) {then} y = Add(f, h)"
    return model_of("int64[N,3] i", "float[N,3] y", body)


def test_integers_that_are_compared_are_not_0_and_1_alone():
    assert verify(counting(40), counting(40)).ok
    verdict = verify(counting(40), counting(90))
    assert verdict.outcome == "no", verdict
    assert "inputs large" in verdict.reason


def test_where_large_integers_cannot_be_run_the_small_ones_are_said_to_be_all():
    index = "table = Constant<value_floats=[1.0, 2.0, 4.0]>() g = Cast<to=1>(i) t = Cast<to=7>(g) f = Gather(table, t)"
    verdict = verify(counting(5, index), counting(5, index))
    assert verdict.ok, verdict
    said = "integers of 'i' were 0 and 1 alone, because the reference fails on larger ones"
    assert verdict.remarks == (said,)
    assert verify(counting(5), counting(5)).remarks == ()


@pytest.mark.parametrize(("limit", "never"), [(1e7, "then_branch"), (-1e7, "else_branch"), (3.0, "")])
def test_a_branch_that_no_inputs_lead_into_is_said(limit, never):
    body = f"""k = Constant<value_float={limit}>() m = ReduceMax<keepdims=0>(x) c = Greater(m, k)
    y = If(c) <then_branch = t () => (float[N,3] a) {{ a = Neg(x) }},
               else_branch = e () => (float[N,3] b) {{ b = Abs(x) }}>"""
    model = model_of("float[N,3] x", "float[N,3] y", body)
    verdict = verify(model, model)
    assert verdict.ok, verdict
    said = f"{never} of If 'y' ran on no inputs, so that this says nothing of it"
    assert verdict.remarks == ((said,) if never else ())


@pytest.mark.parametrize(("factor", "outcome"), [(2.0, "skipped"), (2.0**127, "unusable")])
def test_an_output_that_overflows_is_not_excused_by_another_that_is_no_yardstick(factor, outcome):
    """Rewritten places are compared in float64, where nothing overflows."""
    body = (
        f"big = Constant<value_float=1e8>() a = Add(x, big) z = Sub(a, big) f = Constant<value_float={factor:.1f}>() "
    )
    body += f"g = Constant<value_float={2 / factor!r}>() m = Mul(x, f) y = Mul(m, g)"
    plain = body.replace("m = Mul(x, f) y = Mul(m, g)", "two = Constant<value_float=2.0>() y = Mul(x, two)")
    models = [model_of("float[N,8] x", "float[N,8] y, float[N,8] z", text) for text in (plain, body)]
    verdict = verify(*models, limit=LIMIT, sites=True)
    assert verdict.sites is not None
    assert verdict.sites.complete
    assert verdict.outcome == outcome, verdict

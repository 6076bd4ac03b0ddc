import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

from renorm_onnx.errors import InputError
from renorm_onnx.runtime.inputs import KINDS, InputSpec, Trial, given_trials, input_specs, make_trial, size_plans

IMAGE = InputSpec("x", np.dtype(np.float32), ("N", 3, 32, 32), 2)


def specs_of(inputs, body="y = Identity(x)", opset=17):
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => (float[N] y) {{ {body} }}'
    return input_specs(ir.from_proto(onnx.parser.parse_model(text)))


def test_an_input_with_a_default_is_not_fed():
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N] x, float[1] k) => (float[N] y) { y = Mul(x, k) }'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([2.0]), "k"))
    assert [spec.name for spec in input_specs(ir.from_proto(model))] == ["x"]


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_the_same_for_the_same_seed_and_others_for_another(kind):
    once, again, other = (make_trial([IMAGE], kind, {"N": 2}, seed).feeds["x"] for seed in (0, 0, 1))
    assert once.shape == (2, 3, 32, 32)
    assert once.dtype == np.float32
    np.testing.assert_array_equal(once, again)
    assert kind in ("zeros", "constant") or (once != other).any()


def test_each_kind_is_what_its_name_says():
    x = {kind: make_trial([IMAGE], kind, {"N": 8}, 0).feeds["x"].astype(np.float64) for kind in KINDS}
    assert x["normal"].std() == pytest.approx(1, abs=0.03)
    assert x["uniform"].min() >= 0
    assert x["uniform"].max() < 1
    assert 0 <= x["image"].min() < x["image"].max() <= 1
    assert x["large"].std() == pytest.approx(1e4, rel=0.03)
    assert x["small"].std() == pytest.approx(1e-4, rel=0.03)
    assert not x["zeros"].any()
    assert (x["constant"] == 1).all()
    assert 0 < np.abs(x["denormal"]).max() < np.finfo(np.float32).tiny
    spread = x["mixed"].std(axis=(0, 2, 3))
    assert spread.max() > 3 * spread.min()


@pytest.mark.parametrize(
    ("shapes", "kind", "alike"),
    [
        ([(2, 3, 5, 7)], "zeros", 35),
        ([(2, 5, 7, 3)], "small", 35),
        ([(2, 64, 9)], "constant", 64),
        ([(2, 3, 4), (2, 3, 5, 5), (2, 900)], "denormal", 25),
        ([(2, 900)], "zeros", 1),
        ([(2, 3, 0)], "zeros", 1),
        ([(2, 3, 5, 7)], "normal", 1),
        ([(2, 3, 5, 7)], "large", 1),
        ([], "zeros", 1),
    ],
)
def test_positions_are_counted_where_they_are_about_alike(shapes, kind, alike):
    assert Trial(kind, {str(i): np.zeros(shape) for i, shape in enumerate(shapes)}, kind).alike == alike


def test_images_have_a_1_over_f_spectrum():
    x = make_trial([IMAGE], "image", {"N": 64}, 0).feeds["x"]
    power = np.square(np.abs(np.fft.fft2(x))).mean(axis=(0, 1))
    assert power[1, 1] > 10 * power[4, 4] > 30 * power[12, 12]


def test_half_precision_inputs_stay_finite():
    spec = InputSpec("x", np.dtype(np.float16), (1000,), 2)
    assert np.isfinite(make_trial([spec], "large", {}, 0).feeds["x"]).all()
    assert np.abs(make_trial([spec], "denormal", {}, 0).feeds["x"]).max() < 6.2e-5


def test_indices_stay_within_the_table_that_they_index():
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (int64[N] token, int64[N] flag, bool[N] mask, uint8[N] byte) => (float[N,2] y)
    <float[3,2] table = {1,2,3,4,5,6}>
    { t = Cast<to=7>(token) e = Gather(table, t) y = Identity(e) }"""
    specs = input_specs(ir.from_proto(onnx.parser.parse_model(text)))
    feeds = make_trial(specs, "normal", {"N": 200}, 0).feeds
    assert set(np.unique(feeds["token"])) == {0, 1, 2}
    assert set(np.unique(feeds["flag"])) == {0, 1}
    assert feeds["mask"].dtype == np.bool_
    assert feeds["byte"].max() > 200


@pytest.mark.parametrize(
    ("body", "wide"),
    [
        ("f = Cast<to=1>(i) y = Reshape(f, s)", True),
        ("b = Less(i, k) y = Cast<to=1>(b)", True),
        ("t = Add(i, k) u = Unsqueeze(t, k) y = Cast<to=1>(u)", True),
        ("f = Cast<to=1>(i) y = Reshape(f, i)", False),
        ("t = Mul(i, k) y = Gather(x, t)", False),
        ("d = Div(k, i) y = Cast<to=1>(d)", False),  # 0 would be divided by
        ("y = custom.Add(x, i)", False),
        ("t = Cast<to=6>(i) y = Expand(x, t)", False),
        ("y = TopK(x, i)", False),
    ],
)
def test_integers_that_are_only_counted_with_are_large_among_large_numbers(body, wide):
    text = f"""<ir_version: 8, opset_import: ["" : 17, "custom" : 1]>
    g (int64[N,3] i, float[3] x) => (float[M] y) <int64[1] k = {{2}}, int64[1] s = {{-1}}> {{ {body} }}"""
    spec = input_specs(ir.from_proto(onnx.parser.parse_model(text)))[0]
    assert spec.wide == wide
    drawn = {kind: make_trial([spec], kind, {"N": 400}, 0).feeds["i"] for kind in KINDS}
    assert all(set(np.unique(drawn[kind])) == {0, 1} for kind in set(KINDS) - {"large", "mixed"})
    for kind in ("large", "mixed"):
        assert drawn[kind].dtype == np.int64
        assert set(np.unique(drawn[kind])) == {0, 1} if not wide else drawn[kind].max() > 200
        assert not wide or 0.4 < (drawn[kind] < 16).mean() < 0.6
    image = InputSpec("i", np.dtype(np.uint16), (2, 3, 8, 8), 2, wide)
    assert (make_trial([image], "image", {}, 0).feeds["i"].max() > 200) == wide


def test_sizes_of_one_name_agree_and_several_are_tried():
    specs = specs_of("float[N,3,H,H] x, float[N] z")
    plans = list(size_plans(specs, 8, {}))
    assert plans[0] == {"N": 8, "H": 32}
    assert plans[1] == {"N": 1, "H": 48}
    assert len({tuple(plan.values()) for plan in plans}) == len(plans) > 3
    assert all(plan["H"] == 20 for plan in size_plans(specs, 8, {"H": 20}))
    assert list(size_plans([InputSpec("x", np.dtype("f4"), (1, 3), 2)], 8, {})) == [{}]


def test_an_input_that_cannot_be_made_up_is_an_input_error():
    with pytest.raises(InputError, match="expected a tensor of numbers; pass inputs="):
        specs_of("string[N] x", "y = StringSplit(x)", 20)
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([value], [], nodes=[], name="g", opset_imports={"": 17})
    with pytest.raises(InputError, match="no declared rank"):
        input_specs(ir.Model(graph, ir_version=8))


X, Z = InputSpec("x", np.dtype("f4"), ("N", 3), 2), InputSpec("z", np.dtype("i8"), (2,), 2)


def test_data_come_from_arrays_files_and_folders(tmp_path):
    x, z = np.ones((4, 3)), np.array([1, 2])
    (one,) = given_trials([X, Z], {"x": x, "z": z})
    assert one.kind == "data"
    assert one.ordinary
    assert one.feeds["x"].dtype == np.float32
    np.savez(tmp_path / "b.npz", x=np.stack([x, 2 * x]), z=np.stack([z, z]))
    np.savez(tmp_path / "a.npz", x=x, z=z)
    assert [t.label for t in given_trials([X, Z], str(tmp_path))] == ["a.npz 0", "b.npz 0", "b.npz 1"]
    assert len(given_trials([X, Z], [{"x": x, "z": z}] * 3)) == 3
    np.save(tmp_path / "only.npy", x)
    assert given_trials([X], tmp_path / "only.npy")[0].feeds["x"].shape == (4, 3)


@pytest.mark.parametrize("kind", [np.int32, np.uint8])
def test_integers_of_another_type_are_taken_for_what_they_are(kind):
    (one,) = given_trials([Z], {"z": np.array([1, 200], kind)})
    assert (one.feeds["z"].dtype, one.feeds["z"].tolist()) == (np.int64, [1, 200])


def test_a_batch_longer_than_a_fixed_one_is_cut_into_batches():
    fixed = InputSpec("x", np.dtype("f4"), (2, 3), 2)
    trials = given_trials([fixed], {"x": np.arange(15.0).reshape(5, 3)})
    assert [t.feeds["x"][0, 0] for t in trials] == [0, 6]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": np.ones((4, 3))}, r"holds arrays \['x'\], the model's inputs are \['x', 'z'\]"),
        ({"x": np.ones((4, 5)), "z": np.array([1, 2])}, r"'x' has shape \(4, 5\), expected \('N', 3\)"),
        ({"x": np.ones((4, 3)), "z": np.array([1.5, 2])}, "'z' has type float64, expected int64"),
        ({"x": np.ones((2, 4, 3)), "z": np.array([1, 2])}, "different numbers of batches"),
        ([], "no batch, so there is nothing to compare"),
        (3.5, "inputs=3.5, expected a number, a mapping"),
        ("", "inputs='', expected a number, a mapping"),
        ("/no/such/file.npz", "neither a file nor a folder"),
    ],
)
def test_data_that_do_not_fit_are_input_errors(inputs, message):
    with pytest.raises(InputError, match=message):
        given_trials([X, Z], inputs)


def test_an_empty_batch_is_refused_but_one_empty_input_among_others_is_not():
    past = InputSpec("past", np.dtype("f4"), ("N", "T"), 2)
    with pytest.raises(InputError, match=r"inputs 0 is empty, of shape \{'x': \(0, 3\)\}, so there is nothing to comp"):
        given_trials([X], {"x": np.ones((0, 3))})
    (one,) = given_trials([X, past], {"x": np.ones((4, 3)), "past": np.ones((4, 0))})
    assert one.feeds["past"].shape == (4, 0)


def test_files_that_cannot_be_read_are_input_errors(tmp_path):
    with pytest.raises(InputError, match=r"holds no \.npz or \.npy file"):
        given_trials([X], tmp_path)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(InputError, match="cannot be read as numpy data"):
        given_trials([X], tmp_path)
    (tmp_path / "bad.npz").unlink()
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read as numpy data"):
        given_trials([X], tmp_path)
    np.save(tmp_path / "pickled.npy", np.ones(3))
    with pytest.raises(InputError, match="holds one array, the model has inputs"):
        given_trials([X, Z], tmp_path / "pickled.npy")

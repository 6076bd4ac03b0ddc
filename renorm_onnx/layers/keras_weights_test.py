import warnings

import numpy as np
import pytest
import torch

from renorm_onnx.errors import InputError
from renorm_onnx.layers.keras_weights import load_keras
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from renorm_onnx.layers.schedules import CONSTANT, Sigmoid

C = 4
EPSILON = 0.02  # as large as the smallest variance, so that a second or a missing one shows


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    gamma, beta, mean = (rng.normal(size=C).astype(np.float32) for _ in range(3))
    return [gamma, beta, mean, np.geomspace(0.02, 9, C, dtype=np.float32)]


def inputs(shape=(6, C, 3, 2)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def keras_inference(x, gamma, beta, mean, variance, epsilon):
    """keras.ops.batch_normalization over axis 1, in float64."""
    gamma, beta, mean, variance = (
        torch.as_tensor(np.float64(v)).view(1, -1, *[1] * (x.dim() - 2)) for v in (gamma, beta, mean, variance)
    )
    return (x.double() - mean) / torch.sqrt(variance + epsilon) * gamma + beta


def assert_same(got, want):
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


def test_the_weights_of_keras_give_its_inference():
    config = {"epsilon": EPSILON, "momentum": 0.9, "renorm_clipping": {"rmax": 2.0, "rmin": 0.5, "dmax": 1.5}}
    layer = load_keras(arrays(), config).eval()
    x = inputs()
    assert type(layer) is BatchRenorm2d
    assert_same(layer(x), keras_inference(x, *arrays(), EPSILON))
    assert (layer.eps, layer.r_max, layer.d_max, layer.schedule) == (EPSILON, 2.0, 1.5, CONSTANT)
    assert layer.momentum == pytest.approx(0.1)
    for wrong in (0.0, 2 * EPSILON):  # control: a dropped or a doubled epsilon would be seen
        assert (layer(x).double() - keras_inference(x, *arrays(), wrong)).abs().max() > 1e-2


def test_the_weights_of_titu1994s_layer_keep_both_of_its_epsilons():
    # Its last array is the average of sigma_B^2 = var_B + epsilon, under the name of a standard deviation.
    gamma, beta, mean, variance = arrays()
    stored = variance + EPSILON
    config = {"epsilon": EPSILON, "momentum": 0.9, "t_delta": 1e-3, "r_max_value": 2.0, "d_max_value": 1.5}
    x = inputs()
    for weights in (
        [gamma, beta, mean, stored],
        {
            f"batch_renormalization_3_{name}": value
            for name, value in zip(
                ("gamma", "beta", "running_mean", "running_std"), [gamma, beta, mean, stored], strict=True
            )
        },
    ):
        layer = load_keras(weights, config).eval()
        assert_same(layer(x), keras_inference(x, gamma, beta, mean, variance, 2 * EPSILON))
        assert (layer.r_max, layer.d_max, layer.stat) == (2.0, 1.5, "var")
        as_deviation = keras_inference(x, gamma, beta, mean, stored**2, 0.0)
        assert (layer(x).double() - as_deviation).abs().max() > 0.1  # control: what the name suggests is wrong


def test_the_second_set_of_statistics_drives_r_and_d():
    rng = np.random.default_rng(5)
    deviation, renorm_mean = np.geomspace(0.3, 2, C), rng.normal(size=C)
    weights = [*(a.astype(np.float64) for a in arrays()), np.sqrt(arrays()[3]), renorm_mean, deviation]
    config = {"epsilon": EPSILON, "renorm_momentum": 0.8, "renorm_clipping": {"rmax": 1.5, "dmax": 0.7}}
    layer = load_keras(weights, config, dims=1)
    assert layer.renorm_momentum == pytest.approx(0.2)
    x = inputs((16, C)).double()
    sigma_b = torch.sqrt(x.var(0, unbiased=False) + EPSILON)
    r = (sigma_b / torch.tensor(deviation)).clamp(1 / 1.5, 1.5)
    d = ((x.mean(0) - torch.tensor(renorm_mean)) / torch.tensor(deviation)).clamp(-0.7, 0.7)
    want = ((x - x.mean(0)) / sigma_b * r + d) * torch.tensor(weights[0]) + torch.tensor(weights[1])
    torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)
    one_set = load_keras(weights[:4], config, dims=1)
    assert (one_set(x) - want).abs().max() > 0.1  # control


@pytest.mark.parametrize(
    "names",
    [
        ("bn/gamma:0", "bn/beta:0", "bn/moving_mean:0", "bn/moving_variance:0"),
        ("stage/bn_1/gamma", "stage/bn_1/beta", "stage/bn_1/moving_mean", "stage/bn_1/moving_variance"),
    ],
)
def test_arrays_may_come_by_name_in_any_order(names):
    named = dict(reversed(list(zip(names, arrays(), strict=True))))
    x = inputs()
    assert_same(load_keras({**named, "bn/renorm_mean_weight:0": 0.9}).eval()(x), keras_inference(x, *arrays(), 1e-3))


@pytest.mark.parametrize(("scale", "center"), [(True, False), (False, True), (False, False)])
def test_a_layer_without_gamma_or_beta_gains_nothing_to_train(scale, center):
    gamma, beta, mean, variance = arrays()
    weights = [*([gamma] if scale else []), *([beta] if center else []), mean, variance]
    layer = load_keras(weights, {"scale": scale, "center": center}).eval()
    x = inputs()
    gamma, beta = gamma if scale else np.ones(C), beta if center else np.zeros(C)
    assert_same(layer(x), keras_inference(x, gamma, beta, mean, variance, 1e-3))
    assert sum(p.requires_grad for p in layer.parameters()) == scale + center


def test_dims_dtype_and_options_are_as_asked():
    assert type(load_keras(arrays(), dims=1)) is BatchRenorm1d
    assert type(load_keras(arrays(), dims=3)) is BatchRenorm3d
    assert load_keras([a.astype(np.float64) for a in arrays()]).weight.dtype == torch.float64
    assert load_keras(arrays(), dtype=torch.float64).running_var.dtype == torch.float64
    assert load_keras(arrays(), schedule=Sigmoid()).schedule == Sigmoid()


@pytest.mark.parametrize(
    ("clipping", "expected"),
    [({"rmax": 2.0, "rmin": 0.25}, "0.5"), ({"rmax": 1.5, "rmin": 0.6}, "0.666667"), ({"rmin": 0.5}, "0.333333")],
    ids=str,
)
def test_a_least_r_that_is_not_one_over_the_largest_is_refused(clipping, expected):
    config = {"renorm_clipping": clipping}
    said = (
        rf"renorm_clipping has rmin={clipping['rmin']}, expected 1/rmax={expected} because r lies in \[1/r_max, r_max\]"
    )
    with pytest.raises(InputError, match=said):
        load_keras(arrays(), config)
    assert load_keras(arrays(), config, r_max=2.5).r_max == 2.5


@pytest.mark.parametrize("clipping", [{"rmax": 3, "rmin": 0.333}, {"rmin": 1 / 3}, {"rmax": 3.0}, {"rmin": None}])
def test_a_least_r_that_is_one_over_the_largest_is_taken(clipping):
    assert load_keras(arrays(), {"renorm_clipping": clipping}).r_max == 3.0


@pytest.mark.parametrize("name", ["num_features", "affine", "bias", "track_running_stats"])
def test_an_option_that_follows_from_the_weights_is_refused_by_name(name):
    with pytest.raises(InputError, match=f"load_keras: {name}=False, expected no such option: it follows from the wei"):
        load_keras(arrays(), **{name: False})


def test_a_second_set_asked_for_without_arrays_for_it_starts_as_the_first():
    layer = load_keras(arrays(), renorm_momentum=0.1)
    assert torch.equal(layer.renorm_mean, torch.tensor(arrays()[2]))
    assert torch.equal(layer.renorm_var, torch.tensor(arrays()[3]))


@pytest.mark.parametrize("position", [0, 1, 2, 3, 5])
def test_values_beyond_the_type_asked_for_are_refused_instead_of_becoming_infinite(position):
    weights = [*arrays(), np.sqrt(arrays()[3]), arrays()[2], np.sqrt(arrays()[3])]
    weights[position] = weights[position] + np.float32(1e5)
    names = ["weight", "bias", "running_mean", "running_var", None, "renorm_mean"]
    with pytest.raises(InputError, match=rf"load_keras: {names[position]} goes beyond 65504, .*: pass a wider"):
        load_keras(weights, dtype=torch.float16)
    assert load_keras(weights).weight.isfinite().all()
    weights[position] = weights[position] / 10  # control: what the type holds is taken
    assert load_keras(weights, dtype=torch.float16).weight.dtype == torch.float16


def test_a_squared_deviation_beyond_the_arrays_type_is_refused():
    weights = [a.astype(np.float16) for a in (*arrays(), arrays()[3], arrays()[2], np.full(C, 300.0))]
    with pytest.raises(InputError, match=r"renorm_var goes beyond 65504, the largest number of torch\.float16"):
        load_keras(weights)
    assert load_keras(weights, dtype=torch.float32).renorm_var.max() == pytest.approx(9e4, rel=1e-3)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (arrays()[:3], r"got 3 arrays, expected 4 \(gamma, beta, moving_mean, moving_variance\) or 7 \(then"),
        ({"kernel": [1.0]}, r"got weights \('kernel',\), expected a moving_mean or a running_mean among them"),
        ({"moving_mean": [1.0]}, r"got weights \('moving_mean',\), expected 'moving_variance' among them"),
        ({"moving_mean": [1.0], "moving_variance": [1.0], "kernel": [1.0]}, "weight 'kernel' is not one of"),
        ([*arrays()[:3], [1.0, 2.0]], r"moving_variance has shape \(2,\) and dtype float64, .* of shape \(4,\)"),
        ([[1, 2]] * 4, "gamma has shape .* and dtype int64, expected floating-point"),
        ([*arrays()[:3], -arrays()[3]], r"moving_variance lies in \[-9\.0, -0\.0\d+\], expected finite numbers >= 0"),
        ([*arrays()[:3], arrays()[3] * np.nan], r"moving_variance lies in \[nan, nan\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        load_keras(weights)


def test_bad_dims_and_bad_options_are_refused():
    with pytest.raises(InputError, match="dims=4, expected 1, 2 or 3"):
        load_keras(arrays(), dims=4)
    with pytest.raises(InputError, match=r"r_max=0\.1"):
        load_keras(arrays(), r_max=0.1)


@pytest.mark.peers
@pytest.mark.parametrize(
    "options", [{}, {"renorm_clipping": {"rmax": 1.5, "rmin": 1 / 1.5, "dmax": 0.5}, "epsilon": 0.05}, {"scale": False}]
)
def test_a_trained_layer_of_real_keras_evaluates_alike(options, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs: at import, and whenever a variable becomes an array
        keras = pytest.importorskip("keras", reason="keras is not installed")
        layer = keras.layers.BatchNormalization(renorm=True, momentum=0.9, **options)
        for step in range(20):
            x = torch.randn((8, 5, 5, C), generator=torch.Generator().manual_seed(step)) * torch.logspace(-2, 1, C)
            layer(x + step / 10, training=True)
        layer.set_weights([w + 0.1 * i for i, w in enumerate(layer.get_weights())])
        x = torch.randn((2, 5, 5, C), generator=torch.Generator().manual_seed(99))
        want = layer(x, training=False).detach().permute(0, 3, 1, 2)
        forms = [layer.get_weights(), {v.path: v.numpy() for v in layer.weights}]
    for weights in forms:
        ours = load_keras(weights, layer.get_config()).eval()
        torch.testing.assert_close(ours(x.permute(0, 3, 1, 2)), want, rtol=1e-5, atol=1e-5)

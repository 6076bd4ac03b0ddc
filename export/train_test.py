"""Training learns, repeats itself, and reports the corrections that Algorithm 1 defines."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from export.data import ImageSet, digits
from export.train import CorrectionProbe, Recipe, augmented, choose_device, predict, train
from models.wide_resnet import wide_resnet
from renorm_onnx.errors import InputError, MachineError
from renorm_onnx.layers.modules import BatchRenorm2d
from renorm_onnx.layers.schedules import stretched

CPU = torch.device("cpu")


def stripes(count: int = 64) -> ImageSet:
    """Horizontal against vertical stripes, with noise: learnable in a few steps."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 2
    wave = np.sign(np.sin(np.arange(8) * np.pi / 2 + 0.7))
    pattern = np.stack([np.tile(wave[:, None], (1, 8)), np.tile(wave[None, :], (8, 1))])
    images = (pattern[labels] + 0.3 * rng.standard_normal((count, 8, 8)))[:, None].astype(np.float32)
    half = count // 2
    return ImageSet("stripes", "made here", images[:half], labels[:half], images[half:], labels[half:], flips=False)


def small_network(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 2),
    )  # fmt: skip


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchRenorm2d])
def test_training_learns_a_learnable_task_and_ends_in_inference_mode(norm: type[nn.Module]) -> None:
    network = small_network(norm)
    curves = train(network, stripes(), Recipe(120, 4, evaluations=4), CPU, label="test")
    assert not any(module.training for module in network.modules())
    assert curves.step == [30, 60, 90, 120]
    assert curves.train_loss[-1] < 0.5 * curves.train_loss[0]
    assert curves.test_error[-1] <= 0.1
    assert len({len(values) for values in curves.to_dict().values()}) == 1


def test_training_twice_gives_the_same_numbers_and_another_seed_gives_others() -> None:
    first, again, other = (
        train(small_network(), stripes(), Recipe(10, 4, seed=seed, evaluations=2), CPU, label="test").to_dict()
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first["train_loss"] != other["train_loss"]


def test_the_last_point_of_a_curve_is_what_predict_gives() -> None:
    network, data = small_network(), stripes()
    curves = train(network, data, Recipe(10, 4, evaluations=2), CPU, label="test")
    logits = predict(network, data.test_images, CPU, batch=7)
    assert curves.test_error[-1] == pytest.approx(np.mean(logits.argmax(1).numpy() != data.test_labels))
    with torch.no_grad():
        torch.testing.assert_close(logits, network(torch.from_numpy(data.test_images)))


def test_predict_restores_the_mode_of_the_network() -> None:
    network = small_network().train()
    predict(network, stripes().test_images, CPU)
    assert network.training


def test_the_probe_sees_r_and_d_of_algorithm_1_before_the_update() -> None:
    torch.manual_seed(0)
    layer = BatchRenorm2d(3, schedule=stretched(8), r_max=3, d_max=5).train()
    layer.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    layer.running_var.copy_(torch.tensor([0.25, 4.0, 1.0]))
    layer.num_batches_tracked.fill_(4)
    x = 2 * torch.randn(4, 3, 5, 5) + 1
    network = nn.Sequential(layer)
    sigma = (layer.running_var.double() + layer.eps).sqrt()
    want_r = (x.double().var((0, 2, 3), unbiased=False) + layer.eps).sqrt() / sigma
    want_d = (x.double().mean((0, 2, 3)) - layer.running_mean) / sigma
    with CorrectionProbe(network) as probe:
        network(x)
    torch.testing.assert_close(probe.r[0].double(), want_r, rtol=1e-5, atol=0)
    torch.testing.assert_close(probe.d[0].double(), want_d, rtol=1e-5, atol=1e-6)
    # stretched(8) squeezes 40,000 steps to 8: start at step 1, r_max at 8, d_max at 5; this is step 4.
    assert probe.r_max == pytest.approx(1 + 2 * 3 / 7)
    assert probe.d_max == pytest.approx(5 * 3 / 4)
    (low, median, high), _ = probe.quantiles()
    assert low < median < high
    network(x)
    assert len(probe.r) == 1


def test_the_probe_does_not_change_what_training_computes() -> None:
    plain = small_network(BatchRenorm2d).train()
    probed = copy.deepcopy(plain)
    x = torch.randn(4, 1, 8, 8)
    with CorrectionProbe(probed):
        torch.testing.assert_close(probed(x), plain(x), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), probed.buffers(), strict=True))


def test_the_probe_of_a_network_without_renorm_reports_no_correction() -> None:
    network = small_network().train()
    with CorrectionProbe(network) as probe:
        network(torch.randn(4, 1, 8, 8))
    assert probe.quantiles() == ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    assert (probe.r_max, probe.d_max) == (1.0, 0.0)


def test_augmentation_shifts_every_image_by_its_own_offset_and_repeats_edges() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    shifted = augmented(image.expand(200, 2, 8, 8), torch.Generator().manual_seed(0), flips=False)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1), mode="replicate")[0, 0]
    windows = {(i, j): padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)}
    seen = set()
    for one in shifted:
        assert torch.equal(one[0], one[1])
        seen |= {offset for offset, window in windows.items() if torch.equal(one[0], window)}
    assert seen == set(windows)


def test_augmentation_mirrors_about_half_of_the_images_where_it_may() -> None:
    ramp = torch.arange(8.0).expand(200, 1, 8, 8)
    mirrored = augmented(ramp, torch.Generator().manual_seed(0), flips=True)
    falling = (mirrored[:, 0, 0, 2] > mirrored[:, 0, 0, 5]).sum()
    assert 60 < int(falling) < 140
    rising = augmented(ramp, torch.Generator().manual_seed(0), flips=False)
    assert (rising[:, 0, 0, 2] < rising[:, 0, 0, 5]).all()


def test_wide_resnet_learns_digits_with_batches_of_four() -> None:
    torch.manual_seed(0)
    network = wide_resnet(10, 1, in_channels=1, norm=lambda c: BatchRenorm2d(c, momentum=0.05, schedule=stretched(100)))
    curves = train(network, digits(), Recipe(120, 4, evaluations=3), CPU, label="test")
    assert curves.train_loss[-1] < curves.train_loss[0]
    assert curves.test_error[-1] < 0.75
    assert curves.r_max[-1] == 3.0
    assert curves.d_max[-1] == 5.0
    assert curves.r[-1][0] < 1 < curves.r[-1][2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "training: steps=0, expected at least 1"),
        ({"batch_size": 1}, "training: batch_size=1, expected at least 2"),
        ({"learning_rate": float("nan")}, "training: learning_rate=nan, expected a number > 0"),
    ],
)
def test_impossible_recipes_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**{"steps": 10, "batch_size": 4, **options})


def test_a_batch_larger_than_the_training_split_is_refused() -> None:
    with pytest.raises(InputError, match="batch_size=33, expected at most 32 images"):
        train(small_network(), stripes(), Recipe(1, 33), CPU, label="test")


def test_auto_takes_the_cpu_where_torch_finds_no_gpu_and_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == (CPU, "CPU")
    with pytest.raises(MachineError, match="device 'cuda': a convolution does not run on it: torch finds no CUDA"):
        choose_device("cuda")


def test_a_gpu_on_which_nothing_runs_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(
            "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors..."
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.functional, "conv2d", fail)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    assert choose_device("auto") == (CPU, "CPU")
    with pytest.raises(MachineError, match=r"does not run on it: CUDA error: no kernel image is available .* device$"):
        choose_device("cuda")

"""The digits are split alike every time; CIFAR-10 is read from its published format and from nothing else."""

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from export.data import cifar10, digits, load
from renorm_onnx.errors import InputError

CIFAR_FILES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """Write a batch byte by byte as Python 2's cPickle did (protocol 2), the way the published files are."""

    def string(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    shape = number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86"
    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + number(0) + number(1) + b"tR"
    dtype += b"(" + number(3) + string(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + number(0) + b"\x85" + string(b"b") + b"tR"
    array += b"(" + number(1) + shape + dtype + b"\x89" + string(pixels.tobytes()) + b"tb"
    items = string(b"data") + array + string(b"labels") + b"](" + b"".join(map(number, labels)) + b"e"
    items += string(b"batch_label") + string(b"training batch 1 of 5")
    return b"\x80\x02}(" + items + b"u."


def fake_batch(seed: int, count: int = 20) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), [int(v) for v in rng.permutation(count) % 10]


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for index, name in enumerate(CIFAR_FILES):
        (folder / name).write_bytes(python2_pickle(*fake_batch(index)))
    return folder


def test_digits_are_all_1797_images_in_a_stratified_split_without_overlap() -> None:
    data = digits()
    pixels, labels = load_digits(return_X_y=True)
    assert data.train_images.shape[1:] == (1, 8, 8)
    assert (data.channels, data.size, data.num_classes) == (1, 8, 10)
    both = np.concatenate([data.train_images, data.test_images])
    assert len(both) == len(labels) == 1797
    # The normalization is one affine map of the pixels, so undoing it must give back the same multiset of images.
    scale = (both.max() - both.min()) / 16
    restored = np.rint((both - both.min()) / scale).astype(int).reshape(len(both), -1)
    assert sorted(map(tuple, restored)) == sorted(map(tuple, pixels.astype(int)))
    shares = np.bincount(data.test_labels) / np.bincount(np.concatenate([data.train_labels, data.test_labels]))
    np.testing.assert_allclose(shares, 0.2, atol=0.005)


def test_digits_come_in_the_same_split_on_every_call_and_in_another_for_another_seed() -> None:
    first, again, other = digits(), digits(), digits(seed=1)
    assert np.array_equal(first.test_images, again.test_images)
    assert np.array_equal(first.test_labels, again.test_labels)
    assert not np.array_equal(first.test_images, other.test_images)


def test_images_are_normalized_by_the_training_split() -> None:
    data = digits()
    assert abs(data.train_images.mean()) < 1e-6
    assert abs(data.train_images.std() - 1) < 1e-5
    assert data.test_images.mean() != 0
    assert data.train_images.dtype == data.test_images.dtype == np.float32


@pytest.mark.parametrize("inner", [True, False])
def test_cifar10_reads_python_2_pickles_from_the_folder_or_the_one_above(cifar_folder: Path, inner: bool) -> None:
    data = load("cifar10", cifar_folder if inner else cifar_folder.parent)
    assert data.train_images.shape == (100, 3, 32, 32)
    assert data.test_images.shape == (20, 3, 32, 32)
    pixels, labels = fake_batch(2)
    assert data.train_labels[40:60].tolist() == labels
    everything = np.concatenate([fake_batch(i)[0] for i in range(5)]).reshape(-1, 3, 1024).astype(np.float64)
    mean, sigma = everything.mean((0, 2)), everything.std((0, 2))
    want = (pixels[3].reshape(3, 32, 32) - mean[:, None, None]) / sigma[:, None, None]
    np.testing.assert_allclose(data.train_images[43], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar10_reads_batches_that_python_3_wrote_again(cifar_folder: Path, protocol: int) -> None:
    pixels, labels = fake_batch(1)
    content = {b"data": pixels, b"labels": labels, b"batch_label": b"training batch 2 of 5"}
    before = load("cifar10", cifar_folder)
    (cifar_folder / "data_batch_2").write_bytes(pickle.dumps(content, protocol=protocol))
    after = load("cifar10", cifar_folder)
    assert np.array_equal(before.train_images, after.train_images)
    assert np.array_equal(before.train_labels, after.train_labels)


def test_a_missing_batch_is_one_line_that_names_the_file(cifar_folder: Path) -> None:
    (cifar_folder / "data_batch_4").unlink()
    with pytest.raises(InputError, match=r"data_batch_4' is missing; extract cifar-10-python.tar.gz") as caught:
        cifar10(cifar_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 50, 30_000])
def test_a_truncated_batch_is_one_line_that_names_the_file(cifar_folder: Path, length: int) -> None:
    path = cifar_folder / "test_batch"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="test_batch' is damaged or no CIFAR-10 batch") as caught:
        cifar10(cifar_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected a dictionary"),
        ({b"labels": [0]}, r"'data' in .* is NoneType, expected uint8 of shape \(N, 3072\)"),
        ({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}, r"is uint8 of shape \(2, 3071\), expected uint8"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "'labels' in .* are not 2 numbers from 0 to 9"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "'labels' in .* are not 1 numbers from 0 to 9"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [[1]]}, "'labels' in .* are not 1 numbers from 0 to 9"),
        ({b"data": np.zeros((1, 3072), np.float64), b"labels": [1]}, "holds an array of type 'f8', expected 'u1'"),
    ],
)
def test_a_batch_with_other_content_is_refused(cifar_folder: Path, content: Any, message: str) -> None:
    (cifar_folder / "data_batch_1").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InputError, match=message) as caught:
        cifar10(cifar_folder)
    assert "data_batch_1" in str(caught.value)


def test_a_batch_that_would_run_code_is_refused_without_running_it(cifar_folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {trace}",)

    (cifar_folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Hostile()}, protocol=2))
    with pytest.raises(InputError, match=r"data_batch_1' is damaged .* asks for posix.system"):
        cifar10(cifar_folder)
    assert not trace.exists()


def test_a_folder_in_place_of_a_batch_is_named(cifar_folder: Path) -> None:
    (cifar_folder / "data_batch_1").unlink()
    (cifar_folder / "data_batch_1").mkdir()
    with pytest.raises(InputError, match="data_batch_1' is not a file"):
        cifar10(cifar_folder)


def test_unknown_sets_and_useless_roots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data 'mnist': not known, expected one of digits, cifar10"):
        load("mnist")
    with pytest.raises(InputError, match="data 'cifar10': no root given"):
        load("cifar10")
    with pytest.raises(InputError, match=r"root=.* is not used"):
        load("digits", tmp_path)

"""Image sets for training: scikit-learn's bundled digits, and CIFAR-10 from a local folder.

Both come split, normalized by the training split's mean and standard deviation per channel, and the same on every call.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from renorm_onnx.errors import InputError

_CIFAR_FOLDER = "cifar-10-batches-py"
_CIFAR_TRAIN = tuple(f"data_batch_{index}" for index in range(1, 6))
_CIFAR_TEST = "test_batch"
_CIFAR_FILE_LIMIT = 256 * 2**20  # bytes; a published batch has 31 MB

DATA_SETS = ("digits", "cifar10")
"""Names that `load` knows."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, split for training and testing.

    Attributes:
        name: One of `DATA_SETS`.
        source: Where the images come from, for people.
        train_images: float32 of shape (N, C, H, W), zero mean and unit variance per channel.
        train_labels: int64 of shape (N,), from 0.
        test_images: Like `train_images`, scaled by the training split's numbers.
        test_labels: Like `train_labels`.
        flips: Whether a mirrored image keeps its label.
    """

    name: str
    source: str
    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int64]
    flips: bool

    @property
    def channels(self) -> int:
        """C of the images."""
        return int(self.train_images.shape[1])

    @property
    def size(self) -> int:
        """H of the images, which are square, in pixels."""
        return int(self.train_images.shape[2])

    @property
    def num_classes(self) -> int:
        """One more than the largest training label."""
        return int(self.train_labels.max()) + 1


def load(name: str, root: Path | None = None) -> ImageSet:
    """Load an image set by name.

    Args:
        name: "digits" needs nothing; "cifar10" reads `root`.
        root: The folder of CIFAR-10's python version, or the folder that holds it.

    Returns:
        The set, the same on every call.

    Raises:
        InputError: The name is unknown, `root` is missing or unused, or a file in it is absent or damaged.
    """
    if name == "digits":
        if root is not None:
            raise InputError(f"data 'digits': root={str(root)!r} is not used; the digits come with scikit-learn")
        return digits()
    if name == "cifar10":
        if root is None:
            raise InputError("data 'cifar10': no root given; pass the folder that holds data_batch_1 (--root DIR)")
        return cifar10(root)
    raise InputError(f"data {name!r}: not known, expected one of {', '.join(DATA_SETS)}")


def digits(*, test_fraction: float = 0.2, seed: int = 0) -> ImageSet:
    """Load the 1,797 handwritten digits that come with scikit-learn, 8x8 pixels each.

    Source: the test part of Alpaydin & Kaynak 1998, UCI "Optical Recognition of Handwritten Digits".

    Args:
        test_fraction: Share of each class that goes to the test split.
        seed: Of the split.

    Returns:
        A set with one channel; every class has the same share in both splits.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 1, 8, 8)  # (N, 64) -> (N, C, H, W)
    labels = labels.astype(np.int64)
    rng = np.random.default_rng(seed)
    in_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        in_test[members[: round(test_fraction * len(members))]] = True
    train, test = _normalized(images[~in_test], images[in_test])
    source = f"scikit-learn's handwritten digits, {len(labels):,} images"
    return ImageSet("digits", source, train, labels[~in_test], test, labels[in_test], flips=False)


def cifar10(root: Path) -> ImageSet:
    """Load CIFAR-10 from the files of its published python version.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html, "CIFAR-10 python version": pickled dictionaries whose "data" is
    a uint8 array (N, 3072), red then green then blue rows, and whose "labels" is a list of N numbers from 0 to 9.

    Args:
        root: The folder `cifar-10-batches-py`, or the one that holds it.

    Returns:
        A set with three channels of 32x32 pixels.

    Raises:
        InputError: A file is absent, unreadable or not what the format says; the message names it.
    """
    folder = root / _CIFAR_FOLDER if (root / _CIFAR_FOLDER).is_dir() else root
    parts = [_cifar_batch(folder / name) for name in _CIFAR_TRAIN]
    test_pixels, test_labels = _cifar_batch(folder / _CIFAR_TEST)
    train, test = _normalized(np.concatenate([pixels for pixels, _ in parts]), test_pixels)
    train_labels = np.concatenate([labels for _, labels in parts])
    source = f"CIFAR-10, {len(train) + len(test):,} images"
    return ImageSet("cifar10", source, train, train_labels, test, test_labels, flips=True)


def _normalized(train: NDArray[Any], test: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    mean = train.mean(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    sigma = train.std(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    sigma = np.where(sigma > 0, sigma, 1.0)
    return ((train - mean) / sigma).astype(np.float32), ((test - mean) / sigma).astype(np.float32)


def _cifar_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read one batch file into pixels (N, 3, 32, 32) and labels (N,)."""
    content = _unpickled(path)
    if not isinstance(content, dict):
        raise InputError(f"CIFAR-10: {str(path)!r} holds a {type(content).__name__}, expected a dictionary")
    data, labels = (content.get(key.encode(), content.get(key)) for key in ("data", "labels"))
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072):
        came = f"{data.dtype} of shape {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise InputError(f"CIFAR-10: 'data' in {str(path)!r} is {came}, expected uint8 of shape (N, 3072)")
    if not (isinstance(labels, list) and len(labels) == len(data) > 0 and all(map(_is_label, labels))):
        raise InputError(f"CIFAR-10: 'labels' in {str(path)!r} are not {len(data)} numbers from 0 to 9")
    return data.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)  # (N, 3072) -> (N, C, H, W)


def _is_label(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 10


def _unpickled(path: Path) -> Any:
    if not path.is_file():
        what = "is not a file" if path.exists() else "is missing"
        raise InputError(f"CIFAR-10: {str(path)!r} {what}; extract cifar-10-python.tar.gz there, or correct the root")
    try:
        if path.stat().st_size > _CIFAR_FILE_LIMIT:
            raise InputError(
                f"CIFAR-10: {str(path)!r} has {path.stat().st_size:,} bytes, expected at most {_CIFAR_FILE_LIMIT:,}"
            )
        with path.open("rb") as file:
            return _CifarUnpickler(file, encoding="bytes").load()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"CIFAR-10: {str(path)!r} cannot be read: {error.strerror}") from error
    except Exception as error:  # A damaged pickle raises almost anything, from EOFError to MemoryError.
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"CIFAR-10: {str(path)!r} is damaged or no CIFAR-10 batch; extract it again ({cause})"
        ) from error


class _CifarUnpickler(pickle.Unpickler):
    """Read what a CIFAR-10 batch holds (dictionaries, lists, bytes, byte arrays) and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): _empty_array,
            ("numpy._core.multiarray", "_reconstruct"): _empty_array,
            ("numpy", "ndarray"): _ARRAY_TYPE,
            ("numpy", "dtype"): _byte_type,
            ("_codecs", "encode"): _latin1,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch needs")
        return allowed[module, name]


# Stands for numpy.ndarray as an argument of _reconstruct, and cannot be called.
_ARRAY_TYPE = object()


def _empty_array(*_: Any) -> NDArray[np.uint8]:
    """Give the array that the pickle's state then fills."""
    return np.empty(0, np.uint8)


def _byte_type(code: str | bytes, *_: Any) -> np.dtype[np.uint8]:
    if code not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"it holds an array of type {code!r}, expected 'u1'")
    return np.dtype("u1", copy=True)


def _latin1(text: str, encoding: str | bytes) -> bytes:
    """Encode as Python 3 pickles bytes under protocol 2."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it encodes by {encoding!r}, expected 'latin1'")
    return text.encode("latin1")

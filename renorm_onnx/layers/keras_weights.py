"""Batch renormalization layers of Keras, from the arrays in which their weights are kept.

Two layers, with these weights in this order::

    Keras 3, tf-keras     gamma, beta, moving_mean, moving_variance, then with renorm=True moving_stddev, renorm_mean,
                          renorm_stddev; inference divides by sqrt(moving_variance + epsilon)
    titu1994's            gamma, beta, running_mean, running_std; the last holds, despite its name, the average of the
                          variance plus epsilon, and inference adds epsilon again: sqrt(running_std + epsilon)

So both fold alike: the fourth array is `running_var` and epsilon is `eps`, nothing added and nothing taken away.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from renorm_onnx.errors import InputError
from renorm_onnx.layers.functional import Stat
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, _BatchRenorm
from renorm_onnx.layers.swap import start_second_set

_LAYERS: dict[int, type[_BatchRenorm]] = {1: BatchRenorm1d, 2: BatchRenorm2d, 3: BatchRenorm3d}


@dataclass(frozen=True)
class KerasLayer:
    """Names of a Keras layer's weights, in their order."""

    mean: str
    variance: str
    further: tuple[str, ...]  # in the list only if the layer keeps a second set of statistics
    stat: Stat

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the first four, which every layer with gamma and beta has."""
        return "gamma", "beta", self.mean, self.variance


KERAS = KerasLayer("moving_mean", "moving_variance", ("moving_stddev", "renorm_mean", "renorm_stddev"), "sigma")
TITU1994 = KerasLayer("running_mean", "running_std", (), "var")
_KNOWN = (KERAS, TITU1994)
# Of TensorFlow 1: how far its averages have come. It divided by them before it stored moving_variance.
_IGNORED = ("renorm_mean_weight", "renorm_stddev_weight")


def load_keras(
    weights: Mapping[str, ArrayLike] | Sequence[ArrayLike],
    config: Mapping[str, Any] | None = None,
    *,
    dims: int = 2,
    **options: Any,
) -> _BatchRenorm:
    """Make a layer of ours from the weights of a Keras `BatchNormalization(renorm=True)` or titu1994's layer.

    Evaluation is equal within rounding. The channel is axis 1 here, as always in torch, and mostly the last in Keras.
    Keras' momentum m is the share that is kept, torch's the share that is new: 1 - m. A second set of statistics
    (`renorm_mean`, `renorm_stddev`) is taken over with its momentum. The bounds hold from the first step, since neither
    layer stores how far it has come; they are those of `config`, else 3 and 5, also where Keras would not clip. Keras
    clips r to [rmin, rmax], this layer to [1/r_max, r_max].

    >>> load_keras([[1.0, 2.0], [0.0, 0.5], [0.1, 0.2], [1.0, 4.0]], dims=1, dtype=torch.float32).running_var
    tensor([1., 4.])

    Args:
        weights: What `layer.get_weights()` returned; or arrays by name, with or without the layer's name before it
            (`bn/moving_mean:0`, `batch_renorm_1_running_std`).
        config: What `layer.get_config()` returned; None for the layers' common defaults.
        dims: 1, 2 or 3, for `BatchRenorm1d`, `2d` or `3d`.
        **options: As in `BatchRenorm2d`, instead of what follows from `config`; what follows from the weights
            (`num_features`, `affine`, `bias`, `track_running_stats`) cannot be given.

    Returns:
        The layer, in training mode, of the arrays' type unless `dtype` is given.

    Raises:
        InputError: Arrays are missing, unknown, of unequal or wrong shape, or hold values that cannot be used, or that
            `dtype` does not hold; an option is given that follows from the weights; `config` has a rmin that is not
            1/rmax, and no r_max is given instead.
        TypeError: `options` names something that no layer takes.
    """
    if dims not in _LAYERS:
        raise InputError(f"load_keras: dims={dims!r}, expected 1, 2 or 3 for BatchRenorm1d, 2d or 3d")
    config = {} if config is None else config
    layer, arrays = _named(weights, config)
    tensors = _tensors(layer, arrays)
    mean = tensors[layer.mean]
    eps = float(config.get("epsilon", 1e-3))
    clipping = config.get("renorm_clipping") or {}
    own: dict[str, Any] = {
        "eps": eps,
        "momentum": 1 - float(config.get("momentum", 0.99)),
        "dtype": mean.dtype,
        "r_max": _first(clipping.get("rmax"), config.get("r_max_value"), 3.0),
        "d_max": _first(clipping.get("dmax"), config.get("d_max_value"), 5.0),
        "schedule": None,
        "stat": layer.stat,
    }
    if "renorm_mean" in tensors:
        own["renorm_momentum"] = 1 - float(config.get("renorm_momentum", 0.99))
    for name in ("num_features", "affine", "bias", "track_running_stats"):
        if name in options:
            raise InputError(
                f"load_keras: {name}={options[name]!r}, expected no such option: it follows from the weights"
            )
    affine = "gamma" in tensors or "beta" in tensors
    made = _LAYERS[dims](mean.numel(), affine=affine, **{**own, **options})
    least, expected = clipping.get("rmin"), 1 / made.r_max
    # To the third digit, as one writes 0.333.
    if least is not None and "r_max" not in options and not math.isclose(least, expected, rel_tol=2e-3):
        raise InputError(
            f"load_keras: renorm_clipping has rmin={least!r}, expected 1/rmax={expected:.6g} because r lies in "
            "[1/r_max, r_max] here; pass the r_max to train with"
        )
    _fill(made, layer, tensors, eps)
    return made


def _fill(made: _BatchRenorm, layer: KerasLayer, tensors: Mapping[str, Tensor], eps: float) -> None:
    """Copy the arrays into the layer, in place.

    Raises:
        InputError: The type of the layer does not hold a value.
    """
    buffers: dict[str, Any] = made._buffers
    with torch.no_grad():
        for name, parameter in (("gamma", made.weight), ("beta", made.bias)):
            if name in tensors:
                parameter.copy_(tensors[name])
            elif made.affine:
                parameter.requires_grad_(False)  # Keras has none: it stays 1, or 0
        buffers["running_mean"].copy_(tensors[layer.mean])
        buffers["running_var"].copy_(tensors[layer.variance])
        start_second_set(made)
        if "renorm_mean" in buffers and "renorm_mean" in tensors:
            buffers["renorm_mean"].copy_(tensors["renorm_mean"])
            # The square may be beyond the arrays' type, though not beyond that of the layer.
            buffers["renorm_var"].copy_((tensors["renorm_stddev"].double().square() - eps).clamp(min=0))
    for name, kept in made.state_dict().items():
        if not kept.isfinite().all():
            raise InputError(
                f"load_keras: {name} goes beyond {torch.finfo(kept.dtype).max:g}, the largest number of {kept.dtype}, "
                "expected a type that holds it: pass a wider dtype"
            )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _named(
    weights: Mapping[str, ArrayLike] | Sequence[ArrayLike], config: Mapping[str, Any]
) -> tuple[KerasLayer, dict[str, ArrayLike]]:
    """Tell the layer, and call each of its arrays by its own name."""
    if isinstance(weights, Mapping):
        for layer in _KNOWN:
            fields = {key: _field(layer, key) for key in weights}
            if layer.mean in fields.values():
                unknown = [key for key, field in fields.items() if field is None]
                if unknown:
                    raise InputError(
                        f"load_keras: weight {unknown[0]!r} is not one of {(*layer.order, *layer.further)}"
                    )
                return layer, {field: weights[key] for key, field in fields.items() if field not in (None, *_IGNORED)}
        raise InputError(
            f"load_keras: got weights {tuple(weights)}, expected a moving_mean or a running_mean among them"
        )
    layer = TITU1994 if "t_delta" in config else KERAS
    absent = {name for name, key in (("gamma", "scale"), ("beta", "center")) if not config.get(key, True)}
    short = [name for name in layer.order if name not in absent]
    for names in (short, [*short, *layer.further]):
        if len(names) == len(weights):
            return layer, dict(zip(names, weights, strict=True))
    raise InputError(
        f"load_keras: got {len(weights)} arrays, expected {len(short)} ({', '.join(short)})"
        + (f" or {len(short) + len(layer.further)} (then {', '.join(layer.further)})" if layer.further else "")
        + "; give them by name, or give the config that says which are absent"
    )


def _field(layer: KerasLayer, key: str) -> str | None:
    """`block/bn_1/moving_mean:0` -> moving_mean."""
    last = key.split("/")[-1].split(":")[0]
    known = (*_IGNORED, *layer.order, *layer.further)
    return next((name for name in known if last == name or last.endswith(f"_{name}")), None)


def _tensors(layer: KerasLayer, arrays: Mapping[str, ArrayLike]) -> dict[str, Tensor]:
    needed = [layer.mean, layer.variance, *(("renorm_mean", "renorm_stddev") if "renorm_mean" in arrays else ())]
    for name in needed:
        if name not in arrays:
            raise InputError(f"load_keras: got weights {tuple(arrays)}, expected {name!r} among them")
    found = {}
    channels = np.shape(arrays[layer.mean])
    for name, values in arrays.items():
        array = np.array(values)
        if array.ndim != 1 or array.shape != channels or not np.issubdtype(array.dtype, np.floating):
            raise InputError(
                f"load_keras: {name} has shape {array.shape} and dtype {array.dtype}, expected floating-point numbers "
                f"of shape {channels if len(channels) == 1 else '(C,)'}"
            )
        if not np.isfinite(array).all() or (name in (layer.variance, "renorm_stddev") and (array < 0).any()):
            raise InputError(f"load_keras: {name} lies in [{array.min()}, {array.max()}], expected finite numbers >= 0")
        found[name] = torch.from_numpy(array)
    return found

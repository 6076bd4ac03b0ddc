"""Inputs to judge a model with: made ones of several kinds at several sizes, or real data from a file or folder.

Ordinary kinds look like what networks are fed; the verdict's limits were calibrated on them. The others are there to
show what ordinary data hide: overflow, underflow, division by zero, a shift that grows or vanishes with the input.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx.errors import InputError
from renorm_onnx.runtime.stated_sizes import stated_sizes

Array = npt.NDArray[Any]

ORDINARY = ("normal", "uniform", "image")
EXTREME = ("large", "small", "mixed", "zeros", "constant", "denormal")
KINDS = (*ORDINARY, *EXTREME)

# Kinds whose values are no larger than ordinary ones, so that ordinary rounding errors are the yardstick for them too,
# and so alike that behind a bias all positions are equal, or nearly.
SMALL = ("small", "zeros", "constant", "denormal")

_SAME_VALUES = frozenset({"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Slice"})
# Where integers are no index, size or axis, by operator and position; what comes out of it may yet become one.
_COUNTED: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Min", "Max", "Sum", "Concat"), tuple(range(100))),
    **dict.fromkeys(("Neg", "Abs", "Sign", "Clip", "Relu", "Div", "Mod", "Pow", "ReduceSum", "ReduceMax"), (0,)),
    **dict.fromkeys(_SAME_VALUES, (0,)),
    "Where": (1, 2),
}
_COMPARISONS = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
_MOST = 8  # bits of the integers that are counted with
_WIDE = ("large", "mixed")
_SPATIAL = (32, 48, 64, 128, 224, 299)
_LENGTH = (16, 7, 32, 64)


@dataclass(frozen=True)
class Trial:
    """One set of inputs.

    Attributes:
        kind: One of `KINDS`, or "data" for arrays that the caller gave.
        feeds: One array per input.
        label: Kind and sizes, or the file it came from.
        note: What was done to the data that its owner may not expect; empty if nothing.
    """

    kind: str
    feeds: Mapping[str, Array]
    label: str
    note: str = ""

    @property
    def ordinary(self) -> bool:
        """Whether the calibrated limits hold."""
        return self.kind in ORDINARY or self.kind == "data"

    @property
    def alike(self) -> int:
        """How many equal numbers a pool may sum: the positions of a sample where all are about alike, else 1."""
        if self.kind not in SMALL:
            return 1
        samples = [array.shape[1:] for array in self.feeds.values() if array.ndim > 2 and array.size]
        return max((math.prod(shape) // min(shape) for shape in samples), default=1)


@dataclass(frozen=True)
class InputSpec:
    """An input that has to be fed.

    Attributes:
        name: Its name.
        dtype: Its element type.
        shape: A size per axis, or a string: the name of one that varies.
        bound: Integers are drawn from 0 up to, not including, this.
        wide: They are no index, no size and no axis: kinds with large numbers draw up to 255, half of them below 16.
        stated: Sizes that vary by declaration, and that the model's weights settle; by name.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]
    bound: int
    wide: bool = False
    stated: tuple[tuple[str, int], ...] = ()


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """Return what a model has to be fed: its inputs without an initializer.

    Raises:
        InputError: An input is no tensor of numbers, or its rank is unknown.
    """
    return tuple(_spec_of(value) for value in model.graph.inputs if value.name not in model.graph.initializers)


def _spec_of(value: ir.Value) -> InputSpec:
    if not isinstance(value.type, ir.TensorType) or value.dtype is None or value.dtype == ir.DataType.STRING:
        raise InputError(
            f"verify: input {value.name!r} has type {value.type}, expected a tensor of numbers; pass inputs="
        )
    if value.shape is None:
        raise InputError(f"verify: input {value.name!r} has no declared rank; pass inputs= with arrays for it")
    sizes: list[int | str] = []
    for axis, size in enumerate(value.shape.dims):
        symbol = getattr(size, "value", None)
        # Nameless sizes of one axis are one size: a batch is a batch for every input.
        sizes.append(
            size if isinstance(size, int) else symbol if isinstance(symbol, str) and symbol else f"axis {axis}"
        )
    dtype, bound = value.dtype.numpy(), _index_bound(value)
    wide = bound == 2 and dtype.kind in "iu" and np.iinfo(dtype).bits > _MOST and _is_counted_with(value)
    settled = stated_sizes(value, len(sizes)) if any(isinstance(size, str) for size in sizes) else {}
    stated = tuple(
        (name, settled[axis]) for axis, name in enumerate(sizes) if isinstance(name, str) and axis in settled
    )
    return InputSpec(value.name or "", dtype, tuple(sizes), bound, wide, stated)


def _uses_behind(value: ir.Value, passes: Callable[[ir.Node, int], bool]) -> Iterator[tuple[ir.Node, int]]:
    """Yield every use of a value, and of what comes out of the uses that pass it on."""
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        for node, position in current.uses():
            yield node, position
            if passes(node, position):
                pending.extend(node.outputs)


def _index_bound(value: ir.Value) -> int:
    """Return the number of rows of the smallest constant table that an integer input indexes, else 2."""
    bounds = []
    for node, position in _uses_behind(value, lambda node, at: node.op_type in _SAME_VALUES and at == 0):
        if node.op_type in ("Gather", "GatherElements") and position == 1 and node.inputs[0] is not None:
            axis = node.attributes.get_int("axis", 0)
            shape = node.inputs[0].shape
            rows = shape[axis] if shape is not None else None
            if isinstance(rows, int):
                bounds.append(rows)
    return max(1, min(bounds)) if bounds else 2


def _is_counted_with(value: ir.Value) -> bool:
    """Tell whether integers only meet arithmetic and comparisons, or become floats."""

    def goes_on(node: ir.Node, position: int) -> bool:
        return node.domain == "" and position in _COUNTED.get(node.op_type, ()) and not ends(node)

    def ends(node: ir.Node) -> bool:
        ending = node.op_type in _COMPARISONS or (node.op_type == "Cast" and _makes_no_integers(node))
        return ending and node.domain == ""

    return all(ends(node) or goes_on(node, position) for node, position in _uses_behind(value, goes_on))


def _makes_no_integers(cast: ir.Node) -> bool:
    to = cast.attributes.get("to")
    kind = ir.DataType.UNDEFINED if to is None or to.is_ref() else ir.DataType(to.as_int())
    return kind.is_floating_point() or kind is ir.DataType.BOOL


def size_plans(specs: Sequence[InputSpec], batch: int, given: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Yield values for the sizes that vary, the likeliest first; later ones are other sizes to try.

    Args:
        specs: The inputs.
        batch: Size of a varying first axis in the first plan.
        given: Sizes that the caller fixed, by name.
    """
    axes: dict[str, tuple[int, int]] = {}
    for spec in specs:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str):
                axes.setdefault(size, (axis, len(spec.shape)))
    given = {**dict(pair for spec in specs for pair in spec.stated), **given}
    batches = (batch, 1, 3, batch, batch, batch)
    for plan in range(len(_SPATIAL)):
        sizes = {}
        for name, (axis, rank) in axes.items():
            choices = batches if axis == 0 else _SPATIAL if axis > 1 and rank > 2 else _LENGTH  # (N, C, *spatial)
            sizes[name] = given.get(name, choices[min(plan, len(choices) - 1)])
        yield sizes
        if not axes or set(axes) <= set(given):
            return


def make_trial(specs: Sequence[InputSpec], kind: str, sizes: Mapping[str, int], seed: int) -> Trial:
    """Make inputs of one kind, the same ones for the same arguments.

    Args:
        specs: The inputs.
        kind: One of `KINDS`: "normal" N(0, 1); "uniform" in [0, 1); "image" in [0, 1] with a 1/f spectrum over the
            spatial axes; "large" and "small" N(0, 1) x 1e4 and x 1e-4; "mixed" N(0, 1) x 10^[-2, 2] per channel;
            "zeros"; "constant" 1; "denormal" below the smallest normal number. Integers are those of `InputSpec`;
            an image of integers has large ones too.
        sizes: A value for each size that varies.
        seed: Of numpy's default generator.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind), *sizes.values()])
    feeds = {}
    for spec in specs:
        shape = tuple(size if isinstance(size, int) else sizes[size] for size in spec.shape)
        feeds[spec.name] = _draw(rng, kind, spec, shape)
    label = kind + "".join(f", {name}={size}" for name, size in sizes.items())
    return Trial(kind, feeds, label)


def _draw(rng: np.random.Generator, kind: str, spec: InputSpec, shape: tuple[int, ...]) -> Array:
    dtype = spec.dtype
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(np.bool_)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        if spec.wide and (kind in _WIDE or (kind == "image" and len(shape) > 2)):
            return (2.0 ** rng.uniform(0, _MOST, shape) - 1).round().astype(dtype)
        low, high = (int(info.min), int(info.max) + 1) if info.bits == 8 else (0, spec.bound)
        return rng.integers(low, high, shape).astype(dtype)
    values = _floats(rng, kind, shape, dtype)
    if dtype == np.float16:
        limit = float(np.finfo(np.float16).max)
        values = np.clip(values, -limit, limit)
    return values.astype(dtype)


def _floats(rng: np.random.Generator, kind: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if kind == "zeros":
        return np.zeros(shape)
    if kind == "constant":
        return np.ones(shape)
    if kind == "uniform" or (kind == "image" and len(shape) < 3):
        return rng.random(shape)
    if kind == "image":
        return _image(rng, shape)
    values = rng.standard_normal(shape)
    if kind == "mixed":
        channels = shape[1] if len(shape) > 1 else 1
        return values * (10.0 ** rng.uniform(-2, 2, channels)).reshape(-1, *[1] * max(0, len(shape) - 2))
    return values * {"normal": 1.0, "large": 1e4, "small": 1e-4, "denormal": _denormal(dtype)}[kind]


def _denormal(dtype: np.dtype[Any]) -> float:
    return {2: 1e-6, 8: 1e-310}.get(dtype.itemsize, 1e-40) if dtype.kind == "f" else 1e-40


def _image(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return 1/f noise over the axes after the second: mean 0.45, standard deviation 0.25, cut to [0, 1]."""
    axes = tuple(range(2, len(shape)))
    frequency = np.sqrt(
        sum(np.square(grid) for grid in np.meshgrid(*(np.fft.fftfreq(shape[a]) for a in axes), indexing="ij"))
    )
    amplitude = 1.0 / np.maximum(frequency, 1.0 / max(shape[2:], default=1))
    field = np.fft.ifftn(np.fft.fftn(rng.standard_normal(shape), axes=axes) * amplitude, axes=axes).real
    field = field - field.mean(axes, keepdims=True)
    deviation = field.std(axes, keepdims=True)
    return np.asarray(np.clip(0.45 + 0.25 * field / np.where(deviation > 0, deviation, 1.0), 0.0, 1.0))


def given_trials(specs: Sequence[InputSpec], inputs: Any) -> list[Trial]:
    """Return trials from the caller's own data.

    Args:
        specs: The inputs.
        inputs: A mapping from input names to arrays; a sequence of such mappings; the path of a `.npz` file with one
            array per input, or of a `.npy` file for a model with one input; or a folder of such files. An array with
            one axis more than its input is a stack of batches; one whose first axis is longer than a fixed one is cut.

    Raises:
        InputError: The data cannot be read, or do not fit the inputs.
    """
    if isinstance(inputs, Mapping):
        trials = _split(specs, inputs, "inputs")
    elif isinstance(inputs, str | os.PathLike) and os.fspath(inputs):
        trials = [trial for path in _data_files(Path(inputs)) for trial in _split(specs, _read(path, specs), path.name)]
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str):
        trials = [trial for n, one in enumerate(inputs) for trial in _split(specs, one, f"inputs[{n}]")]
    else:
        raise InputError(
            f"verify: inputs={inputs!r}, expected a number, a mapping of arrays, a .npz or .npy file, or a folder"
        )
    if not trials:
        raise InputError("verify: inputs= holds no batch, so there is nothing to compare")
    for trial in trials:
        if trial.feeds and not any(array.size for array in trial.feeds.values()):
            shapes = {name: array.shape for name, array in trial.feeds.items()}
            raise InputError(f"verify: {trial.label} is empty, of shape {shapes}, so there is nothing to compare")
    return trials


def _data_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(child for child in path.iterdir() if child.suffix in (".npz", ".npy"))
        if not files:
            raise InputError(f"verify: folder {str(path)!r} holds no .npz or .npy file")
        return files
    if not path.is_file():
        raise InputError(f"verify: inputs {str(path)!r} is neither a file nor a folder")
    return [path]


def _read(path: Path, specs: Sequence[InputSpec]) -> dict[str, Array]:
    try:
        # Opened here, since numpy leaves a damaged archive open.
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.ndarray):
                return {name: loaded[name] for name in loaded.files}
    except Exception as error:  # a damaged archive raises whatever zipfile, zlib or numpy's header parser meets first
        # Of any file that is no .npy numpy says that it is a pickle, and advises to load it.
        reason = "it is no .npz or .npy file, or holds Python objects" if "pickle" in str(error) else str(error)
        raise InputError(f"verify: inputs {str(path)!r} cannot be read as numpy data: {reason}") from error
    if len(specs) != 1:
        names = [spec.name for spec in specs]
        raise InputError(f"verify: {str(path)!r} holds one array, the model has inputs {names}; use a .npz file")
    return {specs[0].name: loaded}


def _split(specs: Sequence[InputSpec], arrays: Mapping[str, Any], source: str) -> list[Trial]:
    names = {spec.name for spec in specs}
    if set(arrays) != names:
        raise InputError(f"verify: {source} holds arrays {sorted(arrays)}, the model's inputs are {sorted(names)}")
    batches = {spec.name: _batches(spec, np.asarray(arrays[spec.name]), source) for spec in specs}
    count = {len(parts) for parts in batches.values()}
    if len(count) != 1:
        raise InputError(
            f"verify: {source} gives different numbers of batches: { {k: len(v) for k, v in batches.items()} }"
        )
    notes = [_cast_note(spec, np.asarray(arrays[spec.name]).dtype) for spec in specs]
    note = "; ".join(filter(None, notes))
    return [
        Trial("data", {name: parts[n] for name, parts in batches.items()}, f"{source} {n}", note)
        for n in range(count.pop())
    ]


def _cast_note(spec: InputSpec, given: np.dtype[Any]) -> str:
    return f"data for {spec.name!r} were cast from {given} to {spec.dtype}" if given != spec.dtype else ""


def _batches(spec: InputSpec, array: Array, source: str) -> list[Array]:
    if array.dtype != spec.dtype:
        if array.dtype.kind in "OSUc" or (spec.dtype.kind in "iub" and array.dtype.kind not in "iub"):
            raise InputError(f"verify: {source}: {spec.name!r} has type {array.dtype}, expected {spec.dtype}")
        given = array
        with np.errstate(over="ignore"):
            array = given.astype(spec.dtype)
        kept = array == given if spec.dtype.kind in "iub" else np.isfinite(array) == np.isfinite(given)
        if not np.all(kept):
            raise InputError(f"verify: {source}: {spec.name!r} has type {given.dtype} and values beyond {spec.dtype}")
    rank = len(spec.shape)
    if array.ndim == rank + 1:
        parts = list(array)
    elif rank and array.ndim == rank and isinstance(spec.shape[0], int) and array.shape[0] > spec.shape[0] > 0:
        size = spec.shape[0]
        parts = [array[start : start + size] for start in range(0, len(array) - size + 1, size)]
    else:
        parts = [array]
    for part in parts:
        if part.ndim != rank or any(isinstance(w, int) and w != g for w, g in zip(spec.shape, part.shape, strict=True)):
            raise InputError(f"verify: {source}: {spec.name!r} has shape {part.shape}, expected {spec.shape}")
    return parts

"""Why a model cannot run on what it was given, in the caller's terms; looked for only after a run has failed."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from renorm_onnx.errors import InputError
from renorm_onnx.runtime.sessions.tensors import TensorSpec, is_foreign


def misfit(specs: Sequence[TensorSpec], optional: Collection[str], feeds: Any) -> InputError | None:
    """Return what does not fit, or None if names, element types and shapes are what the model declares.

    Args:
        specs: The inputs that must be fed.
        optional: Names of those that may be: initializers that are inputs too.
        feeds: What was given for them.
    """
    names = [spec.name for spec in specs]
    if not isinstance(feeds, Mapping):
        return InputError(
            f"Session: inputs given are a {type(feeds).__name__}, expected a mapping from names to arrays"
        )
    if not set(names) <= set(feeds) or not set(feeds) <= {*names, *optional}:
        return InputError(f"Session: inputs given are {sorted(feeds)}, expected {names}")
    problems = (_problem(spec, feeds[spec.name]) for spec in specs)
    problem = next(filter(None, problems), "")
    return InputError(f"Session: {problem}") if problem else None


def _problem(spec: TensorSpec, value: Any) -> str:
    if not is_foreign(value):
        try:
            value = np.asarray(value)
        except ValueError as error:
            return f"input {spec.name!r} is no array: {error}"
    given, shape = str(value.dtype).rpartition(".")[2], tuple(value.shape)
    if spec.dtype is not None and given != spec.dtype.name:
        return f"input {spec.name!r} has type {given}, expected {spec.dtype.name}"
    # onnxruntime gives an unknown shape as that of a scalar.
    fits = len(shape) == len(spec.shape) and all(
        size == want for size, want in zip(shape, spec.shape, strict=True) if isinstance(want, int)
    )
    return "" if fits or not spec.shape else f"input {spec.name!r} has shape {shape}, expected {spec.shape}"

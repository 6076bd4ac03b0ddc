"""The sets of inputs that one verdict uses, each with the float64 outputs that belong to it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from renorm_onnx.errors import InputError
from renorm_onnx.runtime.estimate import Cost
from renorm_onnx.runtime.inputs import InputSpec, Trial, given_trials, make_trial, size_plans
from renorm_onnx.runtime.judging.verdict import ENOUGH
from renorm_onnx.runtime.reference import ReferenceUnusableError

Array = npt.NDArray[Any]
Evaluate = Callable[[Mapping[str, Array]], dict[str, Array]]

# The telling ones first, since large models are given only the first few.
_SUITE = (
    *("normal", "image", "large", "zeros", "small", "mixed", "constant", "denormal"),
    *("uniform", "normal", "normal", "image"),
)
_FEWEST = 3
_MOST = 10_000

# Kinds of which a model with few output elements gets more sets.
_REPEATED = ("normal", "large", "mixed")
_LARGE = 2e9  # operations of one run from which one set of inputs fewer has to do
_SUITE_FLOPS = 6e9  # what the reference evaluates in a few seconds

# Size of a varying batch -> up to how many operations per sample.
_BATCHES = ((32, 1e6), (8, 2e7), (4, 2e8), (2, 2e9))


def trials(
    evaluate: Evaluate, specs: Sequence[InputSpec], inputs: Any, cost: Cost, seed: int, sizes: Mapping[str, int]
) -> Iterator[tuple[Trial, dict[str, Array]]]:
    """Yield sets of inputs, each with its float64 outputs.

    Args:
        evaluate: The float64 reference.
        specs: What has to be fed.
        inputs: None: as many generated sets as the cost allows; a number of them; or data (`given_trials`).
        cost: Of one run with a batch of one.
        seed: Of the generated inputs.
        sizes: Values for sizes that vary.

    Raises:
        InputError: `inputs` do not fit, or no generated size does.
        ReferenceUnusableError: The reference does not cover an operator of the model.
    """
    if inputs is not None and not isinstance(inputs, int):
        yield from ((trial, evaluate(trial.feeds)) for trial in given_trials(specs, inputs))
        return
    if inputs is not None and not 1 <= inputs <= _MOST:
        raise InputError(f"verify: inputs={inputs!r}, expected 1 to {_MOST} sets of them, so that it compares and ends")
    batch = next((size for size, flops in _BATCHES if cost.flops < flops), 1)
    fewest = _FEWEST if cost.flops < _LARGE else _FEWEST - 1
    count = inputs or int(np.clip(_SUITE_FLOPS / max(cost.flops * batch, 1.0), fewest, len(_SUITE)))
    plans = _accepted(evaluate, specs, size_plans(specs, batch, sizes), seed)
    first, trial, want = next(plans)
    yield trial, want
    for number in range(1, count):
        kind = _SUITE[number % len(_SUITE)]
        if kind == "normal" and (other := next(plans, None)):
            yield other[1:]
        else:
            yield _ran(evaluate, specs, kind, first, seed + number)
    if inputs is None and specs:
        affordable = int(_SUITE_FLOPS / max(cost.flops * batch, 1.0)) // len(_REPEATED)
        repeats = min(-(-ENOUGH // max(1, _smallest(want))) - 1, affordable)
        for number, kind in product(range(repeats), _REPEATED):
            yield _ran(evaluate, specs, kind, first, seed + count + number)


def _ran(
    evaluate: Evaluate, specs: Sequence[InputSpec], kind: str, sizes: Mapping[str, int], seed: int
) -> tuple[Trial, dict[str, Array]]:
    """Make inputs that the reference runs, with integers of 0 and 1 alone where it cannot take larger ones."""
    trial = make_trial(specs, kind, sizes, seed)
    wide = [spec.name for spec in specs if spec.wide]
    try:
        return trial, evaluate(trial.feeds)
    except ReferenceUnusableError:
        raise
    except InputError:
        if not wide:
            raise
    trial = make_trial([replace(spec, wide=False) for spec in specs], kind, sizes, seed)
    note = f"integers of {', '.join(map(repr, wide))} were 0 and 1 alone, because the reference fails on larger ones"
    return replace(trial, note=note), evaluate(trial.feeds)


def _smallest(outputs: Mapping[str, Array]) -> int:
    """Return the number of elements of the smallest output."""
    return min((np.size(array) for array in outputs.values()), default=ENOUGH)


def _accepted(
    evaluate: Evaluate, specs: Sequence[InputSpec], plans: Iterator[dict[str, int]], seed: int
) -> Iterator[tuple[dict[str, int], Trial, dict[str, Array]]]:
    """Yield the sizes that the reference accepts, with normal inputs of that size; at least one or an error."""
    accepted, last = 0, ""
    for sizes in plans:
        trial = make_trial(specs, "normal", sizes, seed)
        try:
            want = evaluate(trial.feeds)
        except ReferenceUnusableError:
            raise
        except InputError as error:
            last = str(error)
            continue
        accepted += 1
        yield sizes, trial, want
    if not accepted:
        raise InputError(f"verify: the reference accepts no generated inputs ({last}); pass sizes= or inputs=")

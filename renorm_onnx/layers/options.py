"""What a layer's options may be: asked whenever one is assigned, by the constructor or later.

Each row takes the name of the layer and what came, and returns what the layer keeps.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

from renorm_onnx.errors import InputError
from renorm_onnx.layers.functional import STATS
from renorm_onnx.layers.schedules import as_schedule


def _is_within(value: Any, least: float, most: float) -> bool:
    try:
        return math.isfinite(value) and least <= value <= most
    except (TypeError, ValueError):
        return False


def _whole(name: str, or_none: str = "") -> Callable[[str, Any], int]:
    def check(who: str, value: Any) -> int:
        try:
            number = 0 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = 0
        if number < 1:
            raise InputError(f"{who}: {name}={value!r}, expected an integer >= 1{or_none}")
        return number

    return check


def _number(name: str, expected: str, least: float, most: float = math.inf) -> Callable[[str, Any], Any]:
    def check(who: str, value: Any) -> Any:
        if not _is_within(value, least, most):
            raise InputError(f"{who}: {name}={value!r}, expected {expected}")
        return value

    return check


def _bound(name: str, least: float, interval: str) -> Callable[[str, Any], float]:
    check = _number(name, f"a finite number >= {least} because {name[0]} lies in {interval}", least)
    return lambda who, value: float(check(who, value))


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda who, value: None if value is None else check(who, value)


def _stat(who: str, value: Any) -> Any:
    if value not in STATS:
        raise InputError(f"{who}: stat={value!r}, expected one of {STATS}")
    return value


_SECOND_SET = "a number in [0, 1], or None to use one set of statistics for r, d and inference"

CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "num_features": _whole("num_features"),
    "eps": _number("eps", "a finite number >= 0", 0),
    "momentum": _optional(_number("momentum", "a number in [0, 1], or None for a cumulative average", 0, 1)),
    "r_max": _bound("r_max", 1, "[1/r_max, r_max]"),
    "d_max": _bound("d_max", 0, "[-d_max, d_max]"),
    "schedule": lambda who, value: as_schedule(value, who),
    "stat": _stat,
    "renorm_momentum": _optional(_number("renorm_momentum", _SECOND_SET, 0, 1)),
    "virtual_batch_size": _optional(_whole("virtual_batch_size", ", or None")),
}

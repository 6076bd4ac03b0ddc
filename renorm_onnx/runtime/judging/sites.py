"""Each rewritten place by itself: what lies between two values that both models have must compute the same.

A name means the same value in both files. So wherever a value y has the same name in both, the nodes between y and
the nearest other common values are cut out of each model, fed the same numbers and evaluated in float64. In exact
arithmetic a fold changes nothing but the rounding of the new weights, each rounded once, hence, element by element,

    |y' - y| <= gamma_k * (|W'| * |x| + |b'|),     gamma_k = k u / (1 - k u),  k = 4

with u the unit roundoff of the weights (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1).
The right-hand side is the candidate's own cut evaluated on absolute values. Beside narrower weights, what evaluating in
float64 adds is nothing. Beside weights in float64 it is as large: each side then adds gamma_n times its own cut on
absolute values, where a product meets at most n roundings on its way into the result, in whatever order it is summed.
If every place holds and every output is such a value, the models are equal: the check is complete without running
either, and its cost is bounded: places whose operators slide over space are fed crops, and what takes whole images is
run only within the limit of the check end to end.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx.errors import InputError
from renorm_onnx.fusion.fact_rounding import UNIT_ROUNDOFF
from renorm_onnx.model_file import collection_paused
from renorm_onnx.runtime.comparison import index_of, json_value, peak, ratio
from renorm_onnx.runtime.estimate import LIMIT, inferred_shapes
from renorm_onnx.runtime.judging.cuts import Cut, GraphByNames

Array = npt.NDArray[Any]

_ROUNDINGS = 4
_SHOWN = 5
_CROPS = (8, 20, None)  # elements per spatial axis, tried in this order; None: all

_EVALUATION = UNIT_ROUNDOFF[ir.DataType.DOUBLE]
# The smallest positive number of each narrower type.
_SMALLEST = {ir.DataType.FLOAT16: 2.0**-24, ir.DataType.BFLOAT16: 2.0**-133, ir.DataType.FLOAT: 2.0**-149}


@dataclass(frozen=True)
class Site:
    """One rewritten place.

    Attributes:
        name: The value that both models compute there.
        before: Operators in the reference, in order.
        after: Operators in the candidate.
        elements: How many elements were compared.
        used: Largest |y' - y| over its bound; above 1 it is wrong.
        index: Where.
        values: Reference and candidate there.
        problem: What is wrong; empty if nothing.
    """

    name: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    elements: int
    used: float
    index: tuple[int, ...]
    values: tuple[float, float]
    problem: str

    @property
    def ok(self) -> bool:
        """Whether both compute the same."""
        return not self.problem

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        reference, candidate = map(json_value, self.values)
        return {
            "name": self.name,
            "before": list(self.before),
            "after": list(self.after),
            "elements": self.elements,
            "share_of_bound": json_value(self.used),
            "index": list(self.index),
            "reference": reference,
            "candidate": candidate,
            "ok": self.ok,
            "problem": self.problem,
        }

    def __str__(self) -> str:
        change = f"{self.name!r}: {', '.join(self.before)} -> {', '.join(self.after) or 'nothing'}"
        return f"{change}: {self.problem or f'{self.used:.2g} of the rounding bound'}"


@dataclass
class SiteReport:
    """Every rewritten place.

    Attributes:
        sites: Those that were checked.
        unchecked: Name and reason of those that could not be.
    """

    sites: list[Site] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no place is wrong."""
        return all(site.ok for site in self.sites)

    @property
    def complete(self) -> bool:
        """Whether every place could be checked and holds: then both models compute the same."""
        return self.ok and not self.unchecked

    @property
    def wrong(self) -> list[Site]:
        """The places that compute something else."""
        return [site for site in self.sites if not site.ok]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"ok": self.ok, "sites": [site.to_dict() for site in self.sites], "unchecked": dict(self.unchecked)}

    def __str__(self) -> str:
        most = max((site.used for site in self.sites), default=0.0)
        lines = [f"{len(self.sites)} rewritten places checked one by one: at most {most:.2g} of the rounding bound"]
        lines += [f"  WRONG {site}" for site in self.wrong[:_SHOWN]]
        lines += [f"  not checked alone: {n!r}: {reason}" for n, reason in list(self.unchecked.items())[:_SHOWN]]
        hidden = max(0, len(self.wrong) - _SHOWN) + max(0, len(self.unchecked) - _SHOWN)
        lines += [f"  and {hidden} more"] * bool(hidden)
        return "\n".join(lines)


def check_sites(reference: ir.Model, candidate: ir.Model, *, seed: int = 0) -> SiteReport:
    """Compare every place where two models differ, each by itself.

    Args:
        reference: The original. Not changed.
        candidate: The rewritten model, in which names mean the same values. Not changed.
        seed: Of the numbers fed.

    Returns:
        One entry per place. Places that cannot be cut out (control flow, rounding on purpose, unknown shapes) are
        listed as unchecked.
    """
    with collection_paused():
        return _check_all(reference, candidate, seed)


def _check_all(reference: ir.Model, candidate: ir.Model, seed: int) -> SiteReport:
    report = SiteReport()
    pair = (GraphByNames(reference), GraphByNames(candidate))
    common = pair[0].produced.keys() & pair[1].produced.keys()
    shapes: dict[str, tuple[int, ...]] | None = None
    for name in pair[0].produced:
        if name not in common:
            continue
        cuts = [graph.cut(name, common) for graph in pair]
        if cuts[0].signature() == cuts[1].signature():
            continue
        if shapes is None:
            shapes = {**inferred_shapes(candidate, {}), **inferred_shapes(reference, {})}
        if reason := cuts[0].obstacle() or cuts[1].obstacle():
            report.unchecked[name] = reason
            continue
        try:
            report.sites.append(
                _check(name, cuts[0], cuts[1], shapes, np.random.default_rng([seed, len(report.sites)]))
            )
        except _UncheckableError as error:
            report.unchecked[name] = str(error)
    return report


class _UncheckableError(Exception):
    pass


def _check(name: str, before: Cut, after: Cut, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> Site:
    values = {**before.inputs, **after.inputs}
    declared = all(value.shape is not None and value.shape.is_static() for value in values.values())
    last: Exception | None = None
    for crop in _CROPS:
        try:
            if crop is None:
                _check_cost(before, after, shapes)
            feeds = {key: _numbers(rng, value, shapes.get(key), crop) for key, value in values.items()}
            want, got = before.run(feeds), after.run(feeds)
            if want.shape != got.shape and crop is not None:
                continue
            bound = _bound(before, after, feeds, want)
        except InputError as error:
            last = error
            continue
        site = _site(name, before, after, want, got, bound)
        if site.ok or not declared or crop is None:
            return site
        last = InputError("it holds on none of the crops, which are not of the size that the file declares")
    raise _UncheckableError(str(last))


def _check_cost(before: Cut, after: Cut, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for cost in (before.cost(shapes), after.cost(shapes)):
        if cost.flops > LIMIT.flops or cost.bytes > LIMIT.bytes:
            raise InputError(f"one run of it takes {cost} and the limit is {LIMIT}")


def _bound(before: Cut, after: Cut, feeds: Mapping[str, Array], want: Array) -> Array:
    u = UNIT_ROUNDOFF[after.element_type()]
    largest = max((peak(x) for x in feeds.values() if x.dtype.kind == "f" and x.size), default=1.0)
    underflow = _SMALLEST.get(after.element_type(), 0.0) * after.fan_in() * max(1.0, largest)
    magnitude = _magnitude(after, feeds, want)
    bound = _gamma(_ROUNDINGS, u) * magnitude + underflow
    if u <= _EVALUATION:
        bound += _gamma(_steps(after, feeds), _EVALUATION) * magnitude
        bound += _gamma(_steps(before, feeds), _EVALUATION) * _magnitude(before, feeds, want)
    return np.asarray(bound)


def _gamma(count: int, u: float) -> float:
    """By how much `count` roundings may change a product, relative."""
    return count * u / (1 - count * u)


def _magnitude(cut: Cut, feeds: Mapping[str, Array], want: Array) -> Array:
    """How large the terms are that a piece sums up for each element."""
    if cut.monotone():
        return cut.run({key: np.abs(value) for key, value in feeds.items()}, absolute=True)
    # No elementwise bound: what a value of this size may lose, generously.
    return np.full(want.shape, 8.0 * float(np.abs(want[np.isfinite(want)]).max(initial=0.0)))


def _steps(cut: Cut, feeds: Mapping[str, Array]) -> int:
    """At most how many roundings a term meets: no operator sums up more than a weight, or one sample, holds for it."""
    samples = [feeds[key].size // max(1, len(feeds[key])) for key in cut.inputs if feeds[key].ndim]
    return len(cut.nodes) * (_ROUNDINGS + max(cut.fan_in(), *samples, 1))


def _site(name: str, before: Cut, after: Cut, want: Array, got: Array, bound: Array) -> Site:
    operators = before.operators, after.operators
    if want.shape != got.shape:
        problem = f"shape {got.shape}, expected {want.shape}"
        return Site(name, *operators, 0, math.inf, (), (math.nan, math.nan), problem)
    if want.size == 0:
        raise _UncheckableError("it has no elements")
    w, g = want.astype(np.float64), got.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.where((w == g) | (np.isnan(w) & np.isnan(g)), 0.0, np.abs(g - w))
        share = error / np.maximum(bound, np.finfo(np.float64).tiny)
    # Where the candidate is not finite, its bound is not either, and allows nothing.
    used = np.where(np.isfinite(error) & np.isfinite(bound), share, np.where(error == 0, 0.0, np.inf))
    index = index_of(int(np.argmax(used)), w.shape)
    most = float(used[index])
    problem = ""
    if most > 1:
        relative = ratio(float(error[index]), abs(float(w[index])))
        problem = (
            f"at {list(index)} the reference gives {float(w[index])!r}, the candidate {float(g[index])!r}: "
            f"a relative error of {relative:.1e}, {most:.3g} x what rounding the weights explains"
        )
    return Site(name, *operators, w.size, most, index, (float(w[index]), float(g[index])), problem)


def _numbers(rng: np.random.Generator, value: ir.Value, shape: tuple[int, ...] | None, crop: int | None) -> Array:
    if shape is None:
        raise InputError(f"the shape of {value.name!r} is unknown")
    if value.dtype is ir.DataType.BOOL or any(n.op_type == "Where" and i == 0 for n, i in value.uses()):
        return rng.random(shape) < 0.5  # a mask, whether the file declares its type or not
    if value.dtype is not None and not value.dtype.is_floating_point():
        raise InputError(f"{value.name!r} is {value.dtype.name}, for which no numbers can be made up")
    # (N, C, *spatial): only the spatial axes may be cut.
    sizes = [size if crop is None or axis < 2 else min(size, crop) for axis, size in enumerate(shape)]
    return rng.normal(0.25, 1.0, sizes)

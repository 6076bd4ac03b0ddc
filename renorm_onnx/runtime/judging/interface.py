"""Do two models look alike to their caller?"""

import onnx_ir as ir

from renorm_onnx.errors import InputError

# Before IR version 4 every initializer had to be listed as an input, and was a constant all the same.
_FIRST_OVERRIDABLE_IR = 4


def interface_problems(reference: ir.Model, candidate: ir.Model) -> list[str]:
    """Return what a caller of `reference` would notice if given `candidate`, one sentence each.

    Compared are inputs (those that must be fed, and those that may be overridden) and outputs: names as sets, then
    their order, element types, and sizes that both declare as fixed.

    Raises:
        InputError: `reference` has no outputs.
    """
    if not reference.graph.outputs:
        raise InputError("verify: the reference has no outputs, so there is nothing to compare")
    problems = _names("outputs", _output_names(reference), _output_names(candidate))
    required = [_required(model) for model in (reference, candidate)]
    problems += _names("inputs", *required)
    if reference.ir_version >= _FIRST_OVERRIDABLE_IR:
        lost = sorted(set(_optional(reference)) - set(_optional(candidate)) - set(required[1]))
        problems += [f"inputs that a caller may override are missing: {lost}"] if lost else []
    if not problems:
        for kind in ("inputs", "outputs"):
            problems += _types(kind, reference, candidate)
    return problems


def _names(kind: str, want: list[str], got: list[str]) -> list[str]:
    if set(want) != set(got):
        missing, extra = sorted(set(want) - set(got)), sorted(set(got) - set(want))
        parts = [f"missing {missing}"] * bool(missing) + [f"unexpected {extra}"] * bool(extra)
        return [f"{kind} differ: {', '.join(parts)}"]
    return [f"{kind} are in another order: {got}, expected {want}"] if want != got else []


def _types(kind: str, reference: ir.Model, candidate: ir.Model) -> list[str]:
    given = {value.name: value for value in getattr(candidate.graph, kind)}
    problems = []
    for want in getattr(reference.graph, kind):
        got = given.get(want.name)
        if got is None:
            continue
        if None not in (want.dtype, got.dtype) and want.dtype != got.dtype:
            problems.append(f"{kind[:-1]} {want.name!r} has type {got.dtype.name}, expected {want.dtype.name}")
        elif want.shape is not None and got.shape is not None and _contradict(want.shape, got.shape):
            shapes = tuple(map(str, got.shape.dims)), tuple(map(str, want.shape.dims))
            problems.append(f"{kind[:-1]} {want.name!r} has declared shape {shapes[0]}, expected {shapes[1]}")
    return problems


def _contradict(want: ir.Shape, got: ir.Shape) -> bool:
    if len(want) != len(got):
        return True
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(want.dims, got.dims, strict=True))


def _output_names(model: ir.Model) -> list[str]:
    return [value.name or "" for value in model.graph.outputs]


def _required(model: ir.Model) -> list[str]:
    return [value.name or "" for value in model.graph.inputs if value.name not in model.graph.initializers]


def _optional(model: ir.Model) -> list[str]:
    return [value.name or "" for value in model.graph.inputs if value.name in model.graph.initializers]

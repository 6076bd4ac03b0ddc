"""Which function calls must be defined or opened before norms can be folded.

A function is inlined, at each call, if its body holds a normalization, or if the way of a norm ends at one of its
calls and it holds an operator that could absorb one. Every other function stays a function.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator

import onnx_ir as ir

from renorm_onnx.errors import InputError
from renorm_onnx.inlining import inline
from renorm_onnx.model_walk import nodes_of
from renorm_onnx.onnx_function import attach, calls_in

_log = logging.getLogger(__name__)

_NORMS = {"BatchNormalization"}
_LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_ARITHMETIC = {
    *("Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal", "Pow", "Constant", "Identity", "Reshape", "Squeeze"),
    *("Unsqueeze", "Flatten", "Expand", "Shape", "Gather", "Concat", "Slice", "Cast", "CastLike", "ConstantOfShape"),
    *("Range", "Size", "Equal", "Where"),
}


def define_calls(model: ir.Model) -> bool:
    """Define, in place, the functions of ours that `model` calls and lacks; a model that lacks none stays as it is.

    A file exported inside `keep_ops` has such calls, and no runtime knows them, unless `attach` was called too.

    Returns:
        Whether a definition was added.

    Raises:
        InputError: The model's opset is too old for a function it calls.
    """
    lacking = any(call.op_identifier() not in model.functions for call in calls_in(model))
    return lacking and attach(model) > 0


def open_norms(model: ir.Model) -> int:
    """Inline, in place, the calls that hide a normalization; return how many were replaced."""
    return sum(_inline_each(model, [i for i in model.functions if _holds(model, i, _is_norm)]))


def open_absorbers(model: ir.Model, obstacles: Collection[str]) -> int:
    """Inline, in place, the functions that stand in the way of a norm and hold an operator that could absorb it.

    Args:
        model: Changed in place.
        obstacles: Names of nodes where the way of some norm ended, or of their outputs where they have none.

    Returns:
        How many calls were replaced.
    """
    calls = [n for n in nodes_of(model.graph) if n.op_identifier() in model.functions]
    met = {n.op_identifier() for n in calls if (n.name or n.outputs[0].name) in obstacles}
    return sum(_inline_each(model, sorted(i for i in met if _holds(model, i, _is_linear))))


def _inline_each(model: ir.Model, identifiers: list[ir.OperatorIdentifier]) -> Iterator[int]:
    """One function at a time, so that one that cannot be inlined does not keep the others."""
    for identifier in identifiers:
        function = model.functions.get(identifier)
        try:
            yield inline(model, domain=lambda f, wanted=function: f is wanted)  # type: ignore[misc]
        except InputError as error:
            _log.info("function %s::%s stays a function: %s", *identifier[:2], error)


def _is_norm(body: list[ir.Node]) -> bool:
    operators = {n.op_type for n in body if n.domain in ("", "ai.onnx")}
    if operators & _NORMS:
        return True
    arithmetic = all(n.domain in ("", "ai.onnx") and n.op_type in _ARITHMETIC for n in body)
    return arithmetic and bool(operators & {"Sub", "Add"}) and bool(operators & {"Mul", "Div"})


def _is_linear(body: list[ir.Node]) -> bool:
    return any(n.op_type in _LINEAR | _NORMS and n.domain in ("", "ai.onnx") for n in body)


def _holds(model: ir.Model, identifier: ir.OperatorIdentifier, test: Callable[[list[ir.Node]], bool]) -> bool:
    """Whether `test` holds for the function's body or that of a function it calls."""
    seen: set[ir.OperatorIdentifier] = set()
    stack = [identifier]
    while stack:
        current = stack.pop()
        function = model.functions.get(current)
        if function is None or current in seen:
            continue
        seen.add(current)
        body = list(nodes_of(function))
        if test(body):
            return True
        stack.extend(n.op_identifier() for n in body)
    return False

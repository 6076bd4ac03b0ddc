"""Which function calls must be defined or opened before norms can be folded.

A function is inlined, at each call, if its body holds a normalization; if the way of a norm ends at one of its calls,
and it holds an operator that could absorb one or nothing but operators that could let one pass; or if a call of it
hides the rank of what an operator reads at which such a way ends. Every other function stays a function.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterator

import onnx_ir as ir

from renorm_onnx.errors import InputError
from renorm_onnx.fusion.facts import Facts
from renorm_onnx.fusion.report import Reason, Refusal
from renorm_onnx.inlining import inline
from renorm_onnx.model_walk import nodes_of
from renorm_onnx.onnx_function import attach, calls_in, is_training

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


def hiding_norms(model: ir.Model) -> list[ir.OperatorIdentifier]:
    """The functions that hold a normalization, or call one that does; a step of training is none that could fold."""
    return [i for i, f in model.functions.items() if not is_training(f) and _holds(model, i, _is_norm)]


def open_norms(model: ir.Model) -> dict[ir.OperatorIdentifier, str]:
    """Inline, in place, the calls that hide a normalization.

    Returns:
        The functions of them that stay, and why.
    """
    return _inlined(model, hiding_norms(model))[1]


def open_obstacles(model: ir.Model, facts: Facts, refusals: Collection[Refusal], passing: Collection[str]) -> int:
    """Inline, in place, the functions that stand in the way of a norm and may let it through once they are open.

    Args:
        model: Changed in place; facts about its values are to be forgotten afterwards.
        facts: About `model` as it is.
        refusals: Where the way of some norm ended, and why.
        passing: Operators that may let a norm pass.

    Returns:
        How many calls were replaced.
    """
    without_rule = {r.obstacle for r in refusals if r.reason is Reason.OPERATOR}
    of_unknown_shape = {r.obstacle for r in refusals if r.reason is Reason.SHAPE}
    named = [(n, n.name or n.outputs[0].name) for n in nodes_of(model.graph)]
    calls = {n.op_identifier() for n, name in named if name in without_rule} & model.functions.keys()
    lets_pass = functools.partial(_lets_pass, passing=passing)
    met = {i for i in calls if _holds(model, i, _is_linear) or _all_hold(model, i, lets_pass)}
    met |= _hiding(model, facts, [n for n, name in named if name in of_unknown_shape])
    return _inlined(model, sorted(met))[0]


def _hiding(model: ir.Model, facts: Facts, nodes: list[ir.Node]) -> set[ir.OperatorIdentifier]:
    """The functions of which a call hides the rank of what some nodes read."""
    found = set[ir.OperatorIdentifier]()
    stack, seen = list(nodes), set(nodes)
    while stack:
        for value in stack.pop().inputs:
            maker = None if value is None or facts[value].dims is not None else value.producer()
            if maker is None or maker in seen:
                continue
            seen.add(maker)
            if maker.op_identifier() in model.functions:
                found.add(maker.op_identifier())
            else:
                stack.append(maker)
    return found


def _inlined(
    model: ir.Model, identifiers: Collection[ir.OperatorIdentifier]
) -> tuple[int, dict[ir.OperatorIdentifier, str]]:
    """Inline functions, in place: how many calls were replaced, and why which function stays.

    All at once takes time linear in the model; one at a time, where that fails, one does not keep the others.
    """
    wanted = {id(model.functions[i]) for i in identifiers}
    try:
        return inline(model, domain=lambda function: id(function) in wanted), {}
    except InputError as error:
        if len(identifiers) == 1:
            _log.info("function %s::%s stays a function: %s", *next(iter(identifiers))[:2], error)
            return 0, dict.fromkeys(identifiers, str(error).removeprefix("inline: "))
    count, reasons = 0, dict[ir.OperatorIdentifier, str]()
    for identifier in identifiers:
        replaced, why = _inlined(model, [identifier])
        count, reasons = count + replaced, reasons | why
    return count, reasons


def _is_norm(body: list[ir.Node]) -> bool:
    operators = {n.op_type for n in body if n.domain == ""}
    if operators & _NORMS:
        return True
    arithmetic = all(n.domain == "" and n.op_type in _ARITHMETIC for n in body)
    return arithmetic and bool(operators & {"Sub", "Add"}) and bool(operators & {"Mul", "Div"})


def _is_linear(body: list[ir.Node]) -> bool:
    return any(n.op_type in _LINEAR | _NORMS and n.domain == "" for n in body)


def _lets_pass(body: list[ir.Node], passing: Collection[str]) -> bool:
    plain = (n.op_type for n in body if n.domain == "")
    return all(op in passing or op in _ARITHMETIC for op in plain)


def _holds(model: ir.Model, identifier: ir.OperatorIdentifier, test: Callable[[list[ir.Node]], bool]) -> bool:
    """Whether `test` holds for the function's body or that of a function it calls."""
    return any(map(test, _bodies(model, identifier)))


def _all_hold(model: ir.Model, identifier: ir.OperatorIdentifier, test: Callable[[list[ir.Node]], bool]) -> bool:
    """Whether `test` holds for the function's body and those of all functions it calls, which the model defines."""
    bodies = list(_bodies(model, identifier))
    called = {n.op_identifier() for body in bodies for n in body if n.domain != ""}
    return called <= model.functions.keys() and all(map(test, bodies))


def _bodies(model: ir.Model, identifier: ir.OperatorIdentifier) -> Iterator[list[ir.Node]]:
    """The nodes of a function, and of each function that it calls."""
    seen: set[ir.OperatorIdentifier] = set()
    stack = [identifier]
    while stack:
        current = stack.pop()
        function = model.functions.get(current)
        if function is None or current in seen:
            continue
        seen.add(current)
        body = list(nodes_of(function))
        yield body
        stack.extend(n.op_identifier() for n in body)

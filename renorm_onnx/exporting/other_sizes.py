"""Sizes that vary: which of them the capture left open in truth, and inputs of other sizes than the example's.

A dimension is a symbol such as ``s77``, or arithmetic on symbols, ``2*s97``. For each symbol `torch.export` knows the
range that holds; torch.onnx writes none of it, not even where the range is one number.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import sympy  # type: ignore[import-untyped]
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

_UNBOUNDED = 1 << 62  # torch has written infinity in several ways
_SYMBOL = re.compile(r"\b[^\W\d]\w*\b(?!\()")  # what stands before a parenthesis is a function
# Of torch's own; sympy knows Max, Min and Mod.
_FUNCTIONS = {"ToFloat": lambda x: x, "TruncToInt": lambda x: sympy.Integer(int(x))}


def close_fixed_sizes(model: ir.Model, program: ExportedProgram) -> None:
    """Write as a number each size of which the program takes one value alone, in place.

    With `Dim.AUTO` torch may fix an axis, as the steps of an unrolled RNN, and leave it open in the model.

    Args:
        model: Exported from `program`, sizes by the program's own names.
        program: As captured.
    """
    ranges = program.range_constraints
    numbers = {str(name): str(bounds.lower) for name, bounds in ranges.items() if bounds.lower == bounds.upper}
    replace_symbols(model, numbers)


def replace_symbols(model: ir.Model, by: Mapping[str, str]) -> None:
    """Write other names, or numbers, for symbols in sizes, in place; arithmetic on numbers alone becomes one.

    Args:
        model: As torch exported it.
        by: Symbol -> what is to stand for it.
    """
    for graph in model.graphs() if by else ():
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
            if value.shape is not None:
                value.shape = ir.Shape([_replaced(size, by) for size in value.shape])


def _replaced(size: int | ir.SymbolicDim, by: Mapping[str, str]) -> int | ir.SymbolicDim:
    if isinstance(size, int) or size.value is None:
        return size
    text = _SYMBOL.sub(lambda found: by.get(found[0], found[0]), size.value)
    if text == size.value:
        return size
    if _SYMBOL.search(text):
        return ir.SymbolicDim(text)
    number = sympy.sympify(text, locals=_FUNCTIONS)
    return int(number) if number.is_Integer else ir.SymbolicDim(None)


def bounded_axes(program: ExportedProgram, dynamic_shapes: Any) -> list[str]:
    """Return, as text, the axes that torch bounds from above though nobody asked for it.

    That happens where a module takes another way for larger sizes, or refuses them; a model has no place to say so.
    (From below nearly every size is bounded, by kernels; there the module itself fails.)

    Args:
        program: As captured.
        dynamic_shapes: As in `to_onnx`; the bounds of its dimensions are those asked for.
    """
    asked = {getattr(leaf, "max", None) for leaf in pytree.tree_leaves(dynamic_shapes)}
    found = []
    for name, expressions in zip(program.graph_signature.user_inputs, _dims(program), strict=True):
        for axis, expression in enumerate(expressions):
            bounds = program.range_constraints.get(expression)
            if bounds is None or bounds.lower == bounds.upper or bounds.upper in asked:
                continue
            if bounds.upper < _UNBOUNDED:
                found.append(f"axis {axis} of {name!r} to at most {bounds.upper}")
    return found


def open_varying_sizes(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Open, in place, each size of an output that is declared fixed and has turned out otherwise.

    So torch writes the steps of an LSTM that it left open. Behind such an output the sizes of inner values are no
    better, and are dropped.

    Args:
        model: As exported.
        shapes: Of outputs, for inputs of other sizes than the example's.
    """
    wrong = False
    for value in model.graph.outputs:
        found = shapes.get(value.name or "")
        if value.shape is None or found is None or len(found) != len(value.shape):
            continue
        sizes = [
            size if isinstance(size, ir.SymbolicDim) or size == other else None
            for size, other in zip(value.shape, found, strict=True)
        ]
        wrong = wrong or None in sizes
        value.shape = ir.Shape(sizes)
    if wrong:
        for node in model.graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None


def other_inputs(
    program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return example inputs whose open sizes differ from those given, each by another number, within their ranges.

    What is longer than the example repeats it from its start, so that indices stay indices.

    Args:
        program: As captured.
        args: The example inputs that it was captured with.
        kwargs: As `args`.

    Returns:
        Other `args` and `kwargs`; None where no size is open, or some size is not known from the inputs alone.
    """
    leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
    dims = _dims(program)
    if len(dims) != len(leaves):
        return None
    pairs = [
        (expression, size)
        for expressions, leaf in zip(dims, leaves, strict=True)
        if isinstance(leaf, torch.Tensor)
        for expression, size in zip(expressions, leaf.shape, strict=False)
    ]
    known = _solved(pairs)
    others = _changed(known, program.range_constraints)
    if others == known or not all(expression.free_symbols <= known.keys() for expression, _ in pairs):
        return None
    changed = [
        _resized(leaf, [int(expression.subs(others)) for expression in expressions])
        for expressions, leaf in zip(dims, leaves, strict=True)
    ]
    other_args, other_kwargs = pytree.tree_unflatten(changed, structure)
    return other_args, other_kwargs


def _dims(program: ExportedProgram) -> list[list[sympy.Expr]]:
    """The sizes of each input, none for one that is no tensor."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            node = nodes.get(spec.arg.name)
            value = None if node is None else node.meta.get("val")
            shape = value.shape if isinstance(value, torch.Tensor) else ()
            found.append([_expression(size) for size in shape])
    return found


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _solved(pairs: list[tuple[sympy.Expr, int]]) -> dict[sympy.Symbol, int]:
    """What each symbol stands for in the example, where one dimension tells."""
    known: dict[sympy.Symbol, int] = {}
    for expression, size in pairs:
        if len(expression.free_symbols) == 1:
            (symbol,) = expression.free_symbols
            solutions = sympy.solve(expression - size, symbol) if expression != symbol else [size]
            if len(solutions) == 1 and solutions[0] == int(solutions[0]):
                known.setdefault(symbol, int(solutions[0]))
    return known


def _changed(known: Mapping[sympy.Symbol, int], ranges: Mapping[sympy.Symbol, Any]) -> dict[sympy.Symbol, int]:
    others: dict[sympy.Symbol, int] = {}
    for symbol, size in known.items():
        bounds = ranges.get(symbol)
        allowed = [
            other
            for other in (*range(size + 1, size + 2 + len(known)), size - 1)
            if bounds is None or bounds.lower <= other <= bounds.upper
        ]
        # Apart where that can be, so that no axis can stand for another.
        others[symbol] = next((other for other in allowed if other not in others.values()), (allowed or [size])[0])
    return others


def _resized(leaf: Any, shape: list[int]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    for axis, (size, wanted) in enumerate(zip(leaf.shape, shape, strict=False)):
        if size in (wanted, 0):  # of nothing there is nothing to repeat
            continue
        leaf = leaf.index_select(axis, torch.arange(wanted, device=leaf.device) % size)
        if leaf.is_floating_point():  # a little smaller: of equal numbers each side may take another for the largest
            shrunk = 1 - torch.arange(wanted, device=leaf.device).sub(size - 1).clamp(min=0) / (16 * wanted)
            leaf = leaf * shrunk.to(leaf.dtype).view(-1, *[1] * (leaf.dim() - axis - 1))
    return leaf

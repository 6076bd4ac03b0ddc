"""The inputs and outputs of an export: example inputs, and the names and sizes that were asked for."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.utils import _pytree as pytree

from renorm_onnx.errors import InputError
from renorm_onnx.exporting.failures import about_steps, described
from renorm_onnx.exporting.other_sizes import replace_symbols
from renorm_onnx.exporting.surroundings import quiet


def as_args(args: Any) -> tuple[Any, ...]:
    """Return example inputs as a tuple; a tensor may stand alone.

    Raises:
        InputError: Neither a tensor nor a sequence of inputs.
    """
    if isinstance(args, torch.Tensor):
        return (args,)
    if not isinstance(args, (tuple, list)):
        raise InputError(
            f"to_onnx: args is a {type(args).__name__}; expected a tensor, or a tuple of what the module is called "
            "with; inputs by name go into kwargs"
        )
    return tuple(args)


def check_program_args(
    program: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Any
) -> None:
    """Refuse example inputs that a program does not take, and sizes that it cannot change any more.

    Raises:
        InputError: The program fails on them; or dynamic sizes are asked for.
    """
    if dynamic is not None:
        raise InputError(
            "to_onnx: dynamic_shapes or dynamic_axes given for an ExportedProgram, whose sizes were decided when it "
            "was captured; pass dynamic_shapes to torch.export.export"
        )
    try:
        with quiet(), torch.no_grad():
            program.module()(*args, **kwargs)
    except Exception as error:
        raise InputError(
            f"to_onnx: the program does not take these args: {type(error).__name__}: {error}\n"
            f"args: {described(args, kwargs)}"
        ) from error


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return example inputs by the parameters of `forward`, in their order; empty where they do not fit.

    What does not fit is for the module to refuse, in its own words.
    """
    try:
        return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    except TypeError:
        return {}


def in_order(given: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword inputs, or sizes of inputs, in the order of the parameters, which torch takes for granted."""
    return {name: given[name] for name in arguments if name in given} | dict(given)


def shapes_of_axes(
    arguments: Mapping[str, Any],
    dynamic_axes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> dict[str, Any]:
    """Return `dynamic_axes` in the form of `dynamic_shapes`; torch's own way goes by the order of the entries alone.

    Args:
        arguments: Example inputs by parameter.
        dynamic_axes: As in `to_onnx`, as the rest.
        input_names: Or None.
        output_names: Or None.

    Raises:
        InputError: It is of another form, names what is no input or output, or an axis that an input does not have.
    """
    said = f"to_onnx: dynamic_axes={dynamic_axes!r} given"
    if not isinstance(dynamic_axes, Mapping) or not all(
        isinstance(v, dict | list | None) for v in dynamic_axes.values()
    ):
        raise InputError(f"{said}; expected a dict of inputs and their axes, such as {{'x': {{0: 'batch'}}}}")
    leaves, structure = pytree.tree_flatten_with_path(dict(arguments))
    paths = [re.sub(r"\W+", "_", pytree.keystr(path)).strip("_") for path, _ in leaves]
    inputs = {path: leaf for path, (_, leaf) in zip(paths, leaves, strict=True) if isinstance(leaf, torch.Tensor)}
    wanted = {name: axes for name, axes in dynamic_axes.items() if name not in (output_names or ())}
    names = [*(input_names or ()), *list(inputs)[len(input_names or ()) :]]
    if len(set(names)) != len(inputs):
        raise InputError(
            f"to_onnx: input_names={input_names!r} given; expected at most {len(inputs)} names, each given once"
        )
    if input_names is None and len(wanted) == len(inputs) and not wanted.keys() & inputs.keys():
        names = list(wanted)  # names of the user's own
    called = dict(zip(inputs, names, strict=False))
    for name in wanted:
        if name not in called.values():
            raise InputError(f"{said}, but {name!r} is no input; the inputs are {list(called.values())}")
    for path, x in inputs.items():
        for axis in wanted.get(called[path]) or ():
            if axis not in range(x.dim()):
                raise InputError(
                    f"{said}, but {called[path]!r} has no axis {axis!r}: its rank is {x.dim()}, its shape "
                    f"{tuple(x.shape)}; axes count from 0"
                )
    asked = [wanted.get(called[path]) if path in called else None for path in paths]
    shapes = [dict.fromkeys(axes, torch.export.Dim.DYNAMIC) if isinstance(axes, list) else axes for axes in asked]
    return dict(pytree.tree_unflatten(shapes, structure))


def name_sizes(model: ir.Model, arguments: Mapping[str, Any], dynamic_shapes: Any) -> None:
    """Call sizes what they were asked to be called, in place: torch does not where an argument is no tensor.

    Args:
        model: As torch exported it.
        arguments: Example inputs by parameter.
        dynamic_shapes: As in `to_onnx`, structured as `arguments`; where it is not, sizes keep torch's names.
    """
    if isinstance(dynamic_shapes, Mapping):
        dynamic_shapes = [dynamic_shapes.get(name) for name in arguments]
    leaves = pytree.tree_leaves(dict(arguments))
    shapes = pytree.tree_leaves(dynamic_shapes, is_leaf=_is_axes)
    if len(leaves) != len(shapes):
        return
    asked = [shape for leaf, shape in zip(leaves, shapes, strict=True) if isinstance(leaf, torch.Tensor)]
    names: dict[str, str] = {}
    # Behind these inputs come the statistics of a training step.
    for value, axes in zip(model.graph.inputs, asked, strict=False):
        for axis, size in (axes or {}).items() if isinstance(axes, Mapping | None) else enumerate(axes):
            old = value.shape[axis] if value.shape is not None else None
            new = size if isinstance(size, str) else size.__name__ if isinstance(size, torch.export.Dim) else None
            if isinstance(old, ir.SymbolicDim) and old.value is not None and new is not None:
                names.setdefault(old.value, new)
    replace_symbols(model, names)


def _is_axes(shape: Any) -> bool:
    """Whether this part of `dynamic_shapes` is about one tensor."""
    if isinstance(shape, dict):
        return all(isinstance(axis, int) for axis in shape)
    return isinstance(shape, list | tuple) and any(isinstance(size, str | torch.export.Dim) for size in shape)


def check_names(model: ir.Model, input_names: Sequence[str] | None, output_names: Sequence[str] | None) -> None:
    """Refuse a model whose inputs or outputs are not called what they were asked to be.

    Raises:
        InputError: More names than there are values, or names given twice, which torch drops or changes.
    """
    inputs = [v.name for v in model.graph.inputs if not v.is_initializer()]
    outputs = [v.name for v in model.graph.outputs]
    for option, wanted, got in (("input_names", input_names, inputs), ("output_names", output_names, outputs)):
        if wanted is not None and (isinstance(wanted, str) or list(wanted) != got[: len(wanted)]):
            raise InputError(
                f"to_onnx: {option}={wanted!r} given, but torch named them {got!r}; expected a list of at most "
                f"{len(got)} names, each given once"
            )


def check_sizes(model: ir.Model, module: nn.Module | None, dynamic_shapes: Any, dynamic_axes: Any) -> None:
    """Refuse a model with a fixed size that was asked to be dynamic.

    A module that fixes a size makes torch give up the `torch.export.Dim` for it without a word.

    Raises:
        InputError: There are fewer dynamic sizes than were asked for.
    """
    asked = [leaf for leaf in pytree.tree_leaves(dynamic_shapes) if isinstance(leaf, (str, torch.export.Dim))]
    outputs = {v.name for v in model.graph.outputs}
    asked += [axis for name, axes in (dynamic_axes or {}).items() if name not in outputs for axis in axes or ()]
    inputs = {
        v.name: [str(d) if isinstance(d, ir.SymbolicDim) else d for d in v.shape or ()] for v in model.graph.inputs
    }
    if len(asked) > sum(isinstance(size, str) for shape in inputs.values() for size in shape):
        given = f"dynamic_shapes={dynamic_shapes}" if dynamic_axes is None else f"dynamic_axes={dynamic_axes}"
        steps = about_steps(module)
        advice = f"; {steps}" if steps else ""
        raise InputError(
            f"to_onnx: {given} given, but some of these sizes are fixed: the inputs are {inputs}; name inputs and "
            f"axes, from 0, that exist, or change what fixes the size, such as a reshape to numbers{advice}"
        )

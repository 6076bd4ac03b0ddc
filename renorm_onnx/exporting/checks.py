"""What `to_onnx` asks before it exports, and of the result.

Everything here names the module in question by its path in the model, since that is what its owner can act on.
"""

import contextlib
import copyreg
import functools
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from renorm_onnx.errors import InputError, MachineError
from renorm_onnx.exporting.failures import described
from renorm_onnx.layers.distributed import SyncBatchRenorm
from renorm_onnx.layers.modules import _BatchRenorm
from renorm_onnx.layers.schedules import FromFunction
from renorm_onnx.runtime.session import open_session

#: The exporter's own default, and the range it reaches: below, its converter lacks adapters.
DEFAULT_OPSET = 20
OLDEST_OPSET = {"eval": 15, "train": 18}

_FOREIGN = re.compile(r"batch_?re_?norm", re.IGNORECASE)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NOISY = ("torch", "onnxscript", "onnx_ir")
#: Code whose warnings during an export concern its own authors; torch puts some at the line that called it.
_THEIRS = (
    *(str(m.__file__).removesuffix("__init__.py") for m in (torch, onnxscript, ir, onnx, copyreg, contextlib)),
    str(Path(__file__).parents[1]),
)


def uncompiled(module: Any) -> Any:
    """Return the module inside of what `torch.compile` returned, whose paths lack the wrapper's name; else the same."""
    return getattr(module, "_orig_mod", module)


def _at(name: str) -> str:
    return f"module {name!r}" if name else "the model itself"


def layers_of(module: nn.Module) -> dict[str, _BatchRenorm]:
    """Return our layers by path; a layer used in several places once, under its first path."""
    return {name: m for name, m in module.named_modules() if isinstance(m, _BatchRenorm)}


def check_options(mode: str, opset: int | None, dynamic_shapes: Any, dynamic_axes: Any, *, verify: bool = True) -> int:
    """Return the opset to ask for.

    Args:
        mode: As in `to_onnx`, as the rest.
        opset: None for the default.
        dynamic_shapes: Or None.
        dynamic_axes: Or None.
        verify: Whether the installed onnxruntime, where there is one, must load the model.

    Raises:
        InputError: Unknown mode; an opset that cannot be reached; both ways of saying which sizes may change.
    """
    if mode not in OLDEST_OPSET:
        raise InputError(f"to_onnx: mode={mode!r} given; expected 'eval' or 'train'")
    opset = DEFAULT_OPSET if opset is None else opset
    defined = onnx.defs.onnx_opset_version()
    newest = newest_loadable() if verify else defined
    if isinstance(opset, bool) or not isinstance(opset, int) or not OLDEST_OPSET[mode] <= opset <= newest:
        who = f"onnx {onnx.__version__}" if newest == defined else "the installed onnxruntime"
        beyond = "" if newest == defined else f"; with verify=False up to {defined}, for another runtime"
        raise InputError(
            f"to_onnx(mode={mode!r}): opset={opset!r} given; expected {OLDEST_OPSET[mode]}, the oldest that the "
            f"exporter reaches, to {newest}, the newest that {who} knows{beyond}"
        )
    if dynamic_shapes is not None and dynamic_axes is not None:
        raise InputError(
            "to_onnx: both dynamic_shapes and dynamic_axes given; pass one of them (dynamic_shapes is newer)"
        )
    return opset


@functools.cache
def newest_loadable() -> int:
    """Return the newest opset that onnx defines and the installed onnxruntime loads, where there is one."""
    defined = onnx.defs.onnx_opset_version()
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "probe", [x], [y])
    for opset in range(defined, DEFAULT_OPSET, -1):
        probe = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
        try:
            open_session(probe, "cpu", optimize="off", threads=1)
        except MachineError:
            continue
        return opset
    return defined  # it loads nothing, so there is nothing to be learned from it


def check_modes(module: nn.Module, mode: str) -> None:
    """Refuse modules that would be exported as something else than they are.

    Raises:
        InputError: mode="eval" with a module in training mode; mode="train" with none of our layers in it, or with a
            BatchNorm in training mode, which torch's exporter turns into inference.
    """
    training = [name for name, m in module.named_modules() if m.training]
    if mode == "eval":
        if training:
            first = training[0] or type(module).__name__
            others = f" (and {len(training) - 1} more)" if len(training) > 1 else ""
            raise InputError(
                f"to_onnx(mode='eval'): module {first!r} is in training mode{others}; "
                "call .eval() first or pass mode='train'"
            )
        return
    if not any(layer.training for layer in layers_of(module).values()):
        raise InputError(
            f"to_onnx(mode='train'): no batch renorm layer of {type(module).__name__} is in training mode; "
            "call .train() first or pass mode='eval'"
        )
    for name, layer in layers_of(module).items():
        if layer.training and isinstance(layer.schedule, FromFunction):
            raise InputError(
                f"to_onnx(mode='train'): the schedule of {_at(name)} is a Python function, which has no ONNX form; "
                "use a Schedule, or None for bounds that hold from the first step"
            )
    pooled = [name for name, m in layers_of(module).items() if m.training and isinstance(m, SyncBatchRenorm)]
    if pooled:
        warnings.warn(
            "to_onnx(mode='train'): SyncBatchRenorm layers are exported as the step of one process, by the statistics "
            f"of the batch that the model is fed ({len(pooled)} layers, {pooled[0]!r} first)",
            UserWarning,
            stacklevel=3,
        )
    for name, m in module.named_modules():
        if isinstance(m, _BatchNorm) and m.training:
            raise InputError(
                f"to_onnx(mode='train'): {_at(name)} is a {type(m).__name__} in training mode, which torch exports "
                "as inference; convert it with convert_batchnorm or call .eval() on it"
            )


def check_program(program: torch.export.ExportedProgram, mode: str) -> None:
    """Refuse programs that train: what they write into buffers is lost in ONNX.

    Raises:
        InputError: mode="train"; or the program updates running statistics.
    """
    if mode == "train":
        raise InputError(
            "to_onnx(mode='train'): an ExportedProgram given; pass the module itself, which knows what it updates"
        )
    with quiet():  # a program as captured writes in place; decomposed, its signature lists what it writes
        written = program.run_decompositions({}).graph_signature.buffers_to_mutate
    for buffer in written.values():
        path, _, name = buffer.rpartition(".")
        if name in _STATISTICS:
            raise InputError(
                f"to_onnx: the program was captured with layer {path!r} in training mode, and its updated statistics "
                "would be lost; capture it after .eval(), or pass the module itself with mode='train'"
            )


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


def ordered_axes(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_axes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> dict[str, Any]:
    """Return `dynamic_axes` with one entry per input, in their order: torch goes by the order of the entries alone.

    Raises:
        InputError: It is of another form, names what is no input or output, or an axis that an input does not have.
    """
    said = f"to_onnx: dynamic_axes={dynamic_axes!r} given"
    if not isinstance(dynamic_axes, Mapping) or not all(
        isinstance(v, dict | list | None) for v in dynamic_axes.values()
    ):
        raise InputError(f"{said}; expected a dict of inputs and their axes, such as {{'x': {{0: 'batch'}}}}")
    parameters = inspect.signature(module.forward).parameters
    given = dict(zip(parameters, args, strict=False)) | {name: kwargs[name] for name in parameters if name in kwargs}
    leaves, _ = pytree.tree_flatten_with_path(given)
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
    return {called.get(path, path): wanted.get(called.get(path, "")) for path in paths}


def check_sizes(model: ir.Model, dynamic_shapes: Any, dynamic_axes: Any) -> None:
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
        raise InputError(
            f"to_onnx: {given} given, but some of these sizes are fixed: the inputs are {inputs}; name inputs and "
            "axes, from 0, that exist, or change what fixes the size, such as a reshape to numbers"
        )


def _is_fresh(layer: Any) -> bool:
    """Whether the statistics are those that a layer is made with; `update_stats` changes them, but counts no step."""
    return not (layer.num_batches_tracked or layer.running_mean.any() or (layer.running_var != 1).any())


def check_layers(module: nn.Module, *, functions: bool) -> None:
    """Refuse layers without statistics and layers of other libraries; warn about statistics never updated.

    Raises:
        InputError: One of our layers has no running statistics; a function was asked for, and a layer of another
            library that looks like batch renormalization would not become one.
    """
    for name, m in module.named_modules():
        if functions and _FOREIGN.search(type(m).__name__) and not isinstance(m, _BatchRenorm):
            raise InputError(
                f"to_onnx: {_at(name)} is a {type(m).__module__}.{type(m).__qualname__}, another library's batch "
                "renormalization, which would be exported as loose arithmetic; call adopt(module) first, or pass "
                "functions=False"
            )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise InputError(f"to_onnx: {name!r} is on the device 'meta', without values; load the weights first")
    layers = layers_of(module)
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            lacking = "keep between the steps" if layer.training else "normalize by at inference"
            raise InputError(
                f"to_onnx: {_at(name)} has track_running_stats=False; without running statistics there is nothing "
                f"to {lacking}"
            )
    fresh = [name for name, m in layers.items() if not m.training and _is_fresh(m)]
    if fresh:
        warnings.warn(
            f"to_onnx: {len(fresh)} of {len(layers)} batch renorm layers have statistics of 0 and 1, {fresh[0]!r} "
            "first: they were never updated; train or calibrate the model before deploying it",
            UserWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def quiet(*packages: str) -> Iterator[None]:
    """Keep the exporter's notes to its own authors from the user; warnings from the user's code pass.

    Args:
        packages: Whose logging to suppress; none given: those that take part in an export.
    """
    packages = packages or _NOISY
    roots = [logging.getLogger(name) for name in packages]
    loggers = [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and name.split(".")[0] in packages
    ]
    before = [(logger, logger.disabled, logger.level) for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    for logger in roots:  # for those that the exporter creates when it is imported
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger, disabled, level in before:
            logger.disabled = disabled
            logger.setLevel(level)
    for warning in caught:
        if not warning.filename.startswith(_THEIRS):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextlib.contextmanager
def modes_restored(module: nn.Module) -> Iterator[None]:
    """Leave every training flag as it was found."""
    before = [(m, m.training) for m in module.modules()]
    try:
        yield
    finally:
        for m, training in before:
            m.training = training

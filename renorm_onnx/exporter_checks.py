"""What `to_onnx` asks before it exports, and what it says when the exporter fails.

Everything here names the module in question by its path in the model, since that is what its owner can act on.
"""

import contextlib
import copyreg
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from renorm_onnx.errors import InputError
from renorm_onnx.layers.modules import _BatchRenorm
from renorm_onnx.layers.schedules import FromFunction

#: The exporter's own default, and the range it reaches: below, its converter lacks adapters.
DEFAULT_OPSET = 20
OLDEST_OPSET = {"eval": 15, "train": 18}

_FOREIGN = re.compile(r"batch_?re_?norm", re.IGNORECASE)
_COLOUR = re.compile(r"\x1b\[\d*m")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NOISY = ("torch", "onnxscript", "onnx_ir")
#: Code whose warnings during an export concern its own authors; torch puts some at the line that called it.
_THEIRS = (
    *(str(m.__file__).removesuffix("__init__.py") for m in (torch, onnxscript, ir, onnx, copyreg, contextlib)),
    str(Path(__file__).parent),
)


def layers_of(module: nn.Module) -> dict[str, _BatchRenorm]:
    """Return our layers by path; a layer used in several places once, under its first path."""
    return {name: m for name, m in module.named_modules() if isinstance(m, _BatchRenorm)}


def check_options(mode: str, opset: int | None, dynamic_shapes: Any, dynamic_axes: Any) -> int:
    """Return the opset to ask for.

    Raises:
        InputError: Unknown mode; an opset that cannot be reached; both ways of saying which sizes may change.
    """
    if mode not in OLDEST_OPSET:
        raise InputError(f"to_onnx: mode={mode!r} given; expected 'eval' or 'train'")
    opset = DEFAULT_OPSET if opset is None else opset
    newest = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not OLDEST_OPSET[mode] <= opset <= newest:
        raise InputError(
            f"to_onnx(mode={mode!r}): opset={opset!r} given; expected {OLDEST_OPSET[mode]} to {newest}, which torch's "
            "exporter and the installed onnx package reach"
        )
    if dynamic_shapes is not None and dynamic_axes is not None:
        raise InputError(
            "to_onnx: both dynamic_shapes and dynamic_axes given; pass one of them (dynamic_shapes is newer)"
        )
    return opset


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
                f"to_onnx(mode='train'): the schedule of module {name!r} is a Python function, which has no ONNX form; "
                "use a Schedule, or None for bounds that hold from the first step"
            )
    for name, m in module.named_modules():
        if isinstance(m, _BatchNorm) and m.training:
            raise InputError(
                f"to_onnx(mode='train'): module {name!r} is a {type(m).__name__} in training mode, which torch exports "
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


def check_layers(module: nn.Module, *, functions: bool) -> None:
    """Refuse layers without statistics and layers of other libraries; warn about statistics never updated.

    Raises:
        InputError: One of our layers has no running statistics; a function was asked for, and a layer of another
            library that looks like batch renormalization would not become one.
    """
    for name, m in module.named_modules():
        if functions and _FOREIGN.search(type(m).__name__) and not isinstance(m, _BatchRenorm):
            raise InputError(
                f"to_onnx: module {name!r} is a {type(m).__module__}.{type(m).__qualname__}, another library's batch "
                "renormalization, which would be exported as loose arithmetic; call adopt(module) first, or pass "
                "functions=False"
            )
    layers = layers_of(module)
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            raise InputError(
                f"to_onnx: module {name!r} has track_running_stats=False; without running statistics there is nothing "
                "to normalize by at inference"
            )
    fresh = [name for name, m in layers.items() if not m.training and int(m.num_batches_tracked or 0) == 0]
    if fresh:
        warnings.warn(
            f"to_onnx: {len(fresh)} of {len(layers)} batch renorm layers have num_batches_tracked 0, {fresh[0]!r} "
            "first: their running statistics were never updated; train or calibrate the model before deploying it",
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


def explain_failure(
    error: Exception, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> InputError:
    """Return an error that names the layer in which the export failed and keeps torch's own message.

    Args:
        error: What torch.onnx.export raised.
        module: The model; run once more outside the exporter, to tell a wrong argument from a failed export.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    who = type(module).__name__
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except Exception as own:
        where = _layer_in_traceback(own, module)
        return InputError(
            f"to_onnx: {who} itself fails on these args{_at(where)}: {type(own).__name__}: {own}\n"
            f"args: {_described(args, kwargs)}"
        )
    root: BaseException = error
    where = None
    while True:
        where = _layer_in_traceback(root, module) or where
        following = root.__cause__ or root.__context__
        if following is None:
            break
        root = following
    message = f"to_onnx: torch could not export {who}{_at(where)}: {type(root).__name__}: {root}\n\n{error}"
    return InputError(without_colour(message))


def without_colour(text: str) -> str:
    """Return a message of torch without the codes that colour it on a terminal."""
    return _COLOUR.sub("", text)


def _at(where: str | None) -> str:
    return f", in layer {where!r}" if where else ""


def _layer_in_traceback(error: BaseException, module: nn.Module) -> str | None:
    """Return the path of the innermost module whose code, or whose node, was at work when `error` was raised."""
    names = {id(m): name for name, m in module.named_modules()}
    found = None
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame.f_locals
        if id(frame.get("self")) in names:
            found = names[id(frame["self"])] or found
        node = frame.get("node")
        if isinstance(node, torch.fx.Node):
            stack = node.meta.get("nn_module_stack") or {}
            paths = [str(path) for path, _ in stack.values()]
            found = next((path for path in reversed(paths) if path), found)
        traceback = traceback.tb_next
    return found


def _described(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
        return repr(value)

    return ", ".join([*map(one, args), *(f"{key}={one(value)}" for key, value in kwargs.items())]) or "none"

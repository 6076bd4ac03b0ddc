"""What `to_onnx` says when torch's exporter fails: in which layer, or that the module itself fails on these inputs."""

import contextlib
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from renorm_onnx.errors import InputError, root_of

_COLOUR = re.compile(r"\x1b\[[\d;]*m")


def explain_failure(
    error: Exception, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> InputError:
    """Return an error that names the layer in which the export failed and keeps torch's own message.

    Args:
        error: What torch.onnx.export raised.
        module: The model; run once more outside the exporter, to tell a wrong argument from a failed export.
        args: Positional arguments.
        kwargs: Keyword arguments.
        options: What else the exporter was given; named in the message where it was given at all.
    """
    who = type(module).__name__
    try:
        with torch.no_grad(), buffers_restored(module):
            module(*args, **kwargs)
    except Exception as own:
        where = _layer_in_traceback(own, module)
        return InputError(
            f"to_onnx: {who} itself fails on these args{_at(where)}: {type(own).__name__}: {own}\n"
            f"args: {described(args, kwargs)}"
        )
    cause = root_of(error)  # a mere context is what torch stumbled over while it described the cause
    root: BaseException | None = error
    where = None
    while root is not None:
        where = _layer_in_traceback(root, module) or where
        root = root.__cause__ or root.__context__
    message = f"to_onnx: torch could not export {who}{_at(where)}: {type(cause).__name__}: {cause}"
    given = "".join(f"\n{name}: {value!r}" for name, value in options.items() if value is not None)
    if options.get("dynamic_shapes") is not None and _is_about_steps(cause, where, module):
        said = message.partition("\n" if where else "\n\n")[0]  # below stand graphs and stacks
        return InputError(without_colour(f"{said}\n{about_steps(module)}{given}"))
    message += given
    if cause is not error and not isinstance(cause, InputError):  # ours says what to do; torch's advice would mislead
        message += f"\n\n{error}"
    return InputError(without_colour(message))


def _is_about_steps(cause: BaseException, where: str | None, module: nn.Module) -> bool:
    """Whether an export with dynamic sizes failed because it came to fix the number of steps of a recurrent layer."""
    if isinstance(module.get_submodule(where or ""), nn.RNNBase):
        return isinstance(cause, RuntimeError)  # others are failures of other kinds, as those on packed sequences
    fixed = any(text in str(cause) for text in ("inferred a static shape", "Constraints violated"))
    return fixed and not where and bool(about_steps(module))


def about_steps(module: nn.Module | None) -> str:
    """Return what to do about a recurrent layer whose steps cannot be left open; nothing for a model without one.

    So is it in torch 2.11; in 2.13 some LSTM and GRU keep them open. The older exporter is deprecated, and in both.

    Args:
        module: The model; None for a program, whose sizes were decided when it was captured.
    """
    if module is None or not any(isinstance(layer, nn.RNNBase) for layer in module.modules()):
        return ""
    return (
        "torch's exporter unrolls recurrent layers (RNN, GRU, LSTM), and then cannot leave their steps open: "
        "leave that axis out of dynamic_shapes or dynamic_axes; or call torch.onnx.export(module, args, path, "
        "dynamo=False, dynamic_axes=...), torch's older exporter, whose file `renorm-onnx fuse` takes as well"
    )


@contextlib.contextmanager
def buffers_restored(module: nn.Module) -> Iterator[None]:
    """Leave every buffer as it was found: a module in training mode moves its statistics when it is called."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


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
            paths = [_within(str(path), names.values()) for path, _ in stack.values()]
            found = next((path for path in reversed(paths) if path), found)
        traceback = traceback.tb_next
    return found


def _within(path: str, known: Collection[str]) -> str:
    """Return a path as the module knows it: what a training step is exported in puts a name before it."""
    while path and path not in known:
        path = path.partition(".")[2]
    return path


def described(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return example inputs for a message: types and shapes of arrays and tensors, other values cut short."""

    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
        if isinstance(value, np.ndarray):
            return f"numpy {value.dtype}{value.shape}"
        return reprlib.repr(value)

    return ", ".join([*map(one, args), *(f"{key}={one(value)}" for key, value in kwargs.items())]) or "none"

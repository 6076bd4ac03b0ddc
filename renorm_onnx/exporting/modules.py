"""Whether a module, or a captured program, can be exported as what it is.

Everything here names the module in question by its path in the model, since that is what its owner can act on.
"""

import re
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from renorm_onnx.errors import InputError
from renorm_onnx.exporting.surroundings import quiet
from renorm_onnx.layers.convert import has_learned
from renorm_onnx.layers.distributed import SyncBatchRenorm
from renorm_onnx.layers.modules import _BatchRenorm
from renorm_onnx.layers.schedules import FromFunction
from renorm_onnx.layers.swap import refuse_lazy

_FOREIGN = re.compile(r"batch_?re_?norm", re.IGNORECASE)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def unwrapped(module: Any) -> Any:
    """Return the module inside of what `torch.compile` or data parallelism made of it, whose paths lack the wrapper's.

    A module that nothing is wrapped around is returned as it is.
    """
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module


def layers_of(module: nn.Module) -> dict[str, _BatchRenorm]:
    """Return our layers by path; a layer used in several places once, under its first path."""
    return {name: m for name, m in module.named_modules() if isinstance(m, _BatchRenorm)}


def check_modes(module: nn.Module, mode: str) -> None:
    """Refuse modules that would be exported as something else than they are.

    Raises:
        InputError: mode="eval" with a module in training mode; mode="train" with none of our layers in it, with one
            that has several names, or with a BatchNorm in training mode, which torch's exporter turns into inference,
            or an InstanceNorm whose running statistics it leaves out.
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
    names_of: dict[nn.Module, list[str]] = {}
    for name, m in module.named_modules(remove_duplicate=False):
        names_of.setdefault(m, []).append(name)
    for layer in layers_of(module).values():
        names = names_of[layer]
        if layer.training and len(names) > 1:
            raise InputError(
                f"to_onnx(mode='train'): one {type(layer).__name__} stands under {len(names)} names, "
                f"{', '.join(map(repr, names))}, expected one, because torch cannot capture a buffer of several names "
                "that a step changes; give it one name and call that twice, or export it after .eval()"
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
        if isinstance(m, _InstanceNorm) and m.training and m.track_running_stats:
            raise InputError(
                f"to_onnx(mode='train'): {_at(name)} is a {type(m).__name__} in training mode with "
                "track_running_stats=True, whose updated statistics torch leaves out; call .eval() on it"
            )


def check_layers(module: nn.Module, *, functions: bool) -> None:
    """Refuse layers without statistics and layers of other libraries; warn about statistics never updated.

    Raises:
        InputError: A lazy layer has not seen a batch; one of our layers has no running statistics; a function was
            asked for, and a layer of another library that looks like batch renormalization would not become one.
    """
    for name, m in module.named_modules():
        refuse_lazy(m, "to_onnx", name)
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
    fresh = [name for name, m in layers.items() if not (m.training or has_learned(m))]
    if fresh:
        warnings.warn(
            f"to_onnx: {len(fresh)} of {len(layers)} batch renorm layers have statistics of 0 and 1, {fresh[0]!r} "
            "first: they were never updated; train or calibrate the model before deploying it",
            UserWarning,
            stacklevel=3,
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


def _at(name: str) -> str:
    return f"module {name!r}" if name else "the model itself"

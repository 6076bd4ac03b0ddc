"""The way back: layers of a torch model filled from a model file."""

import os
from dataclasses import dataclass

import onnx
import torch
from torch import nn

from renorm_onnx import model_file
from renorm_onnx.errors import InputError
from renorm_onnx.exporting.modules import layers_of, unwrapped
from renorm_onnx.layers.modules import _BatchRenorm
from renorm_onnx.layers.swap import check_module
from renorm_onnx.onnx_function import PARAMETERS
from renorm_onnx.onnx_layers import LayerInfo, layers_in


def restore(module: nn.Module, path: str | os.PathLike[str] | onnx.ModelProto, *, allow_symlinks: bool = False) -> int:
    """Fill the batch-renormalization layers of `module`, in place, from the function calls of an exported model.

    Weights, statistics, eps, momentum, r_max, d_max, stat and the step counter are restored; training goes on as if it
    had not stopped. The schedule is not in the file: it stays the module's own. So does everything that is no batch
    renormalization, e.g. convolutions. A second set of statistics (`renorm_momentum`) is in files of mode="train"
    alone; from other files it starts as a copy of the first, as from a checkpoint that has one set.

    Args:
        module: A model with layers of the same paths and sizes, or one layer for the only one of the file. Unchanged if
            this raises.
        path: A file that `to_onnx` wrote, or the model that it returned; not fused: folding leaves nothing to restore.
        allow_symlinks: Follow links to data files outside the model's folder.

    Returns:
        The number of layers restored.

    Raises:
        InputError: `module` is no module, or `path` no path or model.
        InputError: The file has no such calls; its layers and the module's differ in path or size, or in what they
            learn.
        ModelFileError: The file cannot be read.
    """
    check_module(module, "restore")
    if not isinstance(path, (str, os.PathLike, onnx.ModelProto)):
        raise InputError(f"restore: path is a {type(path).__name__}, expected a path or an onnx.ModelProto")
    shown = "the model" if isinstance(path, onnx.ModelProto) else repr(os.fspath(path))
    model = model_file.load(path, allow_symlinks=allow_symlinks)
    found = {info.name: info for info in layers_in(model)}
    layers = layers_of(unwrapped(module))
    if not found:
        raise InputError(
            f"restore: {shown} has no batch renormalization calls; pass the file that "
            "to_onnx wrote, before fusing or inlining"
        )
    if layers.keys() == {""} and len(found) == 1:  # the module is a layer itself, which has no path in the file
        found = {"": next(iter(found.values()))}
    if found.keys() != layers.keys():
        only_file, only_module = sorted(found.keys() - layers.keys()), sorted(layers.keys() - found.keys())
        raise InputError(
            f"restore: the layers of {shown} and of {type(module).__name__} differ: only in the file: "
            f"{only_file}; only in the module: {only_module}"
        )
    plans = [_Plan.of(found[name], layer) for name, layer in layers.items()]
    for plan in plans:
        plan.apply()
    return len(plans)


@dataclass(frozen=True)
class _Plan:
    """One layer and what it will hold, checked."""

    layer: _BatchRenorm
    info: LayerInfo
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, info: LayerInfo, layer: _BatchRenorm) -> "_Plan":
        who = f"restore: layer {info.name!r}"
        tensors = {}
        for name in PARAMETERS:
            target, value = getattr(layer, name), getattr(info, name)
            if target is None:
                if name in ("running_mean", "running_var"):
                    raise InputError(
                        f"{who} of the module has track_running_stats=False, the file has statistics for it"
                    )
                if value is None or (value != (1 if name == "weight" else 0)).any():
                    raise InputError(f"{who} of the module has no {name} (affine, bias), the file has one for it")
                continue
            if value is None:
                raise InputError(f"{who}: {name} is computed by the model in the file, not stored")
            if value.shape != tuple(target.shape):
                raise InputError(
                    f"{who}: {name} has shape {value.shape} in the file, {tuple(target.shape)} in the module"
                )
            tensors[name] = torch.from_numpy(value.astype("float64"))
        for name in ("mean", "var"):
            second = getattr(info, f"renorm_{name}")
            if f"renorm_{name}" in layer._buffers:
                first = tensors[f"running_{name}"]
                tensors[f"renorm_{name}"] = first if second is None else torch.from_numpy(second.astype("float64"))
        return cls(layer, info, tensors)

    def apply(self) -> None:
        """Write everything into the layer, in place."""
        layer, info = self.layer, self.info
        with torch.no_grad():
            for name, value in self.tensors.items():
                getattr(layer, name).copy_(value)
            if info.num_batches_tracked >= 0 and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(info.num_batches_tracked)
        layer.eps, layer.r_max, layer.d_max, layer.stat = info.epsilon, info.r_max, info.d_max, info.stat
        if info.momentum:  # 0 stands for a cumulative average, which only the module's own setting can say
            layer.momentum = info.momentum

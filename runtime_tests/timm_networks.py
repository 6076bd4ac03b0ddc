"""Architectures of timm, with torchvision or without: timm imports it, and these networks use nothing of it."""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from renorm_onnx.layers.running_stats import update_stats

ARCHITECTURES = {
    64: [
        "resnet18",
        "resnet50",
        "resnetv2_50",
        "seresnet50",
        "resnext50_32x4d",
        "res2net50_26w_4s",
        "densenet121",
        "dpn68",
        "dla34",
        "vgg11_bn",
        "mobilenetv2_100",
        "mobilenetv3_large_100",
        "mnasnet_100",
        "lcnet_100",
        "ghostnet_100",
        "efficientnet_b0",
        "tf_efficientnetv2_b0",
        "regnety_008",
        "repvgg_a0",
        "mobileone_s0",
        "cspdarknet53",
        "gernet_s",
        "hrnet_w18_small",
        "fastvit_t8",
        "mobilevit_xs",
        "efficientvit_b0",
    ],
    96: ["xception41"],
    128: ["inception_v3"],
    224: ["levit_128"],
}
"""Pixels per side -> names of networks that take such images."""


class _Absent(type):
    """A class of a package that is not there: its attributes are their own names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(types.ModuleType):
    """A module of a package that is not there. timm imports torchvision, and these networks use nothing of it."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.islower() and "feature" not in name and "node" not in name:
            return importlib.import_module(f"{self.__name__}.{name}")
        return _Absent(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        here = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if here else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing: its attributes are made when they are asked for."""


@contextlib.contextmanager
def imported() -> Iterator[types.ModuleType]:
    """Import timm, with or without torchvision.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    finder = _Finder()
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(finder)
    try:
        yield importlib.import_module("timm")
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]


def calibrated(network: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """Give `network` affine parameters of its own and statistics of `batches`, in place; return it for inference."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1 and name.endswith(("weight", "bias")):
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    update_stats(network, batches)
    return network.eval()

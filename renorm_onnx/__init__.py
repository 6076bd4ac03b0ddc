"""Batch Renormalization for torch that exports to ONNX as one function and folds away exactly.

Importing this package imports neither torch nor onnxruntime: each name is resolved on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from renorm_onnx.version import __version__ as __version__

# Module -> the public names it defines. No module bears the name of a public function.
_NAMES = {
    "errors": ("InputError", "MachineError", "ModelFileError", "RenormError", "VerificationError"),
    "layers.schedules": ("HardSwitch", "Ramp", "Schedule", "Sigmoid", "linear", "stretched"),
    "layers.masked": ("length_mask",),
    "layers.stateless": ("batch_renorm",),
    "layers.modules": ("BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d"),
    "layers.lazy": ("LazyBatchRenorm1d", "LazyBatchRenorm2d", "LazyBatchRenorm3d"),
    "layers.distributed": ("SyncBatchRenorm", "convert_sync_batchrenorm"),
    "layers.running_stats": ("sync_running_stats", "update_stats"),
    "layers.convert": ("convert_batchnorm", "to_batchnorm"),
    "layers.adoption": ("adopt",),
    "layers.keras_weights": ("load_keras",),
    "fusion.engine": ("FuseOptions", "fuse"),
    "fusion.report": ("FusionReport",),
    "runtime.parity": ("verify",),
    "delivery": ("fuse_file",),
    "inspection": ("inspect_model",),
    "exporter": ("keep_ops", "to_onnx", "translation_table"),
    "onnx_function": ("attach",),
    "exporting.restoring": ("restore",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from renorm_onnx.delivery import fuse_file as fuse_file
    from renorm_onnx.errors import InputError as InputError
    from renorm_onnx.errors import MachineError as MachineError
    from renorm_onnx.errors import ModelFileError as ModelFileError
    from renorm_onnx.errors import RenormError as RenormError
    from renorm_onnx.errors import VerificationError as VerificationError
    from renorm_onnx.exporter import keep_ops as keep_ops
    from renorm_onnx.exporter import to_onnx as to_onnx
    from renorm_onnx.exporter import translation_table as translation_table
    from renorm_onnx.exporting.restoring import restore as restore
    from renorm_onnx.fusion.engine import FuseOptions as FuseOptions
    from renorm_onnx.fusion.engine import fuse as fuse
    from renorm_onnx.fusion.report import FusionReport as FusionReport
    from renorm_onnx.inspection import inspect_model as inspect_model
    from renorm_onnx.layers.adoption import adopt as adopt
    from renorm_onnx.layers.convert import convert_batchnorm as convert_batchnorm
    from renorm_onnx.layers.convert import to_batchnorm as to_batchnorm
    from renorm_onnx.layers.distributed import SyncBatchRenorm as SyncBatchRenorm
    from renorm_onnx.layers.distributed import convert_sync_batchrenorm as convert_sync_batchrenorm
    from renorm_onnx.layers.keras_weights import load_keras as load_keras
    from renorm_onnx.layers.lazy import LazyBatchRenorm1d as LazyBatchRenorm1d
    from renorm_onnx.layers.lazy import LazyBatchRenorm2d as LazyBatchRenorm2d
    from renorm_onnx.layers.lazy import LazyBatchRenorm3d as LazyBatchRenorm3d
    from renorm_onnx.layers.masked import length_mask as length_mask
    from renorm_onnx.layers.modules import BatchRenorm1d as BatchRenorm1d
    from renorm_onnx.layers.modules import BatchRenorm2d as BatchRenorm2d
    from renorm_onnx.layers.modules import BatchRenorm3d as BatchRenorm3d
    from renorm_onnx.layers.running_stats import sync_running_stats as sync_running_stats
    from renorm_onnx.layers.running_stats import update_stats as update_stats
    from renorm_onnx.layers.schedules import HardSwitch as HardSwitch
    from renorm_onnx.layers.schedules import Ramp as Ramp
    from renorm_onnx.layers.schedules import Schedule as Schedule
    from renorm_onnx.layers.schedules import Sigmoid as Sigmoid
    from renorm_onnx.layers.schedules import linear as linear
    from renorm_onnx.layers.schedules import stretched as stretched
    from renorm_onnx.layers.stateless import batch_renorm as batch_renorm
    from renorm_onnx.onnx_function import attach as attach
    from renorm_onnx.runtime.parity import verify as verify


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "onnxscript"):
            raise
        text = f"{__name__}.{name} needs {error.name}, which is not installed: pip install 'renorm-onnx[torch]'"
        raise ModuleNotFoundError(text, name=error.name) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)

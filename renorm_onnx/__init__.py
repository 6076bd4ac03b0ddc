"""Batch Renormalization for torch that exports to ONNX as one function and folds away exactly.

Importing this package imports neither torch nor onnxruntime: each name is resolved on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it. No module bears the name of a public function.
_HOME = {
    "InputError": "errors",
    "MachineError": "errors",
    "ModelFileError": "errors",
    "RenormError": "errors",
    "VerificationError": "errors",
}

__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from renorm_onnx.errors import InputError as InputError


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)

"""Models as onnxruntime takes them: complete, and in bytes where they fit."""

import os
from typing import Any

import onnx_ir as ir

from renorm_onnx import model_file
from renorm_onnx.errors import ModelFileError
from renorm_onnx.fusion.calls import define_calls
from renorm_onnx.onnx_function import calls_in


def runnable(model: Any, *, allow_symlinks: bool = False) -> ir.Model:
    """Load a model, and define the functions of ours that it calls and lacks, as a file exported by `keep_ops` does.

    Args:
        model: Path, `onnx.ModelProto` or `onnx_ir.Model`; not changed.
        allow_symlinks: Follow links to data files outside the model's folder.

    Raises:
        ModelFileError: The model cannot be read.
        InputError: Its opset is too old for a function that it calls and lacks.
    """
    loaded = model_file.load(model, allow_symlinks=allow_symlinks)
    define_calls(loaded)
    return loaded


def source_of(model: Any, *, allow_symlinks: bool = False) -> bytes | str:
    """Return the bytes of a model, or its path where it is too large for one protobuf.

    Args:
        model: Path, `onnx.ModelProto`, `onnx_ir.Model`, or the bytes of a model, which are taken as they are.
        allow_symlinks: Follow links to data files outside the model's folder.

    Raises:
        ModelFileError: The model cannot be read, or is too large and has no path.
        InputError: As `runnable`.
    """
    if isinstance(model, bytes):
        return model
    is_complete = isinstance(model, ir.Model) and all(c.op_identifier() in model.functions for c in calls_in(model))
    loaded = model if is_complete else runnable(model, allow_symlinks=allow_symlinks)
    try:
        return model_file.model_bytes(loaded)
    except ModelFileError:
        if isinstance(model, str | os.PathLike):
            return os.path.abspath(os.fspath(model))  # validated by `load` just now
        raise

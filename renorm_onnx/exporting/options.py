"""Which modes and opsets `to_onnx` knows."""

import functools
from typing import Any

import onnx

from renorm_onnx.errors import InputError, MachineError
from renorm_onnx.runtime.session import open_session

#: The exporter's own default, and the range it reaches: below, its converter lacks adapters.
DEFAULT_OPSET = 20
OLDEST_OPSET = {"eval": 15, "train": 18}


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
    if not isinstance(opset, int) or not OLDEST_OPSET[mode] <= opset <= newest:
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

"""Which function evaluates an operator: the tables of all families, joined."""

from collections.abc import Mapping

from renorm_onnx.runtime.operators import (
    borrowed,
    contrib,
    control,
    convolution,
    deformable,
    detection,
    elementwise,
    linear,
    normalization,
    pooling,
    quantized,
    recurrent,
    reduction,
    resize,
    sampling,
    shaping,
)
from renorm_onnx.runtime.operators.call import Kernel

NEWEST_OPSET = 28
"""The last opset of the ONNX domain whose operators the tables follow."""

FAMILIES: tuple[Mapping[str, Kernel], ...] = (
    elementwise.OPERATORS,
    linear.OPERATORS,
    convolution.OPERATORS,
    deformable.OPERATORS,
    pooling.OPERATORS,
    normalization.OPERATORS,
    shaping.OPERATORS,
    reduction.OPERATORS,
    resize.OPERATORS,
    sampling.OPERATORS,
    quantized.OPERATORS,
    recurrent.OPERATORS,
    control.OPERATORS,
    detection.OPERATORS,
    borrowed.OPERATORS,
)
"""One table per family; no operator is in two."""

OPERATORS: Mapping[str, Kernel] = {name: kernel for family in FAMILIES for name, kernel in family.items()}
"""Operators of the ONNX domain by name."""


def find(domain: str, op_type: str, opset: int) -> Kernel | None:
    """The function that evaluates an operator, or None if there is none that is known to be right.

    Beyond `NEWEST_OPSET` an operator still counts as known if it has not changed since.
    """
    if domain == "com.microsoft":
        return contrib.OPERATORS.get(op_type)
    kernel = OPERATORS.get(op_type) if domain == "" else None
    if kernel is None or opset <= NEWEST_OPSET:
        return kernel
    import onnx

    if opset > onnx.defs.onnx_opset_version():
        return None
    return kernel if onnx.defs.get_schema(op_type, opset, domain).since_version <= NEWEST_OPSET else None

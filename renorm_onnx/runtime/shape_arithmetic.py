"""Which values are sizes: computed from shapes and constants alone, on the way to another shape.

Exporters write ``floor(float(shape) * 0.7)``, or with fixed sizes ``floor(10.0 * 0.7)``. In float32, 10 * 0.7 rounds
to 7; in float64, with the stored 0.699999988, it is 6.9999999 and its floor 6: another size than any runtime's. So the
few numbers of such a computation are rounded to float32 just before they are rounded to an integer; besides them, only
constants that the file casts to a narrower type are rounded.
"""

import enum
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from renorm_onnx.runtime.operators.call import Call, Kernel, Result

_MAX_ELEMENTS = 16  # more than a shape has; grids and position encodings, made of shapes too, are data

_BODIES = {"If", "Loop", "Scan"}
_ROUNDING = {"Cast", "Ceil", "Floor", "Round"}

_CONSTANT_TYPES = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_WIDE = {ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


class Origin(enum.Enum):
    """What a value was computed from."""

    DATA = enum.auto()
    CONSTANT = enum.auto()
    SHAPE = enum.auto()


class Origins:
    """The origin of every value seen so far."""

    def __init__(self) -> None:
        self._known: dict[ir.Value, Origin] = {}
        self._fixed: set[ir.Value] = set()

    def of(self, value: ir.Value) -> Origin:
        """Where `value` comes from; an initializer that the caller may override is data."""
        known = self._known.get(value)
        if known is not None:
            return known
        constant = value.is_initializer() and not value.is_graph_input() and value.dtype not in _WIDE
        return Origin.CONSTANT if constant else Origin.DATA

    def pass_on(self, sources: Sequence[ir.Value | None], targets: Sequence[ir.Value]) -> None:
        """Give each target the origin of its source, as at the border of a function."""
        for position, target in enumerate(targets):
            source = sources[position] if position < len(sources) else None
            self._known[target] = Origin.CONSTANT if source is None else self.of(source)
            if source is not None and self.is_fixed(source):
                self._fixed.add(target)

    def note(self, node: ir.Node) -> Origin:
        """Find and remember the origin of the node's outputs.

        It is a shape's if every input is a shape's or a constant, and one is a shape's. A cast to a type other than
        float32 makes data of it, and so does a body; constants of such a type are data from the start.
        """
        origin = self._after(node)
        # Of CastLike the second operand gives its type alone.
        read = node.inputs[:1] if node.op_type == "CastLike" else node.inputs
        fixed = node.op_type not in _BODIES and all(self.is_fixed(value) for value in read if value is not None)
        for output in node.outputs:
            self._known[output] = origin
            if fixed:
                self._fixed.add(output)
        return origin

    def is_fixed(self, value: ir.Value) -> bool:
        """Whether `value` is computed from constants alone, whatever types it went through."""
        return value in self._fixed or (value.is_initializer() and not value.is_graph_input())

    def _after(self, node: ir.Node) -> Origin:
        if node.op_type in ("Shape", "Size"):
            return Origin.SHAPE
        if node.op_type in _BODIES or node.op_type == "CastLike" or _holds_wide(node):
            return Origin.DATA
        if node.op_type == "Cast":
            to = node.attributes.get("to")
            if to is None or to.is_ref() or to.as_int() in _WIDE:
                return Origin.DATA
        found = {self.of(value) for value in node.inputs if value is not None}
        if Origin.DATA in found:
            return Origin.DATA
        return Origin.SHAPE if Origin.SHAPE in found else Origin.CONSTANT


def stored_in(x: np.ndarray, onnx_type: int | None) -> np.ndarray:
    """A constant of float64 as it is once the file has cast it to a float type; runtimes go by way of float32.

    Unlike the rounding of data, which is the error that is judged, that of a constant is the model itself: it is done
    once and for all, and a weight folded with it is another weight.
    """
    if x.dtype != np.float64 or onnx_type not in _CONSTANT_TYPES:
        return x
    return x.astype(np.float32).astype(ir.DataType(onnx_type).numpy()).astype(np.float64)


def _holds_wide(node: ir.Node) -> bool:
    value = node.attributes.get("value")
    if value is None or value.type != ir.AttributeType.TENSOR or value.is_ref():
        return False
    return value.as_tensor().dtype in _WIDE


def rounded_as_stored(kernel: Kernel, call: Call) -> Result:
    """The kernel's results; where it rounds a number to an integer, of that number in float32."""
    x = call.input(0)
    rounds = call.op_type in _ROUNDING and isinstance(x, np.ndarray) and x.dtype == np.float64
    if not rounds or x.size > _MAX_ELEMENTS:
        return kernel(call)
    return kernel(replace(call, inputs=[x.astype(np.float32).astype(np.float64)]))

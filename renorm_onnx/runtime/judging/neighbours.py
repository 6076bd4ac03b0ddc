"""The same model with its weights rounded otherwise: how far may a correct rewrite be from the original?

A fold replaces weights by others that are rounded once, and sums them in another order. What that costs depends on the
network: where it is badly conditioned, a change of half a unit in the last place somewhere moves the output by hundreds
of them, at times. A *neighbour* is the original with some of its weights moved by one unit in the last place, up or
down. Each is moved with probability 1/12, which gives the change the variance of rounding to nearest, 1/12 ulp^2, and
leaves every weight a number of its type: a neighbour runs wherever the original does. Its distance from the original's
float64 outputs is a sample of what rounding costs (the idea of Monte Carlo arithmetic: Parker, 1997, "Monte Carlo
Arithmetic: exploiting randomness in floating-point arithmetic").

On RepVGG-A0 with random weights the error of one run varies by a factor of 30 between neighbours.
"""

import numpy as np
import onnx_ir as ir

# Whose constants are weights. Those of Resize, Clip or a quantizer are not: one ulp there changes sizes or whole steps.
_WEIGHTED = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Gather", "LSTM", "GRU", "RNN"),
        *("Mul", "Add", "Sub", "Div", "PRelu"),
        *("BatchNormalization", "BatchRenormalization", "GroupNormalization"),
        *("InstanceNormalization", "LayerNormalization", "RMSNormalization"),
    }
)
MOVED = 1 / 12
"""Probability with which a weight is moved, for the variance of rounding to nearest."""


def neighbour(model: ir.Model, seed: int) -> ir.Model:
    """Return a copy of a model with some of its weights moved by one unit in the last place.

    Args:
        model: Not changed.
        seed: Of the choice.
    """
    rng = np.random.default_rng(seed)
    copy = model.clone()
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point() or not _is_weight(value):
            continue
        weights = tensor.numpy()
        if weights.dtype.itemsize == 1:
            continue  # 8-bit floats are codes
        target = np.where(rng.random(weights.shape) < 0.5, np.inf, -np.inf).astype(weights.dtype)
        with np.errstate(over="ignore"):
            beside = np.nextafter(weights, target)
        moved = np.where((rng.random(weights.shape) < MOVED) & np.isfinite(beside), beside, weights)
        value.const_value = ir.tensor(moved.astype(weights.dtype), dtype=tensor.dtype, name=value.name)
    return copy


def _is_weight(value: ir.Value) -> bool:
    uses = value.uses()
    return bool(uses) and all(node.op_type in _WEIGHTED for node, _ in uses)

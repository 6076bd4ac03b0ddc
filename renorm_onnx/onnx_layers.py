"""What a model file says about the batch-renormalization layers in it: attributes, parameters, statistics."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx.onnx_function import DEFAULTS, calls_in, is_training, module_of

Array = npt.NDArray[Any]

#: How the name of the output ends that carries a layer's running mean out of a step of training.
UPDATED_MEAN = ["running_mean", "updated"]


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a model file.

    Attributes:
        name: Path of the torch module it came from, else the name of the call.
        training: Whether the call is a training step.
        calls: How often the model uses the layer; a training step with ghost batches uses it once for each.
        epsilon: Added to variances.
        momentum: Share of a batch in the running statistics; 0 stands for a cumulative average.
        r_max: The layer's own bound on r.
        d_max: The layer's own bound on d, in standard deviations.
        stat: What the running variance follows, a key of `onnx_function.TRAINING_NAMES`.
        num_batches_tracked: Batches seen in training; -1 if the file does not say.
        weight, bias, running_mean, running_var: Shape (C,); None where the model computes the value.
        renorm_mean, renorm_var: Shape (C,), in a training step with a second set of statistics; else None.
    """

    name: str
    training: bool
    calls: int
    epsilon: float
    momentum: float
    r_max: float
    d_max: float
    stat: str
    num_batches_tracked: int
    weight: Array | None
    bias: Array | None
    running_mean: Array | None
    running_var: Array | None
    renorm_mean: Array | None = None
    renorm_var: Array | None = None

    @property
    def num_features(self) -> int | None:
        """The number of channels C, None if no parameter is known."""
        known = (v for v in (self.running_mean, self.weight, self.bias, self.running_var) if v is not None)
        return next((v.size for v in known), None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON has."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}


def layers_in(model: ir.Model) -> list[LayerInfo]:
    """List the layers of a model in the order of their first calls; a layer used twice is listed once.

    Args:
        model: With function calls in it; layers that were folded or inlined are gone.

    Returns:
        One entry per layer, empty if the model calls no such function.
    """
    return [_info(model, name, calls) for name, calls in _calls_by_layer(model).items()]


def count_training_layers(model: ir.Model) -> int:
    """How many layers of a model take a step of training, whether they are function calls still or inlined."""
    called = sum(_is_step(model, calls[0]) for calls in _calls_by_layer(model).values())
    return called or sum((value.name or "").split(".")[-2:] == UPDATED_MEAN for value in model.graph.outputs)


def _calls_by_layer(model: ir.Model) -> dict[str, list[ir.Node]]:
    grouped: dict[str, list[ir.Node]] = {}
    for index, call in enumerate(calls_in(model)):
        grouped.setdefault(module_of(call) or call.name or f"layer {index}", []).append(call)
    return grouped


def _is_step(model: ir.Model, call: ir.Node) -> bool:
    function = model.functions.get(call.op_identifier())
    return function is not None and is_training(function)


def _info(model: ir.Model, name: str, calls: list[ir.Node]) -> LayerInfo:
    call = calls[0]
    weight, bias, mean, var = (_constant(v) for v in call.inputs[1:5])
    second = [_constant(v) for v in call.inputs[8:10]] or [None, None]  # behind INPUTS and CHANGING
    return LayerInfo(
        name=name,
        training=_is_step(model, call),
        calls=len(calls),
        epsilon=_number(call, "epsilon"),
        momentum=_number(call, "momentum"),
        r_max=_number(call, "r_max"),
        d_max=_number(call, "d_max"),
        stat=call.attributes.get_string("stat", str(DEFAULTS["stat"])),
        num_batches_tracked=call.attributes.get_int("num_batches_tracked", -1),
        weight=weight,
        bias=bias,
        running_mean=mean,
        running_var=var,
        renorm_mean=second[0],
        renorm_var=second[1],
    )


def _number(call: ir.Node, name: str) -> float:
    """Return a float attribute as the number that was written: ONNX stores 0.01 as 0.009999999776."""
    value = call.attributes.get_float(name, float(DEFAULTS[name]))
    return float(str(np.float32(value)))


def _constant(value: ir.Value | None) -> Array | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()

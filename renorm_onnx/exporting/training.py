"""A module in training mode as a function: statistics in, updated statistics out.

`torch.onnx.export` drops what a module writes into its buffers. So the module is wrapped in one that returns them, and
in the model they are inputs with a default, named as in the module, and outputs ``{name}.updated``::

    state = {}
    for x in batches:
        y, *rest = session.run(None, {"x": x, **state})
        state = {name.removesuffix(".updated"): value for name, value in zip(updated_names, rest)}
"""

import functools
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from renorm_onnx.exporting.modules import layers_of
from renorm_onnx.naming import Names, names_in
from renorm_onnx.onnx_function import INFERENCE, calls_in

#: The buffers that one training step changes, in the order of the outputs; the last two only with `renorm_momentum`.
STATE = ("running_mean", "running_var", "num_batches_tracked", "renorm_mean", "renorm_var")
UPDATED = ".updated"
#: What the wrapper puts before every path.
WRAPPED = "module."


class TrainingStep(nn.Module):
    """The module to export: calls another, and returns the state of its training layers besides the result.

    Args:
        module: Has layers in training mode.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

        @functools.wraps(module.forward)  # the exporter reads the names of the arguments off the signature
        def forward(*args: Any, **kwargs: Any) -> tuple[Any, list[torch.Tensor]]:
            result = module(*args, **kwargs)
            return result, [tensor.clone() for tensor in training_state(module).values()]

        self.forward = forward


def training_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that one step of `module` changes, by path, in the order of the outputs."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, layer in layers_of(module).items()
        if layer.training
        for name in STATE
        if (tensor := layer._buffers.get(name)) is not None
    }


def open_statistics(model: ir.Model, module: nn.Module) -> dict[str, ir.TensorProtocol]:
    """Make the state of training layers inputs and named outputs, in place.

    The prefix that the wrapper put before the names of parameters is taken off.

    Args:
        model: Exported from a `TrainingStep`, before any optimization.
        module: What was wrapped.

    Returns:
        The values that `set_defaults` gives back afterwards: until then the optimizer would take them for constants.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.name is not None and value.name.startswith(WRAPPED):
            value.name = value.name.removeprefix(WRAPPED)
    names = list(training_state(module))
    defaults = {}
    for output, name in zip(graph.outputs[-len(names) :], names, strict=True):
        output.name = f"{name}{UPDATED}"
        value = graph.initializers.pop(name)
        assert value.const_value is not None
        defaults[name], value.const_value = value.const_value, None
        graph.inputs.append(value)
    return defaults


def name_results(model: ir.Model, given: int) -> None:
    """Call outputs that are a layer's own as the export for inference does, in place; torch says ``getitem`` of them.

    Args:
        model: Exported from a `TrainingStep`.
        given: How many outputs, from the first on, have a name of the user's.
    """
    results = model.graph.outputs[given:]
    names = Names(names_in(model))
    for step in (call for call in calls_in(model) if call.op_type != INFERENCE):
        name = names.unique("batch_renorm")
        if step.outputs[0] in results:
            step.outputs[0].name = name


def set_defaults(model: ir.Model, defaults: Mapping[str, ir.TensorProtocol]) -> None:
    """Give inputs their default values, in place: whoever runs the model need not feed them the first time."""
    for value in model.graph.inputs:
        if value.name is not None and value.name in defaults:
            value.const_value = defaults[value.name]
            model.graph.register_initializer(value)

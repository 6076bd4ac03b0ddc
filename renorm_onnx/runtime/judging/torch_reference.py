"""A torch module in the place of the original model: its float64 copy is R, itself on the CPU is U.

torch is never imported here: whoever has a module has already done so.
"""

import copy
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from renorm_onnx.errors import InputError
from renorm_onnx.runtime.judging.neighbours import MOVED


def is_torch_module(value: Any) -> bool:
    """Tell whether a value is a `torch.nn.Module`, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


class TorchReference:
    """Evaluates a torch module on numpy inputs.

    Args:
        module: In evaluation mode. Copied, never changed.
        inputs: Names of the inputs, in the order of the module's `forward`.
        outputs: Names for the outputs, in the order in which they are returned.

    Raises:
        InputError: A part of the module is in training mode.
    """

    def __init__(self, module: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        training = [name or "the module itself" for name, part in module.named_modules() if part.training]
        if training:
            raise InputError(f"verify: {training[0]} of the torch reference is in training mode; call .eval() first")
        self._torch = sys.modules["torch"]
        self._single = copy.deepcopy(module).cpu()
        self._double = copy.deepcopy(self._single).double()
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)

    def evaluate(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs in float64.

        Raises:
            InputError: The module fails on these inputs, or returns another number of outputs.
        """
        wide = {name: a.astype(np.float64) if a.dtype.kind in "fV" else a for name, a in feeds.items()}
        return self._call(self._double, wide)

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs in the module's own precision.

        Raises:
            InputError: As `evaluate`.
        """
        return self._call(self._single, feeds)

    def neighbour(self, seed: int) -> "TorchReference":
        """Return this module with some of its weights moved by one unit in the last place (`neighbours`).

        Args:
            seed: Of the choice.
        """
        torch = self._torch
        generator = torch.Generator().manual_seed(seed)
        other = copy.copy(self)
        other._single = copy.deepcopy(self._single)
        with torch.no_grad():
            for weights in (*other._single.parameters(), *other._single.buffers()):
                if weights.is_floating_point() and weights.element_size() > 1:
                    up = torch.rand(weights.shape, generator=generator) < 0.5
                    target = torch.where(up, math.inf, -math.inf).to(weights.dtype)
                    moved = torch.rand(weights.shape, generator=generator) < MOVED
                    beside = torch.nextafter(weights, target)
                    weights.copy_(torch.where(moved & beside.isfinite(), beside, weights))
        return other

    def _call(self, module: Any, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        arguments = [self._torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in self._inputs]
        try:
            with self._torch.no_grad():
                result = module(*arguments)
        except Exception as error:  # a module may raise anything
            raise InputError(f"verify: the torch reference fails on these inputs: {error}") from error
        flat = self._flatten(result)
        if len(flat) != len(self._outputs):
            raise InputError(f"verify: the torch reference returns {len(flat)} tensors, the model {len(self._outputs)}")
        return {name: tensor.detach().numpy() for name, tensor in zip(self._outputs, flat, strict=True)}

    def _flatten(self, result: Any) -> list[Any]:
        if isinstance(result, self._torch.Tensor):
            return [result]
        if isinstance(result, Mapping):
            return [tensor for value in result.values() for tensor in self._flatten(value)]
        if isinstance(result, list | tuple):
            return [tensor for value in result for tensor in self._flatten(value)]
        return []

"""The two models of a verdict, and how to get R, U and F from them."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from renorm_onnx.fusion.report import METADATA_KEY
from renorm_onnx.model_walk import nodes_of, scopes_of
from renorm_onnx.runtime.ancestry import largest_before
from renorm_onnx.runtime.inputs import input_specs
from renorm_onnx.runtime.judging.cuts import QUANTIZING, data_names
from renorm_onnx.runtime.judging.interface import interface_problems
from renorm_onnx.runtime.judging.neighbours import neighbour
from renorm_onnx.runtime.judging.torch_reference import TorchReference, is_torch_module
from renorm_onnx.runtime.judging.verdict import PRECISIONS, Precision
from renorm_onnx.runtime.reference import evaluate
from renorm_onnx.runtime.session import Session, open_session
from renorm_onnx.runtime.sessions.sources import runnable, source_of

Array = npt.NDArray[Any]

# What may sum, or average, over all positions of a sample.
_AVERAGING = frozenset(
    {
        *("GlobalAveragePool", "AveragePool", "GlobalLpPool", "LpPool", "ReduceMean", "ReduceSum", "Einsum"),
        *("ReduceL1", "ReduceL2", "ReduceSumSquare", "CumSum", "QLinearGlobalAveragePool"),
    }
)
_NAMES = {ir.DataType.DOUBLE: "float64", ir.DataType.FLOAT: "float32"}
_USUAL = PRECISIONS["float32"]


class Pair:
    """The two models, loaded and held side by side.

    Args:
        reference: A path, `onnx.ModelProto`, `onnx_ir.Model` or torch module.
        candidate: As `reference`, without modules.
        allow_symlinks: Follow links to data files outside a model's folder.

    Raises:
        ModelFileError: A model cannot be read.
        InputError: A torch reference is in training mode; a model has no outputs.
    """

    def __init__(self, reference: Any, candidate: Any, *, allow_symlinks: bool) -> None:
        self.candidate = runnable(candidate, allow_symlinks=allow_symlinks)
        self.torch: TorchReference | None = None
        if is_torch_module(reference):
            specs = input_specs(self.candidate)
            outputs = [value.name or "" for value in self.candidate.graph.outputs]
            self.torch = TorchReference(reference, [spec.name for spec in specs], outputs)
            self.model = self.candidate
            self.problems: list[str] = []
        else:
            self.model = runnable(reference, allow_symlinks=allow_symlinks)
            self.problems = interface_problems(self.model, self.candidate)

    @functools.cached_property
    def sources(self) -> tuple[bytes | str, bytes | str]:
        """Reference and candidate as sessions take them, serialized once."""
        return source_of(self.model), source_of(self.candidate)

    def evaluate(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return R; note which ways the conditions of the main graph went."""
        if self.torch:
            return self.torch.evaluate(feeds)
        found = evaluate(self.model, feeds, keep=list(self._went))
        for name, ways in self._went.items():
            ways.add(bool(found[name]))
        return {value.name or "": found[value.name or ""] for value in self.model.graph.outputs}

    @functools.cached_property
    def _conditions(self) -> dict[ir.Node, str]:
        """The Ifs of the main graph whose condition is no constant, and the name of that."""
        asked = ((node, node.inputs[0]) for node in self.model.graph if node.op_type == "If")
        return {
            node: value.name
            for node, value in asked
            if value is not None and value.name and ir.convenience.get_const_tensor(value) is None
        }

    @functools.cached_property
    def _went(self) -> dict[str, set[bool]]:
        return {name: set() for name in self._conditions.values()}

    def never_ran(self) -> list[str]:
        """Return a sentence for each branch of the main graph that no inputs of `evaluate` led into."""
        if self.torch:
            return []
        return [
            f"{branch} of If {(node.name or node.outputs[0].name)!r} ran on no inputs, so that this says nothing of it"
            for node, name in self._conditions.items()
            for branch, way in (("then_branch", True), ("else_branch", False))
            if way not in self._went[name]
        ]

    def neighbour(self, seed: int, provider: str) -> TorchReference | Session:
        """Return the original with its weights rounded otherwise (`neighbours`), ready to run.

        Raises:
            ModelFileError: The model is too large to be changed in memory.
            MachineError: As `Session`.
        """
        if self.torch is not None:
            return self.torch.neighbour(seed)
        changed = neighbour(self.model, seed)
        try:
            return open_session(changed, provider)
        finally:
            # Nodes and values refer to each other: only a search for garbage would let go of the weights.
            for value in changed.graph.initializers.values():
                value.const_value = None

    @property
    def names_agree(self) -> bool:
        """Whether the candidate says of itself that its names mean what they mean in the original."""
        return self.torch is None and METADATA_KEY in self.candidate.metadata_props

    def live_outputs(self) -> set[str]:
        """Return the outputs that depend on what is fed, by more than its shape."""
        return data_names(self.model, {spec.name for spec in input_specs(self.model)})

    @functools.cached_property
    def averages(self) -> bool:
        """Whether anything sums over the positions of a sample."""
        return any(n.op_type in _AVERAGING for scope in scopes_of(self.model) for n in nodes_of(scope))

    @functools.cached_property
    def precisions(self) -> dict[str, Precision]:
        """What the coarsest type before each output of the original allows to expect of it."""
        known = {precision.u: precision for precision in PRECISIONS.values()}
        return {name: known.get(u, _USUAL) for name, u in largest_before(self.model, _roundoff).items()}

    @property
    def precision(self) -> Precision:
        """What the coarsest of them allows to expect."""
        return max(self.precisions.values(), key=lambda precision: precision.u, default=_USUAL)


def _roundoff(of: ir.Value | ir.Node) -> float:
    """The unit roundoff of a value's type, or of what an operator rounds to; 0 where neither is known to round."""
    if isinstance(of, ir.Value):
        kind = of.dtype
    elif of.op_type in QUANTIZING:
        return PRECISIONS["quantized"].u
    elif of.op_type == "Cast" and (to := of.attributes.get("to")) is not None and to.type is ir.AttributeType.INT:
        kind = None if to.is_ref() else ir.DataType(to.as_int())
    else:
        return 0.0
    found = None if kind is None else PRECISIONS.get(_NAMES.get(kind, kind.name.lower()))
    return 0.0 if found is None else found.u

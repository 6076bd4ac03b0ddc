"""What is in a model file: its interface, operators, norms and batch-renormalization layers. `renorm-onnx inspect`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from renorm_onnx import model_file
from renorm_onnx.fusion.calls import define_calls
from renorm_onnx.fusion.engine import count_operators, fuse_in_place
from renorm_onnx.fusion.report import FusionReport, NormReport
from renorm_onnx.onnx_layers import LayerInfo, layers_in
from renorm_onnx.runtime.table import text_table

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found.

    Attributes:
        path: The file.
        ir_version, opset, producer: As the file states them.
        inputs, outputs: Name -> type and shape as text.
        operators: How many nodes of each operator, in all graphs.
        layers: Batch-renormalization layers that are still function calls.
        report: What fusing would do to each norm; only its `norms` matter unless `explain` was asked for.
        explain: Whether to show where each norm would go.
    """

    path: str
    ir_version: int
    opset: int
    producer: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    operators: dict[str, int]
    layers: tuple[LayerInfo, ...]
    report: FusionReport
    explain: bool

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "path": self.path,
            "ir_version": self.ir_version,
            "opset": self.opset,
            "producer": self.producer,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "operators": self.operators,
            "layers": [layer.to_dict() for layer in self.layers],
            "training_layers": self.report.training_layers,
            "norms": [norm.to_dict() for norm in self.report.norms],
        }

    def __str__(self) -> str:
        lines = [f"{self.path}: IR {self.ir_version}, opset {self.opset}, by {self.producer or 'unknown'}"]
        lines += [f"  input   {name}: {kind}" for name, kind in self.inputs.items()]
        lines += [f"  output  {name}: {kind}" for name, kind in self.outputs.items()]
        counts = sorted(self.operators.items(), key=lambda item: (-item[1], item[0]))
        lines += ["", "  ".join(f"{name} {count}" for name, count in counts)]
        if self.layers:
            lines += ["", *_layer_table(self.layers)]
        norms, gone = self.report.norms, len(self.report.unreachable)
        never = f", {gone} never reached" if gone else ""
        lines += ["", self.report.advice_on_training()] if self.report.training_layers else []
        if norms or not self.report.training_layers:
            lines += ["", f"{len(norms)} norms, {len(self.report.folded) - gone} of them can be folded{never}"]
        if self.explain and norms:
            rows = [(n.label, n.form, _outcome(n), n.detail) for n in norms]
            lines += ["", *text_table(("norm", "form", "", "where, or why not"), rows)]
        return "\n".join(lines)


def inspect_model(path: str | os.PathLike[str], *, explain: bool = False, allow_symlinks: bool = False) -> Inspection:
    """Read a model file and say what is in it.

    Args:
        path: The file; not changed.
        explain: Show for each norm where it would go, or why it stays.
        allow_symlinks: Follow links to data files outside the model's folder.

    Returns:
        What was found; `str` of it is readable.

    Raises:
        ModelFileError: The file cannot be read as a model.
        InputError: Its opset is too old for a function of ours that it calls and lacks.
    """
    model = model_file.load(path, allow_symlinks=allow_symlinks)
    define_calls(model)  # only a definition says whether a call is a step of training
    layers = tuple(layers_in(model))
    operators = dict(count_operators(model))
    inputs = {v.name or "": _kind(v) for v in model.graph.inputs if not v.is_initializer()}
    outputs = {v.name or "": _kind(v) for v in model.graph.outputs}
    opset = model.opset_imports.get("", 0)
    producer = " ".join(part for part in (model.producer_name, model.producer_version) if part)
    report = fuse_in_place(model)
    return Inspection(
        os.fspath(path), model.ir_version, opset, producer, inputs, outputs, operators, layers, report, explain
    )


def _kind(value: ir.Value) -> str:
    shape = "" if value.shape is None else f" [{', '.join(str(d) for d in value.shape)}]"
    return f"{'unknown' if value.dtype is None else value.dtype.name.lower()}{shape}"


def _outcome(norm: NormReport) -> str:
    return "kept" if norm.outcome == "kept" else "goes" if norm.is_unreachable else "folds"


def _layer_table(layers: tuple[LayerInfo, ...]) -> list[str]:
    rows = []
    for layer in layers:
        mean, var = layer.running_mean, layer.running_var
        rows.append(
            (
                layer.name,
                str(0 if mean is None else mean.size),
                f"{layer.epsilon:g}",
                f"{layer.momentum:g}",
                f"{layer.r_max:g}",
                f"{layer.d_max:g}",
                layer.stat,
                "" if mean is None else f"{mean.min():.3g} .. {mean.max():.3g}",
                "" if var is None else f"{var.min():.3g} .. {var.max():.3g}",
            )
        )
    header = ("layer", "C", "epsilon", "momentum", "r_max", "d_max", "stat", "running mean", "running var")
    return text_table(header, rows, numbers=(1, 2, 3, 4, 5))

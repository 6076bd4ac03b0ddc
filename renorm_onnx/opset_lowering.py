"""Opsets that torch's exporter does not reach: 15 to 17, and those newer than its converter.

torch's exporter writes opset 18 and leaves older ones to onnx's converter, which gives up at the first mean over an
axis (it has no rule for ReduceMean from 18 to 17) and keeps the model at 18 without an error. Between 15 and 18 few
operators changed what they mean; those are rewritten here, and the rest is refused by name.

Upwards, onnxscript's converter ends at 25. Beyond it torch asks onnx's converter, which has no rule for e.g. Gelu and
leaves the model at 18. An operator with the same definition in 25 and in the opset asked for needs no rule.
"""

from collections.abc import Callable

import onnx
import onnx_ir as ir

from renorm_onnx.errors import InputError
from renorm_onnx.model_walk import nodes_of

FROM = 18
NEWEST = 25

#: 16 to 18 only added element types (bfloat16, optionals); the checker finds a model that uses one.
_MORE_TYPES = {"GreaterOrEqual", "Identity", "If", "LeakyRelu", "LessOrEqual", "Loop", "PRelu", "Scan", "Where"}


def nearest(opset: int) -> int:
    """Return the opset to ask of torch's exporter where `opset` is wanted."""
    return min(max(opset, FROM), NEWEST)


def raise_opset(model: ir.Model, target: int) -> None:
    """Declare a model of opset `NEWEST` to be of a newer one in which its operators are the same, in place.

    Args:
        model: Of opset `NEWEST`, without function definitions; of another one it stays as it is.
        target: Newer than `NEWEST`.

    Raises:
        InputError: An operator was redefined in between.
    """
    if model.opset_imports.get("") != NEWEST:
        return
    for node in nodes_of(model.graph):
        if node.domain == "" and _since(node.op_type, target) != _since(node.op_type, NEWEST):
            raise InputError(
                f"to_onnx: opset {target} cannot be reached: {node.op_type} {node.name!r} was redefined after "
                f"{NEWEST}; ask for {NEWEST} or older"
            )
    _declare(model, target)


def lower_opset(model: ir.Model, target: int) -> None:
    """Rewrite a model of opset 18 for an older one, in place.

    Args:
        model: Of opset 18, without function definitions. Not to be used after this raised.
        target: 15, 16 or 17.

    Raises:
        InputError: An operator, or a way in which it is used, does not exist in opset `target`.
    """
    for node in list(nodes_of(model.graph)):
        if node.domain != "" or _since(node.op_type, target) == _since(node.op_type, FROM):
            continue
        rule = _RULES.get(node.op_type)
        obstacle = "it is new" if rule is None or _since(node.op_type, target) is None else rule(node)
        if obstacle:
            raise InputError(
                f"to_onnx: opset {target} cannot be reached: {node.op_type} {node.name!r} has no form in it "
                f"({obstacle}); ask for {FROM} or newer"
            )
    _declare(model, target)


def _declare(model: ir.Model, target: int) -> None:
    for node in nodes_of(model.graph):
        if node.domain == "":
            node.version = None
    for graph in model.graphs():
        if "" in graph.opset_imports:
            graph.opset_imports[""] = target


def _since(op_type: str, opset: int) -> int | None:
    try:
        return int(onnx.defs.get_schema(op_type, opset).since_version)
    except onnx.defs.SchemaError:
        return None


def _reduce(node: ir.Node) -> str:
    """The axes were an attribute before 18."""
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    constant = ir.convenience.get_const_tensor(axes) if axes is not None else None
    if axes is not None and constant is None:
        return "its axes are computed"
    empty, keeps_all = constant is None or not constant.size, node.attributes.get_int("noop_with_empty_axes", 0)
    if empty and keeps_all:
        return "noop_with_empty_axes=1"
    if axes is not None and constant is not None:
        if not empty:  # no axes at all are all axes
            node.attributes["axes"] = ir.AttrInt64s("axes", [int(a) for a in constant.numpy().ravel()])
        node.resize_inputs(1)
        graph = axes.graph
        if axes.is_initializer() and not axes.uses() and graph is not None and axes.name is not None:
            graph.initializers.pop(axes.name)
    node.attributes.pop("noop_with_empty_axes", None)
    return ""


def _resize(node: ir.Node) -> str:
    """18 added axes, antialias and a policy."""
    if node.attributes.get_int("antialias", 0):
        return "antialias=1"
    if "axes" in node.attributes:
        return "axes are given"
    if node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "keep_aspect_ratio_policy is given"
    for name in ("antialias", "keep_aspect_ratio_policy"):
        node.attributes.pop(name, None)
    return ""


def _pad(node: ir.Node) -> str:
    """18 added the input axes."""
    return "axes are given" if len(node.inputs) > 3 and node.inputs[3] is not None else ""


def _split(node: ir.Node) -> str:
    """18 added num_outputs, which allows an uneven last part."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return "num_outputs instead of sizes"
    node.attributes.pop("num_outputs", None)
    return ""


def _scatter(node: ir.Node) -> str:
    """16 and 18 added reductions."""
    reduction = node.attributes.get_string("reduction", "none")
    if reduction != "none":
        return f"reduction={reduction!r}"
    node.attributes.pop("reduction", None)
    return ""


_RULES: dict[str, Callable[[ir.Node], str]] = {
    **{name: lambda node: "" for name in _MORE_TYPES},
    **{
        f"Reduce{kind}": _reduce
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
    },
    "Pad": _pad,
    "Resize": _resize,
    "ScatterElements": _scatter,
    "ScatterND": _scatter,
    "Split": _split,
}

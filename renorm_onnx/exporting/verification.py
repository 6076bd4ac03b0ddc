"""After an export: does the model compute what the module computes?

Two questions, kept apart. Whether the *translation* is right is asked in float64 on both sides, torch's copy of the
module against our evaluation of the model, where rounding cannot hide a wrong epsilon. A module whose code names
narrower types (autocast, a cast) may differ there, or have no such copy; then its own run has to do. How well the
result *runs* is asked of onnxruntime, in the model's own types and without its graph optimizations. In its own types
an output may be as far off as the coarsest type that it is computed from explains. The mean that a training step
returns is measured in standard deviations: behind another norm it is 0 but for rounding, on both sides.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from renorm_onnx import model_file
from renorm_onnx.errors import InputError, MachineError, ModelFileError, VerificationError
from renorm_onnx.exporting.other_sizes import open_varying_sizes
from renorm_onnx.exporting.surroundings import copied, quiet
from renorm_onnx.exporting.training import UPDATED, training_state
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.model_walk import nodes_of, scopes_of
from renorm_onnx.runtime.ancestry import largest_before
from renorm_onnx.runtime.comparison import Comparison, Tolerance, compare
from renorm_onnx.runtime.estimate import LIMIT, estimate
from renorm_onnx.runtime.reference import UNUSABLE, ReferenceUnusableError, evaluate
from renorm_onnx.runtime.session import open_session

Array = npt.NDArray[Any]

#: Both sides in float64; what is left are constants that the model stores as float32.
TRANSLATION = Tolerance(rms=1e-5, peak=1e-4)
#: A run in the model's own type: a gate against nonsense, not a measure of the rounding of a deep network.
RUN = {
    np.dtype(np.float64): Tolerance(1e-6, 1e-5),
    np.dtype(np.float32): Tolerance(1e-3, 1e-2),
    np.dtype(np.float16): Tolerance(3e-2, 2e-1),
    np.dtype(ml_dtypes.bfloat16): Tolerance(2e-1, 1.0),
}
#: Larger weights are left out for the structural checks: protobuf holds 2 GB, and their values do not matter there.
_LARGE = 4096
_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ExportReport:
    """What an export was checked for; `str` is the line that `to_onnx` logs.

    Attributes:
        calls: Function calls written, one per use of a layer.
        trained: How many of them are training steps.
        opset: Opset of the model, which is the one asked for.
        valid: Whether the checker and strict shape inference were asked, and agreed.
        error: max|onnxruntime - float64 reference| over all outputs; None if not run.
        relative: `error` divided by max|y| of its output.
        foldable: Norms that `fuse` folds; None if not tried.
        norms: Norms that `fuse` found.
        skipped: What was not checked, and why.
    """

    calls: int
    trained: int
    opset: int
    valid: bool = False
    error: float | None = None
    relative: float | None = None
    foldable: int | None = None
    norms: int | None = None
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [
            f"{self.calls} call{'' if self.calls == 1 else 's'}"
            + (f", {self.trained} of them training steps" if self.trained else "")
        ]
        parts += [f"opset {self.opset} asked and reached", "checker ok" if self.valid else "not verified"]
        if self.error is not None:
            parts.append(f"max error {self.error:.1e}, {self.relative:.1e} of max |y|")
        if self.norms:
            parts.append(f"{self.foldable} of {self.norms} norms foldable")
        parts += [f"not checked: {reason}" for reason in self.skipped]
        return "to_onnx: " + "; ".join(parts)


def verify_export(
    model: ir.Model,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    report: ExportReport,
    others: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
) -> ExportReport:
    """Check an exported model, running it if that costs less than `estimate.LIMIT`.

    Args:
        model: Changed in one thing: sizes of outputs that turn out to vary are opened, in place.
        module: What was exported, or `ExportedProgram.module()`; copied, never changed.
        args: Example inputs.
        kwargs: Example keyword inputs.
        report: What is known so far.
        others: Inputs of other sizes, which the model is said to take as well, or None.

    Returns:
        `report`, completed.

    Raises:
        VerificationError: The model breaks a rule of ONNX, or differs from the module by more than rounding.
    """
    check_structure(model)
    report = replace(report, valid=True)
    cost = estimate(model)
    if not report.trained:
        report = _count_foldable(model, report) if cost.bytes <= LIMIT.bytes else report
    if cost.flops > LIMIT.flops or cost.bytes > LIMIT.bytes:
        return _skip(report, f"values, because one run takes {cost} and the limit is {LIMIT}")
    names, leaves = _fed(model, args, kwargs)
    if len(leaves) != len(names):
        return _skip(report, f"values, because of {len(leaves)} tensors the model takes {len(names)}")
    if drawing := next((node for scope in scopes_of(model) for node in nodes_of(scope) if _is_random(node)), None):
        return _skip(report, f"values, because {drawing.op_type} {drawing.name!r} draws random numbers")
    feeds = dict(zip(names, map(_numpy, leaves), strict=True))
    try:
        reference = evaluate(model, feeds)
    except ReferenceUnusableError as error:
        return _skip(report, "values, because " + str(error).removeprefix("evaluate: ").removesuffix(f" {UNUSABLE}"))
    coarsest = _coarsest(model)
    problem = _check_translation(module, args, kwargs, reference, coarsest)
    if problem:
        return _skip(report, problem)
    if others is not None:
        report = _check_other_sizes(model, module, *others, coarsest, report)
    return _check_run(model, feeds, reference, report, coarsest)


def _fed(model: ir.Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[str], list[torch.Tensor]]:
    """The names of what the model has to be fed, and the tensors that the module is called with, in their order."""
    leaves = torch.utils._pytree.tree_leaves((args, dict(kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return [v.name or "" for v in model.graph.inputs if not v.is_initializer()], tensors


def check_structure(model: ir.Model) -> None:
    """Run onnx's checker and strict shape inference on a model of any size.

    Raises:
        VerificationError: One of them refuses the model; its message is kept.
    """
    light = model_file.to_proto(_without_weights(model))
    try:
        onnx.checker.check_model(light, full_check=True)
        onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        types = {v.dtype for v in (*model.graph.inputs, *model.graph.initializers.values())}
        hint = ""
        if ir.DataType.BFLOAT16 in types and model.opset_imports.get("", 0) < 22:
            hint = "; most operators take bfloat16 from opset 22 on: ask for opset=22 or newer"
        raise VerificationError(f"to_onnx: the exported model is not valid ONNX: {error}{hint}") from error


def _without_weights(model: ir.Model) -> ir.Model:
    """Return a copy in which large initializers are inputs, of the same type and shape."""
    light = model.clone()
    for value in list(light.graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.size > _LARGE and value.name is not None:
            light.graph.initializers.pop(value.name)
            value.const_value = None
            if not value.is_graph_input():
                light.graph.inputs.append(value)
    return light


class _Narrowing(TorchFunctionMode):
    """Notes whether code rounds float64 to float32, or anything to less, although all it was given is float64."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = self.single = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):  # autocast itself leaves float64 alone, so it shows in no result
                kind = value.device.type
                autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
                self.seen |= value.dtype in _NARROW or autocast
                self.single |= value.dtype is torch.float32 and _has_double((args, kwargs))
        return result


def _has_double(values: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves(values)
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype is torch.float64 for leaf in leaves)


def _coarsest(model: ir.Model) -> dict[str, Tolerance]:
    """What is allowed for a run in the model's own types, by output: as much as the coarsest type before it needs."""
    allowed = {ir.DataType.from_numpy(kind): tolerance for kind, tolerance in RUN.items()}
    tolerances = {tolerance.rms: tolerance for tolerance in allowed.values()}

    def needed(of: ir.Value | ir.Node) -> float:
        return allowed[of.dtype].rms if isinstance(of, ir.Value) and of.dtype in allowed else 0.0

    return {name: tolerances.get(rms, TRANSLATION) for name, rms in largest_before(model, needed).items()}


def _check_translation(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    reference: Mapping[str, Array],
    coarsest: Mapping[str, Tolerance],
) -> str:
    """Compare torch in float64 with the evaluation in float64; return why that was impossible, if it was."""
    narrowing = _Narrowing()
    try:
        want: list[Array] | None = _outputs_of(module, args, kwargs, narrowing)
    except Exception:  # code that names float32 cannot run in float64; then torch's own precision has to do
        want = None
    found = {} if want is None else _compared(want, reference, {})
    if want is None or (narrowing.seen and not all(found.values())):
        # What is computed from nothing narrow has been judged, unless the code names float32 on its way.
        limit = 0.0 if narrowing.single else RUN[np.dtype(np.float32)].rms
        known = {k: one for k, one in found.items() if one or coarsest[k].rms <= limit}
        want = _outputs_of(module, args, kwargs)
        found = _compared(want, reference, coarsest) | known
    if len(want) != len(reference):
        return f"values, because the module returns {len(want)} tensors and the model {len(reference)}"
    if not found:
        return "values, because no output is a floating tensor"
    worst = max(found.values(), key=lambda one: (not one, one.peak))
    if not worst:
        raise VerificationError(f"to_onnx: the exported model does not compute what the module computes: {worst}")
    return ""


def _check_other_sizes(
    model: ir.Model,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    coarsest: Mapping[str, Tolerance],
    report: ExportReport,
) -> ExportReport:
    """Check the translation again, at sizes that the module was not exported with."""
    names, leaves = _fed(model, args, kwargs)
    shapes = ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in zip(names, leaves, strict=True))
    try:
        _outputs_of(module, args, kwargs)
    except Exception as error:
        why = str(error).partition("\n")[0]
        return _skip(report, f"sizes other than the example's, because the module itself fails on {shapes}: {why}")
    try:
        reference = evaluate(model, dict(zip(names, map(_numpy, leaves), strict=True)))
        _check_translation(module, args, kwargs, reference, coarsest)
    except ReferenceUnusableError as error:
        return _skip(report, f"sizes other than the example's: {error}")
    except (InputError, VerificationError) as error:
        raise VerificationError(
            f"to_onnx: the exported model is right for inputs of the example's sizes alone, and wrong for {shapes}, "
            "which its open axes allow: torch's exporter has fixed what depends on one of them. Leave that axis out of "
            f"dynamic_shapes or dynamic_axes, or change the module\n{error}"
        ) from error
    open_varying_sizes(model, {name: np.shape(value) for name, value in reference.items()})
    return report


def _compared(
    want: Sequence[Array], reference: Mapping[str, Array], tolerances: Mapping[str, Tolerance]
) -> dict[str, Comparison]:
    """Compare each output that is a floating tensor, by `TRANSLATION` where no tolerance is given."""
    named = dict(zip(reference, want, strict=False))
    floating = {k: w.astype(np.float64) for k, w in named.items() if w.dtype.kind in "fV" and w.size}
    units = _deviations(reference)
    return {
        k: compare({k: w}, {k: np.asarray(reference[k], np.float64)}, tolerances.get(k, TRANSLATION), units=units)
        for k, w in floating.items()
    }


def _deviations(reference: Mapping[str, Array]) -> dict[str, Array]:
    """Return, for each mean that a training step updates, the standard deviation that it is a shift against."""
    kinds = {f"{kind}_mean{UPDATED}": f"{kind}_var{UPDATED}" for kind in ("running", "renorm")}
    pairs = {k: k.removesuffix(end) + kinds[end] for k in reference for end in kinds if k.endswith(end)}
    return {mean: np.sqrt(np.asarray(reference[var], np.float64)) for mean, var in pairs.items() if var in reference}


def _check_run(
    model: ir.Model,
    feeds: Mapping[str, Array],
    reference: Mapping[str, Array],
    report: ExportReport,
    coarsest: Mapping[str, Tolerance],
) -> ExportReport:
    try:
        session = open_session(model, "cpu", optimize="off", threads=1)
        got = session.run(feeds)
    except (MachineError, InputError) as error:
        if isinstance(error, ModelFileError):
            raise VerificationError(f"to_onnx: onnxruntime refuses the exported model: {error}") from error
        return _skip(report, f"a run in onnxruntime, because {error}")
    worst: Comparison | None = None
    units = _deviations(reference)
    for name, value in got.items():
        if value.dtype not in RUN or not value.size:
            continue
        one = compare({name: reference[name]}, {name: value.astype(np.float64)}, coarsest[name], units=units)
        if not one:
            raise VerificationError(f"to_onnx: onnxruntime differs from the float64 reference: {one}")
        worst = one if worst is None or one.peak > worst.peak else worst
    if worst is None:
        return report
    off = float(abs(worst.got - worst.want)) if worst.peak else 0.0
    return replace(report, error=off, relative=worst.peak)


def _outputs_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], in_double: _Narrowing | None = None
) -> list[Array]:
    """Return the tensors that a copy of the module gives, then the statistics that its training layers updated.

    Given `in_double`, the copy runs in float64, under that watch.
    """
    twin = copied(module)
    inputs: Any = (args, dict(kwargs))
    if in_double is not None:
        twin = twin.double()
        inputs = torch.utils._pytree.tree_map(_double, inputs)
    else:
        inputs = copy.deepcopy(inputs)
    with torch.no_grad(), in_double or contextlib.nullcontext():
        result = twin(*inputs[0], **inputs[1])
    tensors = [v for v in torch.utils._pytree.tree_leaves(result) if isinstance(v, torch.Tensor)]
    tensors += training_state(twin).values()
    return [_numpy(v) for v in tensors]


def _double(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().double() if value.is_floating_point() else value.detach().clone()


def _numpy(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _is_random(node: ir.Node) -> bool:
    if node.domain or node.op_type != "Dropout":
        return not node.domain and node.op_type in _RANDOM
    training = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = None if training is None else ir.convenience.get_const_tensor(training)
    return training is not None and (tensor is None or bool(tensor.numpy()))


def _count_foldable(model: ir.Model, report: ExportReport) -> ExportReport:
    with quiet("renorm_onnx"):  # only counted here: that something was folded would be false
        _, fusion = fuse(model)
    return replace(report, foldable=len(fusion.folded), norms=len(fusion.norms))


def _skip(report: ExportReport, reason: str) -> ExportReport:
    return replace(report, skipped=(*report.skipped, reason))

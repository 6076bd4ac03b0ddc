"""torch modules become ONNX models in which every batch-renormalization layer is one function call.

This is the border between two vocabularies: ``weight, bias, running_mean, running_var, eps`` on torch's side,
``scale, B, input_mean, input_var, epsilon`` on ONNX's.

How a layer gets through `torch.onnx.export`, which inlines every function it knows: inside `keep_ops` a layer is one
operator ``renorm_onnx::batch_renorm``; `translation_table` turns that into a node without a definition, which the
exporter's inliner, optimizer and version converter leave alone; the definition is attached afterwards. Without
`keep_ops`, the same layers export as ordinary BatchNormalization.
"""

import contextlib
import inspect
import io
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Never

import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch import nn

from renorm_onnx import model_file, opset_lowering
from renorm_onnx.errors import InputError
from renorm_onnx.exporting.buffers import changed_by_a_call, lost_updates, noting_assigned
from renorm_onnx.exporting.failures import explain_failure, without_colour
from renorm_onnx.exporting.interface import (
    arguments_of,
    as_args,
    check_names,
    check_program_args,
    check_sizes,
    in_order,
    name_sizes,
    shapes_of_axes,
)
from renorm_onnx.exporting.modules import check_layers, check_modes, check_program, layers_of, unwrapped
from renorm_onnx.exporting.options import check_options
from renorm_onnx.exporting.other_sizes import bounded_axes, close_fixed_sizes, other_inputs
from renorm_onnx.exporting.surroundings import modes_restored, quiet
from renorm_onnx.exporting.training import WRAPPED, TrainingStep, name_results, open_statistics, set_defaults
from renorm_onnx.exporting.verification import ExportReport, verify_export
from renorm_onnx.inlining import inline
from renorm_onnx.layers.functional import keep_ops as keep_ops
from renorm_onnx.onnx_function import (
    DEFAULTS,
    DOMAIN,
    INFERENCE,
    MODULE_KEY,
    VERSION,
    attach,
    calls_in,
    module_of,
    training_name,
    unshare,
)

_log = logging.getLogger(__name__)

#: Arguments of `torch.onnx.export` that have another name here.
_NAMED_HERE = {"f": "path", "opset_version": "opset", "training": "mode"}


def to_onnx(
    module: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    mode: str = "eval",
    functions: bool = True,
    opset: int | None = None,
    dynamic_shapes: Any = None,
    dynamic_axes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    external_data: bool | None = None,
    metadata: bool = True,
    verify: bool = True,
    **unknown: Never,
) -> onnx.ModelProto:
    """Export a torch module; every batch-renormalization layer becomes one function call with its own parameters.

    Args:
        module: The model, or an `torch.export.ExportedProgram` captured inside `keep_ops`.
        args: Example inputs, as for calling the module. A single tensor may stand alone. None: those that an
            ExportedProgram carries.
        path: File to write, replacing an existing one; None writes nothing. Written only if everything succeeded.
        kwargs: Example keyword inputs.
        mode: "eval"; or "train": layers in training mode become ``BatchRenormalizationTraining``, whose updated
            statistics are further outputs ``{name}.updated`` of the model, to be fed back as the inputs ``{name}``.
        functions: False: plain ONNX, one BatchNormalization per layer, no trace of this package.
        opset: 15 (mode="train": 18) or newer, up to what the installed onnxruntime loads, or with verify=False up to
            what the installed onnx defines; None: 20.
        dynamic_shapes: Which sizes may change, as for `torch.export.export`; strings name dimensions.
        dynamic_axes: The older form, ``{"x": {0: "batch"}}``.
        input_names: Names of the model's inputs.
        output_names: Names of the model's outputs.
        external_data: Weights in a file beside the model: True, False, or None: above 1.5 GB.
        metadata: Keep torch's metadata on each node: module scopes, stack traces, paths of source files.
        verify: Check the result (checker, shapes, float64 reference at the example's sizes and, where axes are open, at
            others, onnxruntime; bounded), and log one line.
        **unknown: Refused, with the name that an argument of `torch.onnx.export` has here.

    Returns:
        The model. If its weights lie in a file beside it, the message refers to that file.

    Raises:
        InputError: A module in the wrong mode, or one of which a training step changes more than statistics; a program
            captured in training mode, an opset that cannot be reached, args that do not fit, a layer that torch cannot
            export; the message names the layer.
        ModelFileError: `path` lies in a missing or read-only folder, or the model is too large for memory.
        VerificationError: The exported model does not compute what the module computes.
        TypeError: An argument of `torch.onnx.export` that has another name here or is decided here; any other name.
    """
    _refuse_unknown(unknown)
    opset = check_options(mode, opset, dynamic_shapes, dynamic_axes, verify=verify)
    if path is not None:
        model_file.check_output(path, force=True)
    if args is None and kwargs is None and isinstance(module, torch.export.ExportedProgram) and module.example_inputs:
        args, kwargs = module.example_inputs
    args, kwargs, module = as_args(args), dict(kwargs or {}), unwrapped(module)
    scripted = isinstance(module, torch.jit.ScriptModule)
    live = module if isinstance(module, nn.Module) and not scripted else None
    arguments, shapes = {}, dynamic_shapes
    if live is not None:
        check_modes(live, mode)
        check_layers(live, functions=functions)
        arguments = arguments_of(live, args, kwargs)
        if dynamic_axes is not None and arguments:
            shapes = shapes_of_axes(arguments, dynamic_axes, input_names, output_names)
        if isinstance(shapes, Mapping):
            kwargs, shapes = in_order(kwargs, arguments), in_order(shapes, arguments)
    elif isinstance(module, torch.export.ExportedProgram):
        check_program(module, mode)
        kwargs = in_order(kwargs, module.example_inputs[1] if module.example_inputs else {})
        check_program_args(module, args, kwargs, dynamic_axes if dynamic_shapes is None else dynamic_shapes)
    else:
        raise InputError(
            f"to_onnx: module is a {type(module).__name__}; expected a torch.nn.Module or torch.export.ExportedProgram"
            + (", before torch.jit.script or trace" if scripted else "")
        )
    given = {"dynamic_shapes": shapes, "input_names": input_names, "output_names": output_names}
    with noting_assigned(live) as assigned:
        program = _export(module, args, kwargs, opset_version=opset_lowering.nearest(opset), **given)
    lost = lost_updates(program, live, changed_by_a_call(live, assigned, args, kwargs), mode)
    model, captured = program.model, program.exported_program
    assert captured is not None
    close_fixed_sizes(model, captured)
    if live is not None and (bounded := bounded_axes(captured, shapes)):
        _log.warning(
            "to_onnx: torch keeps %s, because the module's code takes another way beyond, or fails; no ONNX model can "
            "say so, and this one computes on",
            ", ".join(bounded),
        )
    name_sizes(model, arguments, shapes)
    check_names(model, input_names, output_names)
    check_sizes(model, live, dynamic_shapes, dynamic_axes)
    calls = _finish(model, opset, live, functions=functions, metadata=metadata)
    if not calls and live is not None and layers_of(live):
        _log.warning("to_onnx: no batch renorm layer became a call; called with a mask in training, it is plain ONNX")
    elif not calls:
        advice = "" if live is not None else "; capture the program inside keep_ops()"
        _log.warning("to_onnx: the model has no batch renorm layer%s", advice)
    later = f"later calls, because each changes the module's buffers {', '.join(map(repr, lost))} and not the model's"
    skipped = (later,) if lost else ()
    report = ExportReport(len(calls), sum(name != INFERENCE for name in calls), opset, skipped=skipped)
    if verify:
        judge = module.module() if isinstance(module, torch.export.ExportedProgram) else module
        report = verify_export(model, judge, args, kwargs, report, other_inputs(captured, args, kwargs))
    _log.info("%s", report)
    return _written(model, path, external_data)


def _refuse_unknown(unknown: Collection[str]) -> None:
    for name in unknown:
        message = f"to_onnx() got an unexpected keyword argument {name!r}"
        if name in _NAMED_HERE:
            message += f"; it is called {_NAMED_HERE[name]!r} here"
        elif name in inspect.signature(torch.onnx.export).parameters:
            message += ", which to_onnx decides itself; to decide it, call torch.onnx.export with translation_table()"
        raise TypeError(message)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what `torch.onnx.export(custom_translation_table=...)` needs to keep our layers.

    For those who call the exporter themselves::

        with keep_ops():
            program = torch.onnx.export(module, args, dynamo=True, custom_translation_table=translation_table())
        attach(program.model)
        program.save("model.onnx")
    """
    return {
        torch.ops.renorm_onnx.batch_renorm.default: _emit_inference,
        torch.ops.renorm_onnx.batch_renorm_training.default: _emit_training,
        torch.ops.renorm_onnx.batch_renorm_training_two_sets.default: _emit_two_sets,
    }


# The annotations decide: parameters of type float and str become attributes, tensors must have none, and of what is
# returned torch understands no type of onnx-ir, and would warn.
def _emit_inference(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    running_mean,
    running_var,
    eps: float,
    momentum: float,
    r_max: float,
    d_max: float,
    stat: str,
) -> Any:
    """Emit one call of the inference function, without a definition."""
    inputs = [x, weight, bias, running_mean, running_var]
    return _emit(INFERENCE, inputs, epsilon=eps, momentum=momentum, r_max=r_max, d_max=d_max, stat=stat)[0]


def _emit_training(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    running_mean,
    running_var,
    r_bound,
    d_bound,
    share,
    eps: float,
    momentum: float,
    r_max: float,
    d_max: float,
    stat: str,
) -> Any:
    """Emit one call of the training function, without a definition."""
    inputs = [x, weight, bias, running_mean, running_var, r_bound, d_bound, share]
    numbers = {"epsilon": eps, "momentum": momentum, "r_max": r_max, "d_max": d_max}
    return _emit(training_name(stat), inputs, 3, **numbers, stat=stat)


def _emit_two_sets(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    running_mean,
    running_var,
    r_bound,
    d_bound,
    share,
    renorm_mean,
    renorm_var,
    renorm_share,
    eps: float,
    momentum: float,
    r_max: float,
    d_max: float,
    stat: str,
) -> Any:
    """Emit one call of the training function with two sets of statistics, without a definition."""
    inputs = [x, weight, bias, running_mean, running_var, r_bound, d_bound, share]
    inputs += [renorm_mean, renorm_var, renorm_share]
    numbers = {"epsilon": eps, "momentum": momentum, "r_max": r_max, "d_max": d_max}
    return _emit(training_name(stat, two_sets=True), inputs, 5, **numbers, stat=stat)


def _emit(op_type: str, inputs: Sequence[ir.Value], outputs: int = 1, **attributes: float | str) -> list[ir.Value]:
    node = ir.node(
        op_type,
        inputs,
        domain=DOMAIN,
        version=VERSION,
        num_outputs=outputs,
        attributes={**DEFAULTS, **attributes},
    )
    onnxscript.evaluator.default().nodes.append(node)  # type: ignore[attr-defined]
    return list(node.outputs)


def _export(
    module: nn.Module | torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any
) -> torch.onnx.ONNXProgram:
    """Run torch's exporter, quietly; on failure say in which layer."""
    live = module if isinstance(module, nn.Module) else None
    stepping = live is not None and any(layer.training for layer in layers_of(live).values())
    said = io.StringIO()  # torch prints the graph of a failed capture
    closed = (*args, {}) if args and isinstance(args[-1], dict) and not kwargs else args  # else it is taken for kwargs
    try:
        with keep_ops(), quiet(), modes_restored(live or nn.Module()), contextlib.redirect_stderr(said):
            program = torch.onnx.export(
                TrainingStep(live) if live is not None and stepping else module,
                closed,
                kwargs=kwargs,
                dynamo=True,
                optimize=False,  # it merges equal tensors; first each call must learn which module it belongs to
                verbose=False,
                custom_translation_table=translation_table(),
                **options,
            )
            assert program is not None
            defaults = {}
            if live is not None and stepping:
                defaults = open_statistics(program.model, live)
                name_results(program.model, len(options["output_names"] or ()))
            for call in calls_in(program.model):
                name = module_of(call)
                call.metadata_props[MODULE_KEY] = f"{name}.".removeprefix(WRAPPED)[:-1] if stepping else name
            program.optimize()
            set_defaults(program.model, defaults)
    except Exception as error:
        if live is None:
            raise InputError(without_colour(f"to_onnx: torch could not export the program: {error}")) from error
        given = {name: value for name, value in options.items() if name != "opset_version"}
        raise explain_failure(error, live, args, kwargs, given) from error
    sys.stderr.write(said.getvalue())
    return program


def _finish(model: ir.Model, opset: int, live: nn.Module | None, *, functions: bool, metadata: bool) -> list[str]:
    """Name, define and complete the calls, in place; return the name of each call's function.

    Raises:
        InputError: The exporter stayed at another opset than asked for.
    """
    if opset < opset_lowering.FROM:
        opset_lowering.lower_opset(model, opset)
    elif opset > opset_lowering.NEWEST:
        opset_lowering.raise_opset(model, opset)
    reached = model.opset_imports.get("")
    if reached != opset:
        raise InputError(
            f"to_onnx: opset {opset} asked for, but torch's converter stayed at {reached}: it has no rule for an "
            f"operator of this model; ask for {reached}"
        )
    if not metadata:
        _strip(model, lambda text: text.startswith(("pkg.torch", "namespace")))
    layers = layers_of(live) if live is not None else {}
    uses: Counter[str] = Counter()
    calls = list(calls_in(model))
    for call in calls:
        name = call.metadata_props.get(MODULE_KEY, "")
        layer = layers.get(name)
        if layer is not None and layer.num_batches_tracked is not None:
            count = int(layer.num_batches_tracked)
            call.attributes["num_batches_tracked"] = ir.AttrInt64("num_batches_tracked", count)
        if name:
            call.name = f"{name}_{uses[name]}" if uses[name] else name
            uses[name] += 1
    kinds = [call.op_type for call in calls]
    attach(model)
    unshare(model)
    if not functions:
        inline(model, domain=DOMAIN)
        _strip(model, lambda text: DOMAIN in text)
    return kinds


def _strip(model: ir.Model, unwanted: Callable[[str], bool]) -> None:
    """Remove metadata whose key or text is unwanted, in place."""
    for graph in model.graphs():
        owners: list[Any] = [graph, *graph.inputs, *graph.initializers.values()]
        for node in graph:
            owners += [node, *node.outputs]
        for owner in owners:
            for key, text in list(owner.metadata_props.items()):
                if unwanted(key) or unwanted(text):
                    del owner.metadata_props[key]


def _written(model: ir.Model, path: str | os.PathLike[str] | None, external_data: bool | None) -> onnx.ModelProto:
    if path is None:
        return model_file.to_proto(model)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if external_data is False and size > model_file.EXTERNAL_ABOVE:
        raise InputError(f"to_onnx: external_data=False, but the weights take {size:,} bytes; leave it out")
    if external_data:
        model.meta[model_file.KEEP_EXTERNAL] = True
    model_file.save(model, path, force=True)
    return onnx.load(path, load_external_data=False)

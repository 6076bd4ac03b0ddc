"""The two ONNX functions that stand for a batch-renormalization layer in a model file.

``renorm_onnx::BatchRenormalization`` is the layer at inference. Its body is one BatchNormalization, so any runtime
that inlines functions runs it, and its attributes keep what the body does not need: a file is enough to rebuild
the layer and go on training (`renorm_onnx.onnx_layers`).

``renorm_onnx::BatchRenormalizationTraining`` is one training step: it normalizes by the batch, corrected towards the
running statistics (Ioffe 2017, arXiv:1702.03275, Algorithm 1), and returns the updated statistics, to be fed back.
Its body differs with what the running variance tracks, and an ONNX function cannot branch on a string, so there is
one name per kind of `stat`.

Every call states every attribute: `onnx.reference` does not know defaults of attributes that a body refers to.
"""

import ast
from collections.abc import Iterator
from typing import Final

import onnx
import onnx_ir as ir

from renorm_onnx.errors import InputError
from renorm_onnx.inlining import Names, names_in, scopes_of
from renorm_onnx.inlining import inline as inline

DOMAIN: Final = "renorm_onnx"
VERSION: Final = 1
INFERENCE: Final = "BatchRenormalization"
TRAINING: Final = "BatchRenormalizationTraining"

#: What the running variance follows -> the name of the training function: the standard deviation (the paper),
#: the biased variance, or the variance divided by m - 1 (torch.nn.BatchNorm).
TRAINING_NAMES: Final = {
    "sigma": TRAINING,
    "var": f"{TRAINING}Var",
    "var_unbiased": f"{TRAINING}VarUnbiased",
}

#: Attributes and their defaults. num_batches_tracked is -1 where the exporter did not know the module.
DEFAULTS: Final[dict[str, float | str | int]] = {
    "epsilon": 1e-5,
    "momentum": 0.01,
    "r_max": 3.0,
    "d_max": 5.0,
    "stat": "sigma",
    "num_batches_tracked": -1,
}

#: Formal inputs of both functions; all but X are of shape (C,). In a file, a layer ``bn`` owns ``bn.weight`` etc.
INPUTS: Final = ("X", "scale", "B", "input_mean", "input_var")
#: Further inputs of a training step, 0-d: r_max and d_max as the schedule has them at this step.
BOUNDS: Final = ("r_bound", "d_bound")
PARAMETERS: Final = ("weight", "bias", "running_mean", "running_var")

#: Node metadata: the path of the torch module that a call came from.
MODULE_KEY: Final = "renorm_onnx.module"
_TORCH_SCOPES: Final = "pkg.torch.onnx.name_scopes"


def inference_function(opset: int) -> ir.Function:
    """Return ``BatchRenormalization``: Y = scale (X - input_mean) / sqrt(input_var + epsilon) + B.

    Source: ONNX BatchNormalization with one output, the paper's Algorithm 1 at inference. Rank-generic.

    Args:
        opset: Of the body, and of the model that calls it: tools differ on functions of another opset.

    Returns:
        A fresh function.

    Raises:
        InputError: `opset` is below 9, where BatchNormalization had another meaning.
    """
    if opset < 9:
        raise InputError(f"{INFERENCE}: opset {opset} given; BatchNormalization is an inference operator from 9 on")
    inputs = [ir.Value(name=n) for n in INPUTS]
    epsilon = ir.RefAttr("epsilon", "epsilon", ir.AttributeType.FLOAT)
    norm = ir.Node("", "BatchNormalization", inputs, [epsilon], num_outputs=1, name="norm")
    norm.outputs[0].name = "Y"
    graph = ir.Graph(
        inputs,
        norm.outputs,
        nodes=[norm],
        opset_imports={"": opset},
        doc_string="Batch Renormalization at inference (arXiv:1702.03275)",
    )
    return ir.Function(DOMAIN, INFERENCE, graph=graph, attributes=ir.convenience.convert_attributes(DEFAULTS))


#: Algorithm 1 without its last line. Statistics are of type T1, the type in which everything is computed.
_STEP = """
    three = Constant <value_ints = [0, 0, -1]> ()
    axes = Constant <value_ints = [0, 2]> ()
    x_flat = Reshape (X, three)
    x = CastLike (x_flat, input_mean)
    eps_f = Constant <value_float: float = @epsilon> ()
    eps = CastLike (eps_f, input_mean)
    momentum_f = Constant <value_float: float = @momentum> ()
    alpha = CastLike (momentum_f, input_mean)
    r_high = CastLike (r_bound, input_mean)
    r_low = Reciprocal (r_high)
    d_high = CastLike (d_bound, input_mean)
    d_low = Neg (d_high)
    mean = Unsqueeze (input_mean, axes)
    var = Unsqueeze (input_var, axes)
    var_eps = Add (var, eps)
    sigma = Sqrt (var_eps)
    batch_mean = ReduceMean <keepdims = 1> (x, axes)
    centered = Sub (x, batch_mean)
    square = Mul (centered, centered)
    batch_var = ReduceMean <keepdims = 1> (square, axes)
    batch_var_eps = Add (batch_var, eps)
    batch_sigma = Sqrt (batch_var_eps)
    r_free = Div (batch_sigma, sigma)
    r = Clip (r_free, r_low, r_high)
    moved = Sub (batch_mean, mean)
    d_free = Div (moved, sigma)
    d = Clip (d_free, d_low, d_high)
    whitened = Div (centered, batch_sigma)
    corrected = Mul (whitened, r)
    x_hat = Add (corrected, d)
    scale_like = CastLike (scale, input_mean)
    scale_flat = Unsqueeze (scale_like, axes)
    B_like = CastLike (B, input_mean)
    B_flat = Unsqueeze (B_like, axes)
    scaled = Mul (x_hat, scale_flat)
    y_flat = Add (scaled, B_flat)
    shape = Shape (X)
    y = Reshape (y_flat, shape)
    Y = CastLike (y, X)
    mean_step = Mul (moved, alpha)
    mean_new = Add (mean, mean_step)
    running_mean = Squeeze (mean_new, axes)
"""

#: The last line of Algorithm 1, for each kind of `stat`.
_UPDATE = {
    "sigma": """
    sigma_moved = Sub (batch_sigma, sigma)
    sigma_step = Mul (sigma_moved, alpha)
    sigma_new = Add (sigma, sigma_step)
    sigma_square = Mul (sigma_new, sigma_new)
    var_free = Sub (sigma_square, eps)
    var_new = Relu (var_free)
    running_var = Squeeze (var_new, axes)
""",
    "var": """
    var_moved = Sub (batch_var, var)
    var_step = Mul (var_moved, alpha)
    var_new = Add (var, var_step)
    running_var = Squeeze (var_new, axes)
""",
    "var_unbiased": """
    x_size = Size (x)
    c_size = Size (input_mean)
    m_int = Div (x_size, c_size)
    one = Constant <value_int = 1> ()
    m_less_int = Sub (m_int, one)
    m = CastLike (m_int, input_mean)
    m_less = CastLike (m_less_int, input_mean)
    batch_sum = Mul (batch_var, m)
    batch_unbiased = Div (batch_sum, m_less)
    var_moved = Sub (batch_unbiased, var)
    var_step = Mul (var_moved, alpha)
    var_new = Add (var, var_step)
    running_var = Squeeze (var_new, axes)
""",
}


def training_function(opset: int, *, stat: str = "sigma") -> ir.Function:
    """Return one training step: (`INPUTS`, `BOUNDS`) -> (Y, running_mean, running_var).

    Source: Ioffe 2017 (arXiv:1702.03275), Algorithm 1; statistics are those *before* the update::

        r = clip(sigma_B / sigma, 1/r_bound, r_bound)    d = clip((mu_B - mu) / sigma, -d_bound, d_bound)
        Y = ((X - mu_B) / sigma_B * r + d) * scale + B
        running_mean = mu + momentum (mu_B - mu)
        running_var: sigma + momentum (sigma_B - sigma), squared, less epsilon        for stat="sigma"

    The bounds are inputs since they follow a schedule; the attributes r_max and d_max are what it ends at. Everything
    is computed in the type of the statistics, so float32 statistics keep float16 inputs accurate.

    Args:
        opset: Of the body and of the model that calls it.
        stat: A key of `TRAINING_NAMES`.

    Returns:
        A fresh function of rank-generic primitive operators (onnxruntime's CUDA provider has no training-mode
        BatchNormalization).

    Raises:
        InputError: `opset` is below 18, where ReduceMean takes its axes otherwise; `stat` is unknown.
    """
    if opset < 18:
        raise InputError(f"{TRAINING}: opset {opset} given; the training function needs opset 18 or newer")
    if stat not in TRAINING_NAMES:
        raise InputError(f"{TRAINING}: stat={stat!r} given; expected one of {tuple(TRAINING_NAMES)}")
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{TRAINING_NAMES[stat]} <epsilon, momentum> ({', '.join(INPUTS + BOUNDS)})"
        f" => (Y, running_mean, running_var)\n{{{_STEP}{_UPDATE[stat]}}}"
    )
    body = ir.serde.deserialize_function(onnx.parser.parse_function(text)).graph
    body.doc_string = "One training step of Batch Renormalization (arXiv:1702.03275, Algorithm 1)"
    attributes = ir.convenience.convert_attributes({**DEFAULTS, "stat": stat})
    return ir.Function(DOMAIN, TRAINING_NAMES[stat], graph=body, attributes=attributes)


def is_inference(function: ir.Function) -> bool:
    """Whether a function is a norm at inference: its body is one BatchNormalization over its own inputs.

    The body decides, not the name: onnx.compose renames functions, and other tools write such functions too.
    """
    if len(function) != 1 or len(function.outputs) != 1:
        return False
    node = function[0]
    return (
        (node.domain, node.op_type) == ("", "BatchNormalization")
        and node.outputs[0] is function.outputs[0]
        and len(node.inputs) == 5
        and all(v in function.inputs for v in node.inputs)
        and "training_mode" not in node.attributes
    )


def is_training(function: ir.Function) -> bool:
    """Whether a function is our training step, possibly with a prefix that onnx.compose put before its name."""
    return function.domain == DOMAIN and function.name.endswith(tuple(TRAINING_NAMES.values()))


def calls_in(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every call of ours in the graph, its subgraphs and the functions, with or without a definition."""
    names = {INFERENCE, *TRAINING_NAMES.values()}
    for scope in scopes_of(model):
        for node in scope.all_nodes():
            if node.domain != DOMAIN:
                continue
            function = model.functions.get(node.op_identifier())
            if node.op_type in names if function is None else is_inference(function) or is_training(function):
                yield node


def attach(model: ir.Model) -> int:
    """Add the functions that `model` calls and lacks, in place.

    torch.onnx.export inlines every function it knows, so it gets none, and the calls are defined afterwards.

    Args:
        model: E.g. ``torch.onnx.export(..., custom_translation_table=translation_table()).model``.

    Returns:
        The number of calls.

    Raises:
        InputError: The model's opset is too old for a function it calls.
    """
    opset = model.opset_imports.get("", 1)
    count = 0
    for call in calls_in(model):
        count += 1
        if call.op_identifier() in model.functions:
            continue
        kinds = {name: stat for stat, name in TRAINING_NAMES.items()}
        stat = kinds.get(call.op_type)
        function = inference_function(opset) if stat is None else training_function(opset, stat=stat)
        model.functions[function.identifier()] = function
    if count:
        for scope in scopes_of(model):
            if any(node.domain == DOMAIN for node in scope.all_nodes()):
                scope.opset_imports[DOMAIN] = VERSION
        model.ir_version = max(model.ir_version, 8)  # the first with functions
    return count


def unshare(model: ir.Model) -> int:
    """Give each call its own parameters ``{module}.weight`` and so on, in place.

    torch's exporter merges equal tensors: in an untrained network all layers, even a convolution's zero bias, read
    one initializer. Then a name says nothing, and statistics fed into one layer would change another. Calls of one
    module keep sharing. Tensor data is not copied.

    Args:
        model: Calls are found everywhere; their new initializers are put into the main graph.

    Returns:
        The number of initializers created.

    Raises:
        InputError: Never on purpose.
    """
    graph = model.graph
    own: dict[tuple[str, ir.Value], ir.Value] = {}
    for call in list(calls_in(model)):
        module = module_of(call)
        if not module:
            continue
        for index, parameter in enumerate(PARAMETERS, start=1):
            old = call.inputs[index]
            if old is None or old.const_value is None or old.is_graph_input():
                continue
            key = f"{module}.{parameter}", old
            if key not in own:
                own[key] = ir.Value(type=old.type, shape=old.shape, const_value=old.const_value)
            call.replace_input_with(index, own[key])
    _remove_unread({old for _, old in own})
    wanted = {name for name, _ in own}
    fresh = Names(names_in(model) | wanted)
    for value in list(graph.initializers.values()):
        if value.name in wanted:  # still read by others, e.g. a convolution whose bias equals a layer's
            value.name = fresh.unique(f"{value.name}_shared")
    names = Names(names_in(model))
    for (name, _), value in own.items():
        value.name = names.unique(name)
        graph.register_initializer(value)
    return len(own)


def _remove_unread(values: set[ir.Value]) -> None:
    """Remove initializers that lost their last reader, in place."""
    for value in values:
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            assert value.graph is not None
            assert value.name is not None
            value.graph.initializers.pop(value.name)


def module_of(call: ir.Node) -> str:
    """Return the path of the torch module that a call came from, "" if the file does not say."""
    if MODULE_KEY in call.metadata_props:
        return call.metadata_props[MODULE_KEY]
    scopes = ast.literal_eval(call.metadata_props.get(_TORCH_SCOPES, "()"))
    if len(scopes) > 1:  # in a branch of torch.cond there is only the node's own name
        return str(scopes[-2])
    mean = call.inputs[3]
    path, dot, last = ((mean.name if mean is not None else None) or "").rpartition(".")
    return path if dot and last == "running_mean" else ""

"""The two ONNX functions that stand for a batch-renormalization layer in a model file.

``renorm_onnx::BatchRenormalization`` is the layer at inference. Its body is one BatchNormalization, so any runtime
that inlines functions runs it, and its attributes keep what the body does not need: a file is enough to rebuild
the layer and go on training (`renorm_onnx.onnx_layers`).

``renorm_onnx::BatchRenormalizationTraining`` is one training step: it normalizes by the batch, corrected towards the
running statistics (Ioffe 2017, arXiv:1702.03275, Algorithm 1), and returns the updated statistics, to be fed back.
Its body differs with what the running variance tracks, and with whether r and d have statistics of their own, and an
ONNX function cannot branch on either, so there is one name per kind.

Every call states every attribute: `onnx.reference` does not know defaults of attributes that a body refers to.
"""

import ast
from collections.abc import Iterator
from typing import Final

import onnx
import onnx_ir as ir

from renorm_onnx.errors import InputError
from renorm_onnx.model_walk import nodes_of, scopes_of
from renorm_onnx.naming import Names, names_in

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

#: Behind such a name: the step of a layer that takes r and d from a second set of statistics (`renorm_momentum`).
TWO_SETS: Final = "TwoSets"

_TRAINING_KINDS: Final = {
    name + suffix: (stat, bool(suffix)) for stat, name in TRAINING_NAMES.items() for suffix in ("", TWO_SETS)
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
#: Further inputs of a training step, 0-d, since they change from step to step: r_max and d_max as the schedule has
#: them, and the share of this batch in the statistics, which is momentum, or 1/n in a cumulative average.
CHANGING: Final = ("r_bound", "d_bound", "share")
#: Inputs of a step with two sets of statistics, behind the others.
SECOND: Final = ("renorm_mean", "renorm_var", "renorm_share")
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


#: Algorithm 1 without its last two lines. Statistics are of type T1, the type in which everything is computed; r and d
#: are measured from those in braces.
_STEP = """
    three = Constant <value_ints = [0, 0, -1]> ()
    axes = Constant <value_ints = [0, 2]> ()
    x_flat = Reshape (X, three)
    x = CastLike (x_flat, input_mean)
    eps_f = Constant <value_float: float = @epsilon> ()
    eps = CastLike (eps_f, input_mean)
    r_high = CastLike (r_bound, input_mean)
    r_low = Reciprocal (r_high)
    d_high = CastLike (d_bound, input_mean)
    d_low = Neg (d_high)
    mean = Unsqueeze ({mean}, axes)
    var = Unsqueeze ({var}, axes)
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
    mean_seen = Squeeze (batch_mean, axes)
"""

#: What the batch contributes to the running variance, for each kind of `stat`.
_SEEN = {
    "sigma": """
    spread_seen = Squeeze (batch_sigma, axes)
""",
    "var": """
    spread_seen = Squeeze (batch_var, axes)
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
    spread_seen = Squeeze (batch_unbiased, axes)
""",
}

#: Which channels teach: no number is below infinity that is infinite, or NaN.
_FINITE = """
    inf_f = Constant <value_float = inf> ()
    inf = CastLike (inf_f, input_mean)
    finite = Less (spread_seen, inf)
"""

#: The last two lines of Algorithm 1 for one set of statistics, {p}_mean and {p}_var, from {mean} and {var}.
_MEAN_UPDATE = """
    {p}_alpha = CastLike ({share}, input_mean)
    {p}_mean_seen = Where (finite, mean_seen, {mean})
    {p}_mean_moved = Sub ({p}_mean_seen, {mean})
    {p}_mean_step = Mul ({p}_mean_moved, {p}_alpha)
    {p}_mean = Add ({mean}, {p}_mean_step)
"""
_SIGMA_UPDATE = """
    {p}_var_eps = Add ({var}, eps)
    {p}_sigma = Sqrt ({p}_var_eps)
    {p}_sigma_seen = Where (finite, spread_seen, {p}_sigma)
    {p}_sigma_moved = Sub ({p}_sigma_seen, {p}_sigma)
    {p}_sigma_step = Mul ({p}_sigma_moved, {p}_alpha)
    {p}_sigma_new = Add ({p}_sigma, {p}_sigma_step)
    {p}_square = Mul ({p}_sigma_new, {p}_sigma_new)
    {p}_var_free = Sub ({p}_square, eps)
    {p}_var = Relu ({p}_var_free)
"""
_VAR_UPDATE = """
    {p}_var_seen = Where (finite, spread_seen, {var})
    {p}_var_moved = Sub ({p}_var_seen, {var})
    {p}_var_step = Mul ({p}_var_moved, {p}_alpha)
    {p}_var = Add ({var}, {p}_var_step)
"""


def training_function(opset: int, *, stat: str = "sigma", two_sets: bool = False) -> ir.Function:
    """Return one training step: (`INPUTS`, `CHANGING`) -> (Y, running_mean, running_var).

    Source: Ioffe 2017 (arXiv:1702.03275), Algorithm 1; statistics are those *before* the update::

        r = clip(sigma_B / sigma, 1/r_bound, r_bound)    d = clip((mu_B - mu) / sigma, -d_bound, d_bound)
        Y = ((X - mu_B) / sigma_B * r + d) * scale + B
        running_mean = mu + share (mu_B - mu)
        running_var: sigma + share (sigma_B - sigma), squared, less epsilon        for stat="sigma"

    A channel whose batch is not finite keeps its statistics: one infinity would else stay in them for ever.

    What changes from step to step is an input; the attributes r_max, d_max and momentum describe the layer. Everything
    is computed in the type of the statistics, so float32 statistics keep float16 inputs accurate.

    Args:
        opset: Of the body and of the model that calls it.
        stat: A key of `TRAINING_NAMES`.
        two_sets: mu and sigma above are renorm_mean and renorm_var, further inputs (`SECOND`), updated likewise by
            renorm_share into two further outputs, new_mean and new_var.

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
    sets = [{"p": "running", "mean": "input_mean", "var": "input_var", "share": "share"}]
    if two_sets:
        sets.append({"p": "new", "mean": "renorm_mean", "var": "renorm_var", "share": "renorm_share"})
    update = _MEAN_UPDATE + (_SIGMA_UPDATE if stat == "sigma" else _VAR_UPDATE)
    learning = _FINITE + "".join(update.format(**names) for names in sets)
    body_text = _STEP.format(**sets[-1]) + _SEEN[stat] + learning
    inputs = INPUTS + CHANGING + (SECOND if two_sets else ())
    outputs = ["Y", *(f"{names['p']}_{moment}" for names in sets for moment in ("mean", "var"))]
    name = training_name(stat, two_sets=two_sets)
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{name} <epsilon> ({', '.join(inputs)}) => ({', '.join(outputs)})\n{{{body_text}}}"
    )
    body = ir.serde.deserialize_function(onnx.parser.parse_function(text)).graph
    body.doc_string = "One training step of Batch Renormalization (arXiv:1702.03275, Algorithm 1)"
    attributes = ir.convenience.convert_attributes({**DEFAULTS, "stat": stat})
    return ir.Function(DOMAIN, name, graph=body, attributes=attributes)


def training_name(stat: str, *, two_sets: bool = False) -> str:
    """Return the name of a training function; arguments as in `training_function`."""
    return TRAINING_NAMES[stat] + (TWO_SETS if two_sets else "")


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
    return function.domain == DOMAIN and function.name.endswith(tuple(_TRAINING_KINDS))


def calls_in(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every call of ours in the graph, its subgraphs and the functions, with or without a definition."""
    names = {INFERENCE, *_TRAINING_KINDS}
    for scope in scopes_of(model):
        for node in nodes_of(scope):
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
        InputError: `model` is no `onnx_ir.Model`; its opset is too old for a function it calls.
    """
    if not isinstance(model, ir.Model):
        raise InputError(
            f"attach: model is a {type(model).__name__}, expected an onnx_ir.Model, as ONNXProgram.model is"
        )
    opset = model.opset_imports.get("", 1)
    count = 0
    for call in calls_in(model):
        count += 1
        if call.op_identifier() in model.functions:
            continue
        kind = _TRAINING_KINDS.get(call.op_type)
        function = (
            inference_function(opset) if kind is None else training_function(opset, stat=kind[0], two_sets=kind[1])
        )
        model.functions[function.identifier()] = function
    if count:
        for scope in scopes_of(model):
            if any(node.domain == DOMAIN for node in nodes_of(scope)):
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

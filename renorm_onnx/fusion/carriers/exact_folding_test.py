"""How carriers are tested: a model in ONNX's text form is fused, and every value of both models compared as fractions.

`assert_fuses` checks everything that a fold promises: the outputs are equal, every name that both models have means the
same value, the norms that stay say the expected reason, a second fusion changes nothing, and the result does not depend
on the order in which norms are tried. Parameters are small multiples of 1/4 and variances have rational roots, so that
float64 holds every folded parameter exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx.parser
import onnx.printer
from onnx import TensorProto, numpy_helper

from renorm_onnx.fusion import engine
from renorm_onnx.fusion.carriers.exact_values_test import evaluate
from renorm_onnx.fusion.report import FusionReport, Reason

Array = np.ndarray
SIZES = {"N": 2, "H": 4, "W": 5, "L": 3}


def quarters(shape: Sequence[int], seed: int = 0, *, positive: bool = False) -> Array:
    """Numbers k/4, none of them zero, one or minus one; the first is negative unless all are to be positive."""
    rng = np.random.default_rng([seed, *shape])
    found = np.asarray(rng.choice([2, 3, 5, 6, 7, 9], tuple(shape)) / 4)
    if not positive:
        found = np.asarray(found * rng.choice([-1, 1], tuple(shape)))
        found.flat[0] = -abs(found.flat[0])
    return found


def norm(
    channels: int,
    name: str = "bn",
    seed: int = 1,
    *,
    positive: bool = False,
    shift: bool = True,
    powers: bool = False,
) -> dict[str, Array]:
    """Parameters of a BatchNormalization that reads ``(x, bn_s, bn_b, bn_m, bn_v)``; kappa stays below 4.

    `powers` makes the scale powers of two, by which float64 divides exactly.
    """
    rng = np.random.default_rng(seed)
    scale = quarters([channels], seed, positive=positive)
    if powers:
        scale = np.sign(scale) * rng.choice([0.5, 2, 4], channels)
    mean = rng.choice([-1, 1, 2], channels) / 4 if shift else np.zeros(channels)
    bias = quarters([channels], seed + 1) if shift else np.zeros(channels)
    return {
        f"{name}_s": scale,
        f"{name}_b": bias,
        f"{name}_m": mean,
        f"{name}_v": rng.choice([1, 4, 16], channels) / 4,
    }


def bn(data: str, name: str = "bn") -> str:
    """A BatchNormalization with the parameters of `norm`, as ONNX text."""
    return f"BatchNormalization<epsilon=0.0>({data}, {name}_s, {name}_b, {name}_m, {name}_v)"


def build(body: str, inputs: str, outputs: str, *, opset: int = 20, **constants: Any) -> onnx.ModelProto:
    """A model in double precision.

    Args:
        body: Nodes in ONNX's text form; initializers are given as `constants`.
        inputs: For example "double[N,4,H,W] x".
        outputs: Names, separated by commas; their types are left open.
        opset: Version of the operator set.
        constants: Initializers by name; floats become double unless they are float32 arrays.
    """
    declared = ", ".join(f"double {name.strip()}" for name in outputs.split(","))
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({declared}) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    found = evaluate(model, feeds_for(model))
    for output in model.graph.output:
        output.type.tensor_type.shape.SetInParent()
        for axis in range(found[output.name].ndim):
            output.type.tensor_type.shape.dim.add(dim_param=f"{output.name}{axis}")
    return model


def feeds_for(model: onnx.ModelProto, seed: int = 7) -> dict[str, Array]:
    """Inputs of quarters; open sizes as in `SIZES`."""
    feeds = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else SIZES[d.dim_param] for d in tensor.shape.dim]
        rng = np.random.default_rng([seed, len(feeds)])
        feeds[value.name] = rng.integers(-12, 13, shape) / 4
        assert tensor.elem_type == TensorProto.DOUBLE
    return feeds


def operators(model: onnx.ModelProto) -> Counter[str]:
    """How many nodes of each operator a model has, bodies included."""
    return Counter(node.op_type for node in nodes_of(model.graph))


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the bodies inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g)


def assert_same(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Both models compute the same, exactly, and a name that both have means the same value."""
    feeds = feeds_for(before)
    want, got = evaluate(before, feeds), evaluate(after, feeds)
    assert [o.name for o in before.graph.output] == [o.name for o in after.graph.output]
    computed = {name for node in nodes_of(before.graph) for name in node.output}
    for name in sorted(computed & set(got)):
        assert want[name].shape == got[name].shape, (name, want[name].shape, got[name].shape)
        differ = np.argwhere(want[name] != got[name])
        assert not len(differ), (
            f"{name!r} differs at {len(differ)} of {want[name].size} places, first {differ[0]}: "
            f"{want[name][tuple(differ[0])]} became {got[name][tuple(differ[0])]}\n{onnx.printer.to_text(after)}"
        )
    stored = {i.name for i in after.graph.initializer}
    for initializer in before.graph.initializer:
        if initializer.name in stored:
            assert initializer in after.graph.initializer, f"{initializer.name!r} kept its name and changed"


def is_valid(model: onnx.ModelProto) -> bool:
    """Whether onnx accepts the model; it refuses deprecated operators that runtimes still run."""
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError:
        return False
    return True


def fuse(model: onnx.ModelProto, options: engine.FuseOptions | None = None) -> tuple[onnx.ModelProto, FusionReport]:
    """`engine.fuse`, checked: exact, idempotent, and independent of the order of norms."""
    fused, report = engine.fuse(model, options)
    if is_valid(model):
        onnx.checker.check_model(fused)
    assert_same(model, fused)
    again, second = engine.fuse(fused, options)
    assert not second.changed, f"fusing twice folds more: {second.to_dict()}"
    assert again.SerializeToString(deterministic=True) == fused.SerializeToString(deterministic=True)
    find = engine.find_norms
    with mock.patch.object(engine, "find_norms", lambda nodes, desk: reversed(list(find(nodes, desk)))):
        other, reverse = engine.fuse(model, options)
    assert_same(model, other)
    kept = [[e.outcome for e in r.entries].count("kept") for r in (report, reverse)]
    assert kept[0] == kept[1], f"{kept[1]} norms stay if they are tried in reverse order, {kept[0]} otherwise"
    return fused, report


def assert_fuses(model: onnx.ModelProto, kept: Sequence[Reason] = ()) -> onnx.ModelProto:
    """Fuse, check, and compare the reasons of what stays (all reasons of each norm count); returns the fused model."""
    fused, report = fuse(model)
    left = [e for e in report.entries if e.outcome == "kept"]
    assert len(left) == len(kept), f"{len(left)} of {len(report.entries)} stay: {[e.detail for e in left]}"
    for entry, reason in zip(left, kept, strict=True):
        assert reason in [r.reason for r in entry.refusals], [str(r) for r in entry.refusals]
    return fused


def backward(
    lines: str,
    channels: int,
    kept: Sequence[Reason] = (),
    *,
    filters: int = 4,
    kernel: int = 1,
    inputs: str = "double[N,3,H,W] x",
    opset: int = 20,
    positive: bool = False,
    shift: bool = True,
    **constants: Any,
) -> onnx.ModelProto:
    """``x -> Conv -> lines -> BatchNormalization``, where `lines` make `d` of `c`; the norm has to reach the Conv."""
    spatial = inputs.count(",") - 1
    weights = {"W": quarters([filters, 3, *[kernel] * spatial]), "b": quarters([filters], 2)}
    body = f"c = Conv(x, W, b) {lines} y = {bn('d')}"
    parameters = norm(channels, positive=positive, shift=shift)
    model = build(body, inputs, "y", opset=opset, **weights, **parameters, **constants)
    fused = assert_fuses(model, kept)
    assert kept or operators(fused)["BatchNormalization"] == 0
    return fused


def forward(
    lines: str,
    channels: int,
    kept: Sequence[Reason] = (),
    *,
    inputs: str = "double[N,4,H,W] x",
    read: str = "Conv(d, W, b)",
    opset: int = 20,
    positive: bool = False,
    shift: bool = True,
    powers: bool = False,
    **constants: Any,
) -> onnx.ModelProto:
    """``x -> BatchNormalization -> lines -> Conv``, where `lines` make `d` of `c` with `channels` channels."""
    spatial = inputs.count(",") - 1
    weights = {"W": quarters([3, channels, *[1] * spatial]), "b": quarters([3], 2)}
    parameters = norm(4, positive=positive, shift=shift, powers=powers)
    body = f"c = {bn('x')} {lines} y = {read}"
    model = build(body, inputs, "y", opset=opset, **(weights | constants), **parameters)
    fused = assert_fuses(model, kept)
    assert kept or operators(fused)["BatchNormalization"] == 0
    return fused


def swapped(constants: Mapping[str, Array], one: str, two: str) -> dict[str, Array]:
    """The constants with two of them exchanged, for negative controls."""
    return {**constants, one: constants[two], two: constants[one]}

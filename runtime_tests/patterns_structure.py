"""Patterns of files: functions, shared and overridable values, names, old versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from renorm_onnx.fusion.engine import FuseOptions
from renorm_onnx.fusion.report import Reason
from runtime_tests.pattern_models import Net, Pattern
from runtime_tests.patterns_bodies import body_of, info

C = 4
IMAGE = ("n", C, 8, 8)
STATS = ("s", "b", "m", "v")


def _function(
    n: Net, name: str, inputs: Sequence[str], nodes: Sequence[onnx.NodeProto], outputs: Sequence[str], **more: Any
) -> None:
    domains = sorted({x.domain for x in nodes} | {""})
    imports = [helper.make_opsetid(d, n.opset if d == "" else 1) for d in domains]
    domain = more.pop("domain", "mine")
    n.functions.append(helper.make_function(domain, name, list(inputs), list(outputs), list(nodes), imports, **more))


def _refer(node: onnx.NodeProto, name: str, parameter: str) -> onnx.NodeProto:
    attribute = node.attribute.add()
    attribute.name, attribute.ref_attr_name, attribute.type = name, parameter, onnx.AttributeProto.FLOAT
    return node


def _norm_function(n: Net, name: str = "Norm", **more: Any) -> None:
    node = _refer(helper.make_node("BatchNormalization", ["X", *STATS], ["Y"], name="inner"), "epsilon", "eps")
    _function(n, name, ["X", *STATS], [node], ["Y"], **({"attributes": ["eps"]} | more))


def _norm_calls(n: Net) -> Any:
    _norm_function(n)
    h = n.op("Norm", n.conv("x", C, 5), *n.stats(5), domain="mine", eps=1e-3)
    return n.op("Norm", n.conv(n.tanh(h), 5, 6), *n.stats(6), domain="mine", eps=0.5)


def _default_attribute(n: Net) -> Any:
    default = helper.make_attribute("eps", 0.25)
    _norm_function(n, attributes=[], attribute_protos=[default])
    h = n.op("Norm", n.conv("x", C, 5), *n.stats(5), domain="mine")
    return n.op("Norm", n.conv(n.tanh(h), 5, 6), *n.stats(6), domain="mine", eps=0.5)


def _nested_functions(n: Net) -> Any:
    _norm_function(n)
    call = helper.make_node("Norm", ["X", *STATS], ["T"], domain="mine", name="call")
    call.attribute.append(helper.make_attribute("eps", 0.125))
    _function(n, "Outer", ["X", *STATS], [call, helper.make_node("Relu", ["T"], ["Y"])], ["Y"])
    return n.op("Outer", n.conv("x", C, 5), *n.stats(5), domain="mine")


def _arithmetic_function(n: Net) -> Any:
    nodes = [
        helper.make_node("Add", ["v", "e"], ["ve"]),
        helper.make_node("Sqrt", ["ve"], ["sigma"]),
        helper.make_node("Sub", ["X", "m"], ["c"]),
        helper.make_node("Div", ["c", "sigma"], ["z"]),
        helper.make_node("Mul", ["z", "s"], ["g"]),
        helper.make_node("Add", ["g", "b"], ["Y"]),
    ]
    _function(n, "Renorm", ["X", *STATS, "e"], nodes, ["Y"])
    stats = [n.away(5, 1, 1), n.rand(5, 1, 1), n.rand(5, 1, 1), n.k(n.rng.uniform(0.5, 2, (5, 1, 1)))]
    return n.op("Renorm", n.conv("x", C, 5), *stats, n.scalar(1e-3), domain="mine")


def _reshaping_function(n: Net) -> Any:
    nodes = [
        helper.make_node("Constant", [], ["dims"], value_ints=[1, -1, 1, 1]),
        helper.make_node("Reshape", ["m", "dims"], ["mm"]),
        helper.make_node("Reshape", ["v", "dims"], ["vv"]),
        helper.make_node("Sub", ["X", "mm"], ["c"]),
        helper.make_node("Mul", ["c", "vv"], ["Y"]),
    ]
    _function(n, "Renorm", ["X", "m", "v"], nodes, ["Y"])
    return n.op("Renorm", n.conv("x", C, 5), n.rand(5), n.away(5), domain="mine")


def _conv_function(n: Net) -> Any:
    _function(n, "Layer", ["X", "w"], [helper.make_node("Conv", ["X", "w"], ["Y"], name="c")], ["Y"])
    return n.bn(n.op("Layer", "x", n.rand(5, C, 3, 3), domain="mine"), 5)


def _block_function(n: Net) -> Any:
    nodes = [
        helper.make_node("Conv", ["X", "w"], ["t"], name="c"),
        helper.make_node("BatchNormalization", ["t", *STATS], ["u"], name="n"),
        helper.make_node("Relu", ["u"], ["Y"]),
    ]
    _function(n, "Block", ["X", "w", *STATS], nodes, ["Y"])
    h = n.op("Block", "x", n.rand(5, C, 3, 3), *n.stats(5), domain="mine")
    return n.op("Block", h, n.rand(6, 5, 1, 1), *n.stats(6), domain="mine")


def _constants_inside(n: Net) -> Any:
    def constant(name: str, array: Any) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, 1, array.shape, array.ravel()))

    rng = np.random.default_rng(3)
    nodes = [constant("w", rng.normal(size=(5, C, 1, 1)))]
    nodes += [constant(s, rng.uniform(0.5, 1.5, 5)) for s in STATS]
    nodes += [helper.make_node("Conv", ["X", "w"], ["t"]), helper.make_node("BatchNormalization", ["t", *STATS], ["Y"])]
    _function(n, "Stored", ["X"], nodes, ["Y"])
    return n.op("Stored", "x", domain="mine")


def _name_in_other_domain(n: Net) -> Any:
    _function(n, "BatchNormalization", ["X"], [helper.make_node("Relu", ["X"], ["Y"])], ["Y"], domain="theirs")
    h = n.op("BatchNormalization", n.bn(n.conv("x", C, 5), 5), domain="theirs")
    return n.op("Identity", h)


def _unused_function(n: Net) -> Any:
    _function(n, "Unused", ["X"], [helper.make_node("Tanh", ["X"], ["Y"])], ["Y"])
    return n.bn(n.conv("x", C, 5), 5)


def _call_in_if(n: Net) -> Any:
    _norm_function(n)
    write = lambda: [n.op("Norm", n.conv("x", C, 5), *n.stats(5), domain="mine", eps=0.125)]  # noqa: E731
    both = [body_of(n, f"branch{i}", [], write) for i in range(2)]
    return n.op("If", n.k(np.array(True)), then_branch=both[0], else_branch=both[1])


def functions() -> Iterator[Pattern]:
    """Model-local functions."""
    yield Pattern("norm function called twice", IMAGE, _norm_calls)
    yield Pattern("norm function with a default attribute", IMAGE, _default_attribute)
    yield Pattern("norm function in a function", IMAGE, _nested_functions)
    yield Pattern("function of arithmetic", IMAGE, _arithmetic_function)
    yield Pattern("function that reshapes its statistics", IMAGE, _reshaping_function)
    yield Pattern("conv in a function, norm outside", IMAGE, _conv_function)
    yield Pattern("conv, norm, relu in a function", IMAGE, _block_function)
    yield Pattern("function with its weights inside", IMAGE, _constants_inside)
    yield Pattern("function of the same name in another domain", IMAGE, _name_in_other_domain)
    yield Pattern("unused function", IMAGE, _unused_function)
    yield Pattern("call of a norm function in an If", IMAGE, _call_in_if)


def _shared_weight(n: Net) -> list[str]:
    w = n.rand(5, C, 3, 3)
    return [n.bn(n.op("Conv", h, w), 5) for h in ("x", n.tanh("x"))]


def _weight_read_elsewhere(n: Net) -> list[str]:
    w = n.rand(5, C, 3, 3)
    return [n.bn(n.op("Conv", "x", w), 5), n.tanh(w)]


def _weight_is_output(n: Net) -> list[str]:
    w = n.rand(5, C, 3, 3)
    return [n.bn(n.op("Conv", "x", w), 5), n.op("Identity", w)]


def _shared_statistics(n: Net) -> list[str]:
    stats = n.stats(5)
    return [n.op("BatchNormalization", n.conv(h, C, 5), *stats) for h in ("x", n.tanh("x"))]


def _scale_is_variance(n: Net) -> Any:
    s = n.k(n.rng.uniform(0.5, 2, 5))
    return n.op("BatchNormalization", n.conv("x", C, 5), s, s, s, s)


def _overridable(n: Net, which: int) -> Any:
    names = [n.rand(5, C, 3, 3), *n.stats(5)]
    shape = [5, C, 3, 3] if which == 0 else [5]
    n.more_inputs.append(info(names[which], 1, shape))
    return n.op("BatchNormalization", n.op("Conv", "x", names[0]), *names[1:])


def _old_ir(n: Net) -> Any:
    n.ir_version = 3
    h = n.bn(n.conv("x", C, 5, bias=True), 5)
    for tensor in n.initializers:
        n.more_inputs.append(info(tensor.name, 1, list(tensor.dims)))
    return h


def _old_ir_bias(n: Net) -> Any:
    n.ir_version = 3
    h = n.bn(n.conv("x", C, 5), 5)
    for tensor in n.initializers:
        n.more_inputs.append(info(tensor.name, 1, list(tensor.dims)))
    return h


def _colliding(n: Net) -> list[str]:
    w = n.k(n.rng.normal(size=(5, C, 3, 3)), "w")
    for taken in ("w__fused", "w__fused_1", "conv_bias", "w_bias", "w_fused"):
        n.k(np.zeros(5), taken)
    h = n.op("Conv", "x", w)
    n.nodes[-1].name = "conv"
    return [n.bn(h, 5), n.op("Identity", "w__fused"), n.op("Add", "conv_bias", n.op("Add", "w_bias", "w_fused"))]


def _stale(shape: Any, kind: int = 1) -> Callable[[Net], Any]:
    def write(n: Net) -> Any:
        h = n.conv("x", C, 5)
        n.infos.append(info(h, kind, shape))
        return n.bn(h, 5)

    return write


def _no_names(n: Net) -> Any:
    h = n.bn(n.conv("x", C, 5), 5)
    for node in n.nodes:
        node.name = ""
    return h


def _same_node_names(n: Net) -> Any:
    h = n.bn(n.conv(n.bn(n.conv("x", C, 5), 5), 5, 6), 6)
    for node in n.nodes:
        node.name = "layer"
    return h


def _extra_outputs(n: Net) -> Any:
    return n.op("BatchNormalization", n.conv("x", C, 5), *n.stats(5), outs=3, training_mode=1)[0]


def _empty_outputs(n: Net) -> Any:
    h = n.bn(n.conv("x", C, 5), 5)
    n.nodes[-1].output.extend(["", ""])
    return h


def files() -> Iterator[Pattern]:
    """Shared, overridable and oddly named values; old versions."""
    yield Pattern("shared weight", IMAGE, _shared_weight)
    yield Pattern("weight read elsewhere", IMAGE, _weight_read_elsewhere)
    yield Pattern("weight handed out", IMAGE, _weight_is_output)
    yield Pattern("shared statistics", IMAGE, _shared_statistics)
    yield Pattern("one tensor for all statistics", IMAGE, _scale_is_variance)
    for which, name in enumerate(("weight", "scale", "B", "mean", "var")):
        write = lambda n, w=which: _overridable(n, w)  # noqa: E731
        yield Pattern(f"overridable {name}", IMAGE, write, 1, None if which == 0 else Reason.OVERRIDABLE)
        yield Pattern(
            f"overridable {name}, assumed constant",
            IMAGE,
            write,
            options=FuseOptions(assume_constant_initializers=True),
        )
    yield Pattern("IR 3", IMAGE, _old_ir, opset=8)
    yield Pattern("IR 3 without a bias", IMAGE, _old_ir_bias, opset=8)
    yield Pattern("names that collide", IMAGE, _colliding)
    for shape in ([2, 7, 3, 3], ["n", 5], [], None, [2, 3, 6, 6, 6]):
        yield Pattern(f"stale value_info {shape}", IMAGE, _stale(shape), runs=False)
    yield Pattern("stale type in value_info", IMAGE, _stale(["n", 5, 6, 6], TensorProto.FLOAT16), runs=False)
    yield Pattern("no node names", IMAGE, _no_names)
    yield Pattern("equal node names", IMAGE, _same_node_names, runs=False)
    yield Pattern("training mode", IMAGE, _extra_outputs, 1, Reason.TRAINING, runs=False)
    yield Pattern("empty further outputs", IMAGE, _empty_outputs, runs=False)


def structure() -> Iterator[Pattern]:
    """All patterns of this file."""
    for rows in (functions, files):
        yield from rows()

"""How the table of patterns writes its models: values are names, constants are drawn, rows are functions of a `Net`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from renorm_onnx.fusion.engine import FuseOptions
from renorm_onnx.fusion.report import Reason

TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float64": TensorProto.DOUBLE,
}
ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Neg")
Shape = Sequence["int | str"]


class Net:
    """A graph under construction.

    Args:
        opset: Version of the default operators.
        dtype: Element type of its constants.
    """

    def __init__(self, opset: int = 17, dtype: str = "float32") -> None:
        self.opset = opset
        self.dtype = dtype
        self.rng = np.random.default_rng(5)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.infos: list[onnx.ValueInfoProto] = []
        self.more_inputs: list[onnx.ValueInfoProto] = []
        self.ir_version = 8
        self._count = 0

    def fresh(self, stem: str) -> str:
        """A name that nothing else bears."""
        self._count += 1
        return f"{stem}{self._count}"

    def k(self, array: Any, name: str = "", *, dtype: str = "") -> str:
        """A stored constant; floats take the type of the net."""
        name = name or self.fresh("k")
        array = np.asarray(array)
        if array.dtype.kind == "f":
            kind = dtype or self.dtype
            array = array.astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        """A stored vector of int64."""
        return self.k(np.array(values, np.int64))

    def rand(self, *shape: int) -> str:
        """Stored normal numbers."""
        return self.k(self.rng.normal(size=shape) * 0.5)

    def away(self, *shape: int) -> str:
        """Stored numbers of both signs, none of them near zero."""
        return self.k(self.rng.uniform(0.5, 2, shape) * self.rng.choice([-1, 1], shape))

    def op(self, operator: str, *inputs: str, outs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """A node; returns the name of its output, or the list of them."""
        names = [self.fresh("v") for _ in range(outs)]
        label = f"{operator.lower()}_{names[0]}"
        self.nodes.append(helper.make_node(operator, list(inputs), names, name=label, domain=domain, **attributes))
        return names[0] if outs == 1 else names

    def stats(self, c: int, *, positive: bool = False, shift: bool = True) -> list[str]:
        """Scale, B, mean and variance of `c` channels, none of them trivial."""
        scale = self.rng.uniform(0.5, 1.5, c) * (1 if positive else self.rng.choice([-1, 1], c))
        rest = [self.rng.normal(size=c) * shift, self.rng.normal(size=c) * shift, self.rng.uniform(0.5, 2, c)]
        return [self.k(v) for v in (scale, *rest)]

    def bn(self, x: str, c: int, *, positive: bool = False, shift: bool = True, **attributes: Any) -> Any:
        """A BatchNormalization at inference, as the opset of the net spells it."""
        if self.opset < 7:
            attributes["is_test"] = 1
        return self.op("BatchNormalization", x, *self.stats(c, positive=positive, shift=shift), **attributes)

    def chain(self, x: str, shape: Sequence[int], operators: str = "Sub Div Mul Add", *, first: bool = False) -> str:
        """Arithmetic with constants of one shape; `first` puts them on the left, where the operator commutes."""
        for operator in operators.split():
            if operator == "Neg":
                x = self.op("Neg", x)
                continue
            c = self.away(*shape)
            x = self.op(operator, *((c, x) if first and operator != "Div" else (x, c)))
        return x

    def conv(
        self, x: str, before: int, after: int, kernel: int = 3, rank: int = 2, *, bias: bool = False, **a: Any
    ) -> Any:
        """A convolution with `rank` spatial axes."""
        weight = self.rand(after, before // a.get("group", 1), *[kernel] * rank)
        return self.op("Conv", x, weight, *([self.rand(after)] if bias else []), **a)

    def deconv(self, x: str, before: int, each: int, kernel: int = 2, rank: int = 2, **a: Any) -> Any:
        """A transposed convolution with `each` output channels per group."""
        return self.op("ConvTranspose", x, self.rand(before, each, *[kernel] * rank), **a)

    def scalar(self, value: float) -> str:
        """A stored number without axes."""
        return self.k(np.array(value))

    def relu(self, x: str) -> Any:
        """What lets no map pass that has a shift."""
        return self.op("Relu", x)

    def tanh(self, x: str) -> Any:
        """What lets no map pass."""
        return self.op("Tanh", x)

    def model(self, inputs: dict[str, Shape], outputs: Sequence[str]) -> onnx.ModelProto:
        """The finished model, with the shapes of its outputs inferred."""
        kind = TYPES[self.dtype]
        given = [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()]
        results = [helper.make_tensor_value_info(n, kind, None) for n in outputs]
        graph = helper.make_graph(
            self.nodes, "g", given + self.more_inputs, results, self.initializers, value_info=self.infos
        )
        domains = sorted(({n.domain for n in self.nodes} | {f.domain for f in self.functions}) - {"", "ai.onnx"})
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in domains)]
        made = helper.make_model(graph, opset_imports=imports, ir_version=self.ir_version, functions=self.functions)
        inferred = {o.name: o for o in onnx.shape_inference.infer_shapes(made).graph.output}
        for output in made.graph.output:
            if inferred[output.name].type.tensor_type.HasField("shape"):
                output.CopyFrom(inferred[output.name])
        return made


Body = Callable[[Net], "str | Sequence[str]"]


@dataclass(frozen=True)
class Pattern:
    """One row of the table.

    Args:
        name: What it shows.
        shape: Of the input "x"; a name stands for 2 when it is run.
        body: Writes the nodes and returns the output, or several.
        left: How many norms and constant affine operators are expected to stay.
        reason: Of the first norm that stays.
        options: What `fuse` may do.
        runs: Whether onnxruntime has kernels for all of it on the CPU.
    """

    name: str
    shape: tuple[int | str, ...]
    body: Body
    left: int = 0
    reason: Reason | None = None
    opset: int = 17
    dtype: str = "float32"
    options: FuseOptions = field(default_factory=FuseOptions)
    runs: bool = True

    def build(self) -> onnx.ModelProto:
        """The model."""
        net = Net(self.opset, self.dtype)
        found = self.body(net)
        return net.model({"x": self.shape}, [found] if isinstance(found, str) else list(found))


def norms_left(model: onnx.ModelProto) -> int:
    """BatchNormalizations and arithmetic with a constant, in the graph, its subgraphs and its functions.

    The Add behind a MatMul or Einsum with a constant factor is its bias and does not count. A fused model is counted
    by what is written in it, not by what the report says.
    """
    stored = {i.name for i in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output}
    return _count(model.graph.node, stored, makers) + sum(_count(f.node, set(), {}) for f in model.functions)


def _count(nodes: Any, stored: set[str], makers: dict[str, onnx.NodeProto]) -> int:
    total = 0
    stored = stored | {o for n in nodes if n.op_type == "Constant" for o in n.output}
    makers = makers | {o: n for n in nodes for o in n.output}
    for node in nodes:
        if node.domain not in ("", "ai.onnx"):
            continue
        graphs = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
        if node.input and not graphs and all(i in stored for i in node.input):
            stored.update(node.output)  # computed from constants alone
            continue
        total += node.op_type == "BatchNormalization"
        constant = [i in stored for i in node.input]
        if node.op_type in ARITHMETIC and (sum(constant) == 1 or node.op_type == "Neg"):
            data = next((i for i, c in zip(node.input, constant, strict=True) if not c), "")
            total += not _is_bias(node, makers.get(data), stored)
        for graph in graphs:
            total += _count(graph.node, stored | {i.name for i in graph.initializer}, makers)
    return total


def _is_bias(node: onnx.NodeProto, maker: onnx.NodeProto | None, stored: set[str]) -> bool:
    product = maker is not None and maker.op_type in ("MatMul", "Einsum") and any(i in stored for i in maker.input)
    return node.op_type in ("Add", "Sub") and product

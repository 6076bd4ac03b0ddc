"""Small models for the tests of the engine, and the comparison of a model with its fused form in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from renorm_onnx import model_file
from renorm_onnx.runtime.reference import evaluate

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}
TYPES["bfloat16"] = TensorProto.BFLOAT16
# A fold rounds each parameter once; sums of at most a few hundred such terms.
ROUNDING = {"float32": 3e-6, "float16": 2e-2, "bfloat16": 1e-1, "float64": 1e-13}


class Builder:
    """Adds nodes one by one; values are names."""

    def __init__(self, seed: int = 0, *, dtype: str = "float32") -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self._count = 0

    def fresh(self, stem: str = "v") -> str:
        self._count += 1
        return f"{stem}{self._count}"

    def constant(self, array: Any, name: str | None = None) -> str:
        name = name or self.fresh("k")
        array = np.asarray(array)
        if array.dtype.kind == "f":
            array = array.astype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def normal(self, *shape: int, name: str | None = None) -> str:
        return self.constant(self.rng.normal(size=shape), name)

    def node(self, operator: str, *inputs: str, out: str | None = None, domain: str = "", **attributes: Any) -> str:
        out = out or self.fresh()
        name = f"{operator.lower()}_{out}"
        self.nodes.append(helper.make_node(operator, list(inputs), [out], name=name, domain=domain, **attributes))
        return out

    def statistics(self, channels: int) -> list[str]:
        """Scale, B, mean and var away from one, zero, zero and one; both signs of scale."""
        scale = self.rng.normal(size=channels) + 0.3
        values = [scale, self.rng.normal(size=channels), self.rng.normal(size=channels)]
        return [self.constant(v) for v in [*values, self.rng.uniform(0.3, 3, channels)]]

    def norm(self, x: str, channels: int, *, out: str | None = None, **attributes: Any) -> str:
        return self.node("BatchNormalization", x, *self.statistics(channels), out=out, **attributes)

    def conv(self, x: str, before: int, after: int, kernel: int = 3, **attributes: Any) -> str:
        group = attributes.get("group", 1)
        return self.node("Conv", x, self.normal(after, before // group, kernel, kernel), **attributes)

    def model(
        self,
        inputs: Mapping[str, Sequence[int | str]],
        outputs: Sequence[str],
        *,
        opset: int = 17,
        ir_version: int = 8,
        **more: Any,
    ) -> onnx.ModelProto:
        kind = TYPES[self.dtype]
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()],
            [helper.make_tensor_value_info(n, kind, None) for n in outputs],
            self.initializers,
        )
        domains = {n.domain for n in self.nodes} - {""}
        imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=self.functions, **more)
        inferred = onnx.shape_inference.infer_shapes(model).graph.output
        for output, known in zip(model.graph.output, inferred, strict=True):
            output.CopyFrom(known)
        return model


def operators(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def largest_difference(model: onnx.ModelProto, fused: onnx.ModelProto, seed: int = 1, **sizes: int) -> float:
    """Largest difference of the outputs relative to the largest output, both models evaluated in float64."""
    one, two = model_file.load(model), model_file.load(fused)
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in one.graph.inputs:
        if value.name in one.graph.initializers:
            continue
        shape = [d if isinstance(d, int) else sizes.get(str(d), 5) for d in value.shape or ()]
        feeds[value.name or ""] = rng.normal(size=shape) + 0.2
    want, got = evaluate(one, feeds), evaluate(two, feeds)
    assert list(want) == list(got)
    worst = 0.0
    for name, array in want.items():
        assert array.shape == got[name].shape
        assert array.size
        worst = max(worst, float(np.abs(array - got[name]).max() / np.abs(array).max()))
    return worst


def assert_same(model: onnx.ModelProto, fused: onnx.ModelProto, *, dtype: str = "float32", **sizes: int) -> None:
    onnx.checker.check_model(fused)
    assert largest_difference(model, fused, **sizes) < ROUNDING[dtype]

"""Random graphs of the operators that the fusion engine knows, with reconvergence, shared values and square shapes.

Models are of type double, so that a right fold differs from its model by 1e-12 and nothing hides in rounding. A graph
is a list of small steps, which hypothesis shrinks to a readable one.

`python -m runtime_tests.random_graphs --examples 10000` tries many; a failure prints the steps that cause it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from renorm_onnx import model_file
from renorm_onnx.fusion.engine import FuseOptions, fuse
from renorm_onnx.runtime.reference import evaluate

TOLERANCE = 1e-9
Shape = tuple[int, ...]


@dataclass
class Graph:
    """A model under construction; `values` are the names that a step may read."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    values: list[tuple[str, Shape]] = field(default_factory=list)

    def constant(self, array: Any, kind: Any = np.float64) -> str:
        """Store an array; equal small constants are sometimes shared on purpose."""
        name = f"k{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array, kind), name))
        return name

    def node(self, operator: str, inputs: list[str], shape: Shape, **attributes: Any) -> None:
        """Add a node with one output of the given shape."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"n{len(self.nodes)}", **attributes))
        self.values.append((name, shape))


@dataclass(frozen=True)
class Step:
    """One operator: which of the values it reads (counted from the newest), and a seed for everything else."""

    operator: str
    first: int
    second: int
    seed: int


Maker = Callable[[Graph, tuple[str, Shape], tuple[str, Shape], np.random.Generator], None]


def _norm(g: Graph, x: tuple[str, Shape], other: tuple[str, Shape], rng: np.random.Generator) -> None:
    name, shape = x
    if len(shape) < 2:
        return
    c = shape[1]
    scale = rng.uniform(0.5, 2, c) * (rng.choice([-1, 1], c) if rng.random() < 0.5 else 1)
    values = [scale, rng.normal(size=c) * (rng.random() < 0.7), rng.normal(size=c) * (rng.random() < 0.7)]
    stats = [g.constant(v) for v in [*values, rng.uniform(0.3, 2, c)]]
    g.node("BatchNormalization", [name, *stats], shape)


def _chain(g: Graph, x: tuple[str, Shape], other: tuple[str, Shape], rng: np.random.Generator) -> None:
    name, shape = x
    operator = str(rng.choice(["Mul", "Add", "Sub", "Div", "Neg"]))
    if operator == "Neg":
        return g.node("Neg", [name], shape)
    form = rng.integers(5)
    dims = [(), (1,), (1, shape[1], *[1] * (len(shape) - 2)) if len(shape) > 1 else (1,), (shape[-1],), (1,)][form]
    numbers = rng.uniform(0.5, 2, dims) * rng.choice([-1, 1], dims)
    if form == 4:  # as large as the data, and constant along all axes but one
        axis = int(rng.integers(len(shape)))
        numbers = np.broadcast_to(rng.uniform(0.5, 2, [n if i == axis else 1 for i, n in enumerate(shape)]), shape)
    k = g.constant(numbers)
    order = [k, name] if rng.random() < 0.3 and operator != "Div" else [name, k]
    return g.node(operator, order, shape)


def _conv(g: Graph, x: tuple[str, Shape], other: tuple[str, Shape], rng: np.random.Generator) -> None:
    name, shape = x
    if len(shape) != 4:
        return
    group = int(rng.choice([d for d in (1, 2, shape[1]) if shape[1] % d == 0]))
    out = group * int(rng.integers(1, 3))
    k, pad = (3, int(rng.integers(0, 2))) if min(shape[2:]) >= 3 else (1, 0)
    inputs = [name, g.constant(rng.normal(size=(out, shape[1] // group, k, k)))]
    if rng.random() < 0.5:
        inputs.append(g.constant(rng.normal(size=out)))
    size = [s + 2 * pad - k + 1 for s in shape[2:]]
    g.node("Conv", inputs, (shape[0], out, *size), group=group, pads=[pad] * 4)


def _conv_transpose(g: Graph, x: tuple[str, Shape], other: tuple[str, Shape], rng: np.random.Generator) -> None:
    name, shape = x
    if len(shape) != 4 or max(shape[2:]) > 8:
        return
    group = int(rng.choice([d for d in (1, 2) if shape[1] % d == 0]))
    each, stride = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    weight = g.constant(rng.normal(size=(shape[1], each, 2, 2)))
    size = [(s - 1) * stride + 2 for s in shape[2:]]
    g.node("ConvTranspose", [name, weight], (shape[0], each * group, *size), group=group, strides=[stride] * 2)


def _dense(g: Graph, x: tuple[str, Shape], other: tuple[str, Shape], rng: np.random.Generator) -> None:
    name, shape = x
    n = int(rng.integers(2, 5))
    if len(shape) == 2 and rng.random() < 0.6:
        trans = int(rng.integers(2))
        weight = rng.normal(size=(n, shape[1]) if trans else (shape[1], n))
        inputs = [name, g.constant(weight)]
        if rng.random() < 0.7:
            dims = [(), (1,), (n,), (1, n), (shape[0], 1), (shape[0], n)][rng.integers(6)]
            inputs.append(g.constant(rng.normal(size=dims)))
        alpha, beta = (float(v) for v in rng.choice([0.5, 1.0, 2.0], 2))
        return g.node("Gemm", inputs, (shape[0], n), transB=trans, alpha=alpha, beta=beta)
    if rng.random() < 0.5 or len(shape) < 2:
        return g.node("MatMul", [name, g.constant(rng.normal(size=(shape[-1], n)))], (*shape[:-1], n))
    return g.node("MatMul", [g.constant(rng.normal(size=(n, shape[-2]))), name], (*shape[:-2], n, shape[-1]))


def _product(g: Graph, x: tuple[str, Shape], other: tuple[str, Shape], rng: np.random.Generator) -> None:
    """A sum over one axis with a matrix, which may have another axis of the data too, and over a second axis or not."""
    name, shape = x
    letters = "abcdef"[: len(shape)]
    summed, second = (int(a) for a in rng.integers(len(shape), size=2))
    shared = letters[second] if rng.random() < 0.3 and second not in (0, summed) else ""
    sizes = dict(zip(letters, shape, strict=True), z=int(rng.integers(1, 4)))
    weight = "z" * (rng.random() < 0.8) + shared + letters[summed]
    output = letters.replace(letters[summed], "z" if "z" in weight else "")
    if rng.random() < 0.3 and second:
        output = output.replace(letters[second], "")
    if not output:
        return
    matrix = g.constant(rng.normal(size=[sizes[letter] for letter in weight]))
    terms, inputs = [letters, weight], [name, matrix]
    if rng.random() < 0.5:
        terms, inputs = terms[::-1], inputs[::-1]
    g.node("Einsum", inputs, tuple(sizes[letter] for letter in output), equation=f"{','.join(terms)}->{output}")


def _activation(g: Graph, x: tuple[str, Shape], other: tuple[str, Shape], rng: np.random.Generator) -> None:
    name, shape = x
    names = ["Relu", "LeakyRelu", "Identity", "Dropout", "Sigmoid", "PRelu", "Clip", "Abs", "Max", "Softmax"]
    operator = str(rng.choice(names))
    inputs, more = [name], {"alpha": 0.25} if operator == "LeakyRelu" else {}
    if operator == "PRelu":
        inputs.append(
            g.constant(rng.uniform(0.1, 0.5, (shape[1], *[1] * (len(shape) - 2)) if len(shape) > 1 else (1,)))
        )
    if operator == "Clip":
        inputs += [[g.constant(-1.5), g.constant(1.0)], [g.constant(0.0)], [g.constant(-0.5)], []][rng.integers(4)]
    if operator == "Max":
        inputs.append(g.constant(rng.normal(size=[(), (shape[-1],), shape[1:]][rng.integers(3)])))
    if operator == "Softmax":
        more = {"axis": int(rng.integers(len(shape)))}
    g.node(operator, inputs, shape, **more)


def _pool(g: Graph, x: tuple[str, Shape], other: tuple[str, Shape], rng: np.random.Generator) -> None:
    name, shape = x
    if len(shape) != 4:
        return None
    operator = str(rng.choice(["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"]))
    if operator.startswith("Global"):
        return g.node(operator, [name], (*shape[:2], 1, 1))
    if operator == "ReduceMean":
        keep = int(rng.integers(2))
        axes = [[2, 3], [1], [3]][rng.integers(3)]
        dims = tuple(1 if i in axes else d for i, d in enumerate(shape) if keep or i not in axes)
        return g.node(operator, [name], dims, axes=axes, keepdims=keep)
    if min(shape[2:]) < 2:
        return None
    pad = int(rng.integers(2))
    more = {"count_include_pad": int(rng.integers(2))} if operator == "AveragePool" else {}
    size = [s + 2 * pad - 2 + 1 for s in shape[2:]]
    return g.node(operator, [name], (*shape[:2], *size), kernel_shape=[2, 2], pads=[pad] * 4, **more)


def _layout(g: Graph, x: tuple[str, Shape], other: tuple[str, Shape], rng: np.random.Generator) -> None:
    name, shape = x
    operator = str(rng.choice(["Transpose", "Flatten", "Reshape", "Unsqueeze", "Squeeze"]))
    if operator == "Transpose":
        perm = [int(p) for p in rng.permutation(len(shape))]
        return g.node(operator, [name], tuple(shape[p] for p in perm), perm=perm)
    if operator == "Flatten":
        axis = int(rng.integers(0, len(shape) + 1))
        return g.node(operator, [name], (int(np.prod(shape[:axis])), int(np.prod(shape[axis:]))), axis=axis)
    if operator == "Reshape" and len(shape) > 2:
        dims = [(shape[0], shape[1], -1), (0, -1), (-1, *shape[2:]), (shape[0], -1, shape[1])][rng.integers(4)]
        full = np.zeros(shape).reshape([shape[i] if d == 0 else d for i, d in enumerate(dims)]).shape
        return g.node(operator, [name, g.constant(dims, np.int64)], full)
    if operator == "Unsqueeze" and len(shape) < 4:
        axis = int(rng.integers(0, len(shape) + 1))
        axes = g.constant([axis], np.int64)
        return g.node(operator, [name, axes], (*shape[:axis], 1, *shape[axis:]))
    if operator == "Squeeze" and 1 in shape:
        axis = shape.index(1)
        return g.node(operator, [name, g.constant([axis], np.int64)], (*shape[:axis], *shape[axis + 1 :]))
    return None


def _regroup(g: Graph, x: tuple[str, Shape], other: tuple[str, Shape], rng: np.random.Generator) -> None:
    """Split an axis in two, or join two neighbours, and sometimes turn the axes in between, as a shuffle does."""
    name, shape = x
    axis = int(rng.integers(len(shape)))
    if rng.random() < 0.5 and len(shape) < 6 and axis > 0 and shape[axis] % 2 == 0 and shape[axis] > 2:
        parts = (2, shape[axis] // 2) if rng.random() < 0.5 else (shape[axis] // 2, 2)
        full = (*shape[:axis], *parts, *shape[axis + 1 :])
        g.node("Reshape", [name, g.constant((0, *full[1:]), np.int64)], full)
        if rng.random() < 0.7:
            perm = [*range(axis), axis + 1, axis, *range(axis + 2, len(full))]
            turned = tuple(full[p] for p in perm)
            g.node("Transpose", [g.values[-1][0]], turned, perm=perm)
        return
    if axis + 1 < len(shape):
        full = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
        dims = (-1, *full[1:]) if axis == 0 else (0, *full[1:])
        g.node("Reshape", [name, g.constant(dims, np.int64)], full)


def _cut(g: Graph, x: tuple[str, Shape], other: tuple[str, Shape], rng: np.random.Generator) -> None:
    name, shape = x
    axis = int(rng.integers(len(shape)))
    operator = str(rng.choice(["Slice", "Gather", "Pad", "Split", "Tile"]))
    if operator == "Tile":
        repeats = [2 if i == axis else 1 for i in range(len(shape))]
        full = (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
        return g.node(operator, [name, g.constant(repeats, np.int64)], full)
    if operator == "Slice" and shape[axis] > 1:
        inputs = [name, *(g.constant([v], np.int64) for v in (1, shape[axis], axis))]
        return g.node(operator, inputs, (*shape[:axis], shape[axis] - 1, *shape[axis + 1 :]))
    if operator == "Gather":
        index = rng.integers(0, shape[axis], 3)
        return g.node(operator, [name, g.constant(index, np.int64)], (*shape[:axis], 3, *shape[axis + 1 :]), axis=axis)
    if operator == "Pad":
        mode = str(rng.choice(["constant", "edge", "reflect"] if shape[axis] > 1 else ["constant", "edge"]))
        pads = [0] * (2 * len(shape))
        pads[axis] = 1
        inputs = [name, g.constant(pads, np.int64)]
        if mode == "constant" and rng.random() < 0.5:
            inputs.append(g.constant(float(rng.choice([0.0, 0.5]))))
        return g.node(operator, inputs, (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]), mode=mode)
    if operator == "Split" and shape[axis] > 1:
        sizes = [1, shape[axis] - 1]
        outs = [f"v{len(g.nodes)}_{i}" for i in range(2)]
        inputs = [name, g.constant(sizes, np.int64)]
        g.nodes.append(helper.make_node("Split", inputs, outs, name=f"n{len(g.nodes)}", axis=axis))
        g.values += [(o, (*shape[:axis], s, *shape[axis + 1 :])) for o, s in zip(outs, sizes, strict=True)]
    return None


def _join(g: Graph, x: tuple[str, Shape], other: tuple[str, Shape], rng: np.random.Generator) -> None:
    (name, shape), (second, dims) = x, other
    operator = str(rng.choice(["Add", "Sub", "Concat", "Mul", "Sum", "Where"]))
    if operator == "Concat":
        axis = int(rng.integers(len(shape)))
        if len(shape) == len(dims) and all(
            a == b or i == axis for i, (a, b) in enumerate(zip(shape, dims, strict=True))
        ):
            full = (*shape[:axis], shape[axis] + dims[axis], *shape[axis + 1 :])
            g.node(operator, [name, second], full, axis=axis)
        return
    try:
        full = np.broadcast_shapes(shape, dims)
    except ValueError:
        return
    inputs = [name, second]
    if operator == "Where":
        if rng.random() < 0.5:
            inputs, full = [g.constant(rng.normal()), name], shape
        inputs = [g.constant(rng.random(full[-1:]) < 0.5, bool), *inputs]
    g.node(operator, inputs, full)


MAKERS: dict[str, Maker] = {
    "norm": _norm,
    "chain": _chain,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "dense": _dense,
    "product": _product,
    "activation": _activation,
    "pool": _pool,
    "layout": _layout,
    "regroup": _regroup,
    "cut": _cut,
    "join": _join,
}

STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(["norm", "norm", "conv", *MAKERS]),
        st.integers(0, 3),
        st.integers(0, 5),
        st.integers(0, 10_000),
    ),
    min_size=1,
    max_size=12,
)


def build(steps: list[Step], shape: Shape, outputs: int, *, open_batch: bool = False) -> onnx.ModelProto | None:
    """The model that the steps describe; its outputs are the last value and `outputs - 1` others. None if empty."""
    g = Graph(np.random.default_rng(0))
    g.values.append(("x", shape))
    for step in steps:
        first = g.values[-1 - step.first % len(g.values)]
        second = g.values[-1 - step.second % len(g.values)]
        if max(np.prod(first[1]), np.prod(second[1])) < 4000:
            MAKERS[step.operator](g, first, second, np.random.default_rng(step.seed))
    if not g.nodes:
        return None
    made = g.values[1:]
    chosen = dict.fromkeys([made[-1], *made[: outputs - 1]])
    infos = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, s) for n, s in chosen]
    declared = ("n", *shape[1:]) if open_batch else shape
    given_info = helper.make_tensor_value_info("x", TensorProto.DOUBLE, declared)
    graph = helper.make_graph(g.nodes, "random", [given_info], infos, g.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def check(steps: list[Step], shape: Shape, outputs: int, open_batch: bool = False) -> Counter[str]:
    """Build, fuse, compare; raise AssertionError with a readable model if they differ."""
    model = build(steps, shape, outputs, open_batch=open_batch)
    return Counter() if model is None else compare_fused(model, shape)


def compare_fused(model: onnx.ModelProto, shape: Shape) -> Counter[str]:
    """Fuse and compare; raise AssertionError with a readable model if they differ, else count the outcomes."""
    text = "\n".join(f"{n.op_type}({', '.join(n.input)}) -> {', '.join(n.output)}" for n in model.graph.node)
    fused, report = fuse(model, FuseOptions(allow_cancellation=True))
    onnx.checker.check_model(fused, full_check=True)
    feeds = {"x": np.random.default_rng(3).normal(size=shape)}
    want, got = evaluate(model_file.load(model), feeds), evaluate(model_file.load(fused), feeds)
    assert list(want) == list(got)
    for name, array in want.items():
        assert array.shape == got[name].shape, f"{name} changed its shape\n{text}\n{report}"
        error = np.abs(array - got[name]).max(initial=0.0)
        size = max(1.0, np.abs(array).max(initial=0.0))
        assert error <= TOLERANCE * size, f"{name} is off by {error:.3g} of {size:.3g}\n{text}\n{report}"
    again, second = fuse(fused, FuseOptions(allow_cancellation=True))
    assert not second.changed, f"fusing twice folds more\n{text}\n{report}\n{second}\n{onnx.printer.to_text(again)}"
    return Counter(e.outcome for e in report.entries)


SHAPES = st.sampled_from([(2, 4, 4, 4), (1, 2, 5, 4), (3, 3), (2, 4, 4), (4, 4)])


def search(about: str | None, examples: int, check: Callable[..., Counter[str]], *strategies: st.SearchStrategy) -> int:
    """Check many drawn examples, others each time, as many as the command line says; raises at the first that differs.

    Args:
        about: What the command's help says.
        examples: How many, unless the command line says another number.
        check: Called with what is drawn; counts outcomes.
        strategies: One for each argument of `check`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--examples", type=int, default=examples)
    total: Counter[str] = Counter()

    @settings(
        max_examples=parser.parse_args().examples,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.tuples(*strategies))
    def tried(drawn: tuple[Any, ...]) -> None:
        total.update(check(*drawn))
        total["models"] += 1

    tried()
    print(f"{total['models']} models, {total['folded']} maps folded, {total['kept']} kept, none wrong")
    return 0


if __name__ == "__main__":
    sys.exit(search(__doc__, 10_000, check, STEPS, SHAPES, st.integers(1, 3), st.booleans()))

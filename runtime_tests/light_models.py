"""The light models of the onnx package, networks as tools wrote them before 2020, with weights that say something.

They ship without weights: each is a ConstantOfShape of 0.02, so their outputs are the same number everywhere, and no
error would show. `drawn` stores random weights in their place and leaves everything else as it is: IR 3, opset 9, every
initializer listed as an input, scales behind Unsqueeze.
"""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from renorm_onnx import model_file
from renorm_onnx.runtime.reference import evaluate

FOLDER = Path(onnx.__file__).parent / "backend/test/data/light"
#: Network -> how many of its norms must stay: those of densenet121 between a Concat that others read and a Relu.
NORMS_LEFT = {"densenet121": 62, "inception_v2": 0, "resnet50": 0, "shufflenet": 0}


def path_of(name: str) -> Path:
    """The file of a network of `NORMS_LEFT`, as the onnx package ships it."""
    return FOLDER / f"light_{name}.onnx"


def drawn(name: str, seed: int = 0) -> onnx.ModelProto:
    """A network of `NORMS_LEFT` with random weights.

    Weights of rank two and more are normal with variance 2 / fan-in (He et al. 2015, arXiv:1502.01852, section 2.2),
    variances and scales uniform in (0.5, 2), other vectors normal with variance 0.01. A classifier before a Softmax is
    scaled until its logits have variance 1: one class would else take all.

    Args:
        name: A key of `NORMS_LEFT`.
        seed: Of the draw.

    Returns:
        The model; its drawn weights are initializers under the names that they had, listed as inputs as IR 3 has it.
    """
    model = onnx.load(path_of(name))
    graph, rng = model.graph, np.random.default_rng(seed)
    shapes = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    positive = {node.input[i] for node in graph.node if node.op_type == "BatchNormalization" for i in (1, 4)}
    makers = [node for node in graph.node if node.op_type == "ConstantOfShape"]
    for maker in makers:
        array = _draw(rng, tuple(shapes[maker.input[0]]), positive=maker.output[0] in positive)
        graph.node.remove(maker)
        graph.initializer.append(numpy_helper.from_array(array, maker.output[0]))
        graph.input.append(helper.make_tensor_value_info(maker.output[0], TensorProto.FLOAT, array.shape))
    unread = {maker.input[0] for maker in makers}
    for entries in (graph.initializer, graph.input):
        for entry in [e for e in entries if e.name in unread]:
            entries.remove(entry)
    if graph.node[-1].op_type == "Softmax":
        _soften(model, classifier=graph.node[-2])
    return model


def image(model: onnx.ModelProto, seed: int = 1) -> dict[str, NDArray[np.float32]]:
    """Random feeds for the only input that is not a weight."""
    stored = {tensor.name for tensor in model.graph.initializer}
    (given,) = (i for i in model.graph.input if i.name not in stored)
    shape = [dim.dim_value for dim in given.type.tensor_type.shape.dim]
    return {given.name: np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


def _draw(rng: np.random.Generator, shape: tuple[int, ...], *, positive: bool) -> NDArray[np.float32]:
    if positive:
        values = rng.uniform(0.5, 2, shape)
    elif len(shape) > 1:
        values = rng.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5
    else:
        values = rng.normal(size=shape) * 0.1
    return np.asarray(values, np.float32)


def _soften(model: onnx.ModelProto, *, classifier: onnx.NodeProto) -> None:
    logits = evaluate(model_file.load(model), image(model), keep=classifier.output)[classifier.output[0]]
    for tensor in model.graph.initializer:
        if tensor.name in classifier.input[1:]:
            weight = numpy_helper.to_array(tensor) / np.float32(logits.std())
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))

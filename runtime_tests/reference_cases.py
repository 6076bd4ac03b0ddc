"""Operator calls on which the float64 reference is compared with onnxruntime, each at every opset that changed it.

A `Case` says at which opsets it is valid as written: a Squeeze with ``axes`` as an attribute ends at 12, one with
``axes`` as an input begins at 13. Inputs are seeded and far from trivial; the file is a table, so that a gap shows.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

NEWEST = 26
"""The last opset that onnxruntime loads."""


@dataclass(frozen=True)
class Case:
    """One call of one operator.

    Attributes:
        op: The operator.
        inputs: Arrays in order; None where an optional input is left out.
        attributes: As for `onnx.helper.make_node`.
        first: The lowest opset at which the call is valid as written.
        last: The highest one.
        outputs: How many outputs are asked for; "" in a tuple leaves one out.
        units: Allowed difference in units of 2**-24 times the largest value of an output.
        steps: Allowed difference of integer outputs (a float32 quotient may round to the other side of a half).
        domain: Of the operator; versions of domains other than ONNX's own are not listed, 1 is used.
    """

    op: str
    inputs: Sequence[Any]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    first: int = 7
    last: int = NEWEST
    outputs: int = 1
    units: float = 64
    steps: int = 0
    domain: str = ""

    def __str__(self) -> str:
        told = ",".join(f"{key}={value}" for key, value in self.attributes.items())
        return f"{self.op}({told[:60]})@{self.first}-{self.last}"

    def opsets(self) -> list[int]:
        """The first opset, each at which the operator changed, the one before that, and the last."""
        if self.domain:
            return [1]
        versions = _versions().get(self.op, ())  # none of onnxruntime's own
        changes = {version - before for version in versions for before in (0, 1)}
        return sorted({self.first, self.last, *(v for v in changes if self.first <= v <= self.last)})


@functools.cache
def _versions() -> Mapping[str, list[int]]:
    """The opsets that changed each operator."""
    found: dict[str, list[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            found.setdefault(schema.name, []).append(schema.since_version)
    return found


_GENERATOR = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    """Standard normal float32."""
    return _GENERATOR.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Any:
    """Uniform float32 between 0.5 and 2."""
    return _GENERATOR.uniform(0.5, 2.0, shape).astype(np.float32)


def unit(*shape: int) -> Any:
    """Uniform float32 strictly between -1 and 1."""
    return _GENERATOR.uniform(-0.9, 0.9, shape).astype(np.float32)


def whole(low: int, high: int, *shape: int, dtype: Any = np.int64) -> Any:
    """Uniform integers in [low, high)."""
    return _GENERATOR.integers(low, high, shape).astype(dtype)


def ints(*values: int) -> Any:
    """A list as an int64 tensor."""
    return np.array(values, np.int64)


def floats(*values: float) -> Any:
    """A list as a float32 tensor."""
    return np.array(values, np.float32)


def _scalar(value: Any, dtype: Any = np.float32) -> Any:
    return np.array(value, dtype)


def elementwise() -> Iterator[Case]:
    """Arithmetic, activations, comparison, logic, casts."""
    plain = {
        "Abs": 6, "Acos": 7, "Asin": 7, "Asinh": 9, "Atan": 7, "Atanh": 9, "Ceil": 6, "Cos": 7, "Cosh": 9, "Elu": 6,
        "Erf": 9, "Exp": 6, "Floor": 6, "HardSigmoid": 6, "HardSwish": 14, "Identity": 6, "IsNaN": 9, "LeakyRelu": 6,
        "Mish": 18, "Neg": 6, "Reciprocal": 6, "Relu": 6, "Round": 11, "Selu": 6, "Shrink": 9, "Sigmoid": 6, "Sign": 9,
        "Sin": 7, "Sinh": 9, "Softplus": 6, "Softsign": 6, "Tan": 7, "Tanh": 6, "Gelu": 20, "Swish": 24,
        "ThresholdedRelu": 10, "Celu": 12, "IsInf": 10,
    }  # fmt: skip
    for op, first in plain.items():
        yield Case(op, [unit(3, 40)], first=first)
    yield Case("Acosh", [1 + positive(30)], first=9)
    yield Case("Log", [positive(30)], first=6)
    yield Case("Sqrt", [positive(30)], first=6)
    yield Case("Not", [whole(0, 2, 9, dtype=bool)], first=6)
    for op, attributes, first in [
        ("Elu", {"alpha": 1.7}, 6), ("LeakyRelu", {"alpha": 0.3}, 6), ("Selu", {"alpha": 1.2, "gamma": 0.8}, 6),
        ("HardSigmoid", {"alpha": 0.4, "beta": 0.3}, 6), ("Gelu", {"approximate": "tanh"}, 20),
        ("Celu", {"alpha": 0.6}, 12), ("ThresholdedRelu", {"alpha": 0.4}, 10), ("Swish", {"alpha": 1.4}, 24),
        ("Shrink", {"lambd": 0.3, "bias": 0.1}, 9),
    ]:  # fmt: skip
        yield Case(op, [3 * normal(4, 30)], attributes, first=first)
    for op in ("Add", "Sub", "Mul", "Div"):
        yield Case(op, [normal(2, 3, 4), positive(3, 1)])
        yield Case(op, [whole(-9, 9, 3, 4), whole(1, 5, 4)])
    yield Case("Div", [whole(-20, 20, 50, dtype=np.int32), np.where(whole(0, 2, 50) == 0, -3, 7).astype(np.int32)])
    for op in ("Equal", "Less", "Greater"):
        yield Case(op, [whole(0, 3, 4, 5, dtype=np.int32), whole(0, 3, 5, dtype=np.int32)], first=9)
    for op in ("Less", "Greater"):
        yield Case(op, [normal(4, 5), normal(5)])
    for op in ("LessOrEqual", "GreaterOrEqual"):
        yield Case(op, [whole(0, 3, 4, 5), whole(0, 3, 5)], first=12)
    for op in ("And", "Or", "Xor"):
        yield Case(op, [whole(0, 2, 4, 5, dtype=bool), whole(0, 2, 5, dtype=bool)])
    for op in ("Sum", "Mean", "Max", "Min"):
        yield Case(op, [normal(2, 3), normal(2, 3), normal(2, 3)], first=6)
        yield Case(op, [normal(2, 3), normal(3), normal(2, 1)], first=8)
    yield Case("Pow", [positive(3, 4), normal(4)])
    yield Case("Pow", [whole(-3, 4, 9), whole(0, 4, 9)], first=12)
    yield Case("Mod", [whole(-9, 9, 30), np.where(whole(0, 2, 30) == 0, -4, 5)], first=10)
    yield Case("Mod", [5 * normal(30), positive(30)], {"fmod": 1}, first=10)
    yield Case("BitShift", [whole(0, 99, 9, dtype=np.uint8), whole(0, 5, 9, dtype=np.uint8)], {"direction": "LEFT"}, 11)
    for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor"):
        yield Case(op, [whole(0, 99, 9), whole(0, 99, 9)], first=18)
    yield Case("BitwiseNot", [whole(0, 99, 9)], first=18)
    yield Case("PRelu", [normal(2, 3, 4), positive(3, 1)])
    yield Case("PRelu", [normal(2, 3, 4), positive(1)])
    yield Case("Clip", [normal(3, 9)], {"min": -0.5, "max": 0.75}, first=6, last=10)
    yield Case("Clip", [normal(3, 9)], {"max": 0.75}, first=6, last=10)
    yield Case("Clip", [normal(3, 9), _scalar(-0.5), _scalar(0.75)], first=11)
    yield Case("Clip", [normal(3, 9), None, _scalar(0.75)], first=11)
    yield Case("Where", [whole(0, 2, 3, 4, dtype=bool), normal(4), normal(3, 1)], first=9)
    yield Case("Cast", [10 * normal(20)], {"to": 7}, first=6)
    yield Case("Cast", [whole(-2, 2, 20)], {"to": 9}, first=6)
    yield Case("Cast", [whole(-99, 99, 20)], {"to": 1}, first=6)
    yield Case("Cast", [300 * normal(20)], {"to": 17}, first=19)
    yield Case("CastLike", [10 * normal(20), ints(1)], first=15)
    yield Case("Dropout", [normal(3, 4)], {"ratio": 0.4}, last=11)
    yield Case("Dropout", [normal(3, 4), _scalar(0.4)], first=12, outputs=2)
    yield Case("IsInf", [floats(np.inf, -np.inf, 1, np.nan)], {"detect_negative": 0}, first=10)


def linear() -> Iterator[Case]:
    """Matrix products and recurrent cells."""
    yield Case("MatMul", [normal(2, 3, 4), normal(4, 5)])
    yield Case("MatMul", [normal(4), normal(2, 4, 5)])
    yield Case("MatMul", [whole(-5, 5, 3, 4, dtype=np.int32), whole(-5, 5, 4, 2, dtype=np.int32)], first=9)
    yield Case("Gemm", [normal(4, 3), normal(5, 4), normal(5)], {"transA": 1, "transB": 1, "alpha": 0.7, "beta": 1.3})
    yield Case("Gemm", [normal(3, 4), normal(4, 5), normal(3, 1)], {"alpha": 0.7})
    yield Case("Gemm", [normal(3, 4), normal(4, 5)], {"alpha": 0.7}, first=11)
    yield Case("Einsum", [normal(2, 3, 4), normal(2, 4, 5)], {"equation": "bij,bjk->bik"}, first=12)
    yield Case("Einsum", [normal(3, 3)], {"equation": "ii->i"}, first=12)
    for op, gates in (("RNN", 1), ("GRU", 3), ("LSTM", 4)):
        both = [normal(5, 2, 3), normal(2, gates * 4, 3), normal(2, gates * 4, 4), normal(2, 2 * gates * 4)]
        lengths, state = np.array([5, 3], np.int32), normal(2, 2, 4)
        outputs = 3 if op == "LSTM" else 2
        yield Case(op, [*both, lengths, state], {"hidden_size": 4, "direction": "bidirectional"}, outputs=outputs)
        one = [value[:1] for value in both[1:]]
        for direction in ("forward", "reverse"):
            yield Case(op, [both[0], *one], {"hidden_size": 4, "direction": direction, "clip": 0.6}, outputs=outputs)
    yield Case("GRU", [normal(5, 2, 3), normal(1, 12, 3), normal(1, 12, 4), normal(1, 24)],
               {"hidden_size": 4, "linear_before_reset": 1}, outputs=2)  # fmt: skip
    peepholes = [normal(5, 2, 3), normal(1, 16, 3), normal(1, 16, 4), normal(1, 32), None, normal(1, 2, 4)]
    yield Case("LSTM", [*peepholes, normal(1, 2, 4), normal(1, 12)], {"hidden_size": 4}, outputs=3)
    yield Case("LSTM", [*peepholes, normal(1, 2, 4), normal(1, 12)], {"hidden_size": 4, "input_forget": 1}, outputs=3)
    yield Case("LSTM", peepholes[:4], {"hidden_size": 4, "activations": ["HardSigmoid", "ScaledTanh", "Softsign"],
               "activation_alpha": [0.3, 1.5], "activation_beta": [0.4, 0.7]}, outputs=3)  # fmt: skip
    # With the numbers of the operators of that name. (onnxruntime 1.31 takes 0 for ThresholdedRelu, ONNX says 1.)
    for name in ("HardSigmoid", "LeakyRelu", "Elu"):
        inputs = [3 * normal(5, 2, 3), normal(1, 4, 3), normal(1, 4, 4), normal(1, 8)]
        yield Case("RNN", inputs, {"hidden_size": 4, "activations": [name]}, outputs=2)


def convolution() -> Iterator[Case]:
    """Conv and ConvTranspose in one to three dimensions, and their integer kin."""
    for rank in (1, 2, 3):
        size = (9, 8, 7)[:rank]
        x, bias = normal(2, 4, *size), normal(6)
        attributes = {"strides": [2, 1, 2][:rank], "dilations": [1, 2, 1][:rank], "pads": [1, 0, 2][:rank] * 2}
        yield Case("Conv", [x, normal(6, 4, *[3] * rank), bias], attributes, first=6)
        yield Case("Conv", [x, normal(6, 2, *[2] * rank)], {"group": 2}, first=6)
        yield Case("Conv", [x, normal(8, 1, *[3] * rank), normal(8)], {"group": 4, "pads": [1] * 2 * rank}, first=6)
        for auto in ("SAME_UPPER", "SAME_LOWER", "VALID"):
            yield Case("Conv", [x, normal(6, 4, *[2] * rank)], {"auto_pad": auto, "strides": [3] * rank}, first=6)
        weight = normal(4, 3, *[3] * rank)
        spread = {"strides": [2] * rank, "pads": [1, 0, 1][:rank] * 2, "dilations": [2] * rank, "group": 2}
        yield Case("ConvTranspose", [x, weight, bias], spread, first=6)
        yield Case("ConvTranspose", [x, weight], {"strides": [3] * rank, "output_padding": [1] * rank}, first=6)
        for auto in ("SAME_UPPER", "SAME_LOWER", "NOTSET"):
            shape = [2 * n + 1 for n in size]
            yield Case("ConvTranspose", [x, weight],
                       {"strides": [2] * rank, "output_shape": shape, "auto_pad": auto}, first=11)  # fmt: skip
        for auto in ("SAME_UPPER", "SAME_LOWER", "VALID"):
            both = {"strides": [2] * rank, "auto_pad": auto}
            yield Case("ConvTranspose", [x, weight], both, first=11)
            yield Case("ConvTranspose", [x, weight], {**both, "output_padding": [1] * rank}, first=11)
            yield Case("ConvTranspose", [x, weight], {**both, "dilations": [2] * rank}, first=11)
    yield Case("Conv", [normal(2, 3, 9, 9), normal(5, 3, 1, 1)], {"strides": [2, 2]}, first=6)
    yield Case("Conv", [normal(2, 3, 9, 9), normal(5, 3, 1, 1)], {"pads": [0, 1, 2, 0]}, first=6)


def pooling() -> Iterator[Case]:
    """Windows and global pools."""
    for rank in (1, 2, 3):
        x = normal(2, 3, *(11, 10, 9)[:rank])
        for extra, first in [({}, 6), ({"ceil_mode": 1}, 10), ({"auto_pad": "SAME_UPPER"}, 6),
                             ({"auto_pad": "SAME_LOWER"}, 6), ({"auto_pad": "VALID"}, 6)]:  # fmt: skip
            pads = {} if "auto_pad" in extra else {"pads": [1] * 2 * rank}
            shape = {"kernel_shape": [3, 2, 4][:rank], "strides": [2, 3, 2][:rank], **pads, **extra}
            yield Case("MaxPool", [x], shape, first=first)
            yield Case("AveragePool", [x], shape, first=max(first, 7))
            yield Case("AveragePool", [x], {**shape, "count_include_pad": 1}, first=max(first, 7))
            yield Case("LpPool", [x], {**shape, "p": 3}, first=18 if extra.get("ceil_mode") else 6)
        yield Case("MaxPool", [x], {"kernel_shape": [3] * rank, "dilations": [2] * rank, "pads": [1] * 2 * rank}, 10)
        yield Case("AveragePool", [x], {"kernel_shape": [3] * rank, "dilations": [2] * rank}, first=19)
        for kernel, stride, pad in ((3, 2, 0), (2, 2, 1), (4, 3, 2), (2, 3, 0)):
            hanging = {"kernel_shape": [kernel] * rank, "strides": [stride] * rank, "ceil_mode": 1}
            hanging["pads"] = [0] * rank + [pad] * rank
            yield Case("MaxPool", [x], hanging, first=10)
            yield Case("AveragePool", [x], hanging, first=10)
            yield Case("AveragePool", [x], {**hanging, "count_include_pad": 1}, first=10)
            yield Case("AveragePool", [x], {**hanging, "dilations": [2] * rank}, first=19)
        yield Case("LpPool", [x], {"kernel_shape": [2] * rank, "dilations": [2] * rank, "p": 2}, first=18)
        for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"):
            yield Case(op, [x], first=6)
    window = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    yield Case("MaxPool", [normal(2, 3, 9, 8)], window, first=8, outputs=2)
    yield Case("MaxPool", [normal(2, 3, 9, 8)], {**window, "storage_order": 1}, first=8, outputs=2)
    yield Case("MaxPool", [whole(0, 99, 1, 2, 7, 7, dtype=np.uint8)], window, first=12)
    pair = {"kernel_shape": [2, 2], "strides": [2, 2]}
    yield Case("MaxUnpool", [normal(1, 1, 2, 2), ints(5, 7, 8, 13).reshape(1, 1, 2, 2)], pair, first=9)


def normalization() -> Iterator[Case]:
    """Norms and the softmax family."""
    channels = [normal(3) + 2, normal(3), normal(3), positive(3)]
    for x in (normal(4, 3, 5, 6), normal(4, 3), normal(2, 3, 7)):
        yield Case("BatchNormalization", [x, *channels], {"epsilon": 1e-3})
    yield Case("BatchNormalization", [normal(4, 3, 5), *channels], {"training_mode": 1, "momentum": 0.8}, 14, outputs=3)
    yield Case("BatchNormalization", [normal(4, 3, 5), *channels], {"momentum": 0.8}, last=13, outputs=5)
    yield Case("InstanceNormalization", [normal(2, 3, 5, 6), *channels[:2]], {"epsilon": 1e-2}, first=6)
    yield Case("InstanceNormalization", [normal(2, 3, 7), *channels[:2]], first=6)
    yield Case("GroupNormalization", [normal(2, 6, 4, 5), positive(2), normal(2)], {"num_groups": 2}, 18, 20)
    yield Case("GroupNormalization", [normal(2, 6, 4, 5), positive(6), normal(6)], {"num_groups": 2}, 21)
    yield Case("LayerNormalization", [normal(2, 3, 8), positive(8), normal(8)], {"epsilon": 1e-3}, 17, outputs=3)
    yield Case("LayerNormalization", [normal(2, 3, 8), positive(3, 8)], {"axis": 1}, 17)
    yield Case("RMSNormalization", [normal(2, 3, 8), positive(8)], {"epsilon": 1e-2}, 23)
    yield Case("MeanVarianceNormalization", [normal(2, 3, 4, 5) + 3], first=9)
    yield Case("MeanVarianceNormalization", [normal(2, 3, 4, 5)], {"axes": [1, 2]}, first=9)
    for size in (1, 3, 5):
        yield Case("LRN", [3 * normal(2, 7, 4, 4)], {"size": size, "alpha": 0.5, "beta": 0.6, "bias": 1.5}, first=6)
    for p in (1, 2):
        yield Case("LpNormalization", [normal(3, 4, 5)], {"axis": 1, "p": p}, first=6)
    for op in ("Softmax", "LogSoftmax", "Hardmax"):
        yield Case(op, [3 * normal(3, 4, 5)], first=6)
        for axis in (0, 1, 2):
            yield Case(op, [3 * normal(3, 4, 5)], {"axis": axis}, first=6)
        yield Case(op, [3 * normal(3, 4, 5)], {"axis": -2}, first=11)
        yield Case(op, [100 * normal(3, 4)], {"axis": 1}, first=6)


FAMILIES: tuple[Callable[[], Iterator[Case]], ...] = (elementwise, linear, convolution, pooling, normalization)
"""Generators of cases; `reference_cases_shapes` holds the rest."""

"""Rare operators, run by ``onnx.reference`` on promoted inputs.

Only those are listed that agree with onnxruntime in ``runtime_tests/reference_opsets_test.py`` or reproduce ONNX's own
conformance cases there.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from renorm_onnx.runtime.operators.call import Call, Kernel, UnusableError

_NAMES = (
    "AffineGrid", "BlackmanWindow", "Col2Im", "DFT", "Det", "HammingWindow", "HannWindow",
    "MelWeightMatrix", "NegativeLogLikelihoodLoss", "RotaryEmbedding", "STFT",
    "SoftmaxCrossEntropyLoss", "TensorScatter", "Unique",
)  # fmt: skip


def _borrow(call: Call) -> Any:
    """Evaluate a model made of this one node."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    given = [f"in{i}" if value is not None else "" for i, value in enumerate(call.inputs)]
    wanted = [f"out{i}" if name else "" for i, name in enumerate(call.outputs)]
    attributes = {
        name: ir.to_proto(value) if isinstance(value, ir.TensorProtocol) else value
        for name, value in call.attributes.items()
    }
    node = onnx.helper.make_node(call.op_type, given, wanted, **attributes)
    unknown = onnx.TypeProto()
    graph = onnx.helper.make_graph(
        [node],
        "borrowed",
        [onnx.helper.make_value_info(name, unknown) for name in given if name],
        [onnx.helper.make_value_info(name, unknown) for name in wanted if name],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", call.opset)])
    feeds = {name: value for name, value in zip(given, call.inputs, strict=True) if name}
    found = iter(ReferenceEvaluator(model).run(None, feeds))
    return tuple(next(found) if name else None for name in wanted)


def _attention(call: Call) -> Any:
    raw = call.wants(3) and call.integer("qk_matmul_output_mode", 0) == 0
    if raw and call.number("softcap", 0.0):
        raise UnusableError("the product of queries and keys before softcap is not covered")  # onnx gives another
    return _borrow(call)


OPERATORS: Mapping[str, Kernel] = dict.fromkeys(_NAMES, _borrow) | {"Attention": _attention}
"""Borrowed operators by name."""

"""Sizes below 0, by which some converters say that any will do, are open: runtimes take them so."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, TypeProto, helper, numpy_helper

from renorm_onnx import fuse, model_file
from renorm_onnx.delivery import fuse_file
from renorm_onnx.runtime.reference import evaluate

RNG = np.random.default_rng(0)


def conv(*behind: onnx.NodeProto, batch: int | str = -1) -> onnx.ModelProto:
    """x: [batch, 4, 6] through a Conv to `c` and what stands behind to `y`, of unknown shape."""
    arrays = {
        **{"w": RNG.normal(size=(4, 4, 1)), "g": RNG.uniform(0.5, 2, (4, 1)), "t": RNG.normal(size=(4, 1))},
        **{"ax": np.array([0]), "one": np.array([1]), "zero": np.array(0)},
    }
    weights = [
        numpy_helper.from_array(a.astype(np.float32) if a.dtype == np.float64 else a, n) for n, a in arrays.items()
    ]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["c"]), *behind],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def norm(of: str, result: str = "y") -> list[onnx.NodeProto]:
    return [helper.make_node("Mul", [of, "g"], ["scaled"]), helper.make_node("Add", ["scaled", "t"], [result])]


SUMMED = (helper.make_node("ReduceSum", ["c", "ax"], ["s"], keepdims=0), *norm("s"))
JOINED = (
    helper.make_node("Slice", ["c", "ax", "one", "ax"], ["part"]),
    helper.make_node("Concat", ["c", "part"], ["k"], axis=0),
    *norm("k"),
)


@pytest.mark.parametrize("in_memory", [False, True])
def test_how_many_elements_a_sum_has_is_not_known(in_memory):
    proto = conv(*SUMMED)
    _, report = fuse(ir.from_proto(proto) if in_memory else proto)
    assert [norm.reason.value for norm in report.kept] == ["shift-cannot-pass"]
    _, report = fuse(conv(*SUMMED, batch=3))
    assert not report.kept


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_folds_is_right_for_every_size(in_memory):
    proto = conv(*JOINED)
    before = model_file.load(proto)
    after, report = fuse(ir.from_proto(proto) if in_memory else proto)
    assert len(report.folded) == 1
    written = after if isinstance(after, onnx.ModelProto) else ir.to_proto(after)
    session = onnxruntime.InferenceSession(written.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in (1, 3):
        x = RNG.normal(size=(size, 4, 6)).astype(np.float32)
        np.testing.assert_allclose(session.run(None, {"x": x})[0], evaluate(before, {"x": x})["y"], 1e-5, 1e-5)
    dims = written.graph.input[0].type.tensor_type.shape.dim
    assert [dim.WhichOneof("value") for dim in dims] == [None, "dim_value", "dim_value"]


def test_a_file_with_such_sizes_is_verified(tmp_path):
    onnx.save(conv(*JOINED), tmp_path / "model.onnx")
    done = fuse_file(tmp_path / "model.onnx")
    assert done.verdict is not None
    assert done.verdict.outcome == "yes", done.verdict


def test_they_are_opened_wherever_a_file_declares_them():
    proto = conv(*JOINED)
    held = TypeProto()
    held.sequence_type.elem_type.optional_type.elem_type.CopyFrom(proto.graph.input[0].type)
    proto.graph.input.append(onnx.ValueInfoProto(name="sequence", type=held))
    proto.graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [-1, 4, -7]))
    proto.graph.value_info.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, [0, 4, 6]))
    graph = model_file.to_proto(model_file.load(proto)).graph
    inner = graph.input[1].type.sequence_type.elem_type.optional_type.elem_type.tensor_type
    shapes = [inner.shape, *(value.type.tensor_type.shape for value in graph.value_info)]
    assert [[d.dim_value if d.HasField("dim_value") else None for d in shape.dim] for shape in shapes] == [
        [None, 4, 6],
        [None, 4, None],
        [0, 4, 6],
    ]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == -1  # what was given is untouched

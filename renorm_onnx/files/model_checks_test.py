"""Messages that are no models, or break a rule that onnxruntime and the ONNX specification have."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from renorm_onnx import model_file
from renorm_onnx.errors import ModelFileError
from renorm_onnx.files import model_checks, name_checks

node = helper.make_node


def info(name: str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4])


def weight(name: str, value: float = 1.0) -> TensorProto:
    return numpy_helper.from_array(np.full(4, value, np.float32), name)


def body(nodes: list[NodeProto], output: str, inputs: tuple[str, ...] = ()) -> GraphProto:
    return helper.make_graph(nodes, "inner", [info(name) for name in inputs], [info(output)])


def model(nodes: list[NodeProto], initializers: tuple[TensorProto, ...] = (), **options: object) -> ModelProto:
    graph = helper.make_graph(nodes, "g", [info("x")], [info("y")], list(initializers))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, **options)


def function(name: str, nodes: list[NodeProto], inputs: tuple[str, ...] = ("a",)) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
    return helper.make_function("f", name, list(inputs), ["b"], nodes, opsets)


def branch(then: GraphProto, other: GraphProto) -> NodeProto:
    return node("If", ["c"], ["y"], "branch", then_branch=then, else_branch=other)


CONDITION = numpy_helper.from_array(np.array(True), "c")
RELU = node("Relu", ["x"], ["y"], "relu")
TWICE = node("LeakyRelu", ["x"], ["y"], alpha=0.1)
TWICE.attribute.append(helper.make_attribute("alpha", 0.9))
UNTYPED = node("LeakyRelu", ["x"], ["y"], "untyped", alpha=0.1)
UNTYPED.attribute[0].type = onnx.AttributeProto.UNDEFINED
INNER = body([node("Relu", ["x"], ["t"])], "t")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (model([node("Add", ["x", "q"], ["y"], "n")]), r"'q', used by node 'n' \(Add\) in graph 'g', is defined now"),
        (model([RELU, node("Abs", ["x"], ["y"], "n")]), r"'y' is defined twice, once as an output of node 'n' \(Abs\)"),
        (model([RELU], (weight("y"),)), r"'y' is defined twice, once as an output of node 'relu'"),
        (model([RELU], (weight("w"), weight("w", 2))), r"'w' is defined twice, once as an initializer of graph 'g'"),
        (model([RELU], (weight(""),)), r"an initializer of graph 'g' is named ''; expected a name in UTF-8"),
        (model([node("Relu", ["x"], ["z"])]), r"graph 'g' has output 'y', which nothing in it defines"),
        (
            model([node("Add", ["a", "x"], ["b"], "n1"), node("Relu", ["b"], ["a"]), node("Relu", ["b"], ["y"])]),
            r"graph 'g' has a cycle: node '(n1|)' \((Add|Relu)\) needs its own output",
        ),
        (
            model([branch(body([node("Relu", ["y"], ["t"])], "t"), INNER)], (CONDITION,)),
            r"graph 'g' has a cycle: node 'branch' \(If\) needs its own output",
        ),
        (
            model([branch(body([node("Relu", ["q"], ["t"], "deep")], "t"), INNER)], (CONDITION,)),
            r"'q', used by node 'deep' \(Relu\) in graph 'inner', is defined nowhere",
        ),
        (
            model([branch(body([], "x"), INNER)], (CONDITION,)),
            r"graph 'inner' has output 'x', which nothing in it defines",
        ),
        (
            model(
                [
                    node("Abs", ["x"], ["a"]),
                    branch(body([node("Relu", ["a"], ["t"]), node("Abs", ["x"], ["a"])], "t"), INNER),
                ],
                (CONDITION,),
            ),
            r"'a' is used in graph 'inner' before it is defined there, and is also defined in graph 'g'",
        ),
        (model([TWICE]), r"node '' \(LeakyRelu\) in graph 'g' has attribute 'alpha' twice"),
        (model([UNTYPED]), r"node 'untyped' .*: attribute 'alpha' has type UNDEFINED, which is not supported here"),
        (model([NodeProto(input=["x"], output=["y"], name="n")]), r"node 'n' \(\) in graph 'g' has no operator type"),
        (ModelProto(ir_version=10), r"it has no graph, so it is not an ONNX model"),
        (ModelProto(graph=model([RELU]).graph), r"ir_version is 0; expected 1 or more; the file is damaged"),
        (
            model([node("F", ["x"], ["y"], domain="f")], functions=[function("F", [node("Relu", ["q"], ["b"])])]),
            r"'q', used by node '' \(Relu\) in function 'f::F', is defined nowhere",
        ),
        (
            model([node("F", ["x", "x"], ["y"], domain="f")], functions=[function("F", [node("Relu", ["a"], ["b"])])]),
            r"node '' \(F\) in graph 'g' has 2 inputs and 1 outputs; the function it calls has 1 and 1",
        ),
        (
            model([node("F", ["x"], ["y"], domain="f")], functions=[function("F", [node("Relu", ["a"], ["b"])])] * 2),
            r"function 'f::F' is defined twice; expected it once",
        ),
        (
            model([RELU], functions=[function("F", [node("G", ["a"], ["b"], domain="f")]),
                                     function("G", [node("F", ["a"], ["b"], domain="f")])]),
            r"function 'f::F' calls itself; expected no recursion",
        ),
        (
            model([RELU], functions=[function("F", [node("Relu", ["a"], ["b"])], ("a", "a"))]),
            r"'a' is defined twice, once as an input of function 'f::F'",
        ),
    ],
)  # fmt: skip
def test_a_model_that_breaks_a_rule_is_refused(bad: ModelProto, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        model_checks.check_model(bad)


def extended(change: Callable[[ModelProto], object]) -> ModelProto:
    proto = model([RELU])
    change(proto)
    return proto


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.opset_import.add(domain="ai.onnx", version=13), r"opset '' is given twice, as 20 and 13"),
        (
            lambda m: [m.metadata_props.add(key="k", value=v) for v in "ab"],
            r"metadata entry 'k' is given twice, as 'a' and 'b'; expected one value",
        ),
        (lambda m: m.training_info.add(), r"it has training_info, which would be lost; remove it first \(del model"),
        (lambda m: m.graph.input.append(info("x")), r"'x' is defined twice, once as an input of graph 'g'"),
        (lambda m: m.MergeFromString(b"\xfa\x3f\x01a"), r"the model has a field \(number 1023\) that onnx .* not know"),
        (lambda m: m.graph.node[0].MergeFromString(b"\xfa\x3f\x01a"), r"graph 'g' has a field \(number 1023\)"),
        (
            lambda m: setattr(m.graph.output[0].type.sequence_type.elem_type.map_type, "key_type", 7),
            r"'y' is a map, which is not supported here; let the model hand out tensors .*'zipmap': False",
        ),
    ],
)
def test_what_would_be_lost_is_refused(change: Callable[[ModelProto], object], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        model_checks.check_model(extended(change))


def test_a_name_that_is_not_utf_8_is_refused() -> None:
    proto = ModelProto()
    proto.ParseFromString(model([RELU], (weight("QQ"),)).SerializeToString().replace(b"QQ", b"Q\xff"))
    with pytest.raises(ModelFileError, match=r"named b'Q\\xff'; expected a name in UTF-8"):
        model_checks.check_model(proto)


def test_equal_entries_given_twice_are_one_entry() -> None:
    model_checks.check_model(extended(lambda m: m.opset_import.add(domain="", version=20)))


def test_names_may_repeat_in_branches_and_shadow_outer_constants() -> None:
    then = body([node("Add", ["x", "w"], ["y"])], "y")
    then.initializer.append(weight("w", 3))
    proto = model([branch(then, body([node("Relu", ["x"], ["y"])], "y"))], (CONDITION, weight("w")))
    assert not model_checks.check_model(proto).unsorted


@pytest.mark.parametrize("depth", [model_checks.MAX_NESTING + 1, 2000])
def test_deep_nesting_is_refused_without_recursion(depth: int) -> None:
    proto = model([branch(INNER, INNER)], (CONDITION,))
    graph = proto.graph.node[0].attribute[0].g
    for _ in range(depth):
        graph.node[0].attribute.add(name="body", type=onnx.AttributeProto.GRAPH)
        graph = graph.node[0].attribute[0].g
        graph.name = "inner"
        graph.node.add(op_type="Relu", input=["x"], output=["t"])
    with pytest.raises(ModelFileError, match=r"graph 'inner' lies 33 graphs deep; expected at most 32"):
        model_checks.check_model(proto)


def chain(depth: int, calls: int = 1) -> ModelProto:
    functions = [function("F0", [node("Relu", ["a"], ["b"])])]
    for i in range(1, depth + 1):
        nodes = [node(f"F{i - 1}", ["a"], ["b" if j == 0 else f"b{j}"], domain="f") for j in range(calls)]
        functions.append(function(f"F{i}", nodes))
    return model([node(f"F{depth}", ["x"], ["y"], domain="f")], functions=functions)


def test_function_calls_are_bounded_in_depth_and_in_what_they_expand_to() -> None:
    model_checks.check_model(chain(name_checks.MAX_CALL_DEPTH - 1))
    with pytest.raises(ModelFileError, match=r"function 'f::F101' calls functions 101 deep; expected at most 100"):
        model_checks.check_model(chain(10_000))
    with pytest.raises(ModelFileError, match=r"grows beyond 200,000 nodes when its function calls are replaced"):
        model_checks.check_model(chain(60, calls=2))


def test_too_many_nodes_are_refused() -> None:
    proto = model([RELU])
    proto.graph.node.extend([node("Relu", ["x"], [""])] * name_checks.MAX_NODES)
    with pytest.raises(ModelFileError, match=r"it has more than 200,000 nodes or 2,000,000 values"):
        model_checks.check_model(proto)


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a message."""
    head = bytearray()
    for value in (number << 3 | 2, len(content)):
        while value > 127:
            head.append(value & 127 | 128)
            value >>= 7
        head.append(value)
    return bytes(head) + content


# Where in a model a repeated field stands: the numbers of the fields that lead there, from ModelProto on.
COUNTLESS = {
    "nodes": (7, 1),
    "value infos": (7, 13),
    "inputs of a node": (7, 1, 1),
    "attributes of a node": (7, 1, 5),
    "graphs in an attribute": (7, 1, 5, 11),
    "nodes in a subgraph": (7, 1, 5, 6, 1),
    "functions": (25,),
    "attributes in a function's node": (25, 7, 5),
    "entries of a tensor": (7, 5, 13),
    "metadata": (14,),
}


@pytest.mark.parametrize("path", COUNTLESS.values(), ids=list(COUNTLESS))
def test_a_file_of_countless_empty_entries_is_refused_before_it_is_parsed(path, monkeypatch) -> None:
    monkeypatch.setattr(model_checks, "MAX_PARSED_BYTES", 2**22)

    def built(count: int) -> bytes:
        content = field(path[-1], b"") * count
        for number in reversed(path[:-1]):
            content = field(number, content)
        return content

    with pytest.raises(ModelFileError, match=r"its [\d,]+ bytes would become more than 4,194,304 in memory"):
        model_checks.check_size(built(2**22 // 100))
    model_checks.check_size(built(2**22 // 200 - 10))


def test_many_messages_that_are_not_many_each_are_counted_together(monkeypatch) -> None:
    monkeypatch.setattr(model_checks, "MAX_PARSED_BYTES", 2**22)
    nodes = field(1, field(5, b"") * 20)
    model_checks.check_size(field(7, nodes * 900))
    with pytest.raises(ModelFileError, match="would become more than"):
        model_checks.check_size(field(7, nodes * 1100))


def test_a_size_is_taken_of_damaged_files_too() -> None:
    model_checks.check_size(model([RELU]).SerializeToString())
    for damage in (b"\xff" * 30, b"\x3a", b"\x07", b"\x3a\xff\xff\xff\xff\x0f\x0a", b"\x3a\x80"):
        model_checks.check_size(damage)


def test_what_an_empty_entry_takes_is_not_underestimated() -> None:
    """The bound rests on it: protobuf's own figure, measured in a process of its own."""
    code = (
        "import onnx, sys\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "data = bytes.fromhex(sys.argv[1]) * 300_000\n"
        "length = 600_000\n"
        "head = bytes([0x3A, length & 127 | 128, length >> 7 & 127 | 128, length >> 14])\n"
        "before = resident(); proto = onnx.ModelProto(); proto.ParseFromString(head + data)\n"
        "print((resident() - before) / 300_000)"
    )
    for entry in ("0a00", "2a00", "6a00"):
        done = subprocess.run([sys.executable, "-c", code, entry], capture_output=True, text=True, check=True)
        assert float(done.stdout) < 1.1 * model_checks._MESSAGE_BYTES


def test_nodes_out_of_order_are_sorted() -> None:
    proto = model([node("Relu", ["a"], ["y"]), node("Abs", ["x"], ["a"])])
    loaded = model_file.load(proto)
    assert [n.op_type for n in loaded.graph] == ["Abs", "Relu"]
    both = [node("Add", ["b", "c"], ["y"]), node("Neg", ["a"], ["c"]), node("Relu", ["a"], ["b"])]
    loaded = model_file.load(model([*both, node("Abs", ["x"], ["a"])]))
    assert sorted(n.op_type for n in list(loaded.graph)[1:3]) == ["Neg", "Relu"]
    assert [n.op_type for n in loaded.graph][::3] == ["Abs", "Add"]
    inner = body([node("Add", ["x", "q"], ["t"])], "t")
    proto = model([branch(inner, INNER), node("Abs", ["x"], ["q"])], (CONDITION,))
    assert [n.op_type for n in model_file.load(proto).graph] == ["Abs", "If"]


def test_sparse_tensors_become_dense_wherever_they_are() -> None:
    sparse = onnx.SparseTensorProto(
        values=numpy_helper.from_array(np.array([2.0], np.float32), "w"),
        indices=numpy_helper.from_array(np.array([1], np.int64)),
        dims=[4],
    )
    constant = node("Constant", [], ["k"])
    constant.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse)
    proto = model([constant, node("Sum", ["x", "w", "k"], ["y"])])
    proto.graph.sparse_initializer.append(sparse)
    saved = model_file.to_proto(model_file.load(proto))
    for tensor in (saved.graph.initializer[0], saved.graph.node[0].attribute[0].t):
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), [0, 2, 0, 0])
    assert saved.graph.node[0].attribute[0].name == "value"
    onnx.checker.check_model(saved, full_check=True)


def commented() -> ModelProto:
    """Texts everywhere that no value and no operator is called by."""
    made = model([node("Gain", ["x"], ["y"], "NAME", domain="f"), RELU], (weight("w"),), producer_name="NAME")
    made.graph.node[1].output[0] = "z"
    made.functions.append(function("Gain", [node("Abs", ["a"], ["b"], doc_string="NAME")]))
    made.graph.value_info.append(info("z"))
    inner, relu = made.graph, made.graph.node[1]
    relu.attribute.append(helper.make_attribute("alpha", 1.0, "NAME"))
    holders = (made, inner, relu, inner.initializer[0], inner.input[0], inner.value_info[0], made.functions[0])
    for holder in holders:
        holder.doc_string = "NAME"
        holder.metadata_props.add(key="NAME", value="NAME")
    annotation = inner.quantization_annotation.add(tensor_name="w")
    annotation.quant_parameter_tensor_names.add(key="NAME", value="NAME")
    inner.name = made.producer_version = made.domain = "NAME"
    return made


def spoilt(proto: ModelProto) -> ModelProto:
    return ModelProto.FromString(proto.SerializeToString().replace(b"NAME", b"M\xfcll"))


def test_comments_that_are_not_utf_8_are_read_with_a_replacement() -> None:
    count = commented().SerializeToString().count(b"NAME")
    bad = spoilt(commented())
    assert bad.SerializeToString().count(b"M\xfcll") == count > 20
    written = model_file.to_proto(model_file.load(bad)).SerializeToString()
    assert written.count("M\ufffdll".encode()) == count
    assert b"\xfc" not in written
    assert bad.SerializeToString().count(b"M\xfcll") == count  # what was given is untouched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.graph.node[0], "op_type", "NAME"), r"operator, domain or overload is b'M\\xfcll'"),
        (lambda m: setattr(m.graph.node[0], "domain", "NAME"), r"operator, domain or overload is b'M\\xfcll'"),
        (lambda m: m.opset_import.append(helper.make_opsetid("NAME", 1)), r"an opset is of domain b'M\\xfcll'"),
        (lambda m: m.graph.node[0].output.append("NAME"), r"an output of node .* is named b'M\\xfcll'"),
        (lambda m: setattr(m.graph.input[0], "name", "NAME"), r"an input of graph 'g' is named b'M\\xfcll'"),
    ],
)
def test_what_names_a_value_or_an_operator_must_be_utf_8(change, message) -> None:
    bad = model([node("Relu", ["x"], ["y"])])
    change(bad)
    with pytest.raises(ModelFileError, match=message):
        model_file.load(spoilt(bad))

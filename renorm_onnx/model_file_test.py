"""Reading and writing models."""

import gc
import os
import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from renorm_onnx import model_file
from renorm_onnx.errors import ModelFileError
from renorm_onnx.files import model_checks, protobuf_writing

WEIGHT = np.random.default_rng(0).normal(size=(64, 3, 3, 3)).astype(np.float32)


def small_model() -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 64, 6, 6])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(small_model(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def external_path(tmp_path: Path) -> Path:
    onnx.save(small_model(), tmp_path / "in.onnx", save_as_external_data=True, location="in.data")
    return tmp_path / "in.onnx"


def weight_in(path: Path) -> np.ndarray:
    return numpy_helper.to_array(onnx.load(path).graph.initializer[0])


def test_a_model_is_saved_as_it_was_loaded(path: Path) -> None:
    out = path.with_name("out.onnx")
    model_file.save(model_file.load(path), out)
    onnx.checker.check_model(out, full_check=True)
    assert onnx.load(out) == small_model()
    assert sorted(os.listdir(path.parent)) == ["model.onnx", "out.onnx"]


def test_the_domain_of_onnx_has_one_name_in_every_model_that_is_read() -> None:
    proto, relu = small_model(), helper.make_node("Relu", ["a"], ["b"])
    long = helper.make_opsetid("ai.onnx", 20)
    function = helper.make_function("f", "F", ["a"], ["b"], [relu], [long])
    proto.functions.append(function)
    proto.opset_import[0].CopyFrom(long)
    for source in (proto, ir.serde.deserialize_model(proto)):
        loaded = model_file.load(source)
        assert [dict(scope.opset_imports) for scope in (loaded.graph, *loaded.functions.values())] == [{"": 20}] * 2


def test_the_input_is_never_changed(path: Path) -> None:
    proto = small_model()
    source = ir.serde.deserialize_model(small_model())
    for given in (proto, source):
        model = model_file.load(given)
        model.graph.initializers["w"].name = "other"
        model.graph.outputs[0].name = "z"
        next(iter(model.graph)).op_type = "Relu"
    assert proto == small_model()
    assert ir.serde.serialize_model(source).graph.node == small_model().graph.node
    assert source.graph.initializers["w"].const_value.name == "w"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"model\.onnx' is empty; expected an ONNX model file; export or download it again"),
        (b"\x08\x07\x12\xff\xff", r"cannot be read as protobuf: it is no ONNX model, or a damaged or truncated one"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"it is a Git LFS pointer; fetch the file .* `git lfs pull`"),
        (b"PK\x03\x04....", r"it is a zip archive, as torch\.save writes; export the model to ONNX first"),
        (b"\x89HDF\r\n", r"it is an HDF5 file, as Keras writes; convert the model to ONNX first"),
        (
            b'<\n   ir_version: 10,\n   opset_import: ["" : 20]\n>',
            r"it is ONNX in its text form; give it to onnx\.parser",
        ),
        (
            b'ir_version: 10\nproducer_name: "x"',
            r"it is protobuf in its text form; read it with onnx\.load\(path, form",
        ),
        (b"<!DOCTYPE html>", r"it is a web page or XML; download the file itself"),
        (b'{"irVersion": 10}', r"it is JSON; expected the binary ONNX format"),
        (b"\x08\x07", r"model\.onnx': it has no graph, so it is not an ONNX model"),
    ],
)
def test_a_file_that_is_no_model_is_refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        model_file.load(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_model_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for size in range(1, len(content), 97):
        path.write_bytes(content[:size])
        with pytest.raises(ModelFileError, match=r"damaged or truncated|is damaged|it has no graph"):
            model_file.load(path)


def test_a_path_that_is_no_readable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "big").touch()
    (tmp_path / "private").touch()
    os.truncate(tmp_path / "big", 2**31)
    for name, message in [
        ("absent.onnx", r"absent\.onnx' does not exist; expected an ONNX model file"),
        ("", r"^'[^']*' is a folder; expected an ONNX model file"),
        ("pipe", r"pipe' is a pipe or a device; expected an ONNX model file; save it to one first"),
        ("loop", r"cannot read '.*loop': too many levels of symbolic links"),
        ("a\0b", r"b' is not a path: embedded null byte"),
        (
            "big",
            r"big' has 2,147,483,648 bytes; an \.onnx file holds at most .*; save the model with its weights as ext",
        ),
    ]:
        with pytest.raises(ModelFileError, match=message):
            model_file.load(f"{tmp_path}/{name}")

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Whoever runs the tests may be root, whom permissions do not stop.
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ModelFileError, match=r"cannot read '.*private': no permission"):
        model_file.load(tmp_path / "private")


def test_what_onnx_ir_cannot_hold_is_refused_in_one_line() -> None:
    proto = small_model()
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "SIZE"
    proto.ParseFromString(proto.SerializeToString().replace(b"SIZE", b"S\xffZE"))
    with pytest.raises(ModelFileError, match=r"^the model cannot be represented: Expected str, .* got bytes$"):
        model_file.load(proto)
    proto = small_model()
    proto.graph.output[0].type.denotation = "IMAGE"
    proto.ParseFromString(proto.SerializeToString().replace(b"IMAGE", b"IM\xffGE"))
    with pytest.raises(ModelFileError, match=r"^the model cannot be written: it holds text that is not UTF-8$"):
        model_file.to_proto(model_file.load(proto))


def test_a_model_whose_nodes_onnx_ir_cannot_copy_is_refused() -> None:
    proto = small_model()
    proto.graph.node.insert(0, helper.make_node("Relu", ["y"], ["z"]))
    with pytest.raises(ModelFileError, match=r"^the model cannot be copied: Value .* is an outer-scope value"):
        model_file.load(ir.serde.deserialize_model(proto))


def test_an_external_model_is_saved_with_its_own_data_file(external_path: Path) -> None:
    model = model_file.load(external_path)
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    out = external_path.with_name("out.onnx")
    model_file.save(model, out)
    (data,) = [name for name in os.listdir(out.parent) if name.startswith("out.") and name != "out.onnx"]
    assert data.endswith(".data")
    np.testing.assert_array_equal(weight_in(out), WEIGHT)
    onnx.checker.check_model(out, full_check=True)
    assert weight_in(external_path).shape == WEIGHT.shape
    assert all(os.stat(out.with_name(name)).st_nlink == 1 for name in os.listdir(out.parent))


def test_an_external_model_is_replaced_without_touching_the_data_that_others_use(external_path: Path) -> None:
    model = model_file.load(external_path)
    other = external_path.with_name("other.onnx")
    other.write_bytes(external_path.read_bytes())
    model.graph.initializers["w"].const_value = ir.Tensor(2 * WEIGHT, name="w")
    model_file.save(model, external_path, force=True)
    np.testing.assert_array_equal(weight_in(external_path), 2 * WEIGHT)
    np.testing.assert_array_equal(weight_in(other), WEIGHT)
    with pytest.raises(ModelFileError, match=r"in\.data' is the same file as the input"):
        model_file.save(model_file.load(other), other.with_name("in.data"), force=True)


def test_tied_weights_are_written_once(tmp_path: Path, external_path: Path) -> None:
    proto = onnx.load(external_path, load_external_data=False)
    proto.graph.initializer.append(proto.graph.initializer[0])
    proto.graph.initializer[1].name = "tied"
    external_path.write_bytes(proto.SerializeToString())
    model_file.save(model_file.load(external_path), tmp_path / "out.onnx")
    (data,) = tmp_path.glob("out.*.data")
    assert data.stat().st_size == WEIGHT.nbytes


def test_external_tensors_of_inner_graphs_and_constants_stay_external(tmp_path: Path) -> None:
    big = numpy_helper.from_array(WEIGHT.reshape(-1), "w")
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["k"], value=big), helper.make_node("Sum", ["k", "w"], ["t"])],
        "inner", [], [helper.make_tensor_value_info("t", TensorProto.FLOAT, [1728])], [big],
    )  # fmt: skip
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph([node], "g", [condition], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1728])])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    offset = 0
    content = b""
    for attribute in proto.graph.node[0].attribute:
        for tensor in (attribute.g.initializer[0], attribute.g.node[0].attribute[0].t):
            content += tensor.raw_data if offset % 2 else bytes(reversed(tensor.raw_data))
            onnx.external_data_helper.set_external_data(tensor, "in.data", offset * WEIGHT.nbytes, WEIGHT.nbytes)
            tensor.ClearField("raw_data")
            offset += 1
    (tmp_path / "in.data").write_bytes(content)
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    model = model_file.load(tmp_path / "in.onnx")
    model_file.save(model, tmp_path / "out.onnx")
    (data,) = tmp_path.glob("out.*.data")
    assert data.stat().st_size == 4 * WEIGHT.nbytes
    wanted = onnx.load(tmp_path / "in.onnx")
    saved = [onnx.load(tmp_path / "out.onnx"), model_file.to_proto(model)]
    for proto in saved:
        for i, attribute in enumerate(proto.graph.node[0].attribute):
            expected = wanted.graph.node[0].attribute[i].g
            for a, b in [
                (attribute.g.initializer[0], expected.initializer[0]),
                (attribute.g.node[0].attribute[0].t, expected.node[0].attribute[0].t),
            ]:
                np.testing.assert_array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))


class Streamed(ir.LazyTensor):
    """A tensor that is computed in blocks, as a folded weight is."""

    def tofile(self, file: Any) -> None:
        for row in WEIGHT:
            file.write((3 * row).tobytes())


def streamed(rows: int = 64) -> Streamed:
    return Streamed(lambda: ir.Tensor(3 * WEIGHT), dtype=ir.DataType.FLOAT, shape=ir.Shape([rows, 3, 3, 3]), name="w")


@pytest.mark.parametrize("is_external", [False, True])
def test_a_tensor_that_gives_blocks_is_written_block_by_block(
    tmp_path: Path, external_path: Path, is_external: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protobuf_writing, "_SMALL_BYTES", 0)
    model = model_file.load(external_path if is_external else small_model())
    model.graph.initializers["w"].const_value = streamed()
    model_file.save(model, tmp_path / "out.onnx")
    np.testing.assert_array_equal(weight_in(tmp_path / "out.onnx"), 3 * WEIGHT)
    assert len(list(tmp_path.glob("out.*.data"))) == is_external
    model.graph.initializers["w"].const_value = streamed(rows=65)
    with pytest.raises(ModelFileError, match=r"tensor 'w' gave 6,912 bytes; expected 7,020"):
        model_file.save(model, tmp_path / "other.onnx")
    assert not list(tmp_path.glob("*other*"))


def test_weights_beyond_a_limit_go_to_a_data_file(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_file, "EXTERNAL_ABOVE", 1000)
    model_file.save(model_file.load(path), tmp_path / "out.onnx")
    assert len(list(tmp_path.glob("out.*.data"))) == 1
    np.testing.assert_array_equal(weight_in(tmp_path / "out.onnx"), WEIGHT)


def test_weights_beyond_protobuf_are_refused_before_they_are_read(path: Path) -> None:
    model = model_file.load(path)
    huge = ir.LazyTensor(pytest.fail, dtype=ir.DataType.FLOAT, shape=ir.Shape([2**30]), name="w")
    model.graph.initializers["w"].const_value = huge
    with pytest.raises(
        ModelFileError, match=r"takes 4,294,967,\d+ bytes; one protobuf message holds at most 2,147,483,"
    ):
        model_file.model_bytes(model)


def test_a_full_disk_leaves_the_folder_as_it_was(external_path: Path) -> None:
    before = {name: external_path.with_name(name).read_bytes() for name in os.listdir(external_path.parent)}
    model = model_file.load(external_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ModelFileError, match=r"cannot write '.*in\.onnx': the file would pass the size limit of"):
            model_file.save(model, external_path, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {name: external_path.with_name(name).read_bytes() for name in os.listdir(external_path.parent)}


def test_two_writers_of_one_external_model_leave_a_whole_pair(external_path: Path) -> None:
    def write(scale: float) -> None:
        model = model_file.load(small_model())
        model.graph.initializers["w"].const_value = ir.Tensor((scale * WEIGHT).astype(np.float32), name="w")
        model.meta[model_file.KEEP_EXTERNAL] = True
        for _ in range(10):
            model_file.save(model, external_path, force=True)

    threads = [threading.Thread(target=write, args=[scale]) for scale in (2.0, 3.0)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found = model_file.load(external_path).graph.initializers["w"].const_value.numpy()
        assert any(np.array_equal(found, scale * WEIGHT) for scale in (1.0, 2.0, 3.0))
    for thread in threads:
        thread.join()
    assert sorted(name.split(".")[-1] for name in os.listdir(external_path.parent)) == ["data", "data", "data", "onnx"]


def test_an_existing_output_is_refused(path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"exists; choose another name, or allow it to be replaced \(--force\)"):
        model_file.save(model_file.load(path), path)


def test_a_copy_has_the_same_bytes_and_its_data_with_it(external_path: Path, tmp_path: Path) -> None:
    model_file.copy_file(external_path, tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == external_path.read_bytes()
    (tmp_path / "sub").mkdir()
    target = tmp_path / "sub" / "copy.onnx"
    model_file.copy_file(external_path, target)
    assert sorted(os.listdir(tmp_path / "sub")) == ["copy.onnx", "in.data"]
    np.testing.assert_array_equal(weight_in(target), WEIGHT)
    model_file.copy_file(external_path, target, force=True)
    (tmp_path / "sub" / "in.data").write_bytes(b"of another model")
    with pytest.raises(
        ModelFileError, match=r"the data file '.*in\.data' exists with other content; copy the model to"
    ):
        model_file.copy_file(external_path, target, force=True)
    with pytest.raises(ModelFileError, match=r"is the same file as the input"):
        model_file.copy_file(external_path, external_path, force=True)


def test_garbage_collection_is_paused_only_while_a_model_is_built() -> None:
    with model_file.collection_paused():
        assert not gc.isenabled()
        with model_file.collection_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_damaged_model_is_not_copied(path: Path) -> None:
    path.write_bytes(b"\x08\x07\x12\xff\xff")
    with pytest.raises(ModelFileError, match=r"^'[^']*model\.onnx' cannot be read as protobuf"):
        model_file.copy_file(path, path.with_name("copy.onnx"))
    path.write_bytes(b"\x08\x07")
    with pytest.raises(ModelFileError, match=r"^'[^']*model\.onnx': it has no graph"):
        model_file.copy_file(path, path.with_name("copy.onnx"))
    assert os.listdir(path.parent) == ["model.onnx"]


def test_a_file_that_would_become_too_large_in_memory_is_refused_by_name(path: Path, monkeypatch) -> None:
    monkeypatch.setattr(model_checks, "MAX_PARSED_BYTES", 100)
    with pytest.raises(ModelFileError, match=rf"^'{path}': its [\d,]+ bytes would become more than 100 in memory"):
        model_file.load(path)

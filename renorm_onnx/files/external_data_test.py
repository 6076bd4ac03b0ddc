"""Data files: what is refused, what is followed, and reading in blocks."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from renorm_onnx import model_file
from renorm_onnx.errors import ModelFileError
from renorm_onnx.files import external_data

VALUES = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
SIZE = VALUES.nbytes


def external(name: str, **entries: object) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[8, 4], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write(folder: Path, *tensors: TensorProto) -> Path:
    """A model that adds up `tensors`; beside it w.data, with room for two of them."""
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 4]) for name in "xy"]
    nodes = [helper.make_node("Sum", ["x", *(tensor.name for tensor in tensors)], ["y"])]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], list(tensors))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    folder.mkdir(exist_ok=True)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    (folder / "w.data").write_bytes(VALUES.tobytes() + (2 * VALUES).tobytes())
    return folder / "m.onnx"


def test_external_tensors_are_found_and_read(tmp_path: Path) -> None:
    path = write(
        tmp_path, external("a", location="w.data", offset=0, length=SIZE), external("b", location="w.data", offset=SIZE)
    )
    initializers = model_file.load(path).graph.initializers
    np.testing.assert_array_equal(initializers["a"].const_value.numpy(), VALUES)
    np.testing.assert_array_equal(initializers["b"].const_value.numpy(), 2 * VALUES)
    np.testing.assert_array_equal(external_data.read_rows(initializers["b"].const_value, 2, 5), 2 * VALUES[2:5])
    np.testing.assert_array_equal(external_data.read_rows(ir.Tensor(VALUES), 2, 5), VALUES[2:5])


def test_a_bare_file_name_is_found_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, external("a", location="w.data", length=SIZE))
    monkeypatch.chdir(tmp_path)
    model = model_file.load("m.onnx")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(model.graph.initializers["a"].const_value.numpy(), VALUES)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../w.data"}, r"external tensor 'a' lies at '\.\./w\.data', outside the model's folder; expe"),
        ({"location": "sub/../w.data"}, r"outside the model's folder; expected a path inside it, without '\.\.'"),
        ({"location": "..\\w.data"}, r"outside the model's folder"),
        ({"location": "/etc/passwd"}, r"external tensor 'a' lies at '/etc/passwd', outside the model's folder"),
        ({}, r"external tensor 'a' has location ''; expected the name of a file in the model's folder"),
        ({"location": "a\0b"}, r"has location 'a\\x00b'; expected the name of a file"),
        ({"location": "absent.data"}, r"lies in 'absent\.data', which is not in '.*'; put the data file there"),
        ({"location": "x" * 5000}, r"cannot be read: the file name is too long"),
        ({"location": "sub"}, r"lies in 'sub', which is not a regular file"),
        ({"location": "pipe"}, r"lies in 'pipe', which is not a regular file"),
        ({"location": "w.data", "offset": -4}, r"has offset '-4'; expected a number of bytes, 0 or more"),
        ({"location": "w.data", "offset": "٣"}, r"has offset '٣'; expected a number of bytes"),
        ({"location": "w.data", "offset": 10**30}, r"has offset '1000000.*'; expected a number of bytes"),
        ({"location": "w.data", "length": -1}, r"has length '-1'; expected a number of bytes"),
        ({"location": "w.data", "length": 4}, r"of type FLOAT and shape \(8, 4\) has length 4; expected 128 bytes"),
        ({"location": "w.data", "length": 2**62}, r"has length 4,611,686,018,427,387,904; expected 128 bytes"),
        ({"location": "w.data", "offset": 200}, r"takes bytes 200 to 328 of 'w\.data', which has 256; the data file"),
        ({"location": "w.data", "offset": 2**60}, r"which has 256; the data file is truncated or belongs to another"),
    ],
)  # fmt: skip
def test_data_that_is_elsewhere_or_not_there_is_refused(
    tmp_path: Path, entries: dict[str, object], message: str
) -> None:
    path = write(tmp_path / "model", external("a", **entries))
    (tmp_path / "w.data").write_bytes(bytes(SIZE))
    (tmp_path / "model" / "sub").mkdir()
    os.mkfifo(tmp_path / "model" / "pipe")
    with pytest.raises(ModelFileError, match=message):
        model_file.load(path)


def test_an_entry_given_twice_is_refused(tmp_path: Path) -> None:
    tensor = external("a", location="w.data")
    tensor.external_data.add(key="location", value="other")
    with pytest.raises(ModelFileError, match=r"external tensor 'a' gives its location twice; expected it once"):
        model_file.load(write(tmp_path, tensor))


def test_strings_in_a_data_file_are_refused(tmp_path: Path) -> None:
    tensor = external("a", location="w.data")
    tensor.data_type = TensorProto.STRING
    with pytest.raises(ModelFileError, match=r"has type STRING; strings cannot be kept in a data file"):
        model_file.load(write(tmp_path, tensor))


def test_partly_overlapping_tensors_are_refused_and_tied_ones_accepted(tmp_path: Path) -> None:
    half = external("b", location="w.data", offset=SIZE // 2)
    with pytest.raises(
        ModelFileError, match=r"external tensors 'a' and 'b' overlap in 'w\.data': bytes 0 to 128 and 64"
    ):
        model_file.load(write(tmp_path, external("a", location="w.data"), half))
    tied = write(tmp_path, external("a", location="w.data"), external("b", location="./w.data", offset=0))
    model_file.load(tied)


@pytest.mark.parametrize("kind", ["symbolic", "hard", "folder"])
def test_a_link_out_of_the_folder_is_followed_only_on_request(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "model", external("a", location="sub/w.data" if kind == "folder" else "w.data"))
    (tmp_path / "store").mkdir()
    (tmp_path / "model" / "w.data").rename(tmp_path / "store" / "w.data")
    if kind == "symbolic":
        (tmp_path / "model" / "w.data").symlink_to("../store/w.data")
    elif kind == "hard":
        (tmp_path / "model" / "w.data").hardlink_to(tmp_path / "store" / "w.data")
    else:
        (tmp_path / "model" / "sub").symlink_to(tmp_path / "store")
    expected = "a hard link" if kind == "hard" else r"a symbolic link to '.*store/w\.data', outside the model's folder"
    with pytest.raises(ModelFileError, match=rf"is {expected}; copy the file there, or, .* \(--allow-symlinks\)"):
        model_file.load(path)
    model = model_file.load(path, allow_symlinks=True)
    np.testing.assert_array_equal(model.graph.initializers["a"].const_value.numpy(), VALUES)
    model_file.save(model, tmp_path / "model" / "out.onnx")
    saved = onnx.load(tmp_path / "model" / "out.onnx")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(saved.graph.initializer[0]), VALUES)


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    path = write(tmp_path, external("a", location="w.data"))
    (tmp_path / "w.data").rename(tmp_path / "real.data")
    (tmp_path / "w.data").symlink_to("real.data")
    np.testing.assert_array_equal(model_file.load(path).graph.initializers["a"].const_value.numpy(), VALUES)


def test_a_message_in_memory_cannot_name_data_files(tmp_path: Path) -> None:
    proto = onnx.load(write(tmp_path, external("a", location="w.data")), load_external_data=False)
    with pytest.raises(ModelFileError, match=r"the model: tensor 'a' lies in a data file, .* pass the model's path"):
        model_file.load(proto)


def test_a_model_that_onnx_ir_loaded_by_a_bare_name_cannot_leave_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model", external("a", location="../w.data"))
    (tmp_path / "w.data").write_bytes(bytes(SIZE))
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(ModelFileError, match=r"the model: external tensor 'a' lies at '\.\./w\.data', outside"):
        model_file.load(ir.load("m.onnx"))


def test_a_data_file_that_shrinks_after_loading_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, external("a", location="w.data"))
    model = model_file.load(path)
    (tmp_path / "w.data").write_bytes(bytes(10))
    with pytest.raises(
        ModelFileError, match=r"w\.data' has become 118 bytes too short for tensor 'a'; was it replaced"
    ):
        model_file.model_bytes(model)
    (tmp_path / "w.data").unlink()
    with pytest.raises(ModelFileError, match=r"cannot read '.*w\.data': no such file or directory"):
        model_file.save(model, tmp_path / "out.onnx")
    assert sorted(os.listdir(tmp_path)) == ["m.onnx"]


def test_a_large_data_file_is_opened_and_copied_in_little_memory(tmp_path: Path) -> None:
    path = write(tmp_path, external("a", location="w.data"))
    proto = onnx.load(path, load_external_data=False)
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend([50_000_000])
    path.write_bytes(proto.SerializeToString())
    os.truncate(tmp_path / "w.data", 200_000_000)
    tracemalloc.start()
    try:
        model_file.save(model_file.load(path), tmp_path / "out.onnx")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000, peak

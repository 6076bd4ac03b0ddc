"""Opsets that cannot be reached, and arguments that have another name here, are refused."""

import onnx
import onnxruntime
import pytest

from renorm_onnx import model_file, opset_lowering
from renorm_onnx.errors import InputError, MachineError, ModelFileError
from renorm_onnx.exporter import to_onnx
from renorm_onnx.exporting import options
from renorm_onnx.exporting.conftest import X, small
from renorm_onnx.exporting.options import check_options, newest_loadable


def test_an_opset_that_onnxruntime_does_not_load_is_refused_unless_nothing_is_to_be_run(monkeypatch) -> None:
    defined = onnx.defs.onnx_opset_version()
    monkeypatch.setattr(options, "newest_loadable", lambda: defined - 1)
    message = (
        rf"opset={defined} given; .* to {defined - 1}, the newest that the installed onnxruntime knows; "
        rf"with verify=False up to {defined}, for another runtime"
    )
    with pytest.raises(InputError, match=message):
        to_onnx(small(), X, opset=defined)
    assert to_onnx(small(), X, opset=defined, verify=False).opset_import[0].version == defined


def test_the_newest_opset_is_found_by_loading_a_model() -> None:
    newest = newest_loadable()
    make = onnx.helper.make_tensor_value_info
    x, y = make("x", onnx.TensorProto.FLOAT, [1]), make("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])

    def load(opset: int) -> None:
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    load(newest)
    if newest < onnx.defs.onnx_opset_version():
        with pytest.raises(Exception, match="under development"):
            load(newest + 1)


def test_an_opset_at_which_torchs_converter_does_not_arrive_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(opset_lowering, "nearest", lambda opset: 18)
    with pytest.raises(
        InputError, match=r"opset 20 asked for, but torch's converter stayed at 18: it has no rule .*; ask for 18$"
    ):
        to_onnx(small(), X)


def test_where_nothing_can_be_loaded_every_opset_that_onnx_defines_passes(monkeypatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise MachineError("Session: onnxruntime is not installed")

    monkeypatch.setattr(options, "open_session", absent)
    assert newest_loadable.__wrapped__() == onnx.defs.onnx_opset_version()


@pytest.mark.parametrize("opset", [True, "20", 20.0])
def test_an_opset_that_is_no_whole_number_is_refused(opset) -> None:
    with pytest.raises(InputError, match=rf"to_onnx\(mode='eval'\): opset={opset!r} given; expected 15, "):
        check_options("eval", opset, None, None)


def test_the_default_opset_is_twenty() -> None:
    assert check_options("eval", None, None, None) == 20


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("opset_version", "; it is called 'opset' here"),
        ("f", "; it is called 'path' here"),
        ("training", "; it is called 'mode' here"),
        (
            "dynamo",
            r", which to_onnx decides itself; to decide it, call torch\.onnx\.export with translation_table\(\)",
        ),
        ("opsett", ""),
    ],
)
def test_arguments_of_torchs_exporter_are_answered_with_ours(name, said) -> None:
    with pytest.raises(TypeError, match=rf"^to_onnx\(\) got an unexpected keyword argument '{name}'{said}$"):
        to_onnx(small(), X, **{name: 1})


def test_a_missing_folder_is_noticed_before_the_export(tmp_path) -> None:
    with pytest.raises(ModelFileError, match=r"the folder .*nowhere' does not exist"):
        to_onnx(small(), X, tmp_path / "nowhere" / "model.onnx")


def test_one_file_is_refused_for_weights_that_it_cannot_hold(monkeypatch, tmp_path) -> None:
    path = tmp_path / "model.onnx"
    to_onnx(small(), X, path, external_data=False)
    path.unlink()
    monkeypatch.setattr(model_file, "EXTERNAL_ABOVE", 300)
    with pytest.raises(InputError, match="external_data=False, but the weights take 384 bytes; leave it out"):
        to_onnx(small(), X, path, external_data=False)
    assert not list(tmp_path.iterdir())
    to_onnx(small(), X, path)


def test_an_export_without_verification_says_so(caplog) -> None:
    with caplog.at_level("INFO", logger="renorm_onnx.exporter"):
        to_onnx(small(), X, verify=False)
    assert caplog.messages == ["to_onnx: 1 call; opset 20 asked and reached; not verified"]

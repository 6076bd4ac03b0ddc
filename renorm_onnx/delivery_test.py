"""What `fuse_file` and `inline_file` write where nothing folds, and what they say about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from renorm_onnx import cli, model_file
from renorm_onnx.delivery import UNCHANGED, fuse_file, inline_file
from renorm_onnx.errors import InputError, MachineError, ModelFileError
from renorm_onnx.fusion import fact_rules
from renorm_onnx.inspection import inspect_model
from renorm_onnx.onnx_function import DEFAULTS, DOMAIN, INFERENCE, TRAINING, attach
from renorm_onnx.runtime import providers as execution_providers
from renorm_onnx.runtime.parity import verify
from renorm_onnx.runtime.session import Session

CHANNELS = 4


def model_of_calls(*, foldable: bool = False, name: str = INFERENCE, opset: int = 18) -> onnx.ModelProto:
    """A Conv or a Relu and a call of ours without a definition, as `keep_ops` leaves it; a norm cannot pass Relu."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(CHANNELS, CHANNELS, 1, 1)), "var": rng.uniform(0.5, 2, CHANNELS)}
    arrays |= {name: rng.normal(size=CHANNELS) for name in ("scale", "B", "mean")}
    arrays |= {name: np.asarray(value) for name, value in (("r", 3.0), ("d", 5.0), ("share", 0.1))}
    inputs = ["h", "scale", "B", "mean", "var"] + (["r", "d", "share"] if name == TRAINING else [])
    outputs = ["y", "m", "v"] if name == TRAINING else ["y"]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]) if foldable else helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node(name, inputs, outputs, name="bn", domain=DOMAIN, **DEFAULTS),
    ]
    shape = [2, CHANNELS, 5, 5]
    graph = helper.make_graph(
        nodes,
        "calls",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, shape)],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def saved(path: Path, model: onnx.ModelProto, *, defined: bool) -> Path:
    loaded = model_file.load(model)
    if defined:
        attach(loaded)
    model_file.save(loaded, path)
    return path


def test_an_output_in_the_way_is_refused_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(b"no model")
    Path("model.fused.onnx").write_bytes(b"in the way")
    Path("model.inlined.onnx").write_bytes(b"in the way")
    for deliver in (fuse_file, inline_file):
        with pytest.raises(ModelFileError, match=r"output 'model\.\w+\.onnx' exists"):
            deliver("model.onnx")
        with pytest.raises(ModelFileError, match="cannot be read as protobuf"):
            deliver("model.onnx", force=True)
        with pytest.raises(ModelFileError, match=r"'absent/model\.onnx' does not exist; expected an ONNX model file"):
            deliver("absent/model.onnx")


def last_line(text: object) -> str:
    return str(text).splitlines()[-1]


def outputs_of(path: str | Path) -> np.ndarray:
    x = np.random.default_rng(1).normal(size=(2, CHANNELS, 5, 5)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x})[0])


def test_where_nothing_folds_the_functions_become_plain_operators_and_are_verified(tmp_path):
    source = saved(tmp_path / "model.onnx", model_of_calls(), defined=True)
    done = fuse_file(source)
    written = onnx.load(done.target)
    assert not done.report.changed
    assert done.rewritten
    assert done.to_dict()["rewritten"] is True
    assert [n.op_type for n in written.graph.node] == ["Relu", "BatchNormalization"]
    assert not written.functions
    assert {i.domain for i in written.opset_import} == {""}
    assert done.verdict is not None
    assert done.verdict.outcome == "yes"
    assert last_line(done) == f"nothing to fold: wrote {done.target}, with plain operators in place of functions"
    np.testing.assert_allclose(outputs_of(done.target), outputs_of(source), rtol=1e-6, atol=1e-6)


def test_a_result_without_functions_that_is_wrong_is_not_written(tmp_path, monkeypatch):
    from renorm_onnx import delivery

    fuse = delivery.fuse_in_place

    def wrong(model, options):
        report = fuse(model, options)
        model.graph[-1].attributes["epsilon"] = delivery.ir.AttrFloat32("epsilon", 1e-2)
        return report

    monkeypatch.setattr(delivery, "fuse_in_place", wrong)
    done = fuse_file(saved(tmp_path / "model.onnx", model_of_calls(), defined=True))
    assert (done.ok, done.written) == (False, False)
    assert not Path(done.target).exists()


def test_a_model_that_needs_nothing_is_copied_and_in_place_left_as_it_is(tmp_path):
    plain = Path(fuse_file(saved(tmp_path / "model.onnx", model_of_calls(), defined=True)).target)
    content = plain.read_bytes()
    copied = fuse_file(plain, tmp_path / "copy.onnx")
    assert not copied.rewritten
    assert Path(copied.target).read_bytes() == content
    assert last_line(copied) == f"nothing to fold: {copied.target} is a copy of {plain}"
    left = fuse_file(plain, in_place=True)
    assert plain.read_bytes() == content
    assert last_line(left) == f"nothing to fold: {plain} stays as it is"


def test_a_check_says_no_only_where_a_norm_folds_not_where_functions_are_opened(tmp_path):
    kept = saved(tmp_path / "kept.onnx", model_of_calls(), defined=True)
    folded = saved(tmp_path / "folded.onnx", model_of_calls(foldable=True), defined=True)
    assert cli.main(["fuse", str(kept), "--check"]) == cli.YES
    assert cli.main(["fuse", str(folded), "--check"]) == cli.NO
    assert last_line(fuse_file(kept, dry_run=True)) == "wrote nothing"


@pytest.mark.parametrize("check", ["auto", "never"])
def test_calls_without_a_definition_fold_as_if_they_had_one(tmp_path, check):
    source = saved(tmp_path / "model.onnx", model_of_calls(foldable=True), defined=False)
    defined = saved(tmp_path / "defined.onnx", model_of_calls(foldable=True), defined=True)
    done = fuse_file(source, verify=check)
    assert (len(done.report.folded), done.written) == (1, True)
    assert last_line(done) == f"wrote {done.target}"
    assert [n.op_type for n in onnx.load(done.target).graph.node] == ["Conv"]
    np.testing.assert_allclose(outputs_of(done.target), outputs_of(defined), rtol=1e-5, atol=1e-5)


def test_calls_without_a_definition_are_inlined_and_inspected(tmp_path, capsys):
    source = saved(tmp_path / "model.onnx", model_of_calls(), defined=False)
    done = inline_file(source)
    assert done.calls == 1
    assert [n.op_type for n in onnx.load(done.target).graph.node] == ["Relu", "BatchNormalization"]
    assert cli.main(["inspect", str(source)]) == cli.YES
    assert "1 norms, 0 of them can be folded" in capsys.readouterr().out


def test_calls_without_a_definition_run_are_timed_and_are_judged(tmp_path, capsys):
    source = saved(tmp_path / "model.onnx", model_of_calls(foldable=True), defined=False)
    defined = saved(tmp_path / "defined.onnx", model_of_calls(foldable=True), defined=True)
    before = source.read_bytes()
    for command in (["verify"], ["verify", str(defined)], ["bench", "--rounds", "1"]):
        assert cli.main([command[0], str(source), *command[1:]]) == cli.YES, capsys.readouterr().err
    x = np.random.default_rng(0).normal(size=(2, CHANNELS, 5, 5)).astype(np.float32)
    loaded = model_file.load(source)
    for model in (str(source), onnx.load(source), loaded):
        np.testing.assert_array_equal(Session(model)(x), Session(defined)(x))
    assert not loaded.functions
    assert source.read_bytes() == before
    changed = model_of_calls(foldable=True)
    shift = changed.graph.initializer[3]
    shift.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(shift) + np.float32(1e-3), "B"))
    wrong = saved(tmp_path / "wrong.onnx", changed, defined=False)
    assert cli.main(["verify", str(source), str(wrong)]) == cli.NO


def test_a_training_step_without_a_definition_gets_one(tmp_path):
    done = fuse_file(saved(tmp_path / "model.onnx", model_of_calls(name=TRAINING), defined=False), verify="never")
    assert [f.name for f in onnx.load(done.target).functions] == [TRAINING]
    assert inspect_model(done.source).layers[0].training
    assert np.isfinite(outputs_of(done.target)).all()
    assert last_line(done) == f"nothing to fold: wrote {done.target}, whose functions alone differ"


@pytest.mark.parametrize("inlined", [False, True])
def test_a_step_of_training_is_told_from_a_model_without_norms(tmp_path, inlined):
    model = model_of_calls(name=TRAINING)
    model.graph.node[1].output[1] = "bn.running_mean.updated"
    model.graph.output.append(helper.make_tensor_value_info("bn.running_mean.updated", 1, [CHANNELS]))
    source = saved(tmp_path / "step.onnx", model, defined=True)
    if inlined:
        source = Path(inline_file(source).target)
    done, found = fuse_file(source, verify="never"), inspect_model(source)
    said = "a training graph: 1 norm in training, which nothing can fold; fuse the export for inference instead"
    assert said in str(done).splitlines()
    assert said in str(found).splitlines()
    assert "no normalization" not in str(done)
    assert done.to_dict()["fusion"]["training_layers"] == found.to_dict()["training_layers"] == 1
    if not inlined:  # the function stays closed, whose gamma and beta would else be taken for a norm
        assert (done.report.entries, done.rewritten) == ([], False)
    other = inspect_model(saved(tmp_path / "model.onnx", model_of_calls(), defined=True))
    assert (other.report.training_layers, "a training graph" in str(other)) == (0, False)


def test_a_call_that_cannot_be_defined_is_refused(tmp_path):
    source = saved(tmp_path / "model.onnx", model_of_calls(name=TRAINING, opset=17), defined=False)
    for command in (fuse_file, inline_file, inspect_model, verify, Session):
        with pytest.raises(InputError, match="needs opset 18 or newer"):
            command(source)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_sizes_count_each_data_file_once(tmp_path):
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.iterdir())

    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(32, 32)).astype(np.float32) for _ in range(2)]
    nodes = [helper.make_node("MatMul", ["x", "w0"], ["h"]), helper.make_node("MatMul", ["h", "w1"], ["y0"])]
    nodes.append(helper.make_node("Mul", ["y0", "s"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", 1, [3, 32])],
        [helper.make_tensor_value_info("y", 1, [3, 32])],
        [numpy_helper.from_array(a, f"w{i}") for i, a in enumerate(arrays)]
        + [numpy_helper.from_array(np.float32(3.0), "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folders = [tmp_path / name for name in ("before", "after", "copy")]
    for folder in folders:
        folder.mkdir()
    paths = [folder / "model.onnx" for folder in folders]
    onnx.save(model, paths[0], save_as_external_data=True, location="model.data", size_threshold=0)
    done = fuse_file(paths[0], paths[1])
    assert done.report.changed
    assert (done.bytes_before, done.bytes_after) == (size(folders[0]), size(folders[1]))
    assert done.bytes_before > sum(a.nbytes for a in arrays)
    again = fuse_file(paths[1], paths[2])
    assert not again.rewritten
    assert (again.bytes_before, again.bytes_after) == (size(folders[1]), size(folders[2]))


def test_data_that_a_replaced_model_does_not_use_any_more_stays_and_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = model_of_calls(foldable=True)
    tensor = numpy_helper.from_array(np.ones((CHANNELS, 300), np.float32), "spare")
    model.graph.initializer.append(tensor)
    model.graph.output.append(helper.make_tensor_value_info("spare", 1, [CHANNELS, 300]))
    onnx.save(model, "model.onnx", save_as_external_data=True, location="weights.data", size_threshold=0)
    beside = fuse_file("model.onnx")
    assert (beside.left_behind, beside.to_dict()["left_behind"]) == ((), [])
    done = fuse_file("model.onnx", in_place=True)
    assert done.ok
    assert done.to_dict()["left_behind"] == ["weights.data"]
    assert Path("weights.data").exists()
    assert last_line(done) == "left behind: weights.data, which another model may use; else delete it"
    again = fuse_file(tmp_path / "model.onnx", in_place=True)
    assert (again.rewritten, again.left_behind) == (False, ())


def test_a_write_protected_model_is_replaced_only_by_force(tmp_path):
    source = saved(tmp_path / "model.onnx", model_of_calls(foldable=True), defined=True)
    source.chmod(0o444)
    before = source.read_bytes()
    with pytest.raises(
        ModelFileError, match=r"model\.onnx' is write-protected \(mode 444\); make it writable, or .*--force"
    ):
        fuse_file(source, in_place=True)
    assert source.read_bytes() == before
    assert fuse_file(source, in_place=True, dry_run=True).report.changed
    assert fuse_file(source).written, "another file may be made of it"
    assert fuse_file(source, in_place=True, force=True).written
    assert source.read_bytes() != before
    assert source.stat().st_mode & 0o777 == 0o444


def test_an_if_that_was_opened_in_vain_is_in_the_copy_and_in_the_table(tmp_path):
    rng = np.random.default_rng(0)
    info = [helper.make_tensor_value_info(n, 1, [2, 4]) for n in ("x", "h", "y")]
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["h"])], "branch", [], info[1:2])
    nodes = [
        helper.make_node("If", ["flag"], ["c"], then_branch=branch, else_branch=branch),
        helper.make_node("BatchNormalization", ["c", *"sbmv"], ["y"]),
    ]
    stored = [numpy_helper.from_array(rng.uniform(0.5, 2, 4).astype(np.float32), n) for n in "sbmv"]
    stored.append(numpy_helper.from_array(np.array(True), "flag"))
    graph = helper.make_graph(nodes, "g", info[:1], info[2:], stored)
    source = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
    done = fuse_file(source)
    assert Path(done.target).read_bytes() == source.read_bytes()
    assert done.report.operators_after == {"If": 1, "Relu": 2, "BatchNormalization": 1}


def test_what_the_check_left_out_is_said_beside_its_yes(tmp_path):
    model = model_of_calls(foldable=True)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    array = numpy_helper.to_array(weight).copy()
    array[0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(array, "w"))
    done = fuse_file(saved(tmp_path / "model.onnx", model, defined=True))
    assert done.ok
    verdict, left_out, wrote = str(done).splitlines()[-3:]
    assert verdict.startswith("verdict: yes")
    assert left_out.startswith("not checked: ")
    assert left_out.endswith("elements of 'y' on cpu: the reference or both models are not finite")
    assert wrote == f"wrote {done.target}"


def test_why_the_whole_was_not_run_is_said_once(tmp_path):
    model = model_of_calls(foldable=True)
    model.graph.node.append(helper.make_node("Thing", ["y"], ["z"], domain="elsewhere"))
    model.graph.output.append(helper.make_tensor_value_info("z", 1, [2, CHANNELS, 5, 5]))
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))
    done = fuse_file(saved(tmp_path / "model.onnx", model, defined=True))
    assert done.verdict is not None
    assert done.verdict.outcome == "skipped"
    assert str(done).count(done.unchecked) == 1
    assert "verdict: skipped" in str(done)


def test_another_word_for_verify_is_refused(tmp_path):
    with pytest.raises(InputError, match="verify='always' given, expected one of auto, require, never"):
        fuse_file(saved(tmp_path / "model.onnx", model_of_calls(), defined=True), verify="always")


@pytest.mark.parametrize("there", [True, False])
def test_a_provider_that_is_asked_for_must_be_there_even_where_nothing_is_checked(tmp_path, monkeypatch, there):
    status = replace(execution_providers.provider_status("cuda"), creatable=there)
    monkeypatch.setattr(execution_providers, "provider_status", lambda name: status)
    source = fuse_file(saved(tmp_path / "model.onnx", model_of_calls(), defined=True)).target
    if there:
        assert fuse_file(source, providers=("cuda",)).unchecked == UNCHANGED
    else:
        with pytest.raises(MachineError, match="fuse: provider cuda"):
            fuse_file(source, providers=("cuda",))


def test_functions_that_were_opened_in_vain_stay_in_the_file(tmp_path: Path) -> None:
    """The norm would pass the function, but not the Relu in it."""
    rng = np.random.default_rng(0)
    norm = {"var": rng.uniform(0.5, 2, CHANNELS)} | {name: rng.normal(size=CHANNELS) for name in ("scale", "B", "mean")}
    own = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    act = helper.make_function("own", "Act", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], own[:1])
    nodes = [
        helper.make_node("Act", ["x"], ["h"], domain="own"),
        helper.make_node("BatchNormalization", ["h", "scale", "B", "mean", "var"], ["y"], "bn"),
    ]
    values = [helper.make_tensor_value_info(name, 1, [2, CHANNELS, 5, 5]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in norm.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    source = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=own, functions=[act], ir_version=8), source)
    done = fuse_file(source)
    assert (done.rewritten, done.report.changed, len(done.report.kept)) == (False, False, 1)
    assert done.report.kept[0].reason is not None
    assert done.report.kept[0].obstacle.endswith("Relu")  # so it was opened
    assert Path(done.target).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("like", [False, True])
@pytest.mark.parametrize("kind", [onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
def test_a_constant_that_the_file_rounds_folds_as_it_is_rounded_and_else_is_refused(
    kind: int, like: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, to two types; and to that of another value."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(CHANNELS, CHANNELS, 3, 3)), "var": rng.uniform(0.5, 2, CHANNELS)}
    arrays |= {name: rng.normal(size=CHANNELS) for name in ("scale", "B", "mean")}
    nodes = [
        helper.make_node("Cast", ["w"], ["half"], to=onnx.TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["single"], to=onnx.TensorProto.FLOAT),
        helper.make_node("CastLike", ["single", "z"], ["narrow"])
        if like
        else helper.make_node("Cast", ["single"], ["narrow"], to=kind),
        helper.make_node("Cast", ["narrow"], ["wide"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "wide"], ["h"]),
        helper.make_node("BatchNormalization", ["h", "scale", "B", "mean", "var"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, 1, ["n", CHANNELS, size, size]) for n, size in (("x", 8), ("y", 6))]
    tensors = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()]
    source, imports = tmp_path / "model.onnx", [helper.make_opsetid("", 17)]
    inputs = [values[0], helper.make_tensor_value_info("z", kind, [1])] if like else values[:1]
    graph = helper.make_graph(nodes, "g", inputs, values[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), source)
    done = fuse_file(source)
    assert done.verdict is not None
    assert (done.verdict.outcome, done.written, len(done.report.folded)) == ("yes", True, 1)
    monkeypatch.setattr(fact_rules, "rounded", lambda content, to: content)
    done = fuse_file(source, force=True)
    assert done.verdict is not None
    assert (done.verdict.outcome, done.written) == ("no", False)

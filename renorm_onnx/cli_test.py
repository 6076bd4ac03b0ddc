import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from renorm_onnx import cli
from renorm_onnx.errors import ModelFileError
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.runtime.session import Session, open_session


def small_model(scale: float = 0.7) -> onnx.ModelProto:
    """Conv -> BatchNormalization -> Relu -> BatchNormalization: the first norm folds, the second stays."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(4, 3, 3, 3)), "s": rng.normal(size=4) + scale, "b": rng.normal(size=4)}
    arrays |= {"m": rng.normal(size=4), "v": rng.uniform(0.5, 2, 4)}
    norm = ["s", "b", "m", "v"]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", *norm], ["n"], name="bn"),
        helper.make_node("Relu", ["n"], ["r"], name="relu"),
        helper.make_node("BatchNormalization", ["r", *norm], ["y"], name="last"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", 1, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", 1, ["n", 4, 6, 6])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(small_model(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def run(*arguments: str) -> int:
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_fuse_writes_beside_its_input_and_says_what_stayed(model, capsys):
    assert run("fuse", "model.onnx") == cli.YES
    said = capsys.readouterr().out
    assert "1 of 2 norms folded, 1 kept" in said
    assert "no-rule-for-operator" in said or "Relu" in said
    assert "verdict: yes" in said
    assert [n.op_type for n in onnx.load("model.fused.onnx").graph.node] == ["Conv", "Relu", "BatchNormalization"]


def test_fuse_prints_one_json_object(model, capsys):
    assert run("fuse", "model.onnx", "--json") == cli.YES
    said = json.loads(capsys.readouterr().out)
    assert said["schema_version"] == 1
    assert said["written"] is True
    assert (said["fusion"]["norms_before"], said["fusion"]["norms_after"]) == (2, 1)
    assert said["fusion"]["norms"][1]["refusals"][0]["reason"]


def test_an_existing_output_is_replaced_only_by_force(model, capsys):
    Path("model.fused.onnx").write_bytes(b"precious")
    assert run("fuse", "model.onnx") == cli.BAD_INPUT
    assert "exists" in one_line(capsys)
    assert Path("model.fused.onnx").read_bytes() == b"precious"
    assert run("fuse", "model.onnx", "--force") == cli.YES


def test_the_input_is_replaced_only_in_place(model, capsys):
    before = model.read_bytes()
    assert run("fuse", "model.onnx", "-o", "model.onnx", "--force") == cli.BAD_INPUT
    assert "same file as the input" in one_line(capsys)
    os.link("model.onnx", "hard.onnx")
    assert run("fuse", "model.onnx", "-o", "hard.onnx", "--force") == cli.BAD_INPUT
    assert model.read_bytes() == before
    assert run("fuse", "model.onnx", "--in-place") == cli.YES
    assert model.read_bytes() != before


def test_fusing_twice_copies_the_bytes(model, capsys):
    run("fuse", "model.onnx", "-o", "once.onnx")
    assert run("fuse", "once.onnx", "-o", "twice.onnx") == cli.YES
    assert "nothing to fold" in capsys.readouterr().out
    assert Path("once.onnx").read_bytes() == Path("twice.onnx").read_bytes()


def test_check_writes_nothing_and_says_by_its_exit_status_whether_something_folds(model):
    assert run("fuse", "model.onnx", "--check") == cli.NO
    assert not Path("model.fused.onnx").exists()
    run("fuse", "model.onnx", "--no-verify")
    assert run("fuse", "model.fused.onnx", "--check") == cli.YES


def test_nothing_is_written_when_the_verdict_is_no(model, capsys, monkeypatch):
    from renorm_onnx.fusion import parameters

    rounded = parameters.Parameter.rounded
    monkeypatch.setattr(parameters.Parameter, "rounded", lambda self: rounded(self) + np.float32(1e-3))
    assert run("fuse", "model.onnx") == cli.NO
    assert "the fused model is not right, so 'model.fused.onnx' was not written" in capsys.readouterr().err
    assert not Path("model.fused.onnx").exists()


def test_a_fold_that_only_rounds_worse_is_not_called_wrong(model, capsys, monkeypatch):
    from renorm_onnx.runtime.judging import verdict

    monkeypatch.setattr(verdict, "WORST", 1e-9)
    assert run("fuse", "model.onnx") == cli.NO
    said = capsys.readouterr()
    assert (
        "the fused model rounds worse, so 'model.fused.onnx' was not written; every rewritten place holds" in said.err
    )
    assert "verdict: no. On cpu" in said.out
    assert not Path("model.fused.onnx").exists()


def test_a_fold_that_is_not_finite_where_it_should_be_does_not_only_round_worse(model, capsys, monkeypatch):
    from renorm_onnx.runtime.judging import deviation

    monkeypatch.setattr(deviation, "_class_ok", lambda r, *_: np.zeros(r.shape, bool))
    assert run("fuse", "model.onnx") == cli.NO
    said = capsys.readouterr()
    assert "the fused model is not right, so 'model.fused.onnx' was not written" in said.err
    assert "places checked one by one" in said.out
    assert not Path("model.fused.onnx").exists()


@pytest.mark.parametrize(("places", "options"), [(False, ()), (True, ("--require-verify",)), (False, ("--check",))])
def test_a_fold_that_could_not_be_judged_is_not_called_wrong(places, options, model, capsys, monkeypatch):
    from renorm_onnx.runtime.judging import sites, verdict

    monkeypatch.setattr(verdict.Judge, "unusable", lambda self: "reference unusable: it is off")
    monkeypatch.setattr(sites.SiteReport, "complete", places)
    assert run("fuse", "model.onnx", *options) == cli.NO
    assert "the fused model could not be judged, so 'model.fused.onnx' was not" in capsys.readouterr().err
    assert not Path("model.fused.onnx").exists()


def test_a_fold_whose_places_hold_is_written_though_the_original_is_no_yardstick(model, capsys, monkeypatch):
    from renorm_onnx.runtime.judging import verdict

    monkeypatch.setattr(verdict.Judge, "unusable", lambda self: "reference unusable: it is off")
    assert run("fuse", "model.onnx") == cli.YES
    said = capsys.readouterr()
    assert "verdict: skipped. Not judged end to end: reference unusable: it is off" in said.out
    assert "places checked one by one" in said.out
    assert said.err == ""
    assert Path("model.fused.onnx").exists()
    assert run("verify", "model.onnx", "model.fused.onnx") == cli.NO


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: p.unlink(), "does not exist"),
        (lambda p: (p.unlink(), p.mkdir()), "folder"),
        (lambda p: p.write_bytes(b"\x89PNG not a model"), "model.onnx"),
        (lambda p: p.write_bytes(p.read_bytes()[:-200]), "model.onnx"),
        (lambda p: p.write_bytes(b""), "empty"),
    ],
)
@pytest.mark.parametrize("command", ["fuse", "verify", "inspect", "inline"])
def test_a_file_that_is_no_model_gets_one_line_and_exit_2(model, capsys, command, prepare, message):
    prepare(model)
    assert run(command, "model.onnx") == cli.BAD_INPUT
    said = one_line(capsys)
    assert message in said
    assert "Traceback" not in said
    assert not Path("model.fused.onnx").exists()


def test_an_unknown_execution_provider_is_bad_input(model, capsys):
    assert run("verify", "model.onnx", "--ep", "gpu9000") == cli.BAD_INPUT
    assert "gpu9000" in one_line(capsys)


def test_a_missing_execution_provider_is_exit_3(model, capsys):
    from renorm_onnx.runtime.providers import provider_status

    if provider_status("cuda").creatable:
        pytest.skip("this machine has a CUDA execution provider")
    assert run("fuse", "model.onnx", "--ep", "cuda") == cli.BAD_MACHINE
    assert "cuda" in one_line(capsys).lower()
    assert not Path("model.fused.onnx").exists()


def test_a_provider_is_asked_for_even_where_nothing_folds(model, capsys, monkeypatch):
    from renorm_onnx.runtime import providers

    assert run("fuse", "model.onnx", "-o", "once.onnx") == cli.YES
    capsys.readouterr()
    for more in ([], ["--no-verify"]):
        assert run("fuse", "once.onnx", "--ep", "tpu", *more) == cli.BAD_INPUT
        assert "execution provider 'tpu' is unknown" in one_line(capsys)
    broken = providers.ProviderStatus("cuda", False, "driver missing", "libcuda.so.1", "Install one")
    monkeypatch.setattr(providers, "provider_status", lambda name: broken)
    assert run("fuse", "once.onnx", "--ep", "cuda") == cli.BAD_MACHINE
    assert "cuda: driver missing" in one_line(capsys)
    assert not Path("once.fused.onnx").exists()
    assert run("fuse", "once.onnx", "--ep", "cuda", "--no-verify") == cli.YES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fuse", ""], "'' does not exist; expected an ONNX model file"),
        (["fuse", "."], "fuse: '.' is a folder; expected an ONNX model file"),
        (["inline", "/"], "inline: '/' is a folder; expected an ONNX model file"),
        (["fuse", "model.onnx", "-o", ""], "output '' is empty"),
        (["fuse", "model.onnx", "-o", "absent/out.onnx"], "the folder 'absent' does not exist"),
        (["fuse", "model.onnx", "--seed", "-1"], "'-1' given, expected a whole number, 0 or more"),
        (["verify", "model.onnx", "--seed", "x"], "'x' given, expected a whole number"),
        (["verify", "model.onnx", "--inputs", "model.onnx"], "it is no .npz or .npy file"),
        (["bench", "model.onnx", "--batch", "1,b"], "'1,b' given, expected whole numbers"),
        (["bench", "model.onnx", "--threads", "99999"], "renorm-onnx bench: threads=99999, expected at most"),
        (["bench", "model.onnx", "--compare"], "--compare needs two models or more"),
        (["bench", "model.onnx", "--plot", "absent/out.png"], "the folder 'absent' does not exist"),
        (["bench", "model.onnx", "--plot", "model.onnx"], "is the same file as the input"),
    ],
)
def test_bad_arguments_get_one_line_and_exit_2_and_nothing_is_written(model, capsys, arguments, message):
    before = model.read_bytes()
    assert run(*arguments) == cli.BAD_INPUT
    assert message in one_line(capsys)
    assert [path.name for path in Path().iterdir()] == ["model.onnx"]
    assert model.read_bytes() == before


def test_every_command_and_call_follows_links_to_data_when_allowed(model, tmp_path, capsys):
    elsewhere = tmp_path / "cache"
    elsewhere.mkdir()
    onnx.save(small_model(), "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    Path("big.data").rename(elsewhere / "blob")
    folder = tmp_path / "linked"
    folder.mkdir()
    Path("big.onnx").rename(folder / "big.onnx")
    (folder / "big.data").symlink_to(elsewhere / "blob")
    path = str(folder / "big.onnx")
    for call in (fuse, Session, open_session):
        with pytest.raises(ModelFileError, match="--allow-symlinks"):
            call(path)
        call(path, allow_symlinks=True)
    for command in (["inspect"], ["verify", "--inputs", "1"], ["bench", "--rounds", "1"], ["inline"], ["fuse"]):
        assert run(*command, path) == cli.BAD_INPUT
        assert "--allow-symlinks" in one_line(capsys)
        assert run(*command, path, "--allow-symlinks") == cli.YES


def test_a_result_that_is_wrong_is_exit_1(model, capsys, monkeypatch):
    from renorm_onnx import inspection
    from renorm_onnx.errors import VerificationError

    def wrong(*arguments, **options):
        raise VerificationError("found to be wrong")

    monkeypatch.setattr(inspection, "inspect_model", wrong)
    assert run("inspect", "model.onnx") == cli.NO
    assert "found to be wrong" in one_line(capsys)


def test_verify_says_no_by_its_exit_status(model, capsys):
    assert run("verify", "model.onnx") == cli.YES
    onnx.save(small_model(scale=0.7001), "wrong.onnx")
    assert run("verify", "model.onnx", "wrong.onnx", "--json") == cli.NO
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["outcome"] == "no"


def test_bench_compares_by_its_exit_status(model, capsys, monkeypatch):
    from renorm_onnx.runtime.timing_report import BenchReport

    arguments = ("bench", "model.onnx", "model.onnx", "--rounds", "1", "--json")
    monkeypatch.setattr(BenchReport, "regressions", lambda self: ("slower",))
    assert run(*arguments) == cli.YES
    assert json.loads(capsys.readouterr().out)["timings"][0]["model"] == "1: model.onnx"
    assert run(*arguments, "--compare") == cli.NO


@pytest.mark.parametrize(
    ("arguments", "who"),
    [
        (["fuse"], "renorm-onnx fuse"),
        (["fuse", "model.onnx", "--bogus"], "renorm-onnx fuse"),
        (["verify", "a.onnx", "b.onnx", "c.onnx"], "renorm-onnx verify"),
        (["--bogus"], "renorm-onnx"),
        (["fuse", "model.onnx", "--ep", ""], "renorm-onnx fuse: argument --ep: '' given, expected a name"),
        (["bench", "model.onnx", "--opt", ","], "renorm-onnx bench: argument --opt: ',' given, expected a name"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_help(capsys, arguments, who):
    assert run(*arguments) == cli.BAD_INPUT
    said = one_line(capsys)
    assert said.startswith(who)
    assert said.endswith(f"; see {who.partition(':')[0]} --help\n")


@pytest.mark.parametrize("inputs", ["", "99999999999999999999", "0"])
def test_inputs_that_are_none_or_too_many_are_refused(model, capsys, inputs):
    assert run("verify", "model.onnx", "--inputs", inputs) == cli.BAD_INPUT
    assert f"inputs={inputs or repr(inputs)}, expected" in one_line(capsys)
    assert run("verify", "model.onnx", "--inputs", "2") == cli.YES


def test_a_model_without_outputs_is_bad_input_and_not_called_wrong(model, capsys):
    bad = onnx.load("model.onnx")
    del bad.graph.output[:]
    onnx.save(bad, "none.onnx")
    for command in ("fuse", "verify"):
        assert run(command, "none.onnx") == cli.BAD_INPUT
        said = "the reference has no outputs, so there is nothing to compare"
        assert one_line(capsys) == f"renorm-onnx {command}: {'verify: ' * (command == 'fuse')}{said}\n"


def test_errors_are_json_too_when_json_is_asked_for(model, capsys):
    assert run("fuse", "absent.onnx", "--json") == cli.BAD_INPUT
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False
    assert "absent.onnx" in said["error"]["message"]


def test_inspect_explains_every_norm(model, capsys):
    assert run("inspect", "model.onnx", "--explain") == cli.YES
    said = capsys.readouterr().out
    assert "backward into Conv 'conv'" in said
    assert "kept" in said


def modules_after(*arguments: str) -> set[str]:
    code = "import sys; from renorm_onnx import cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES")[2].split())


def test_help_and_version_import_nothing_heavy():
    for flag in ("--help", "--version"):
        assert not modules_after(flag) & {"numpy", "onnx", "onnx_ir", "onnxruntime", "torch"}


def test_the_help_tells_every_exit_status_and_what_a_check_answers(capsys):
    run("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "2 bad usage or input, 3 this machine cannot, 4 internal error, 130 interrupted." in said
    run("fuse", "--help")
    assert "exit 1 means that a norm could be folded" in " ".join(capsys.readouterr().out.split())


def test_no_command_imports_torch(model):
    commands = [["fuse", "model.onnx"], ["verify", "model.onnx"], ["inspect", "model.onnx"]]
    for command in commands:
        assert "torch" not in modules_after(*command), command


def test_branches_stay_apart_where_merging_costs_precision(tmp_path, monkeypatch, capsys):
    from dataclasses import replace

    from renorm_onnx import delivery
    from renorm_onnx.fusion.branches_test import IMAGE, rep_vgg
    from renorm_onnx.fusion.engine import FuseOptions, fuse_in_place

    check = delivery._check

    def strict(original, model, *rest):
        verdict, unchecked = check(original, model, *rest)
        merged = [n.op_type for n in model.graph].count("Conv") == 1
        return (replace(verdict, outcome="no", reason="too far") if merged else verdict), unchecked

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(delivery, "_check", strict)
    onnx.save(rep_vgg().model(IMAGE, ["y"]), "model.onnx")
    asked: list[FuseOptions] = []
    monkeypatch.setattr(delivery, "fuse_in_place", lambda model, o: asked.append(o) or fuse_in_place(model, o))
    assert run("fuse", "model.onnx", "--target", "fp16") == cli.YES
    assert [(options.target, options.merge_branches) for options in asked] == [("fp16", True), ("fp16", False)]
    said = capsys.readouterr().out
    assert "branches kept apart, because merged they cost precision: too far" in said
    assert [n.op_type for n in onnx.load("model.fused.onnx").graph.node].count("Conv") == 2


def test_branches_that_are_merged_wrongly_are_no_matter_of_precision(tmp_path, monkeypatch, capsys):
    from renorm_onnx.fusion import branches
    from renorm_onnx.fusion.branches_test import IMAGE, rep_vgg

    monkeypatch.chdir(tmp_path)
    onnx.save(rep_vgg().model(IMAGE, ["y"]), "model.onnx")
    place = branches._place
    monkeypatch.setattr(branches, "_place", lambda *given: place(*given) * (1 + 1e-4))
    assert run("fuse", "model.onnx") == cli.NO
    assert "rewritten place(s) compute something else" in capsys.readouterr().out
    assert not (tmp_path / "model.fused.onnx").exists()


def test_a_process_that_ends_looks_for_no_garbage_and_a_caller_keeps_its_own_ways(model, capsys):
    program = (
        "import atexit, gc, sys; from renorm_onnx.cli import main\n"
        "atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 0, file=sys.stderr))\n"
        "sys.argv[1:] = ['fuse', 'model.onnx', '--no-verify']; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "False True\n"
    frozen = gc.get_freeze_count()
    assert run("inspect", "model.onnx") == cli.YES
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen

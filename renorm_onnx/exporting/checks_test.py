"""What cannot be exported is refused before anything is written, in words that name the module."""

import contextlib
import warnings

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError, ModelFileError
from renorm_onnx.exporter import keep_ops, to_onnx
from renorm_onnx.exporting import checks
from renorm_onnx.exporting.checks import check_options, newest_loadable, quiet
from renorm_onnx.layers.distributed import SyncBatchRenorm
from renorm_onnx.layers.modules import BatchRenorm2d

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class BatchReNorm(nn.Module):
    """Another library's layer, by its name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def small(*more: nn.Module) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), BatchRenorm2d(3), *more)
    net[1].num_batches_tracked.fill_(1)
    return net.eval()


def with_training(net: nn.Module, name: str) -> nn.Module:
    net.get_submodule(name).train()
    return net


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (small().train(), {}, r"to_onnx\(mode='eval'\): module 'Sequential' is in training mode \(and 2 more\); call"),
        (with_training(small(nn.Dropout()), "2"), {}, r"module '2' is in training mode; call \.eval\(\) first or pass"),
        (small(), {"mode": "train"}, "no batch renorm layer of Sequential is in training mode"),
        (small(nn.BatchNorm2d(3)).train(), {"mode": "train"}, "module '2' is a BatchNorm2d in training mode"),
        (small(), {"mode": "infer"}, "mode='infer' given; expected 'eval' or 'train'"),
        (
            small(),
            {"opset": 14},
            r"opset=14 given; expected 15, the oldest that the exporter reaches, to \d\d, the new",
        ),
        (small(), {"opset": 99}, r"opset=99 given; expected 15, "),
        (small(), {"opset": 99, "verify": False}, r"expected 15, .* the newest that onnx 1\.\d+\.\d+ knows$"),
        (small().train(), {"opset": 17, "mode": "train"}, r"opset=17 given; expected 18, "),
        (small(), {"dynamic_axes": {}, "dynamic_shapes": ()}, "both dynamic_shapes and dynamic_axes given"),
        (small(BatchReNorm()), {}, r"module '2' is a .*BatchReNorm, another library's .* call adopt\(module\) first"),
        (
            nn.Sequential(BatchRenorm2d(3, track_running_stats=False)).eval(),
            {},
            "module '0' has track_running_stats=False",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(net, options, message, tmp_path) -> None:
    with pytest.raises(InputError, match=message):
        to_onnx(net, (X,), tmp_path / "model.onnx", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize("norm", [BatchRenorm2d, nn.BatchNorm2d])
def test_a_program_captured_in_training_mode_is_refused_whatever_its_operators(norm, keep, decomposed) -> None:
    with warnings.catch_warnings(), keep_ops() if keep else contextlib.nullcontext():
        warnings.simplefilter("ignore")
        program = torch.export.export(nn.Sequential(nn.Conv2d(3, 3, 3), norm(3)).train(), (X,))
        if decomposed:
            program = program.run_decompositions()
    with pytest.raises(InputError, match="the program was captured with layer '1' in training mode, and its updated"):
        to_onnx(program, (X,))
    with pytest.raises(InputError, match="an ExportedProgram given; pass the module itself"):
        to_onnx(program, (X,), mode="train")


def test_another_librarys_layer_is_exported_where_no_function_is_asked_for() -> None:
    assert not to_onnx(small(BatchReNorm()), X, functions=False).functions


def test_a_missing_folder_is_noticed_before_the_export(tmp_path) -> None:
    with pytest.raises(ModelFileError, match=r"the folder .*nowhere' does not exist"):
        to_onnx(small(), X, tmp_path / "nowhere" / "model.onnx")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (X[:, :2],),
            r"Sequential itself fails on these args, in layer '0': RuntimeError: .*\nargs: float32\(2, 2, 6, 6\)",
        ),
        ((X, X), r"Sequential itself fails on these args: TypeError: .*takes 2 positional arguments but 3 were given"),
    ],
)
def test_arguments_that_do_not_fit_are_told_apart_from_a_failed_export(args, message, tmp_path) -> None:
    with pytest.raises(InputError, match=message):
        to_onnx(small(), args, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (None, r"to_onnx: args is a NoneType; expected a tensor, or a tuple"),
        ({"input": X}, r"to_onnx: args is a dict; expected .* inputs by name go into kwargs"),
        ((X.numpy(),), r"(?s)to_onnx: Sequential itself fails on these args, .*args: numpy float32\(2, 3, 6, 6\)$"),
        ((X, list(range(1000))), r"args: float32\(2, 3, 6, 6\), \[0, 1, 2, 3, 4, 5, \.\.\.\]$"),
    ],
)
def test_arguments_of_another_kind_are_described_in_few_words(args, message) -> None:
    with pytest.raises(InputError, match=message):
        to_onnx(small(), args)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (X[:, :2], {}, r"to_onnx: the program does not take these args: (?s:.*)args: float32\(2, 2, 6, 6\)$"),
        ((X, X), {}, r"to_onnx: the program does not take these args: (?s:.*)args: float32\(2, 3, 6, 6\), float32"),
        ((), {}, r"to_onnx: the program does not take these args: (?s:.*)args: none$"),
        (X, {"dynamic_shapes": ({0: "n"},)}, "given for an ExportedProgram, whose sizes were decided when it was capt"),
        (X, {"dynamic_axes": {"x": [0]}}, "given for an ExportedProgram, whose sizes were decided when it was capt"),
    ],
)
def test_what_a_program_does_not_take_is_refused(args, options, message, tmp_path) -> None:
    with keep_ops():
        program = torch.export.export(small(), (X,))
    with pytest.raises(InputError, match=message):
        to_onnx(program, args, tmp_path / "model.onnx", **options)
    assert not list(tmp_path.iterdir())
    assert to_onnx(program, X).functions


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("opset_version", "; it is called 'opset' here"),
        ("f", "; it is called 'path' here"),
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


def test_a_program_brings_its_own_example_inputs() -> None:
    with keep_ops():
        program = torch.export.export(small(), (), {"input": X})
    assert to_onnx(program).functions
    program.example_inputs = None
    with pytest.raises(InputError, match="to_onnx: args is a NoneType; expected a tensor"):
        to_onnx(program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"input_names": ["a", "b"]},
            r"input_names=\['a', 'b'\] given, but torch named them \['a'\]; .* at most 1 names",
        ),
        ({"output_names": ["a", "b"]}, r"output_names=\['a', 'b'\] given, but torch named them \['a'\]"),
        ({"input_names": ["a"], "output_names": ["a"]}, r"output_names=\['a'\] given, but torch named them \['a_1'\]"),
        ({"input_names": "x"}, r"input_names='x' given, but torch named them \['x'\]; expected a list"),
    ],
)
def test_names_that_torch_drops_or_changes_are_refused(options, message) -> None:
    with pytest.raises(InputError, match=message):
        to_onnx(small(), X, **options)


class Pair(nn.Module):
    def forward(self, a: torch.Tensor, b: list[torch.Tensor], c: float = 1.0) -> tuple[torch.Tensor, ...]:
        return a * c, b[0] * 2


PAIR = (torch.ones(4, 2), [torch.ones(5, 3)], 2.0)


@pytest.mark.parametrize(
    ("axes", "options", "dynamic"),
    [
        ({"b_0": {0: "n"}}, {}, {"a": [], "b_0": [0]}),
        ({"q": {0: "n"}}, {"input_names": ["p", "q"]}, {"p": [], "q": [0]}),
        ({"q": {0: "n"}, "p": {1: "m"}}, {"input_names": ["p", "q"]}, {"p": [1], "q": [0]}),
        ({"y": {0: "n"}, "p": {0: "n"}}, {"input_names": ["p"], "output_names": ["y"]}, {"p": [0], "b_0": []}),
        ({"r": {0: "n"}, "s": None}, {}, {"a": [0], "b_0": []}),
    ],
)
def test_dynamic_axes_go_to_the_inputs_that_they_name(axes, options, dynamic) -> None:
    proto = to_onnx(Pair().eval(), PAIR, dynamic_axes=axes, **options)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.input}
    assert {name: [i for i, size in enumerate(shape) if size.dim_param] for name, shape in shapes.items()} == dynamic


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"z": {0: "b"}}, r"dynamic_axes=\{'z': .* given, but 'z' is no input; the inputs are \['p', 'b_0'\]$"),
        ({"c": [0]}, r"'c' is no input"),
        ({"p": {7: "b"}}, r"'p' has no axis 7: its rank is 2, its shape \(4, 2\); axes count from 0"),
        ({"p": [-1]}, r"'p' has no axis -1"),
        ({"p": 0}, r"dynamic_axes=\{'p': 0\} given; expected a dict of inputs and their axes"),
        ([0], r"dynamic_axes=\[0\] given; expected a dict of inputs and their axes"),
    ],
)
def test_dynamic_axes_that_do_not_exist_are_refused(axes, message) -> None:
    with pytest.raises(InputError, match=message):
        to_onnx(Pair().eval(), PAIR, input_names=["p"], dynamic_axes=axes)
    with pytest.raises(InputError, match=r"input_names=\['p', 'q', 'r'\] given; expected at most 2 names"):
        to_onnx(Pair().eval(), PAIR, input_names=["p", "q", "r"], dynamic_axes={"p": [0]})


class Fixed(nn.Module):
    """Fixes the size of the batch in its code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 3, 4, 4)


@pytest.mark.parametrize("size", ["n", torch.export.Dim("n")], ids=str)
def test_a_size_that_the_module_fixes_is_never_given_up_silently(size) -> None:
    with pytest.raises(InputError, match=r"some of these sizes are fixed|tracing inferred a static shape") as raised:
        to_onnx(small(Fixed()), X, dynamic_shapes=({0: size},))
    assert "dynamic_shapes" in str(raised.value)
    proto = to_onnx(small(), X, dynamic_shapes=({0: size},))
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"


def test_weights_without_values_are_refused_by_name() -> None:
    with pytest.raises(
        InputError, match=r"'0\.weight' is on the device 'meta', without values; load the weights first"
    ):
        to_onnx(small().to("meta"), X.to("meta"))


class Svd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svd(x)[1]


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Svd(), r"torch could not export Sequential, in layer '2\.0': .*No ONNX function found for .*_linalg_svd"),
        (Branch(), r"torch could not export Sequential, in layer '2\.0': .*data-dependent expression"),
    ],
)
def test_a_failed_export_names_the_layer_and_keeps_torchs_message(layer, message, tmp_path, capfd) -> None:
    with pytest.raises(InputError, match=message) as raised:
        to_onnx(small(nn.Sequential(layer)), X, tmp_path / "model.onnx")
    assert "Exception summary" in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert capfd.readouterr() == ("", "")  # torch prints the graph of a failed capture
    assert not list(tmp_path.iterdir())


def test_an_opset_that_onnxruntime_does_not_load_is_refused_unless_nothing_is_to_be_run(monkeypatch) -> None:
    defined = onnx.defs.onnx_opset_version()
    monkeypatch.setattr(checks, "newest_loadable", lambda: defined - 1)
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


def test_a_synchronized_training_step_is_exported_as_that_of_one_process_with_a_warning() -> None:
    net = nn.Sequential(SyncBatchRenorm(3)).train()
    with pytest.warns(
        UserWarning, match=r"SyncBatchRenorm layers are exported as the step of one process, .* '0' first"
    ):
        to_onnx(net, X, mode="train")


def test_a_failed_export_leaves_the_statistics_of_a_training_module_alone() -> None:
    net = small(Svd()).train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with pytest.raises(InputError, match="torch could not export Sequential, in layer '2'"):
        to_onnx(net, X, mode="train")
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


def test_the_default_opset_is_twenty() -> None:
    assert check_options("eval", None, None, None) == 20


def test_only_the_users_own_warnings_pass() -> None:
    def both() -> None:
        with quiet():
            warnings.warn_explicit("mine", UserWarning, "/home/me/torch/net.py", 1)
            warnings.warn_explicit("theirs", FutureWarning, torch.onnx.__file__, 1)

    with pytest.warns(UserWarning, match="mine") as caught:
        both()
    assert [str(w.message) for w in caught] == ["mine"]


def test_a_quiet_export_prints_nothing(capfd) -> None:
    to_onnx(small(), X)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(InputError, match=r"module is a function; expected a torch\.nn\.Module or torch\.export"):
        to_onnx(lambda x: x, X)  # type: ignore[arg-type]


def test_an_export_without_verification_says_so(caplog) -> None:
    with caplog.at_level("INFO", logger="renorm_onnx.exporter"):
        to_onnx(small(), X, verify=False)
    assert caplog.messages == ["to_onnx: 1 call; opset 20 asked and reached; not verified"]


def test_the_root_is_named_as_such():
    with pytest.raises(InputError, match="to_onnx: the model itself has track_running_stats=False"):
        to_onnx(BatchRenorm2d(3, track_running_stats=False).eval(), X)


def test_a_training_step_without_statistics_is_refused_in_words_of_training():
    with pytest.raises(InputError, match=r"track_running_stats=False; .* nothing to keep between the steps$"):
        to_onnx(BatchRenorm2d(3, track_running_stats=False).train(), X, mode="train")


class Masked(nn.Module):
    """A layer that is always called with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchRenorm2d(3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.norm(x, mask)


def test_a_masked_layer_in_training_is_not_said_to_be_missing(caplog):
    to_onnx(Masked(), (X, torch.ones(2, 6, 6, dtype=torch.bool)), mode="train")
    assert "no batch renorm layer became a call" in caplog.text
    assert "the model has no batch renorm layer" not in caplog.text

"""Modules that cannot be exported as what they are are refused by name, before anything is written."""

import contextlib
import warnings

import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError
from renorm_onnx.exporter import keep_ops, to_onnx
from renorm_onnx.exporting.conftest import X, small
from renorm_onnx.exporting.modules import check_layers, check_modes, unwrapped
from renorm_onnx.exporting.restoring import restore
from renorm_onnx.layers.distributed import SyncBatchRenorm
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d


class BatchReNorm(nn.Module):
    """Another library's layer, by its name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


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


def test_weights_without_values_are_refused_by_name() -> None:
    with pytest.raises(
        InputError, match=r"'0\.weight' is on the device 'meta', without values; load the weights first"
    ):
        to_onnx(small().to("meta"), X.to("meta"))


def test_statistics_without_values_are_refused_by_name() -> None:
    net = small()
    net[1].running_var = net[1].running_var.to("meta")
    with pytest.raises(InputError, match=r"'1\.running_var' is on the device 'meta', without values"):
        to_onnx(net, X)


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_one_statistic_that_was_set_is_enough_not_to_be_called_untrained(statistic) -> None:
    net = small()
    net[1].num_batches_tracked.zero_()
    with pytest.warns(UserWarning, match="statistics of 0 and 1, '1' first"):
        check_layers(net, functions=True)
    getattr(net[1], statistic)[2] = 0.5
    check_layers(net, functions=True)


def test_what_cannot_train_may_evaluate_beside_a_layer_that_trains() -> None:
    scheduled = BatchRenorm2d(3, schedule=lambda step: (1.0, 0.0))
    rest = nn.Sequential(
        nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True), SyncBatchRenorm(3), scheduled
    )
    check_modes(nn.Sequential(BatchRenorm2d(3), rest.eval()), "train")


def test_a_synchronized_training_step_is_exported_as_that_of_one_process_with_a_warning() -> None:
    net = nn.Sequential(SyncBatchRenorm(3)).train()
    with pytest.warns(
        UserWarning, match=r"SyncBatchRenorm layers are exported as the step of one process, .* '0' first"
    ):
        to_onnx(net, X, mode="train")


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(InputError, match=r"module is a function; expected a torch\.nn\.Module or torch\.export"):
        to_onnx(lambda x: x, X)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("script", [torch.jit.script, lambda net: torch.jit.trace(net, torch.ones(2, 4))])
def test_a_scripted_module_is_refused_as_torch_does(script) -> None:
    scripted = script(BatchRenorm1d(4).eval())
    with pytest.raises(InputError, match=r"module is a \w+; expected .* before torch\.jit\.script or trace"):
        to_onnx(scripted, torch.ones(2, 4))


def test_the_root_is_named_as_such():
    with pytest.raises(InputError, match="to_onnx: the model itself has track_running_stats=False"):
        to_onnx(BatchRenorm2d(3, track_running_stats=False).eval(), X)


def test_a_training_step_without_statistics_is_refused_in_words_of_training():
    with pytest.raises(InputError, match=r"track_running_stats=False; .* nothing to keep between the steps$"):
        to_onnx(BatchRenorm2d(3, track_running_stats=False).train(), X, mode="train")


class Twice(nn.Module):
    """One layer called twice, under one name."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.norm(x).tanh())


def test_a_training_layer_of_several_names_is_refused_with_all_of_them() -> None:
    norm = BatchRenorm2d(3)
    norm.num_batches_tracked.fill_(1)
    block = nn.Sequential(nn.Conv2d(3, 3, 1), norm)
    shared = nn.Sequential(block, nn.Tanh(), block)
    with pytest.raises(
        InputError, match=r"to_onnx\(mode='train'\): one BatchRenorm2d stands under 2 names, '0\.1', '2\.1', exp"
    ):
        to_onnx(shared.train(), X, mode="train")
    assert len(to_onnx(shared.eval(), X).graph.node) == 5
    shared.append(BatchRenorm2d(3).train())  # the shared one only evaluates beside one that trains
    kinds = [node.op_type for node in to_onnx(shared, X, mode="train").graph.node]
    assert (kinds.count("BatchRenormalization"), kinds.count("BatchRenormalizationTraining")) == (2, 1)
    kinds = [node.op_type for node in to_onnx(Twice(norm).train(), X, mode="train").graph.node]
    assert kinds.count("BatchRenormalizationTraining") == 2


class Masked(nn.Module):
    """A layer that is always called with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchRenorm2d(3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.norm(x, mask)


def test_a_module_with_no_layer_says_no_more_than_that(caplog) -> None:
    to_onnx(nn.Tanh().eval(), X)
    assert caplog.messages == ["to_onnx: the model has no batch renorm layer"]


def test_a_masked_layer_in_training_is_not_said_to_be_missing(caplog):
    to_onnx(Masked(), (X, torch.ones(2, 6, 6, dtype=torch.bool)), mode="train")
    assert "no batch renorm layer became a call" in caplog.text
    assert "the model has no batch renorm layer" not in caplog.text


def test_a_module_that_is_spread_over_devices_of_one_process_is_unwrapped() -> None:
    net = small()
    assert unwrapped(nn.DataParallel(net)) is unwrapped(net) is net


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_that_data_parallelism_wraps_is_exported_without_the_wrapper(compiled, tmp_path) -> None:
    net = small()
    net[1].running_mean.fill_(0.3)
    wrapped = nn.parallel.DistributedDataParallel(net)
    wrapped = (torch.compile(wrapped, backend="eager") if compiled else wrapped).eval()
    names = {value.name for value in to_onnx(wrapped, X, tmp_path / "model.onnx").graph.initializer}
    assert names == {value.name for value in to_onnx(net, X).graph.initializer}
    net[1].running_mean.zero_()
    assert restore(wrapped, tmp_path / "model.onnx") == 1
    assert net[1].running_mean.any()
    outputs = [value.name for value in to_onnx(wrapped.train(), X, mode="train").graph.output]
    assert "1.running_mean.updated" in outputs

"""Example inputs that do not fit, and names and sizes that an export would not have, are refused."""

import re

import pytest
import torch
from torch import nn

from renorm_onnx.errors import InputError
from renorm_onnx.exporter import keep_ops, to_onnx
from renorm_onnx.exporting.conftest import X, small
from renorm_onnx.exporting.interface import as_args
from renorm_onnx.layers.modules import BatchRenorm1d


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


def test_a_list_of_example_inputs_is_as_good_as_a_tuple() -> None:
    assert as_args([X]) == (X,)


def test_a_size_of_what_is_no_argument_is_never_dropped() -> None:
    with pytest.raises(InputError, match=r"could not export Sequential: .*\['input', 'z'\]"):
        to_onnx(small(), X, dynamic_shapes={"z": None, "input": {0: "n"}})


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


def test_a_program_brings_its_own_example_inputs() -> None:
    with keep_ops():
        program = torch.export.export(small(), (), {"input": X})
    assert to_onnx(program).functions
    with pytest.raises(InputError, match="to_onnx: args is a NoneType; expected a tensor"):
        to_onnx(program, kwargs={"input": X})
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


class Options(nn.Module):
    def forward(self, x: torch.Tensor, *, b: torch.Tensor, c: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return x + b, torch.cat([c["k"], c["k"]])


class Several(nn.Module):
    def forward(self, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return xs[0] + 1, xs[1] * 2


OPTIONS = {"c": {"k": torch.ones(7, 3)}, "b": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("net", "args", "options", "sizes"),
    [
        (Pair(), PAIR, {"dynamic_axes": {"a": {0: "m"}, "b_0": {0: "n"}}}, {"a": "m,2", "b_0": "n,3"}),
        (Pair(), PAIR, {"dynamic_shapes": ({0: "m"}, [{1: "k"}], None)}, {"a": "m,2", "b_0": "5,k"}),
        (
            Pair(),
            PAIR,
            {"dynamic_shapes": {"c": None, "b": [{0: torch.export.Dim("n")}], "a": ("m", None)}},
            {"a": "m,2", "b_0": "n,3"},
        ),
        (
            Options(),
            PAIR[:1],
            {"kwargs": OPTIONS, "dynamic_axes": {"x": {0: "m"}, "b": {0: "m"}, "c_k": {0: "n"}}},
            {"x": "m,2", "b": "m,2", "c_k": "n,3"},
        ),
        (
            Options(),
            PAIR[:1],
            {"kwargs": OPTIONS, "dynamic_shapes": {"c": {"k": {0: "n"}}, "b": {1: "k"}, "x": {1: "k"}}},
            {"x": "4,k", "b": "4,k", "c_k": "n,3"},
        ),
        (
            Several(),
            (PAIR[0], PAIR[1][0]),
            {"input_names": ["p", "q"], "dynamic_axes": {"q": {0: "n"}, "p": {0: "m"}}},
            {"p": "m,2", "q": "n,3"},
        ),
    ],
)
def test_sizes_bear_the_names_that_they_were_given(net, args, options, sizes) -> None:
    proto = to_onnx(net.eval(), args, **options)
    got = {v.name: [d.dim_param or str(d.dim_value) for d in v.type.tensor_type.shape.dim] for v in proto.graph.input}
    assert {name: ",".join(shape) for name, shape in got.items()} == sizes
    values = [*proto.graph.output, *proto.graph.value_info]
    named = " ".join(d.dim_param for v in values for d in v.type.tensor_type.shape.dim)
    assert named.strip()
    assert not re.search(r"\bs\d", named), "arithmetic on sizes is renamed too"


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


class Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchRenorm1d(3)
        self.norm.num_batches_tracked.fill_(1)
        self.norm.running_mean.fill_(0.5)

    def forward(self, x, *, a, b):
        return self.norm(x) + a - 2 * b


def test_keyword_inputs_of_a_program_may_come_in_another_order():
    a, b, x = torch.full((3,), 1.0), torch.full((3,), 5.0), torch.zeros(2, 3)
    with keep_ops():
        program = torch.export.export(Difference().eval(), (x,), {"a": a, "b": b})
    model = to_onnx(program, (x,), kwargs={"b": b, "a": a})
    assert [value.name for value in model.graph.input] == ["x", "a", "b"]

"""An export is checked at sizes that it was not made with, and says of each size whether it varies."""

import numpy as np
import onnx_ir as ir
import pytest
import sympy
import torch
from torch import nn
from torch.export import Dim

from renorm_onnx.errors import VerificationError
from renorm_onnx.exporter import keep_ops, to_onnx
from renorm_onnx.exporting import other_sizes
from renorm_onnx.exporting.other_sizes import close_fixed_sizes, open_varying_sizes, other_inputs
from renorm_onnx.exporting.verification import ExportReport, verify_export
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d
from renorm_onnx.runtime.session import open_session

REPORT = ExportReport(calls=1, trained=0, opset=20)


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def trained(norm):
    """Return the layer with statistics of its own."""
    channels = torch.arange(1, norm.num_features + 1) / norm.num_features
    norm.running_mean.copy_(channels)
    norm.running_var.copy_(channels + 0.5)
    norm.num_batches_tracked.fill_(1)
    return norm


class Steps(nn.Module):
    """An unrolled RNN, whose steps torch fixes."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(4, 6, batch_first=True)
        self.norm = trained(BatchRenorm1d(6))

    def forward(self, x):
        return self.norm(self.rnn(x)[0].transpose(1, 2))


def sizes(value):
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def test_a_size_that_torch_has_fixed_under_an_open_axis_is_a_number_in_the_model():
    model = to_onnx(Steps(nn.RNN).eval(), numbers(2, 3, 4), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    batch, *rest = sizes(model.graph.input[0])
    assert (type(batch), rest) == (str, [3, 4])
    assert sizes(model.graph.output[0]) == [batch, 6, 3]


def test_sizes_computed_from_a_fixed_one_are_numbers_too():
    program = torch.export.export(nn.Identity(), (numbers(2, 3),), dynamic_shapes=({0: Dim.AUTO},))
    (symbol,) = program.range_constraints
    functions = [
        f"TruncToInt(1.5*ToFloat({symbol}))",
        f"Max(1, {symbol})",
        f"{symbol}//2",
        f"{symbol}/2",
        f"Max(n, {symbol})",
    ]
    x = ir.val("x", ir.DataType.FLOAT, [f"2*{symbol} + 1", str(symbol), "other", None, 3, *functions])
    model = ir.Model(ir.Graph([x], [x], nodes=[]), ir_version=10)
    close_fixed_sizes(model, program)
    assert str(x.shape[0]) == f"2*{symbol} + 1"
    program.range_constraints[symbol] = type(program.range_constraints[symbol])(7, 7)
    close_fixed_sizes(model, program)
    found = [size if isinstance(size, int) else size.value for size in x.shape]
    assert found == [15, 7, "other", None, 3, 10, 7, 3, None, "Max(n, 7)"]


def captured(forward, args, **options):
    module = nn.Module()
    module.forward = forward
    with keep_ops():
        return torch.export.export(module, args, **options)


def test_other_sizes_differ_each_by_another_number_and_repeat_the_example():
    x, indices = numbers(3, 4), torch.tensor([2, 0, 1])
    shapes = ({0: Dim("n"), 1: Dim("k")}, {0: Dim("m")}, None)
    program = captured(lambda x, i, flag: x[i] + flag, (x, indices, 2), dynamic_shapes=shapes)
    (other, other_indices, flag), kwargs = other_inputs(program, (x, indices, 2), {})
    assert (tuple(other.shape), tuple(other_indices.shape), flag, kwargs) == ((4, 5), (6,), 2, {})
    assert torch.equal(other[:3, :4], x)
    repeated = other / x[[0, 1, 2, 0]][:, [0, 1, 2, 3, 0]]
    assert ((repeated > 0.85) & (repeated <= 1)).all()
    assert other.unique().numel() == other.numel()
    assert torch.equal(other_indices, indices[[0, 1, 2, 0, 1, 2]])


def test_inputs_that_do_not_tell_every_size_have_no_others(monkeypatch):
    x = numbers(3, 2)
    program = captured(lambda x: 2 * x, (x,), dynamic_shapes=({0: Dim("n")},))
    assert other_inputs(program, (x, x), {}) is None
    a, b = sympy.symbols("a b")
    monkeypatch.setattr(other_sizes, "_dims", lambda _: [[a + b, a]])
    assert other_inputs(program, (x,), {}) is None
    monkeypatch.setattr(other_sizes, "_dims", lambda _: [[2 * a + 1, a + 1]])
    assert tuple(other_inputs(program, (x,), {})[0][0].shape) == (5, 3)


def test_an_empty_example_stays_empty():
    program = captured(lambda x: 2 * x, (numbers(3, 2),), dynamic_shapes=({0: Dim("n"), 1: Dim("k")},))
    ((other,), _) = other_inputs(program, (numbers(0, 2),), {})
    assert tuple(other.shape) == (0, 3)


def test_sizes_that_belong_together_stay_together():
    n = Dim("n")
    a, b = numbers(3, 2), numbers(6, 2)
    program = captured(
        lambda *, a, b: torch.cat([a, b]), (), kwargs={"a": a, "b": b}, dynamic_shapes={"a": {0: n}, "b": {0: 2 * n}}
    )
    _, kwargs = other_inputs(program, (), {"a": a, "b": b})
    assert [tuple(value.shape) for value in kwargs.values()] == [(4, 2), (8, 2)]


def test_no_two_axes_take_the_same_other_size_if_that_can_be():
    x = numbers(3, 2, 4)
    program = captured(lambda x: 2 * x, (x,), dynamic_shapes=({0: Dim("a"), 1: Dim("b"), 2: Dim("c")},))
    ((other,), _) = other_inputs(program, (x,), {})
    assert len(set(other.shape)) == 3
    assert all(new != old for new, old in zip(other.shape, x.shape, strict=True))


@pytest.mark.parametrize(("bounds", "size"), [((2, 5), 4), ((2, 6), 6), ((5, 5), None)])
def test_other_sizes_stay_within_their_range(bounds, size):
    x = numbers(5, 2)
    program = captured(lambda x: 2 * x, (x,), dynamic_shapes=({0: Dim("n", min=2, max=8)},))
    (symbol,) = program.range_constraints
    program.range_constraints[symbol] = type(program.range_constraints[symbol])(*bounds)
    found = other_inputs(program, (x,), {})
    assert (found and tuple(found[0][0].shape)) == (size and (size, 2))


def test_without_an_open_size_there_are_no_other_inputs():
    x = numbers(5, 2)
    assert other_inputs(captured(lambda x: 2 * x, (x,)), (x,), {}) is None


class Net(nn.Module):
    """Any number of rows, of which it forgets none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = trained(BatchRenorm2d(3))

    def forward(self, x):
        return self.norm(x).flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def open_model() -> ir.Model:
    model = to_onnx(Net().eval(), numbers(2, 3, 4, 5), dynamic_shapes=({0: "n", 2: "h"},), verify=False)
    return ir.from_proto(model)


def others():
    return (numbers(3, 3, 6, 5),), {}


def test_a_model_that_is_right_at_other_sizes_passes(open_model):
    report = verify_export(open_model, Net().eval(), (numbers(2, 3, 4, 5),), {}, REPORT, others())
    assert not report.skipped


def test_a_model_that_is_right_at_the_examples_sizes_alone_is_refused(open_model):
    fixed = open_model.clone()
    sliced = ir.node("Slice", [fixed.graph.inputs[0], *(constant([n]) for n in (0, 4, 2))])
    fixed.graph.inputs[0].replace_all_uses_with(sliced.outputs[0])
    sliced.replace_input_with(0, fixed.graph.inputs[0])
    fixed.graph.insert_before(fixed.graph[0], [*(v.producer() for v in sliced.inputs[1:]), sliced])
    module, args = Net().eval(), (numbers(2, 3, 4, 5),)
    assert not verify_export(fixed, module, args, {}, REPORT).skipped
    with pytest.raises(VerificationError, match=r"alone, and wrong for x \(3, 3, 6, 5\), which its open axes allow"):
        verify_export(fixed, module, args, {}, REPORT, others())


def constant(values):
    return ir.node("Constant", [], attributes={"value": ir.tensor(np.array(values, np.int64))}).outputs[0]


class Picky(Net):
    """Refuses what is longer than the example."""

    def forward(self, x):
        if x.shape[2] > 4:
            raise ValueError("rows beyond 4\nare too many")
        return super().forward(x)


def test_sizes_that_the_module_itself_refuses_are_not_checked_and_this_is_said(open_model):
    report = verify_export(open_model, Picky().eval(), (numbers(2, 3, 4, 5),), {}, REPORT, others())
    assert report.skipped == (
        "sizes other than the example's, because the module itself fails on x (3, 3, 6, 5): rows beyond 4",
    )


def test_an_export_with_open_axes_is_checked_at_other_sizes(monkeypatch):
    from renorm_onnx import exporter

    seen = []

    def watched(*args):
        seen.append(args[-1])
        return verify_export(*args)

    monkeypatch.setattr(exporter, "verify_export", watched)
    to_onnx(Net().eval(), numbers(2, 3, 4, 5), dynamic_shapes=({0: "n"},))
    to_onnx(Net().eval(), numbers(2, 3, 4, 5))
    assert tuple(seen[0][0][0].shape) == (3, 3, 4, 5)
    assert seen[1] is None


@pytest.mark.filterwarnings("ignore:_check_is_size:FutureWarning")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch before 2.13 cannot leave the steps of an LSTM open")
def test_the_length_that_torch_declares_behind_an_open_lstm_is_opened():
    module = Steps(nn.LSTM).eval()
    model = to_onnx(module, numbers(2, 3, 4), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    assert sizes(model.graph.output[0])[1:] == [6, 0]  # 0 stands for nothing declared
    x = numbers(3, 7, 4)
    got = open_session(model, "cpu", optimize="off", threads=1).run({"x": x.numpy()})
    np.testing.assert_allclose(*got.values(), module(x).detach().numpy(), atol=1e-5)


def test_sizes_that_hold_stay_as_they_are_declared():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[n, 3] x) => (float[n, 3] y, float[2, 3] z) {
        y = Relu(x)  w = Neg(x)  z = Neg(w) }"""
    model = ir.from_onnx_text(text)
    w = model.graph.node(1).outputs[0]
    w.shape = ir.Shape([2, 3])
    open_varying_sizes(model, {"y": (4, 3), "z": (2, 3)})
    open_varying_sizes(model, {"y": (4, 3), "z": (4,)})
    assert [str(value.shape) for value in (*model.graph.outputs, w)] == ["[n,3]", "[2,3]", "[2,3]"]
    open_varying_sizes(model, {"y": (4, 3), "z": (4, 3)})
    y, z = model.graph.outputs
    assert (str(y.shape), z.shape[1], w.shape) == ("[n,3]", 3, None)
    assert isinstance(z.shape[0], ir.SymbolicDim)


class Branching(nn.Module):
    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.norm = trained(BatchRenorm1d(3))
        self.least, self.most = least, most

    def forward(self, x):
        y = self.norm(x)
        return 2 * y if self.least <= x.shape[2] <= self.most else y


def test_a_bound_that_torch_chose_is_told(caplog):
    to_onnx(Branching(0, 6).eval(), numbers(2, 3, 5), dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO},))
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith(
        "to_onnx: torch keeps axis 2 of 'x' to at most 6, because the module's code takes another way"
    )


def test_a_bound_that_was_asked_for_is_not_told(caplog):
    to_onnx(Branching(4, 6).eval(), numbers(2, 3, 5), dynamic_shapes=({2: Dim("t", min=4, max=6)},))
    to_onnx(Net().eval(), numbers(2, 3, 4, 5), dynamic_shapes=({0: Dim.AUTO, 2: "h"},))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


class Picking(nn.Module):
    """Takes the three rows with the largest sums, each with what belongs to its place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = trained(BatchRenorm1d(4))
        self.places = nn.Parameter(numbers(64, 4))

    def forward(self, x):
        largest = x.sum(2).topk(3, 1).indices
        y = self.norm(x.transpose(1, 2)).transpose(1, 2) + self.places[: x.shape[1]]
        return y.gather(1, largest[..., None].expand(-1, -1, 4))


def test_other_inputs_hold_no_two_equal_samples_between_which_either_side_could_choose():
    x = numbers(2, 20, 4)
    x[:, 0] += 9  # which is what is repeated behind the end
    to_onnx(Picking().eval(), x, dynamic_shapes=({0: "n", 1: "t"},))

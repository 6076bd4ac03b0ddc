"""A model that is not the module is refused; what was not checked is said."""

import logging

import onnx_ir as ir
import pytest
import torch
from torch import nn

from renorm_onnx.errors import MachineError, VerificationError
from renorm_onnx.exporter import keep_ops, to_onnx
from renorm_onnx.exporting import verification
from renorm_onnx.exporting.verification import ExportReport, check_structure, verify_export
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d
from renorm_onnx.runtime.estimate import Cost
from renorm_onnx.runtime.operators import registry
from renorm_onnx.runtime.session import open_session

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
REPORT = ExportReport(calls=1, trained=0, opset=20)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchRenorm2d(4), nn.ReLU()).eval()
    net[1].running_mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.5]))
    net[1].num_batches_tracked.fill_(1)
    return net


@pytest.fixture(scope="module")
def model(net: nn.Module) -> ir.Model:
    return ir.from_proto(to_onnx(net, X, verify=False))


def test_a_right_model_passes_with_its_figures(model, net) -> None:
    report = verify_export(model, net, (X,), {}, REPORT)
    assert 0 < report.error < 1e-5
    assert 0 < report.relative < 1e-5
    assert (report.foldable, report.norms) == (1, 1)
    assert not report.skipped
    assert str(report).startswith("to_onnx: 1 call; opset 20 asked and reached; checker ok; max error ")


def test_one_line_is_logged_at_the_end(net, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="renorm_onnx"):
        to_onnx(net, X)
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.endswith("1 of 1 norms foldable")


def test_a_wrong_epsilon_is_found_although_float32_would_hide_it(model, net) -> None:
    wrong = model.clone()
    call = next(n for n in wrong.graph if n.domain == "renorm_onnx")
    call.attributes["epsilon"] = ir.AttrFloat32("epsilon", 6e-5)
    with pytest.raises(VerificationError, match="does not compute what the module computes"):
        verify_export(wrong, net, (X,), {}, REPORT)


def test_a_model_that_breaks_a_rule_is_refused_with_the_checkers_message(model) -> None:
    broken = model.clone()
    broken.graph.node(0).attributes["group"] = ir.AttrString("group", "one")
    with pytest.raises(VerificationError, match=r"is not valid ONNX: .*group") as raised:
        check_structure(broken)
    assert "bfloat16" not in str(raised.value)


def test_bfloat16_below_opset_22_is_explained() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchRenorm2d(4)).eval().to(torch.bfloat16)
    net[1].num_batches_tracked.fill_(1)
    with pytest.raises(VerificationError, match="ask for opset=22 or newer"):
        to_onnx(net, X.to(torch.bfloat16))
    broken = ir.from_proto(to_onnx(net, X.to(torch.bfloat16), opset=22, verify=False))
    broken.graph.node(0).attributes["group"] = ir.AttrString("group", "one")
    with pytest.raises(VerificationError, match="is not valid ONNX") as raised:
        check_structure(broken)
    assert "ask for opset" not in str(raised.value)


@pytest.mark.parametrize(
    ("limit", "norms"), [(Cost(1e3, 1e9, complete=True), 1), (Cost(1e9, 1e3, complete=True), None)]
)
def test_a_model_that_costs_too_much_is_not_run_and_this_is_said(model, net, monkeypatch, limit, norms) -> None:
    monkeypatch.setattr(verification, "LIMIT", limit)
    report = verify_export(model, net, (X,), {}, REPORT)
    assert report.error is None
    assert report.norms == norms
    assert "not checked: values, because one run takes" in str(report)


class SinglePrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchRenorm2d(3)
        self.norm.num_batches_tracked.fill_(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) @ torch.ones(6, 2, dtype=torch.float32)


def test_code_that_names_float32_is_checked_in_float32() -> None:
    net = SinglePrecision().eval()
    model = ir.from_proto(to_onnx(net, X, verify=False))
    assert verify_export(model, net, (X,), {}, REPORT).error is not None
    net.norm.running_mean.fill_(1.0)
    with pytest.raises(VerificationError, match="does not compute"):
        verify_export(model, net, (X,), {}, REPORT)


class Narrowed(nn.Module):
    """Computes in a narrower type than its parameters have, by autocast or by casts."""

    def __init__(self, narrow: torch.dtype, by: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), BatchRenorm2d(4)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        self.norm.running_mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.5]))
        self.norm.num_batches_tracked.fill_(1)
        self.narrow, self.by = narrow, by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by == "autocast":
            with torch.autocast("cpu", self.narrow):
                return self.norm(self.conv(x)).float()
        weight, bias = self.conv.weight.to(self.narrow), self.conv.bias.to(self.narrow)
        return self.norm(nn.functional.conv2d(x.to(self.narrow), weight, bias).to(x.dtype))


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by", ["autocast", "cast"])
@pytest.mark.parametrize("captured", [False, True])
def test_a_module_that_computes_in_a_narrower_type_is_checked_by_its_own_run(narrow, by, captured) -> None:
    net = Narrowed(narrow, by).eval()
    with keep_ops():
        judge = torch.export.export(net, (X,)).module() if captured else net
    model = ir.from_proto(to_onnx(net, X, opset=22, verify=False))
    report = verify_export(model, judge, (X,), {}, REPORT)
    assert not [reason for reason in report.skipped if reason.startswith("values")]
    for parameter in (net.norm.bias, net.norm.weight):
        with torch.no_grad():
            parameter.add_(3.0)
            faulty = ir.from_proto(to_onnx(net, X, opset=22, verify=False))
            parameter.sub_(3.0)
        with pytest.raises(VerificationError, match="does not compute what the module computes"):
            verify_export(faulty, judge, (X,), {}, REPORT)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_module_whose_own_type_is_narrow_is_still_checked_in_float64(kind) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchRenorm2d(4)).eval().to(kind)
    net[1].num_batches_tracked.fill_(1)
    wrong = ir.from_proto(to_onnx(net, X.to(kind), opset=22))
    call = next(n for n in wrong.graph if n.domain == "renorm_onnx")
    call.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-4)
    with pytest.raises(VerificationError, match=r"does not compute .*allowed 1\.0e-05"):
        verify_export(wrong, net, (X.to(kind),), {}, REPORT)


class Remembering(nn.Module):
    """Keeps what it computed, as attention with a cache does; torch refuses to copy such a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.cache = nn.Parameter(torch.arange(3.0) + 1), {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "twice" not in self.cache:
            self.cache["twice"] = self.weight * 2
        return x * self.cache["twice"]


def test_a_module_that_keeps_an_earlier_result_can_be_checked(caplog) -> None:
    net = Remembering().eval()
    net(torch.ones(3))
    with caplog.at_level("INFO", logger="renorm_onnx.exporter"):
        to_onnx(net, torch.ones(2, 3))
    assert "max error" in caplog.text
    assert "not checked" not in caplog.text


class Beside(nn.Module):
    """Has a narrow tensor beside its norm, which its outputs are computed from, or not."""

    def __init__(self, *, used: bool) -> None:
        super().__init__()
        self.norm, self.used = BatchRenorm2d(3), used
        self.norm.running_mean.copy_(torch.tensor([0.3, -0.2, 0.1]))
        self.norm.num_batches_tracked.fill_(1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        narrow, y = x.to(torch.bfloat16), self.norm(x)
        return (y, narrow.float().tanh()) if self.used else (y,)


@pytest.mark.parametrize("used", [False, True])
def test_a_narrow_tensor_does_not_hide_what_is_not_computed_from_it(used) -> None:
    net = Beside(used=used).eval()
    model = ir.from_proto(to_onnx(net, X, opset=22, verify=False))
    assert verify_export(model, net, (X,), {}, REPORT).error is not None
    with torch.no_grad():
        net.norm.bias.add_(1e-4)
    with pytest.raises(VerificationError, match=r"does not compute what the module computes.*allowed 1\.0e-05"):
        verify_export(model, net, (X,), {}, REPORT)


@pytest.mark.parametrize("second", [None, 0.1])
def test_the_mean_that_a_norm_learns_behind_a_norm_is_measured_in_standard_deviations(second) -> None:
    options = {"momentum": 0.1, "renorm_momentum": second}
    norms = nn.Sequential(BatchRenorm1d(8, **options), nn.Linear(8, 8, bias=False), BatchRenorm1d(8, **options)).train()
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    model = ir.from_proto(to_onnx(norms, x, mode="train", verify=False))
    trained = ExportReport(calls=2, trained=2, opset=20)
    report = verify_export(model, norms, (x,), {}, trained)
    assert 0 < report.error < 1e-5
    assert 0 < report.relative < 1e-5
    statistic = "running_mean" if second is None else "renorm_mean"
    for position, output in enumerate(model.graph.outputs):
        if not output.name.endswith(f"{statistic}.updated"):
            continue
        wrong = model.clone()
        right = wrong.graph.outputs[position]
        shift = ir.node("Constant", [], {"value_float": 1e-4})
        off = ir.node("Add", [right, shift.outputs[0]])
        wrong.graph.extend([shift, off])
        right.name, off.outputs[0].name = f"{right.name}.right", right.name
        off.outputs[0].type, off.outputs[0].shape = right.type, right.shape
        wrong.graph.outputs[position] = off.outputs[0]
        with pytest.raises(VerificationError, match=rf"does not compute .*worst output '\d\.{statistic}\.updated'"):
            verify_export(wrong, norms, (x,), {}, trained)


class Calling(nn.Module):
    """A norm whose result goes through a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.norm, self.function = BatchRenorm1d(4), function
        self.norm.num_batches_tracked.fill_(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.norm(x))


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda y: y + torch.randn_like(y), "RandomNormalLike"),
        (lambda y: y * torch.rand_like(y), "RandomUniformLike"),
        (lambda y: torch.bernoulli(y.sigmoid()), "Bernoulli"),
        (lambda y: nn.functional.dropout(y, 0.5, True), "Dropout"),
        (lambda y: nn.functional.dropout(y, 0.5, False), ""),
    ],
)
def test_a_model_that_draws_random_numbers_is_written_and_not_compared(function, operator, caplog) -> None:
    with caplog.at_level("INFO", logger="renorm_onnx.exporter"):
        to_onnx(Calling(function).eval(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert (f"not checked: values, because {operator} 'node_" in caplog.text) == bool(operator)
    assert ("draws random numbers" in caplog.text) == bool(operator)
    assert ("max error" in caplog.text) != bool(operator)


def test_a_layer_that_is_random_in_training_is_found_in_the_graph(caplog) -> None:
    net, x = nn.Sequential(BatchRenorm1d(4), nn.Dropout(0.3)), torch.randn(3, 4)
    with caplog.at_level("INFO", logger="renorm_onnx.exporter"):
        to_onnx(net.train(), x, mode="train")
    assert "not checked: values, because Dropout 'node_" in caplog.text
    caplog.clear()
    net[1].eval()
    with caplog.at_level("INFO", logger="renorm_onnx.exporter"):
        to_onnx(net, x, mode="train")
    assert "not checked" not in caplog.text


def test_an_operator_that_the_reference_does_not_cover_is_a_skip(model, net, monkeypatch) -> None:
    monkeypatch.delitem(registry.OPERATORS, "Conv")
    report = verify_export(model, net, (X,), {}, REPORT)
    assert report.error is None
    (reason,) = report.skipped
    assert reason.startswith("values, because node 'node_conv2d")
    assert reason.endswith("not covered by the float64 reference")


@pytest.mark.parametrize("trained", [None, False, True, "computed"])
def test_a_dropout_draws_only_where_it_may_train(model, net, trained) -> None:
    dropping = model.clone()
    (y,) = dropping.graph.outputs
    truth = ir.node("Constant", [], {"value": ir.tensor(bool(trained))})
    share = ir.node("Constant", [], {"value_float": 0.5})
    passed = ir.node("Identity", truth.outputs)
    given = [share.outputs[0], (passed if trained == "computed" else truth).outputs[0]] if trained is not None else []
    drop = ir.node("Dropout", [y, *given], name="drop")
    dropping.graph.extend([truth, passed, share, drop])
    drop.outputs[0].name, drop.outputs[0].type, drop.outputs[0].shape = "dropped", y.type, y.shape
    dropping.graph.outputs[0] = drop.outputs[0]
    report = verify_export(dropping, net, (X,), {}, REPORT)
    assert report.skipped == (("values, because Dropout 'drop' draws random numbers",) if trained else ())


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda y: y.argmax(1), "values, because no output is a floating tensor"),
        (lambda y: (y, y), "values, because the module returns 2 tensors and the model 1"),
    ],
)
def test_outputs_that_cannot_be_compared_are_a_skip(function, reason) -> None:
    net = Calling(function).eval()
    model = ir.from_proto(to_onnx(net, torch.ones(2, 4), verify=False))
    for output in model.graph.outputs[1:]:
        model.graph.outputs.remove(output)
    report = verify_export(model, net, (torch.ones(2, 4),), {}, REPORT)
    assert report.error is None
    assert report.skipped == (reason,)


def test_more_tensors_than_inputs_are_a_skip(model, net) -> None:
    report = verify_export(model, net, (X, X), {}, REPORT)
    assert report.skipped == ("values, because of 2 tensors the model takes 1",)


def test_a_run_in_onnxruntime_that_differs_is_refused(model, net, monkeypatch) -> None:
    wrong = model.clone()
    call = next(n for n in wrong.graph if n.domain == "renorm_onnx")
    call.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.1)
    monkeypatch.setattr(verification, "open_session", lambda model, *args, **options: open_session(wrong, "cpu"))
    with pytest.raises(VerificationError, match=r"to_onnx: onnxruntime differs from the float64 reference: .*'relu'"):
        verify_export(model, net, (X,), {}, REPORT)


def test_a_machine_that_cannot_run_the_model_is_a_skip(model, net, monkeypatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise MachineError("Session: onnxruntime is not installed")

    monkeypatch.setattr(verification, "open_session", absent)
    report = verify_export(model, net, (X,), {}, REPORT)
    assert (report.valid, report.error) == (True, None)
    assert report.skipped == ("a run in onnxruntime, because Session: onnxruntime is not installed",)


def test_a_model_that_onnxruntime_refuses_is_refused(model, net, monkeypatch) -> None:
    wrong = model.clone()
    wrong.graph.node(-1).op_type = "Unheard"
    monkeypatch.setattr(verification, "open_session", lambda model, *args, **options: open_session(wrong, "cpu"))
    with pytest.raises(VerificationError, match=r"to_onnx: onnxruntime refuses the exported model: .*Unheard"):
        verify_export(model, net, (X,), {}, REPORT)


class Amplified(nn.Module):
    """Rounds to float32 by name, where torch in float64 has more digits, and makes much of the difference."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchRenorm2d(3)
        self.norm.num_batches_tracked.fill_(1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.to(torch.bfloat16).float(), torch.sin(self.norm(x).float() * 1e3)


def test_code_that_names_float32_beside_a_narrow_type_is_judged_by_its_own_run() -> None:
    net = Amplified().eval()
    model = ir.from_proto(to_onnx(net, X, opset=22, verify=False))
    assert not [reason for reason in verify_export(model, net, (X,), {}, REPORT).skipped if "values" in reason]
    with torch.no_grad():
        net.norm.bias.add_(1.0)
    with pytest.raises(VerificationError, match="does not compute what the module computes"):
        verify_export(model, net, (X,), {}, REPORT)

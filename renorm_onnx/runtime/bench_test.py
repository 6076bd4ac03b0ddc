import json
import os

import numpy as np
import onnx
import pytest

from renorm_onnx.errors import InputError, MachineError
from renorm_onnx.runtime import bench as bench_module
from renorm_onnx.runtime.bench import bench, plot
from renorm_onnx.runtime.parity_networks_test import build
from renorm_onnx.runtime.session import Session
from renorm_onnx.runtime.timing_report import BenchReport, Timing


def timing(model, low, middle, **changes):
    fields = {
        "model": model,
        "provider": "cpu",
        "batch": 1,
        "threads": 1,
        "optimize": "all",
        "mode": "run",
        "min_ms": low,
        "median_ms": middle,
        "p90_ms": 2 * middle,
        "cpu_ms": middle,
        "samples": 5,
        "repeats": 1,
        "load_ms": 1.0,
        "bytes": 1000,
        "on_cpu": 0,
    }
    return Timing(**{**fields, **changes})


def test_every_combination_is_timed_and_the_figures_are_in_order(tmp_path):
    onnx.save(build("mlp"), tmp_path / "a.onnx")
    onnx.save(build("mlp", fold=True), tmp_path / "b.onnx")
    models = [tmp_path / "a.onnx", str(tmp_path / "b.onnx")]
    report = bench(models, batches=(1, 4), optimize=("off", "all"), rounds=3)
    assert len(report.timings) == 2 * 2 * 2
    assert {t.model for t in report.timings} == {"a.onnx", "b.onnx"}
    assert {(t.batch, t.optimize) for t in report.timings} == {(1, "off"), (1, "all"), (4, "off"), (4, "all")}
    for t in report.timings:
        assert 0 < t.min_ms <= t.median_ms <= t.p90_ms
        assert t.samples == 3
        assert t.repeats * t.min_ms > 0.5, "a sample of a tiny model must repeat the call"
        assert t.load_ms > 0
    sizes = {t.model: t.bytes for t in report.timings}
    assert sizes["b.onnx"] < sizes["a.onnx"]
    assert sizes["a.onnx"] == pytest.approx((tmp_path / "a.onnx").stat().st_size, rel=0.05)
    assert json.loads(json.dumps(report.to_dict()))["timings"][0]["speedup"] is None
    assert "speed-up" in str(report)


def test_a_slower_model_is_found_to_be_slower():
    small = build("convnet")
    report = bench({"batch": small}, batches=(1, 64), rounds=5)
    one, many = report.timings
    assert many.min_ms > 3 * one.min_ms


def test_regressions_need_both_the_shortest_and_the_median_time():
    def slower(low, middle):
        return BenchReport((timing("old", 1.0, 1.1), timing("new", low, middle))).regressions()

    assert slower(1.01, 2.0) == []
    assert slower(1.5, 1.12) == []
    assert len(slower(1.2, 1.4)) == 1
    assert "'new' takes 1.27 x the time of 'old'" in slower(1.2, 1.4)[0]
    assert BenchReport((timing("old", 1, 1), timing("new", 9, 9, batch=2))).regressions() == []
    assert BenchReport(()).regressions() == []


def test_inputs_are_not_zeros_and_shared_by_all_models(monkeypatch):
    seen = []
    real = bench_module._open

    def spy(name, model, setting, feeds, remarks):
        seen.append(feeds["x"])
        return real(name, model, setting, feeds, remarks)

    monkeypatch.setattr(bench_module, "_open", spy)
    bench({"a": build("mlp"), "b": build("mlp", fold=True)}, rounds=1)
    assert np.abs(seen[0]).min() > 0
    assert seen[0] is seen[1]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {}, "models is empty"),
        (["mlp"], {"batches": ()}, "batches is empty"),
        (["mlp"], {"optimize": ("most",)}, "optimize='most'"),
        (["mlp"], {"rounds": 0}, "rounds=0, expected at least 1"),
        (["mlp"], {"batches": (2, 0)}, "batches=0, expected at least 1"),
        (["mlp"], {"threads": -1}, "threads=-1, expected at least 0"),
        (["mlp"], {"threads": ()}, "threads is empty"),
        (["mlp"], {"threads": 99999}, rf"threads=99999, expected at most {8 * (os.cpu_count() or 1)}, 8 per core"),
        (["mlp", "convnet"], {}, r"'model 2' has inputs x: float32\['N', 3, 'H', 'W'\], expected those of 'model 1'"),
        (["upsampler"], {"batches": (4,)}, r"batch 4 is not possible, the first axis is fixed at \[1\]"),
    ],
)
def test_what_cannot_be_timed_is_an_input_error(arguments, options, message):
    with pytest.raises(InputError, match=message):
        bench([build(name) for name in arguments], **options)


def test_models_whose_fixed_sizes_differ_are_named_before_any_is_run():
    other = build("convnet")
    other.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    with pytest.raises(
        InputError, match=r"'other' has inputs .*4, 'H', 'W'\], expected those of 'first': .*3, 'H', 'W'"
    ):
        bench({"first": build("convnet"), "other": other})


def test_a_provider_that_is_not_there_is_a_machine_error(monkeypatch):
    from renorm_onnx.runtime import providers

    broken = providers.ProviderStatus("cuda", False, "driver missing", "libcuda.so.1", "Install one")
    real = providers.provider_status
    monkeypatch.setattr(providers, "provider_status", lambda name: broken if name == "cuda" else real(name))
    with pytest.raises(MachineError, match="driver missing"):
        bench([build("mlp")], providers=("cuda",))


def test_a_busy_machine_is_warned_about(monkeypatch):
    monkeypatch.setattr(bench_module, "_load", lambda: 99.0)
    report = bench([build("mlp")], rounds=1)
    assert any("load average was 99.0" in text for text in report.warnings)
    assert "warning: the load average" in str(report)


def test_the_plot_is_an_image_and_its_path_is_checked(tmp_path):
    report = BenchReport((timing("old", 1.0, 1.1), timing("new", 0.5, 0.6), timing("old", 60, 61, batch=32)))
    plot(report, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"'.*no/out.png' cannot be written"):
        plot(report, tmp_path / "no" / "out.png")
    with pytest.raises(InputError, match="cannot be written"):
        plot(report, tmp_path / "out.nosuchformat")
    with pytest.raises(InputError, match="holds no timings"):
        plot(BenchReport(()), tmp_path / "out.png")


class OnTheCpu(Session):
    """A session that says it is on CUDA, and can or cannot capture a graph."""

    can_capture = True

    def __init__(self, model, provider="cpu", *, cuda_graph=None, **options):
        if cuda_graph and not self.can_capture:
            raise MachineError("Session: cuda_graph=True is not possible: Loop 'l' runs on the CPU")
        super().__init__(model, "cpu", cuda_graph=False, **options)
        self.provider, self.wants_graph = "cuda", cuda_graph

    def bind(self, feeds):
        return dict(feeds)

    def run_bound(self, binding):
        self.run(binding)

    def replay(self):
        assert self.wants_graph
        assert all(spec.is_static for spec in (*self.inputs, *self.outputs))


@pytest.mark.parametrize("possible", [True, False])
def test_a_gpu_has_rows_for_bound_memory_and_for_a_graph_where_one_is_possible(monkeypatch, possible):
    class Pretending(OnTheCpu):
        can_capture = possible

    monkeypatch.setattr(bench_module, "Session", Pretending)
    report = bench([build("mlp")], rounds=1)
    modes = {timing.mode for timing in report.timings}
    assert modes == ({"run", "binding", "graph"} if possible else {"run", "binding"})
    refused = [text for text in report.warnings if "as a CUDA graph: Session: cuda_graph=True is not possible" in text]
    assert len(refused) == (not possible)

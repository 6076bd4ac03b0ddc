"""Faults on purpose, in networks of full size: `verify` must refuse each of them, and must accept the correct fold.

    python -m runtime_tests.faults [--small] [--models NAME ...] [--timm NAME ...] [--kinds NAME ...] [--json FILE]

Each network is exported, fused, and then spoiled: in its norms before it is fused, as a wrong engine would, or in the
fused file. A table says of each fault whether the interface, the rewritten places one by one, or the outputs showed it;
the exit status is 1 if one was accepted, or a correct fold was not.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import torch

from models import MODELS
from models.calibration import calibrated
from renorm_onnx.delivery import metadata
from renorm_onnx.exporter import to_onnx
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.fusion.report import METADATA_KEY
from renorm_onnx.layers.convert import convert_batchnorm
from renorm_onnx.onnx_function import DOMAIN
from renorm_onnx.runtime.judging.report import Verdict
from renorm_onnx.runtime.parity import verify
from renorm_onnx.runtime.table import text_table
from runtime_tests import timm_networks

_CARRIERS = ("Conv", "ConvTranspose", "Gemm")
CORRECT = "none"
MISSING = "output missing"


def fused(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold, and say so in the file as `renorm-onnx fuse` does: then names mean the same, and places are checked too."""
    result, report = fuse(model)
    oh.set_model_props(result, {METADATA_KEY: metadata(report)})
    return result


def _epsilon_dropped(model: onnx.ModelProto) -> onnx.ModelProto:
    for node in _norms(model):
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 0.0
    return fused(model)


def _swapped(model: onnx.ModelProto) -> onnx.ModelProto:
    for node in _norms(model):
        node.input[1], node.input[2] = node.input[2], node.input[1]
    return fused(model)


def _norms(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    found = [node for node in model.graph.node if node.domain == DOMAIN]
    assert found, "no norm to spoil"
    return found


def _changed(position: float, slot: int, change: Callable[[Any], None]) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """Change a weight (slot 1) or bias (slot 2) of the fused operator at a share of the way from first to last."""

    def spoil(model: onnx.ModelProto) -> onnx.ModelProto:
        result = fused(model)
        nodes = [n for n in result.graph.node if n.op_type in _CARRIERS and len(n.input) > slot]
        name = nodes[round(position * (len(nodes) - 1))].input[slot]
        tensor = next(t for t in result.graph.initializer if t.name == name)
        values = onh.to_array(tensor).copy()
        change(values)
        tensor.CopyFrom(onh.from_array(values, name))
        return result

    return spoil


def _moved(values: Any) -> None:
    values.flat[0] += 1e-4


def _scaled(values: Any) -> None:
    values[0] *= 1.01


def _not_a_number(values: Any) -> None:
    values.flat[0] = np.nan


def _with_stranger(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the last output once more under another name, in place."""
    output = model.graph.output[-1]
    stranger = copy.deepcopy(output)
    stranger.name = "stranger"
    model.graph.node.append(oh.make_node("Identity", [output.name], [stranger.name]))
    model.graph.output.append(stranger)
    return model


def _renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    result = _with_stranger(fused(model))
    del result.graph.output[-2]
    return result


def _other_type(model: onnx.ModelProto) -> onnx.ModelProto:
    result = fused(model)
    output = result.graph.output[0]
    for node in result.graph.node:
        node.output[:] = ["narrow" if name == output.name else name for name in node.output]
        node.input[:] = ["narrow" if name == output.name else name for name in node.input]
    wide = onnx.TensorProto.DOUBLE
    result.graph.node.append(oh.make_node("Cast", ["narrow"], [output.name], to=wide))
    output.type.tensor_type.elem_type = wide
    return result


KINDS: Mapping[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    CORRECT: fused,
    "epsilon dropped": _epsilon_dropped,
    "gamma and beta swapped": _swapped,
    "first bias off by 1e-4": _changed(0.0, 2, _moved),
    "middle bias off by 1e-4": _changed(0.5, 2, _moved),
    "last bias off by 1e-4": _changed(1.0, 2, _moved),
    "first channel off by 1 %": _changed(0.0, 1, _scaled),
    "middle channel off by 1 %": _changed(0.5, 1, _scaled),
    "NaN in a weight": _changed(0.5, 1, _not_a_number),
    "output renamed": _renamed,
    "output too many": lambda model: _with_stranger(fused(model)),
    MISSING: fused,
    "output of another type": _other_type,
}
"""What is done to a network, by name; each takes a copy of the model as it was exported, and gives the fused one."""


@dataclass(frozen=True)
class Row:
    """What `verify` says to one fault.

    Attributes:
        network, kind: Which one.
        outcome: The verdict.
        interface, places, outputs: Whether it showed there; of a correct fold, whether it was refused for it.
        seconds: Wall time of the verdict.
        reason: Of the verdict.
    """

    network: str
    kind: str
    outcome: str
    interface: bool
    places: bool
    outputs: bool
    seconds: float
    reason: str

    @property
    def ok(self) -> bool:
        """Whether a correct fold was accepted, or a fault refused."""
        return self.outcome == ("yes" if self.kind == CORRECT else "no")


def judge(network: str, model: onnx.ModelProto, kind: str) -> Row:
    """Spoil a copy of an exported network in one way, and ask `verify`.

    Args:
        network: Its name, for the row.
        model: As it was exported. Not changed.
        kind: A key of `KINDS`.
    """
    candidate = KINDS[kind](copy.deepcopy(model))
    reference = _with_stranger(copy.deepcopy(model)) if kind == MISSING else model
    # Of a fault, two sets of inputs are enough to see it; that a correct fold holds is to be seen on all.
    verdict = verify(reference, candidate, inputs=None if kind == CORRECT else 2)
    return Row(network, kind, verdict.outcome, *_seen(verdict), round(verdict.seconds, 1), verdict.reason)


def _seen(verdict: Verdict) -> tuple[bool, bool, bool]:
    wrong = any(row.ok is False for row in verdict.rows)
    in_outputs = wrong or (bool(verdict.problems) and bool(verdict.rows))
    return bool(verdict.problems) and not verdict.rows, verdict.sites is not None and not verdict.sites.ok, in_outputs


def exported(names: Sequence[str], timm: Sequence[str], *, small: bool) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Yield networks as the exporter writes them, with weights and statistics of their own.

    Args:
        names: Keys of `MODELS`.
        timm: Names of architectures of timm, which must be importable.
        small: Small networks of the same structure, for those of `MODELS`.
    """
    for name in names:
        network, inputs = calibrated(MODELS[name], small=small, seed=0)
        yield name, to_onnx(network, inputs, dynamic_shapes=({0: "batch"},), verify=False)
    if not timm:
        return
    sizes = {name: size for size, group in timm_networks.ARCHITECTURES.items() for name in group}
    with timm_networks.imported() as library:
        for name in timm:
            torch.manual_seed(0)
            images = torch.randn(8, 3, *[sizes.get(name, 64)] * 2)
            network = convert_batchnorm(library.create_model(name, pretrained=False), strict=True)
            network = timm_networks.calibrated(network, [images])
            yield name, to_onnx(network, images[:2], dynamic_shapes=({0: "batch"},), verify=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Judge every fault in every network; 0 if all are refused and all correct folds accepted, else 1."""
    parser = argparse.ArgumentParser(prog="python -m runtime_tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--timm", nargs="*", default=[], metavar="NAME", help="architectures of timm, if installed")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--small", action="store_true", help="small networks of the same structure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every row to FILE")
    options = parser.parse_args(argv)
    rows: list[Row] = []
    started = time.perf_counter()
    for network, model in exported(options.models, options.timm, small=options.small):
        for kind in options.kinds:
            rows.append(judge(network, model, kind))
            seconds = time.perf_counter() - started
            print(f"{network}, {kind}: {rows[-1].outcome} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    cells = [
        (
            "ok" if row.ok else "WRONG",
            row.network,
            row.kind,
            row.outcome,
            *("seen" if seen else "" for seen in (row.interface, row.places, row.outputs)),
            f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    header = ("", "network", "fault", "verdict", "interface", "places", "outputs", "seconds")
    print("\n".join(text_table(header, cells, numbers=(7,))))
    wrong = [row for row in rows if not row.ok]
    print(f"{len(rows)} verdicts, {len(wrong)} of them wrong")
    for row in wrong:
        print(f"WRONG {row.network}, {row.kind}: {row.outcome}. {row.reason}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

"""Fold every normalization that can be folded exactly, and say why the rest stays.

The engine finds norms, plans each (`plan`), applies the plans that succeed, and repeats until nothing changes. Operands
are changed in float64 beside the graph (`parameters`) and written into it once, at the end. **A name means the same
value in the model before and after**: what now equals a norm's output takes that output's name; a value or weight that
changed gets a new name, unique in the model.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import overload

import numpy as np
import onnx
import onnx_ir as ir

from renorm_onnx import model_file
from renorm_onnx.errors import InputError
from renorm_onnx.fusion.branches import Merge, find_merges
from renorm_onnx.fusion.calls import define_calls, open_norms, open_obstacles
from renorm_onnx.fusion.carrier import AddAfter, Carrier, Desk, SetAttribute, SetInput, label, refuse
from renorm_onnx.fusion.carriers import load_carriers
from renorm_onnx.fusion.conditionals import open_conditionals
from renorm_onnx.fusion.fact_dims import CONSTANT_OPERATORS, RULES
from renorm_onnx.fusion.facts import Facts
from renorm_onnx.fusion.plan import Limits, Plan, Planner
from renorm_onnx.fusion.report import FusionReport, NormReport, Reason, Refusal
from renorm_onnx.fusion.rewriter import Rewriter
from renorm_onnx.fusion.sequences import open_sequences
from renorm_onnx.fusion.shadowing import rename_shadowing
from renorm_onnx.fusion.sources import Norm, find_norms
from renorm_onnx.fusion.units import multiplied, unit_of, write_units
from renorm_onnx.model_walk import graphs_of, in_order, nodes_of
from renorm_onnx.onnx_function import MODULE_KEY
from renorm_onnx.onnx_layers import count_training_layers

logger = logging.getLogger(__name__)

# Largest kappa of a forward fold by the arithmetic that will run the model: measured error is kappa * unit roundoff.
TARGETS = {"fp32": Limits(4.0), "tf32": Limits(1.0), "fp16": Limits(1.0, 65504.0)}


@dataclass(frozen=True, kw_only=True)
class FuseOptions:
    """What `fuse` may do.

    Args:
        target: Arithmetic that will run the model, "fp32", "tf32" or "fp16": sets the numerical guards.
        allow_cancellation: Fold forward whatever precision that costs.
        merge_branches: Make one operator of parallel linear branches over the same input.
        assume_constant_initializers: Fold initializers that a caller may override.
    """

    target: str = "fp32"
    allow_cancellation: bool = False
    merge_branches: bool = True
    assume_constant_initializers: bool = False

    def limits(self) -> Limits:
        """The numerical guards for these options.

        Raises:
            InputError: `target` is not one of the known kinds of arithmetic.
        """
        if self.target not in TARGETS:
            raise InputError(f"fuse: target {self.target!r} is unknown, expected one of {', '.join(TARGETS)}")
        chosen = TARGETS[self.target]
        return Limits(float("inf"), chosen.max_weight) if self.allow_cancellation else chosen


@overload
def fuse(
    model: ir.Model, options: FuseOptions | None = None, *, allow_symlinks: bool = False
) -> tuple[ir.Model, FusionReport]: ...
@overload
def fuse(
    model: str | PathLike[str] | onnx.ModelProto, options: FuseOptions | None = None, *, allow_symlinks: bool = False
) -> tuple[onnx.ModelProto, FusionReport]: ...
def fuse(
    model: str | PathLike[str] | onnx.ModelProto | ir.Model,
    options: FuseOptions | None = None,
    *,
    allow_symlinks: bool = False,
) -> tuple[onnx.ModelProto | ir.Model, FusionReport]:
    """Fold the normalizations of a model into its linear operators.

    Args:
        model: A path, a `ModelProto` or an `onnx_ir.Model`; never changed.
        options: What may be done; None for the defaults.
        allow_symlinks: Follow links to data files outside the model's folder.

    Returns:
        A new model (an `onnx_ir.Model` for one, a `ModelProto` otherwise) with the same inputs and outputs, and the
        report of what was folded and why the rest stays.

    Raises:
        ModelFileError: The model cannot be read, or breaks a rule of ONNX; or the result exceeds the 2 GB of a
            `ModelProto`: `renorm_onnx.fuse_file` writes such a model, an `onnx_ir.Model` holds it.
        InputError: As `fuse_in_place`.
    """
    copy = model_file.load(model, allow_symlinks=allow_symlinks)
    report = fuse_in_place(copy, options)
    return (copy if isinstance(model, ir.Model) else model_file.to_proto(copy)), report


def fuse_in_place(model: ir.Model, options: FuseOptions | None = None) -> FusionReport:
    """Fold the normalizations of `model` in place.

    Args:
        model: A model that `model_file.load` returned.
        options: What may be done; None for the defaults.

    Returns:
        The report. Where its `changed` is false, nothing was folded, though function calls may have been inlined,
        an If or a sequence opened, and inner values renamed, in vain.

    Raises:
        InputError: An option is unknown; the model's opset is too old for a function of ours that it calls and lacks.
    """
    define_calls(model)
    rename_shadowing(model)
    return _Engine(model, options or FuseOptions()).run()


class _Engine:
    def __init__(self, model: ir.Model, options: FuseOptions) -> None:
        self._model = model
        self._options = options
        self._limits = options.limits()
        assumed = options.assume_constant_initializers
        facts = Facts(model, RULES, CONSTANT_OPERATORS, assume_constant_initializers=assumed)
        self._desk = Desk(facts, self._limits.max_weight)
        self._rewriter = Rewriter(model, facts.opset)
        training = count_training_layers(model)
        self._report = FusionReport(training_layers=training, operators_before=count_operators(model))
        # A norm that absorbs another one takes over its output's name, so a node is the only lasting identity.
        self._entries: dict[ir.Node, NormReport] = {}
        self._order: dict[ir.Node, float] = {}
        self._touched: set[ir.Node] = set()
        self._added: set[ir.Node] = set()
        self._graphs = [model.graph]
        self._across = False
        self._found_constant = False

    def run(self) -> FusionReport:
        with model_file.collection_paused(), np.errstate(all="ignore"):
            return self._run()

    def _run(self) -> FusionReport:
        self._forms = {
            v.name: f"{n.domain}::{n.op_type}"
            for n in (nodes_of(self._model.graph) if self._model.functions else ())
            if n.op_identifier() in self._model.functions
            for v in n.outputs
        }
        if self._desk.opset > onnx.defs.onnx_opset_version():
            self._keep_all()
            return self._report
        self._note_closed(open_norms(self._model))
        self._fold_all()
        # What folds across an If that always goes one way would leave it there, so it is opened first.
        while self._open() or self._cross():
            self._desk.facts.forget()
            self._fold_all()
        self._rewriter.write(self._desk.pending)
        self._clean()
        write_units(self._desk.units)
        for entry in self._report.entries:
            if entry.outcome == "kept" and not entry.refusals:
                why = f"{entry.name!r} took up another norm, and varies along several axes since"
                entry.refusals = (Refusal(Reason.AXIS, entry.name, why),)
        self._desk.pending.clear()
        self._report.operators_after = count_operators(self._model)
        logger.info("%s", self._report)
        return self._report

    def _keep_all(self) -> None:
        """Say of every norm that nobody here knows what its operators, and those around it, compute."""
        opset, newest = self._desk.opset, onnx.defs.onnx_opset_version()
        why = f"is of opset {opset}, and the newest that onnx {onnx.__version__} knows is {newest}; upgrade onnx"
        self._graphs = list(graphs_of(self._model.graph))
        for norm, entries in self._norms():
            for entry in entries:
                entry.refusals = (refuse(Reason.UNKNOWN_OPSET, norm.nodes[0], why),)
        self._report.operators_after = self._report.operators_before

    def _note_closed(self, reasons: Mapping[ir.OperatorIdentifier, str]) -> None:
        """Say of every call of a function that holds a norm and cannot be opened why it stays."""
        for node in nodes_of(self._model.graph) if reasons else ():
            if (why := reasons.get(node.op_identifier())) is not None:
                form, name = f"{node.domain}::{node.op_type}", node.outputs[0].name or ""
                refusal = refuse(Reason.OPERATOR, node, f"calls a function that holds a norm and stays closed: {why}")
                self._report.entries.append(NormReport(name, "norm", form, (label(node),), refusals=(refusal,)))

    def _fold_all(self) -> None:
        self._rewriter.learn()
        self._graphs = list(graphs_of(self._model.graph))
        self._fold()
        while self._options.merge_branches and self._merge_branches():
            self._fold()

    def _stays(self) -> bool:
        """Whether any norm is left."""
        return any(e.outcome == "kept" for e in self._report.entries)

    def _open(self) -> bool:
        """Open what may stand in the way of norms that stay: Ifs that always go one way, sequences, then functions.

        Operators that nobody reads stand in the way too, and go.
        """
        if not self._stays():
            return False
        known = (self._model, self._desk.facts, self._rewriter)
        gone = open_conditionals(*known) or open_sequences(*known)
        for node in gone:
            if (entry := self._entries.get(node)) is not None and entry.outcome == "kept":
                entry.fold("unreachable", ())
        unread = [] if gone else [node for graph in self._graphs for node in graph if _is_unread(node)]
        self._rewriter.delete([*gone, *unread])
        self._clean()
        if gone or unread or not self._model.functions:
            return bool(gone or unread)
        return open_obstacles(self._model, self._desk.facts, self._refusals(), _passing()) > 0

    def _cross(self) -> bool:
        """Let maps enter and leave the bodies of If, Loop and Scan from now on, if that is new and may help."""
        if self._across or not self._stays():
            return False
        self._across = len(self._graphs) > 1
        return self._across

    def _refusals(self) -> list[Refusal]:
        """Where the ways of the norms that stay have ended."""
        return [r for e in self._report.entries if e.outcome == "kept" for r in e.refusals]

    def _clean(self) -> None:
        """Take out what nobody reads any more; a norm among it is as one that nobody read before."""
        for node in self._rewriter.clean():
            if (entry := self._entries.get(node)) is not None and entry.outcome == "kept":
                entry.fold("forward", ())

    def _fold(self) -> None:
        """Plan and apply until a whole round changes nothing; rounds alternate in direction."""
        forwards = True
        while True:
            norms = self._norms()
            self._touched.clear()
            nodes = in_order(self._model.graph) if len(self._graphs) > 1 else self._model.graph
            self._order = {n: float(i) for i, n in enumerate(nodes)}
            planner = Planner(self._order, self._desk, load_carriers(), self._limits, across=self._across)
            count, self._found_constant = len(self._added), False
            # A norm before what is none: where one must stay, an Add stays rather than the norm that would absorb it.
            turn = sorted(norms if forwards else reversed(norms), key=lambda found: found[0].kind != "norm")
            folded = sum([self._try(*found, planner) for found in turn])
            self._clean()
            if not folded or (folded == len(norms) and len(self._added) == count and not self._found_constant):
                return
            self._desk.facts.forget()
            forwards = not forwards

    def _norms(self) -> list[tuple[Norm, list[NormReport]]]:
        """The norms of all graphs, each with its entries in the report."""
        found = [norm for graph in self._graphs for norm in find_norms(list(graph), self._desk)]
        return [(norm, self._entries_of(norm)) for norm in found]

    def _entries_of(self, norm: Norm) -> list[NormReport]:
        """The entries of a norm's nodes: one, unless norms of the input model have become one chain."""
        known = {id(e): e for n in norm.nodes if (e := self._entries.get(n)) is not None}
        if not known:
            form = self._forms.get(norm.name, norm.form)
            module = norm.nodes[-1].metadata_props.get(MODULE_KEY, "")
            entry = NormReport(norm.name, norm.kind, form, tuple(map(label, norm.nodes)), module)
            if not self._added.issuperset(norm.nodes):
                self._report.entries.append(entry)
            self._entries.update(dict.fromkeys(norm.nodes, entry))
            return [entry]
        return list(known.values())

    def _try(self, norm: Norm, entries: list[NormReport], planner: Planner) -> bool:
        # What an earlier plan of this round changed is no longer what was found: the next round finds it anew.
        changed = any(self._rewriter.is_deleted(n) or n in self._touched for n in norm.nodes)
        if changed or norm.input not in norm.nodes[0].inputs:
            return False
        plan = planner.plan(norm)
        if not isinstance(plan, Plan):
            for entry in entries:
                entry.refusals = plan
            return False
        # Without its norm a computed constant may be seen to be one, and what reads it a chain.
        self._found_constant |= self._desk.facts.is_constant(norm.input)
        self._apply(plan)
        for entry in entries:
            entry.fold(plan.way, plan.into)
        return True

    def _merge_branches(self) -> int:
        """Make one convolution of parallel ones wherever that is possible now; return how often it was."""
        count = 0
        for graph in self._graphs:
            for merge in find_merges(graph, self._desk):
                self._apply_merge(merge)
                count += 1
        self._report.branches_merged += count
        self._desk.facts.forget()
        return count

    def _apply_merge(self, merge: Merge) -> None:
        keep, geometry, graph = merge.keep, merge.geometry, merge.add.graph
        assert isinstance(graph, ir.Graph)
        self._desk.pending[keep, 1] = merge.weight
        if merge.bias is not None:
            self._desk.pending[keep, 2] = merge.bias
        keep.attributes.add(ir.AttrInt64s("pads", [*geometry.begin, *geometry.end]))
        keep.attributes.add(ir.AttrInt64s("dilations", geometry.dilations))
        keep.attributes.add(ir.AttrInt64s("kernel_shape", geometry.kernel))
        keep.attributes.pop("auto_pad", None)
        self._rewriter.replace(merge.add.outputs[0], keep.outputs[0])
        self._rewriter.delete([merge.add])
        self._clean()
        if merge.norm is not None:
            for entry in self._entries_of(merge.norm):
                entry.fold("branches", [label(keep)])

    def _apply(self, plan: Plan) -> None:
        changed = list(plan.changed)
        source = plan.norm.input
        for edit in plan.edits:
            self._touched.add(edit.node)
            self._desk.facts.change(edit.node)
            if isinstance(edit, SetInput):
                self._desk.pending[edit.node, edit.index] = edit.parameter
            elif isinstance(edit, SetAttribute):
                edit.node.attributes.add(edit.attribute)
            else:
                value, total = edit.node.outputs[0], self._add_behind(edit)
                source = total if value is source else source
                changed = [total if v is value else v for v in changed]
        for node, unit in plan.units.items():
            self._desk.units[node] = multiplied(unit_of(node, self._desk.units), unit)
        for value in changed:
            self._rewriter.rename(value)
        self._leave_out(plan, source)
        self._rewriter.delete(plan.norm.nodes)

    def _leave_out(self, plan: Plan, source: ir.Value) -> None:
        """Let the readers of a norm's output take `source`, which holds what they need."""
        output, last, maker = plan.norm.output, plan.norm.nodes[-1], source.producer()
        if plan.way == "forward":
            self._rewriter.redirect(output, source)
            return
        if maker is not None and maker.graph is not last.graph:
            # A name inside a body may stand in a body beside it too, and a body hands out only what it computes.
            self._rewriter.rename(source)
            if not output.is_graph_output():
                self._rewriter.redirect(output, source)
                return
            source = self._rewriter.copy_before(last, source, last.name or output.name)
        self._rewriter.replace(output, source)

    def _add_behind(self, edit: AddAfter) -> ir.Value:
        node = self._rewriter.add_behind(edit.node, edit.parameter)
        self._order[node] = self._order[edit.node] + 0.5
        self._added.add(node)
        self._desk.pending[node, 1] = edit.parameter
        self._desk.facts.change(node)
        return node.outputs[0]


def _is_unread(node: ir.Node) -> bool:
    """Whether nothing of what an operator computes is read; those of other domains may do more than compute."""
    own = node.domain == ""
    return own and not any(output.uses() or output.is_graph_output() for output in node.outputs)


def _passing() -> frozenset[str]:
    """The operators that may let a map pass: of them all, some only take one up."""
    carriers = load_carriers().items()
    return frozenset(operator for operator, carrier in carriers if type(carrier).backward is not Carrier.backward)


def count_operators(model: ir.Model) -> Counter[str]:
    """How many nodes of each operator the graph and its subgraphs hold; other domains' with their domain."""
    return Counter(n.op_type if n.domain == "" else f"{n.domain}::{n.op_type}" for n in nodes_of(model.graph))

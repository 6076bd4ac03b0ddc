"""Fold every normalization that can be folded exactly, and say why the rest stays.

The engine finds norms, plans each (`plan`), applies the plans that succeed, and repeats until nothing changes. Operands
are changed in float64 beside the graph (`parameters`) and written into it once, at the end. **A name means the same
value in the model before and after**: what now equals a norm's output takes that output's name; a value or weight that
changed gets a new name, unique in the model.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import overload

import numpy as np
import onnx
import onnx_ir as ir

from renorm_onnx import model_file
from renorm_onnx.errors import InputError
from renorm_onnx.fusion.branches import Merge, find_merges
from renorm_onnx.fusion.calls import define_calls, open_absorbers, open_norms
from renorm_onnx.fusion.carrier import AddAfter, Desk, SetAttribute, SetInput, label
from renorm_onnx.fusion.carriers import load_carriers
from renorm_onnx.fusion.conditionals import open_conditionals
from renorm_onnx.fusion.fact_dims import CONSTANT_OPERATORS, RULES
from renorm_onnx.fusion.facts import Facts
from renorm_onnx.fusion.operands import is_read_once, set_content, store, store_expanded
from renorm_onnx.fusion.parameters import Parameter
from renorm_onnx.fusion.plan import Limits, Plan, Planner
from renorm_onnx.fusion.report import FusionReport, NormReport, Reason
from renorm_onnx.fusion.sequences import open_sequences
from renorm_onnx.fusion.sources import Norm, describe, find_norms
from renorm_onnx.inlining import Names, names_in
from renorm_onnx.model_walk import graphs_of, nodes_of
from renorm_onnx.onnx_function import MODULE_KEY

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
        The report. Where its `changed` is false, nothing was folded, though function calls may have been inlined.

    Raises:
        InputError: An option is unknown; the model's opset is too old for a function of ours that it calls and lacks.
    """
    define_calls(model)
    return _Engine(model, options or FuseOptions()).run()


class _Engine:
    def __init__(self, model: ir.Model, options: FuseOptions) -> None:
        self._model = model
        self._options = options
        self._limits = options.limits()
        assumed = options.assume_constant_initializers
        facts = Facts(model, RULES, CONSTANT_OPERATORS, assume_constant_initializers=assumed)
        self._desk = Desk(facts)
        self._report = FusionReport(operators_before=count_operators(model))
        # A norm that absorbs another one takes over its output's name, so a node is the only lasting identity.
        self._entries: dict[ir.Node, NormReport] = {}
        self._order: dict[ir.Node, float] = {}
        self._taken: set[str] = set()
        self._touched: set[ir.Node] = set()
        self._added: set[ir.Node] = set()
        # Taken out together, since onnx-ir looks at all outputs of a graph for each removal.
        self._gone: dict[ir.Node, ir.Graph] = {}
        self._unread: dict[ir.Value, None] = {}
        self._output_places: dict[ir.Graph, dict[ir.Value, list[int]]] = {}

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
        open_norms(self._model)
        self._fold_all()
        while self._open():
            self._desk.facts.forget()
            self._fold_all()
        self._write_parameters()
        self._report.operators_after = count_operators(self._model)
        logger.info("%s", self._report)
        return self._report

    def _fold_all(self) -> None:
        self._taken |= names_in(self._model)
        self._names = Names(self._taken)
        for graph in list(graphs_of(self._model.graph)):
            self._fold(graph)
            while self._options.merge_branches and self._merge_branches(graph):
                self._fold(graph)

    def _open(self) -> bool:
        """Open what may stand in the way of norms that stay: Ifs that always go one way, sequences, then functions."""
        if all(e.outcome == "folded" for e in self._report.entries):
            return False
        known = (self._model, self._desk.facts, self._names)
        gone = open_conditionals(*known) or open_sequences(*known)
        for node in gone:
            if (entry := self._entries.get(node)) is not None and entry.outcome == "kept":
                entry.fold("unreachable", ())
        self._output_places.clear()
        self._delete(gone)
        self._clean()
        return bool(gone) or (bool(self._model.functions) and open_absorbers(self._model, self._obstacles()) > 0)

    def _obstacles(self) -> set[str]:
        """The names of the operators at which the way of a norm that stays has ended."""
        refusals = (r for e in self._report.entries if e.outcome == "kept" for r in e.refusals)
        return {r.obstacle for r in refusals if r.reason is Reason.OPERATOR}

    def _fold(self, graph: ir.Graph) -> None:
        """Plan and apply until a whole round changes nothing; rounds alternate in direction."""
        forwards = True
        while True:
            nodes = list(graph)
            norms = [(norm, self._entries_of(norm)) for norm in list(find_norms(nodes, self._desk))]
            self._touched.clear()
            self._order = {n: float(i) for i, n in enumerate(nodes)}
            planner = Planner(self._order, self._desk, load_carriers(), self._limits)
            count = len(self._added)
            # A norm before what is none: where one must stay, an Add stays rather than the norm that would absorb it.
            turn = sorted(norms if forwards else reversed(norms), key=lambda found: found[0].kind != "norm")
            folded = sum([self._try(*found, planner) for found in turn])
            self._clean()
            if not folded or (folded == len(norms) and len(self._added) == count):
                return
            self._desk.facts.forget()
            forwards = not forwards

    def _entries_of(self, norm: Norm) -> list[NormReport]:
        """The entries of a norm's nodes: one, unless norms of the input model have become one chain."""
        known = {id(e): e for n in norm.nodes if (e := self._entries.get(n)) is not None}
        if not known:
            form = self._forms.get(norm.name, norm.form)
            module = norm.nodes[-1].metadata_props.get(MODULE_KEY, "")
            entry = NormReport(norm.name, norm.kind, form, describe(norm), module)
            if not self._added.issuperset(norm.nodes):
                self._report.entries.append(entry)
            self._entries.update(dict.fromkeys(norm.nodes, entry))
            return [entry]
        return list(known.values())

    def _try(self, norm: Norm, entries: list[NormReport], planner: Planner) -> bool:
        # What an earlier plan of this round changed is no longer what was found: the next round finds it anew.
        if any(n in self._gone or n in self._touched for n in norm.nodes) or norm.input not in norm.nodes[0].inputs:
            return False
        plan = planner.plan(norm)
        if not isinstance(plan, Plan):
            for entry in entries:
                entry.refusals = plan
            return False
        self._apply(plan)
        for entry in entries:
            entry.fold(plan.way, plan.into)
        return True

    def _merge_branches(self, graph: ir.Graph) -> int:
        """Make one convolution of parallel ones wherever that is possible now; return how often it was."""
        norms = {norm.output: norm for norm in find_norms(list(graph), self._desk)}
        count = 0
        for merge in find_merges(graph, self._desk, norms):
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
        self._replace(merge.add.outputs[0], keep.outputs[0])
        self._delete([merge.add])
        self._clean()
        if merge.norm is not None:
            for entry in self._entries_of(merge.norm):
                entry.fold("branches", [label(keep)])

    def _apply(self, plan: Plan) -> None:
        changed = list(plan.changed)
        source = plan.norm.input
        for edit in plan.edits:
            self._touched.add(edit.node)
            self._desk.facts.changed.add(edit.node)
            if isinstance(edit, SetInput):
                self._desk.pending[edit.node, edit.index] = edit.parameter
            elif isinstance(edit, SetAttribute):
                edit.node.attributes.add(edit.attribute)
            else:
                value = edit.node.outputs[0]
                total = self._add_after(edit)
                source = total if value is source else source
                changed = [total if v is value else v for v in changed]
        for value in changed:
            value.name = self._fresh(value.name or "value")
        if plan.way == "backward":
            self._replace(plan.norm.output, source)
        else:
            self._redirect(plan.norm.output, source)
        self._delete(plan.norm.nodes)

    def _add_after(self, edit: AddAfter) -> ir.Value:
        """Insert ``Add(output, constant)`` behind a node and let it take over the node's readers and name."""
        value = edit.node.outputs[0]
        graph = edit.node.graph
        assert isinstance(graph, ir.Graph)
        name = self._names.unique(f"{edit.node.name or value.name}_bias")
        total = ir.Value(name=value.name, type=value.type, shape=value.shape)
        self._redirect(value, total)
        value.name = self._fresh(value.name or "value")
        broadcast = [ir.AttrInt64("broadcast", 1)] if self._desk.opset < 7 else []
        shift = self._store(graph, edit.parameter, name)
        node = ir.Node("", "Add", [value, shift], attributes=broadcast, outputs=[total], name=name)
        graph.insert_after(edit.node, node)
        self._order[node] = self._order[edit.node] + 0.5
        self._added.add(node)
        self._desk.pending[node, 1] = edit.parameter
        return total

    def _replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let `new` stand where `old` stood and bear its name, since it holds the same."""
        name = old.name
        self._redirect(old, new)
        # What the file declares about `old` is its interface; a shape declared for `new` alone may be stale.
        new.name, new.type, new.shape = name, old.type or new.type, old.shape

    def _redirect(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of `old`, and every graph output that it is, take `new` instead."""
        graph = old.graph
        if old.is_graph_output() and isinstance(graph, ir.Graph):
            if graph not in self._output_places:
                self._output_places[graph] = {}
                for index, value in enumerate(graph.outputs):
                    self._output_places[graph].setdefault(value, []).append(index)
            places = self._output_places[graph]
            moved = places.pop(old)
            for index in moved:
                graph.outputs[index] = new
            places.setdefault(new, []).extend(moved)
        old.replace_all_uses_with(new)

    def _delete(self, nodes: Iterable[ir.Node]) -> None:
        """Make nodes read nothing; `_clean` takes them out of their graphs, and what only they read."""
        for node in nodes:
            self._unread.update(dict.fromkeys(v for v in node.inputs if v is not None))
            assert isinstance(node.graph, ir.Graph)
            self._gone[node] = node.graph
            node.resize_inputs(0)

    def _clean(self) -> None:
        """Remove deleted nodes, constants that nobody reads any more, and operators that computed nothing else."""
        dropped: dict[ir.Graph, set[ir.Value]] = {}
        while self._unread:
            value = self._unread.popitem()[0]
            if value.uses() or value.is_graph_output():
                continue
            node, graph = value.producer(), value.graph
            if node is not None:
                unread = not any(o.uses() or o.is_graph_output() for o in node.outputs)
                self._delete([node] if unread and node not in self._gone and node.graph is not None else [])
            elif value.is_initializer() and isinstance(graph, ir.Graph) and not self._is_interface(value):
                del graph.initializers[value.name or ""]
                if value.is_graph_input():
                    dropped.setdefault(graph, set()).add(value)
        for graph, values in dropped.items():
            graph.inputs[:] = [v for v in graph.inputs if v not in values]
        for graph in set(self._gone.values()):
            graph.remove([n for n, g in self._gone.items() if g is graph], safe=True)
        self._gone.clear()

    def _fresh(self, hint: str) -> str:
        """A name that nothing in the model bears, recognizable as what `hint` became."""
        return self._names.unique(hint.partition("__fused")[0] + "__fused")

    def _is_interface(self, value: ir.Value) -> bool:
        return value.is_graph_input() and self._model.ir_version >= 4

    def _write_parameters(self) -> None:
        """Give every changed operand its new constant, each number rounded once."""
        for (node, index), parameter in self._desk.pending.items():
            graph = node.graph
            if not isinstance(graph, ir.Graph):
                continue
            old = node.inputs[index] if index < len(node.inputs) else None
            hint = old.name if old is not None and old.name else f"{node.name or node.outputs[0].name}_operand"
            name = self._fresh(hint)
            if old is not None and old.graph is graph and is_read_once(old):
                set_content(old, parameter, name)
                old.name = name
                continue
            as_input, opset = self._model.ir_version < 4, self._desk.opset
            value = store_expanded(node, parameter, name, self._names, opset, as_input=as_input)
            value = value or self._store(graph, parameter, name)
            if index >= len(node.inputs):
                node.resize_inputs(index + 1)
            node.replace_input_with(index, value)
            if old is not None:
                self._unread[old] = None
        self._desk.pending.clear()
        self._clean()

    def _store(self, graph: ir.Graph, parameter: Parameter, name: str) -> ir.Value:
        return store(graph, parameter, name, as_input=self._model.ir_version < 4)


def count_operators(model: ir.Model) -> Counter[str]:
    """How many nodes of each operator the graph and its subgraphs hold; other domains' with their domain."""
    return Counter(
        n.op_type if n.domain in ("", "ai.onnx") else f"{n.domain}::{n.op_type}" for n in nodes_of(model.graph)
    )

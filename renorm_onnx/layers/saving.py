"""How a compiled graph is made to save r and d for its backward pass.

torch.compile may compute an intermediate result a second time in the backward pass instead of saving it, and
checkpointing asks it to. For r and d that is wrong: by then the same graph has updated the running statistics they come
from, and the gradients would silently belong to another step (pytorch/pytorch#197039). So r and d pass through an
operator that copies them and marks the copies as to be saved.

One setting is beyond the mark: `torch._functorch.config.activation_memory_budget = 0` saves the graph's inputs and
nothing else, whatever is marked; so a training step is not compiled under it. Any budget above 0 obeys the mark.
"""

from itertools import islice

import torch
from torch import Tensor
from torch._functorch import config
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy

from renorm_onnx.errors import InputError


def save_for_backward(r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return r and d, in a compiled graph as values that its backward pass does not compute again.

    An exported program gets no such operator: it would need this package to load.

    Args:
        r: Shape (C,).
        d: Shape (C,).
    """
    # Not is_exporting(): in torch 2.11 it is true of whatever torch.compile traces.
    if torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag:
        saved: tuple[Tensor, Tensor] = torch.ops.renorm_onnx.save_for_backward(r, d)
        return saved
    return r, d


def _save(r: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Copy both; as a composite operator, in Python while the joint graph is traced, marking the nodes it adds.

    The mark is what selective checkpointing uses. A concatenation, unlike a pointwise operation, is saved even without.
    """
    proxy_mode = get_proxy_mode()
    if proxy_mode is not None and config.activation_memory_budget == 0:
        raise InputError(
            "batch renorm: torch._functorch.config.activation_memory_budget=0, expected more because the backward pass "
            "of a compiled step would compute r and d again, from statistics that have moved"
        )
    graph = None if proxy_mode is None else proxy_mode.tracer.graph
    before = 0 if graph is None else len(graph.nodes)
    copies = tuple(torch.stack((r, d)).unbind())
    if graph is not None:
        for node in islice(reversed(graph.nodes), len(graph.nodes) - before):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return copies


_LIBRARY = torch.library.Library("renorm_onnx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("save_for_backward(Tensor r, Tensor d) -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]
_LIBRARY.impl("save_for_backward", _save, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]

"""Buffers that a call of a module changes and its model does not.

A model gives back the statistics of training layers (`training`); whatever else a call writes, it loses. torch's
capture says which buffers are written in place. Of one that is assigned anew, ``self.average = self.average + ...``, it
says nothing and takes the assignment back, so that is seen here, while the module runs.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from renorm_onnx.errors import InputError
from renorm_onnx.exporting.surroundings import copied
from renorm_onnx.exporting.training import WRAPPED, training_state


@contextlib.contextmanager
def noting_assigned(module: nn.Module | None) -> Iterator[set[str]]:
    """Give the paths of the buffers that calls of a module assign anew, for the time of the block.

    Args:
        module: What is called in the block; None for none.
    """
    assigned: set[str] = set()
    if module is None:
        yield assigned
        return
    before: dict[str, torch.Tensor] = {}

    def note(*_: Any) -> None:
        if not torch.compiler.is_dynamo_compiling():  # where a hook is part of what is captured
            before.update(module.named_buffers())

    def compare(*_: Any) -> None:
        if not torch.compiler.is_dynamo_compiling():
            assigned.update(name for name, now in module.named_buffers() if now is not before.get(name))

    hooks = module.register_forward_pre_hook(note), module.register_forward_hook(compare)
    try:
        yield assigned
    finally:
        for hook in hooks:
            hook.remove()


def changed_by_a_call(
    module: nn.Module | None, assigned: set[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> set[str]:
    """Return those of some buffers that hold something else after a call: others are caches, which nobody loses.

    Args:
        module: Not changed; a copy of it is called. All of `assigned` if that fails.
        assigned: As `noting_assigned` gives them.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    if module is None or not assigned:
        return assigned
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            called = copied(module)
            called(*args, **kwargs)
        before, after = dict(module.named_buffers()), dict(called.named_buffers())
        same = (n for n in assigned if n in before and n in after and torch.equal(before[n], after[n]))
        return assigned.difference(same)
    except Exception:  # whatever it is, torch has called the module without it
        return assigned


def lost_updates(program: torch.onnx.ONNXProgram, module: nn.Module | None, assigned: set[str], mode: str) -> list[str]:
    """Return the buffers that a call of the module changes and the model does not, by path.

    Args:
        program: What torch captured.
        module: What it was captured from; None for an ExportedProgram, which says itself what it changes.
        assigned: As `changed_by_a_call` gives them.
        mode: As for `to_onnx`.

    Raises:
        InputError: mode="train", and there is one: already the second step would be another than the module's.
    """
    captured = program.exported_program
    written = [] if captured is None else list(captured.graph_signature.buffers_to_mutate.values())
    kept = {} if module is None else training_state(module)
    changed = {name.removeprefix(WRAPPED) if kept else name for name in written} | assigned
    lost = sorted(path for path in changed if path not in kept)
    if lost and mode == "train":
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise InputError(
            f"to_onnx(mode='train'): a step changes the buffer {lost[0]!r}{more}, expected only statistics of batch "
            "renorm layers, because the model would lose it; call .eval() on the module that it belongs to, or change "
            "it outside of the module"
        )
    return lost

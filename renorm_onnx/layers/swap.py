"""Replacing layers inside a model that somebody else holds: its optimizer, its hooks and its owner must not notice.

Everything that changes one kind of norm into another goes through these functions, so all of them agree on what
survives: parameters and buffers by identity, the training flag, every hook together with the handle that removes it.
"""

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, TypeVar

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from renorm_onnx.errors import InputError

Layer = TypeVar("Layer", bound=nn.Module)

# Made anew by nn.Module.__init__, or bound to the code of the layer that goes.
_NOT_CARRIED = frozenset({"training", "_parameters", "_buffers", "_modules", "_compiled_call_impl"})
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
# Where the methods of a norm layer may be defined for its state to say everything about it.
_HOMES = frozenset(
    {
        "torch.nn.modules.batchnorm",
        *(f"renorm_onnx.layers.{name}" for name in ("modules", "activated", "distributed", "adoption")),
    }
)
_STATE = frozenset(
    {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "renorm_mean", "renorm_var"}
)


class Swap(NamedTuple):
    """A layer of a model and what takes its place."""

    name: str  # first qualified name in the model
    old: nn.Module
    new: nn.Module


def check_module(module: object, who: str) -> None:
    """Refuse what is no module.

    Args:
        module: What should be one.
        who: Name of the function, for the message.

    Raises:
        InputError: It is something else.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"{who}: module is a {type(module).__name__}, expected a torch.nn.Module")


def refuse_lazy(module: nn.Module, who: str, name: str) -> None:
    """Refuse a layer of which nothing is known before its first batch.

    Args:
        module: A layer.
        who: Name of the function, for the message.
        name: Of the layer in its model.

    Raises:
        InputError: It is lazy, and has not seen a batch.
    """
    # After its first batch it is of another class, if it names one.
    if isinstance(module, LazyModuleMixin) and (module.cls_to_become is not None or module.has_uninitialized_params()):  # type: ignore[no-untyped-call]
        raise InputError(
            f"{who}: {quoted(name)} is a {type(module).__name__} that does not know its sizes yet; run one batch "
            "through the model first"
        )


def plan_swaps(root: nn.Module, build: Callable[[str, nn.Module], nn.Module | None]) -> list[Swap]:
    """Build the replacements for the layers of a model, and change nothing.

    Args:
        root: The model; may itself be a layer to replace.
        build: Called once per distinct module with its first qualified name; None leaves the module alone. Must not
            change the module.

    Returns:
        One swap per module for which `build` gave another one.
    """
    built = ((name, old, build(name, old)) for name, old in root.named_modules())
    return [Swap(name, old, new) for name, old, new in built if new is not None]


def swap_layers(root: nn.Module, swaps: Sequence[Swap]) -> nn.Module:
    """Put every replacement into the model, in place; the new layers inherit training flags and hooks.

    A module used in several places is replaced in all of them. References that are not submodules (a plain list, a
    closure) cannot be seen and keep the old layer.

    Args:
        root: The model.
        swaps: From `plan_swaps` on the same model.

    Returns:
        `root`, or its replacement if `root` itself was replaced.
    """
    fresh = {id(swap.old): swap.new for swap in swaps}
    for parent in [module for module in root.modules() if id(module) not in fresh]:
        for name, child in parent._modules.items():
            if child is not None and id(child) in fresh:
                parent._modules[name] = fresh[id(child)]
    for swap in swaps:
        inherit(swap.new, swap.old)
    return fresh.get(id(root), root)


def inherit(new: nn.Module, old: nn.Module) -> None:
    """Move the training flag and the hooks of `old` to `new`, in place.

    The hook dictionaries themselves move, so a handle that `register_forward_hook` returned still removes its hook.

    Args:
        new: The layer that takes the place; hooks of its own are kept.
        old: The layer that goes. Not usable afterwards where its hooks matter.
    """
    new.training = old.training
    new._is_full_backward_hook = old._is_full_backward_hook
    for key, hooks in vars(old).items():
        if not (key.endswith(_HOOKS) and isinstance(hooks, dict)):
            continue
        hooks.update(vars(new).get(key, {}))
        vars(new)[key] = hooks
        for hook in hooks.values():
            if getattr(hook, "with_module", False):  # torch binds such a hook to its module by weak reference
                hook.module = weakref.ref(new)


def carry_attributes(new: nn.Module, old: nn.Module, *, but: Collection[str] = ()) -> None:
    """Give `new`, in place, every instance attribute of `old` that it lacks: `qconfig`, marks set by the user.

    Args:
        new: The layer that takes the place.
        old: The layer that goes.
        but: Names that stay behind.
    """
    for key, value in vars(old).items():
        if key not in vars(new) and key not in _NOT_CARRIED and key not in but:
            vars(new)[key] = value


def share_state(new: Layer, old: nn.Module) -> Layer:
    """Give `new` the very parameters and buffers of `old`, in place, where both use torch's names for them.

    A second set of statistics starts as a copy of the first.

    Returns:
        `new`.
    """
    for name in ("weight", "bias"):
        new._parameters[name] = old._parameters.get(name)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        new._buffers[name] = old._buffers.get(name)
    start_second_set(new)
    return new


def start_second_set(layer: nn.Module) -> None:
    """Let the second set of statistics, which `renorm_momentum` asks for, start as a copy of the first, in place."""
    for name, source in (("renorm_mean", "running_mean"), ("renorm_var", "running_var")):
        if name in layer._buffers:
            running = layer._buffers[source]
            layer._buffers[name] = None if running is None else running.clone()


def quoted(name: str) -> str:
    """Return a qualified name for a message; the root has none."""
    return repr(name) if name else "the model itself"


def home_of(module: nn.Module, method: str) -> type | None:
    """Return the class that defines a method of `module`."""
    return next((kind for kind in type(module).__mro__ if method in vars(kind)), None)


def why_not(module: nn.Module, *, known: type | None = None, children: Collection[str] = ()) -> str:
    """Say why a norm layer cannot be replaced by its parameters and buffers alone.

    A subclass that computes something else, a parametrization, weight norm, pruning or a patched instance would
    silently lose what it adds.

    Args:
        module: A layer that derives from one of torch's norms or ours.
        known: A class whose methods the caller knows.
        children: Submodules that the caller takes over.

    Returns:
        The reason for a message, or the empty string.
    """
    for method in ("forward", "_forward", "_check_input_dim"):
        home = home_of(module, method)
        if home is not None and home is not known and home.__module__ not in _HOMES:
            return f"{type(module).__name__} defines its own {method}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    extra = sorted({*module._parameters, *module._buffers, *module._modules} - _STATE - set(children))
    return f"it also holds {', '.join(extra)}" if extra else ""

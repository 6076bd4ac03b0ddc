"""Modules that a dependency imports at once, and that a process of the command line seldom needs."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# onnx-ir computes with the names of sizes in sympy, whose import takes longer than to fold most networks.
SELDOM_USED = ("sympy", "onnx_ir._symbolic_shapes")


class _Deferring:
    """Finds `SELDOM_USED` on the path, to be loaded when something is first asked of them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in SELDOM_USED else None
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


def defer_imports() -> None:
    """Load `SELDOM_USED` at their first use from now on, in a process of our own.

    Not in a program of others: before Python 3.12.3, two threads must not be the first to use such a module at once.
    """
    sys.meta_path.insert(0, _Deferring())

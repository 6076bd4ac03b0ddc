"""One file per operator family: what it does with an affine map that arrives at its output or its input.

A file defines `CARRIERS`, the carriers it offers, and `load_carriers` collects them: a new operator is a new file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from renorm_onnx.fusion.carrier import Carrier


@functools.cache
def load_carriers() -> Mapping[str, Carrier]:
    """Every operator of the default domain that absorbs or passes maps, with the carrier that answers for it."""
    found: dict[str, Carrier] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.endswith("_test"):
            continue
        for carrier in importlib.import_module(f"{__name__}.{module.name}").CARRIERS:
            for operator in carrier.operators:
                assert operator not in found, f"two carriers answer for {operator}"
                found[operator] = carrier
    return MappingProxyType(found)

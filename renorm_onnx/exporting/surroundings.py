"""What an export leaves as it found it: the user's logs and warnings, and the modes of the modules."""

import contextlib
import copy
import copyreg
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch import nn

_NOISY = ("torch", "onnxscript", "onnx_ir")
#: Code whose warnings during an export concern its own authors; torch puts some at the line that called it.
_THEIRS = (
    *(str(m.__file__).removesuffix("__init__.py") for m in (torch, onnxscript, ir, onnx, copyreg, contextlib)),
    str(Path(__file__).parents[1]),
)


@contextlib.contextmanager
def quiet(*packages: str) -> Iterator[None]:
    """Keep the exporter's notes to its own authors from the user; warnings from the user's code pass.

    Args:
        packages: Whose logging to suppress; none given: those that take part in an export.
    """
    packages = packages or _NOISY
    roots = [logging.getLogger(name) for name in packages]
    loggers = [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and name.split(".")[0] in packages
    ]
    before = [(logger, logger.disabled, logger.level) for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    for logger in roots:  # for those that the exporter creates when it is imported
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger, disabled, level in before:
            logger.disabled = disabled
            logger.setLevel(level)
    for warning in caught:
        if not warning.filename.startswith(_THEIRS):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextlib.contextmanager
def modes_restored(module: nn.Module) -> Iterator[None]:
    """Leave every training flag as it was found."""
    before = [(m, m.training) for m in module.modules()]
    try:
        yield
    finally:
        for m, training in before:
            m.training = training


def copied(module: nn.Module) -> nn.Module:
    """Return a copy of the module, also of one that keeps results of an earlier call, which torch does not copy."""
    kept = (
        v for m in module.modules() for v in torch.utils._pytree.tree_leaves(vars(m)) if isinstance(v, torch.Tensor)
    )
    with quiet():  # copying the module of a program makes torch warn of itself
        return copy.deepcopy(module, {id(v): v.detach().clone() for v in kept if not v.is_leaf})

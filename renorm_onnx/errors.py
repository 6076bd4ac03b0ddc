"""Every exception a caller may catch.

::

    RenormError
    ├── InputError (ValueError)      the caller gave something that cannot be used      CLI exit 2
    │   └── ModelFileError           a model file is absent, damaged, hostile or in the way
    ├── VerificationError            the result was computed, and it is wrong           CLI exit 1
    └── MachineError (RuntimeError)  this machine lacks what was asked for              CLI exit 3

A message says who speaks, what came, what was expected, and what to do; values with ``!r``, shapes as tuples.
"""


class RenormError(Exception):
    """Base of everything this package raises on purpose."""


class InputError(RenormError, ValueError):
    """An argument, a module or a model cannot be used as given."""


class ModelFileError(InputError):
    """A model file is absent, damaged, hostile, or in the way of the output."""


class VerificationError(RenormError):
    """A result differs from its reference by more than rounding."""


class MachineError(RenormError, RuntimeError):
    """This machine lacks a package, a driver or a device that the call needs."""


def root_of(error: BaseException) -> BaseException:
    """Return the exception at the root of a chain of causes, which alone says what went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error

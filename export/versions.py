"""Which versions of what produced a file."""

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "renorm-onnx",
    "torch",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "scikit-learn",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that take part, by name."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

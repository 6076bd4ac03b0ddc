"""Running and judging models: sessions, the float64 reference, parity, timing, diagnosis.

`renorm_onnx.runtime.Session` deploys a model; it is resolved on first use, so that importing this package stays cheap.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["Session"]

if TYPE_CHECKING:
    from renorm_onnx.runtime.session import Session as Session


def __getattr__(name: str) -> Any:
    if name != "Session":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from renorm_onnx.runtime.session import Session

    globals()[name] = Session
    return Session

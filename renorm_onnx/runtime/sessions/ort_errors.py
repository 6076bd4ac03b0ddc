"""What onnxruntime's exceptions mean: they share no base class, and their text is all there is to go by."""

from renorm_onnx.errors import InputError, MachineError, ModelFileError, RenormError
from renorm_onnx.runtime.providers import INSTALL_CUDA

_OF_THE_DEVICE = ("CUDA", "CUDNN", "CUBLAS", "EP_FAIL", "Failed to allocate")
_LACKING = (
    *("NOT_IMPLEMENTED", "under development", "max supported", "Unsupported model IR"),
    "is not a registered function/op",  # of a domain that another build of onnxruntime may have
)


def creation_error(error: Exception, who: str) -> RenormError:
    """Return the error to raise when a session could not be created.

    Args:
        error: What onnxruntime raised.
        who: Its version and provider, for the message.
    """
    text = " ".join(str(error).split())
    if any(sign in text for sign in _LACKING):
        return MachineError(f"Session: {who} has no kernel for this model, or is too old for it: {text}")
    if "CUDA" in text or "allocate" in text:
        return MachineError(f"Session: {who} failed: {text}")
    return ModelFileError(f"Session: {who} refuses the model: {text}")


def run_error(error: Exception) -> RenormError:
    """Return the error to raise when a run failed.

    Args:
        error: What onnxruntime raised.
    """
    text = " ".join(str(error).split())
    if "cuDNN is not available" in text or "cuDNN library was not found" in text or "cuDNN handle is required" in text:
        return MachineError(f"Session: cuDNN is missing on this machine. Run: {INSTALL_CUDA} ({text})")
    if any(sign in text for sign in _OF_THE_DEVICE):
        return MachineError(f"Session: running failed: {text}")
    return InputError(f"Session: running failed: {text}")

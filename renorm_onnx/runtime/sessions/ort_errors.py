"""What onnxruntime's exceptions mean: they share no base class, and their text is all there is to go by."""

from renorm_onnx.errors import InputError, MachineError, ModelFileError, RenormError

_LACKING = ("NOT_IMPLEMENTED", "under development", "max supported", "Unsupported model IR")


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
    if "CUDA" in text or "CUDNN" in text or "Failed to allocate" in text:
        return MachineError(f"Session: running failed: {text}")
    return InputError(f"Session: running failed: {text}")

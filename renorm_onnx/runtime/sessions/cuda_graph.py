"""One model as one CUDA graph: launched as a whole, without the cost of launching each kernel."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import renorm_onnx.runtime.sessions.tensors as tensors
from renorm_onnx.errors import InputError
from renorm_onnx.runtime.sessions.tensors import TensorSpec


class CudaGraph:
    """Fixed buffers on the device, and the graph that onnxruntime captured over them.

    Args:
        ort: The onnxruntime module.
        session: An `onnxruntime.InferenceSession` created with `enable_cuda_graph`.
        inputs: The session's inputs, all static.
        outputs: The session's outputs, all static.
        device: Number of the CUDA device.
    """

    def __init__(
        self, ort: Any, session: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], device: int
    ) -> None:
        self._session, self._binding, self._lock = session, session.io_binding(), threading.Lock()
        self._specs = {spec.name: spec for spec in inputs}
        self._ort = ort

        def buffer(spec: TensorSpec) -> Any:
            return ort.OrtValue.ortvalue_from_shape_and_type(list(spec.shape), spec.dtype.type, "cuda", device)  # type: ignore[union-attr]

        self._inputs = {spec.name: buffer(spec) for spec in inputs}
        self._outputs = [buffer(spec) for spec in outputs]
        for spec in inputs:
            self._inputs[spec.name].update_inplace(tensors.ones(spec))
            self._binding.bind_ortvalue_input(spec.name, self._inputs[spec.name])
        for spec, value in zip(outputs, self._outputs, strict=True):
            self._binding.bind_ortvalue_output(spec.name, value)
        for _ in range(3):
            session.run_with_iobinding(self._binding)

    def replay(self) -> None:
        """Run on what the input buffers hold."""
        with self._lock:
            self._session.run_with_iobinding(self._binding)

    def takes(self, example: Any) -> bool:
        """Whether tensors of that library can be copied into the buffers (numpy: `example` is None)."""
        return example is None or hasattr(example, "copy_")

    def run(self, feeds: Mapping[str, Any], example: Any) -> list[Any]:
        """Copy the inputs in, replay, and return the outputs: numpy arrays, or tensors of `example`'s library.

        Raises:
            InputError: A shape or element type is not the one captured.
        """
        with self._lock:
            for name, value in feeds.items():
                self._fill(name, value)
            self._session.run_with_iobinding(self._binding)
            if example is None:
                return [value.numpy() for value in self._outputs]
            # A copy: the next replay writes into the same buffers.
            views = [tensors.to_library_of(example, value) for value in self._outputs]
            results = [view.to(example.device, copy=True) for view in views]
            tensors.synchronize(views[0])
            return results

    def _fill(self, name: str, value: Any) -> None:
        buffer, spec = self._inputs[name], self._specs[name]
        if tuple(np.shape(value)) != spec.shape:
            raise InputError(f"Session: input {name!r} has shape {tuple(np.shape(value))}, expected {spec.shape}")
        if tensors.is_foreign(value):
            view = tensors.to_library_of(value, buffer)
            if view.dtype != value.dtype:
                raise InputError(f"Session: input {name!r} has type {value.dtype}, expected {view.dtype}")
            view.copy_(value.detach())
            tensors.synchronize(view)
        else:
            array = np.ascontiguousarray(value)
            if array.dtype != spec.dtype:
                raise InputError(f"Session: input {name!r} has type {array.dtype}, expected {spec.dtype}")
            buffer.update_inplace(array)

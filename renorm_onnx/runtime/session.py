"""onnxruntime sessions whose every option is stated, and which run where they were told to or not at all.

onnxruntime's own default on a machine without CUDA is a working session on the CPU, without a warning. Here that is
a `MachineError` that names the missing piece, and so is a model of which one operator would run on the CPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import renorm_onnx.runtime.providers as providers
import renorm_onnx.runtime.sessions.tensors as tensors
from renorm_onnx.errors import InputError, MachineError, RenormError
from renorm_onnx.runtime.sessions.cuda_graph import CudaGraph
from renorm_onnx.runtime.sessions.feeds import misfit
from renorm_onnx.runtime.sessions.ort_errors import creation_error, run_error
from renorm_onnx.runtime.sessions.placement import Placed, compute_nodes, placement_of
from renorm_onnx.runtime.sessions.sources import source_of
from renorm_onnx.runtime.sessions.tensors import TensorSpec

LEVELS = {
    "off": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}

_SILENT = 4  # onnxruntime severities: 0 verbose ... 4 fatal; its exceptions carry the message anyway


class Session:
    """A model ready to run on one execution provider.

    Deploying a fused model on a GPU takes three lines::

        from renorm_onnx.runtime import Session
        session = Session("model.fused.onnx", provider="cuda")
        y = session(x)                                   # x: a torch tensor on the GPU, never copied

    A call with tensors of torch (or any library with DLPack) returns tensors of that library on the device of the
    inputs; a call with numpy arrays returns numpy arrays. Inputs are shared, not copied, if contiguous. One session
    may be used by several threads.

    With static shapes on CUDA, calls replay one CUDA graph: inputs are copied into fixed buffers on the device, and the
    results out of them. The graph has a session of its own, with weights of its own: it writes its intermediate values
    wherever they were when it was captured, and other runs, or results that are kept, must not lie there.

    Args:
        model: Path, `onnx.ModelProto`, `onnx_ir.Model`, or the bytes of a model.
        provider: "cpu", "cuda" or "cuda:N".
        optimize: onnxruntime's graph optimizations: "off", "basic", "extended" or "all".
        threads: Threads inside an operator; 0 is one per physical core.
        spinning: Let waiting threads spin: lower latency for one session, ruinous for several in one process.
        tf32: Let CUDA round the operands of convolutions and matrix products to 10 bits.
        cuda_graph: Capture a CUDA graph: True (MachineError if impossible), False, or None: if possible.
        strict: Refuse a model of which an operator that computes more than sizes would run on the CPU.
        allow_symlinks: Follow links to data files outside the model's folder.

    Raises:
        MachineError: The provider cannot be created here, an operator has no kernel on it, or onnxruntime is absent.
        ModelFileError: The model cannot be read, or onnxruntime refuses it.
        InputError: An option is not one of those above.
    """

    def __init__(
        self,
        model: Any,
        provider: str = "cpu",
        *,
        optimize: str = "all",
        threads: int = 0,
        spinning: bool = False,
        tf32: bool = False,
        cuda_graph: bool | None = None,
        strict: bool = True,
        allow_symlinks: bool = False,
    ) -> None:
        if optimize not in LEVELS:
            raise InputError(f"Session: optimize={optimize!r}, expected one of {', '.join(LEVELS)}")
        if threads < 0:
            raise InputError(f"Session: threads={threads!r}, expected 0 (one per core) or more")
        self.provider, self._device = providers.provider_of(provider)
        self.optimize, self.threads, self.spinning, self.tf32 = optimize, threads, spinning, tf32
        status = providers.provider_status(provider)
        if not status.creatable:
            raise MachineError(
                f"Session: provider {provider!r} cannot be created here: {status.stage}: {status.detail}. {status.fix}"
            )
        self._ort = providers.onnxruntime()
        source = source_of(model, allow_symlinks=allow_symlinks)
        self._session = self._create(source, graph=False, cpu=False)
        self.placement: tuple[Placed, ...] = placement_of(self._session)
        self.on_cpu: tuple[Placed, ...] = self._check_placement(source, strict)
        self.inputs = tuple(TensorSpec(i.name, i.type, tuple(i.shape)) for i in self._session.get_inputs())
        self.outputs = tuple(TensorSpec(o.name, o.type, tuple(o.shape)) for o in self._session.get_outputs())
        self._output_names = [output.name for output in self.outputs]
        bfloat16 = tensors.DTYPES["bfloat16"]
        self._has_bfloat16 = any(spec.dtype == bfloat16 for spec in (*self.inputs, *self.outputs))
        self._graph: CudaGraph | None = None
        if cuda_graph or (cuda_graph is None and self.provider == "cuda"):
            self._graph = self._capture(source, required=bool(cuda_graph))

    def run(
        self, feeds: Mapping[str, npt.ArrayLike], outputs: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Run on numpy arrays.

        Args:
            feeds: One array per input, of the input's element type.
            outputs: Names to return; None: all.

        Returns:
            The outputs by name, in the order asked for.

        Raises:
            InputError: A name, element type or shape does not fit the model, or an operator fails on these values.
            MachineError: The device ran out of memory.
        """
        names = list(outputs) if outputs is not None else self._output_names
        try:
            if self._has_bfloat16:
                binding = self._bind(feeds, names, ("cpu", 0))
                self._session.run_with_iobinding(binding)
                values = [tensors.to_numpy(value) for value in binding.get_outputs()]
            else:
                arrays = {name: np.asarray(value) for name, value in feeds.items()}
                values = self._session.run(names, arrays) if names else []  # it takes no names for all names
        except InputError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise self._explained(error, feeds, names) from error
        return dict(zip(names, values, strict=True))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on arrays or tensors, given in the order of the model's inputs or by name.

        Returns:
            The output, or a tuple of all if the model has several, of the kind of the inputs.

        Raises:
            InputError: As `run`.
            MachineError: As `run`.
        """
        feeds = self._named(args, kwargs)
        example = next((value for value in feeds.values() if tensors.is_foreign(value)), None)
        if self._graph is not None and self._graph.takes(example):
            results = self._graph.run(feeds, example)
        elif example is None:
            results = list(self.run(feeds).values())
        else:
            results = self._run_bound(feeds, example)
        return results[0] if len(results) == 1 else tuple(results)

    def warm_up(self, *args: Any, runs: int = 3, **kwargs: Any) -> None:
        """Run a few times, so that memory is allocated and algorithms are chosen before the first real call.

        Args:
            args: Inputs as for a call; without any, ones of the model's shapes with 1 for sizes that vary.
            runs: How often.
            kwargs: Inputs by name.

        Raises:
            InputError: As `run`.
        """
        feeds = self._named(args, kwargs) if args or kwargs else {spec.name: tensors.ones(spec) for spec in self.inputs}
        for _ in range(runs):
            self(**feeds)

    def replay(self) -> None:
        """Run the captured CUDA graph again, on the inputs of the last call.

        Raises:
            InputError: There is no CUDA graph.
        """
        if self._graph is None:
            raise InputError("Session.replay: this session has no CUDA graph")
        self._graph.replay()

    @property
    def uses_cuda_graph(self) -> bool:
        """Whether calls replay a CUDA graph."""
        return self._graph is not None

    def bind(self, feeds: Mapping[str, Any], device: tuple[str, int] | None = None) -> Any:
        """Return an `onnxruntime.IOBinding` with inputs and all outputs bound, for calls that move no memory.

        Args:
            feeds: Arrays or tensors by name; moved to the session's device now.
            device: Where the outputs go; None: the session's own device.

        Raises:
            InputError: An element type does not fit.
        """
        where = device or (self.provider, self._device)
        feeds = {name: self._on_device(name, value) for name, value in feeds.items()}
        return self._bind(feeds, self._output_names, where)

    def run_bound(self, binding: Any) -> None:
        """Run an `onnxruntime.IOBinding` and wait until its outputs are written.

        Raises:
            InputError: What is bound does not fit the model.
            MachineError: As `run`.
        """
        try:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise run_error(error) from error

    def _create(self, source: bytes | str, *, graph: bool, cpu: bool) -> Any:
        ort, on_gpu = self._ort, self.provider == "cuda"
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[self.optimize])
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = _SILENT
        entries = {
            "session.intra_op.allow_spinning": str(int(self.spinning)),
            "session.inter_op.allow_spinning": "0",
            "session.set_denormal_as_zero": "0",
            "session.record_ep_graph_assignment_info": "1",
            "session.disable_cpu_ep_fallback": str(int(on_gpu and not cpu)),
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        full = providers.PROVIDERS[self.provider]
        asked: list[Any] = [(full, self._cuda_options(graph)) if on_gpu else full]
        if on_gpu and cpu:
            asked.append(providers.PROVIDERS["cpu"])
        try:
            with providers.captured():
                # Without it, a run that fails on the GPU is repeated on the CPU, and so are all that follow.
                session = ort.InferenceSession(source, options, providers=asked, enable_fallback=0)
        except Exception as error:  # onnxruntime's exceptions share no base class
            if on_gpu and not cpu and "fallback to CPU EP has been explicitly disabled" in str(error):
                return self._create(source, graph=graph, cpu=True)
            raise creation_error(error, f"onnxruntime {ort.__version__} on {self.provider}") from error
        if session.get_providers()[0] != full:
            raise MachineError(f"Session: asked for {full}, onnxruntime created {session.get_providers()[0]}")
        return session

    def _cuda_options(self, graph: bool) -> dict[str, str]:
        return {
            "device_id": str(self._device),
            "use_tf32": str(int(self.tf32)),
            # Since onnxruntime 1.20 DEFAULT is cuDNN's slow fallback, and EXHAUSTIVE differs from run to run.
            "cudnn_conv_algo_search": "HEURISTIC",
            "cudnn_conv_use_max_workspace": "1",
            "do_copy_in_default_stream": "1",
            "enable_cuda_graph": str(int(graph)),
            "prefer_nhwc": "0",
        }

    def _check_placement(self, source: bytes | str, strict: bool) -> tuple[Placed, ...]:
        full = providers.PROVIDERS[self.provider]
        elsewhere = tuple(node for node in self.placement if node.provider != full)
        if not elsewhere or not strict:
            return elsewhere
        # A model too large for one protobuf is judged by its operators alone.
        if wrong := compute_nodes(elsewhere, source if isinstance(source, bytes) else None):
            listed = ", ".join(map(str, wrong[:5])) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise MachineError(
                f"Session: {len(wrong)} operators have no kernel on {full} and would run on the CPU: {listed}; "
                "pass strict=False to allow it"
            )
        return elsewhere

    def _capture(self, source: bytes | str, *, required: bool) -> CudaGraph | None:
        reason = ""
        if self.provider != "cuda":
            reason = f"provider is {self.provider!r}"
        elif not all(spec.is_static for spec in (*self.inputs, *self.outputs)):
            reason = "a shape varies"
        elif self.on_cpu:
            reason = f"{self.on_cpu[0]} runs on the CPU"
        if not reason:
            try:
                session = self._create(source, graph=True, cpu=False)
                graph = CudaGraph(self._ort, session, self.inputs, self.outputs, self._device)
            except Exception as error:  # capture can fail inside CUDA in many ways; the plain session still works
                reason = str(error)
            else:
                return graph
        if required:
            raise MachineError(f"Session: cuda_graph=True is not possible: {reason}")
        return None

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = [spec.name for spec in self.inputs]
        if len(args) > len(names):
            raise InputError(f"Session: {len(args)} inputs given, expected {len(names)}: {', '.join(names)}")
        feeds = {**dict(zip(names, args, strict=False)), **kwargs}
        if set(feeds) != set(names) or len(args) + len(kwargs) != len(feeds):
            raise InputError(f"Session: inputs given are {sorted(feeds)!r}, expected {names!r}")
        return feeds

    def _run_bound(self, feeds: Mapping[str, Any], example: Any) -> list[Any]:
        device = next((where for where in map(tensors.device_of, feeds.values()) if where[0] == "cuda"), ("cpu", 0))
        if self.provider == "cpu":
            device = ("cpu", 0)
        try:
            binding = self._bind(feeds, self._output_names, device)
            self.run_bound(binding)
        except InputError as error:
            raise self._explained(error, feeds) from error
        return [tensors.to_library_of(example, value) for value in binding.get_outputs()]

    def _bind(self, feeds: Mapping[str, Any], outputs: Sequence[str], device: tuple[str, int]) -> Any:
        binding = self._session.io_binding()
        specs = {spec.name: spec for spec in self.inputs}
        try:
            for name, value in feeds.items():
                if name not in specs:
                    raise InputError(f"Session: input {name!r} is not one of {list(specs)!r}")
                is_value = isinstance(value, self._ort.OrtValue)
                wrapped = value if is_value else tensors.to_ort_value(self._ort, specs[name], value)
                binding.bind_ortvalue_input(name, wrapped)
            for name in outputs:
                binding.bind_output(name, *device)
        except InputError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise run_error(error) from error
        return binding

    def _explained(self, error: Exception, feeds: Any, names: Sequence[str] = ()) -> RenormError:
        if unknown := sorted(set(names) - set(self._output_names)):
            return InputError(f"Session: outputs asked for are {unknown}, the model has {self._output_names}")
        optional = {value.name for value in self._session.get_overridable_initializers()}
        return misfit(self.inputs, optional, feeds) or (error if isinstance(error, RenormError) else run_error(error))

    def _on_device(self, name: str, value: Any) -> Any:
        spec = next((spec for spec in self.inputs if spec.name == name), None)
        if spec is None or self.provider == "cpu" or tensors.device_of(value)[0] == "cuda":
            return value
        array = np.ascontiguousarray(value)
        if array.dtype != spec.dtype:
            raise InputError(f"Session: input {name!r} has type {array.dtype}, expected {spec.dtype}")
        return self._ort.OrtValue.ortvalue_from_numpy(array, "cuda", self._device)


def open_session(
    model: Any,
    provider: str = "cpu",
    *,
    optimize: str = "off",
    threads: int = 1,
    strict: bool = True,
    allow_symlinks: bool = False,
) -> Session:
    """Open a model for comparing: optimizations off, one thread, no spinning, no TF32, no CUDA graph.

    Args:
        model: Path, `onnx.ModelProto`, `onnx_ir.Model`, or the bytes of a model.
        provider: "cpu", "cuda" or "cuda:N".
        optimize: onnxruntime's graph optimizations: "off", "basic", "extended" or "all".
        threads: Threads inside an operator; 0 is one per physical core.
        strict: Refuse a model of which an operator that computes more than sizes would run on the CPU.
        allow_symlinks: Follow links to data files outside the model's folder.

    Raises:
        MachineError: As `Session`.
        ModelFileError: As `Session`.
        InputError: As `Session`.
    """
    return Session(
        model,
        provider,
        optimize=optimize,
        threads=threads,
        spinning=False,
        tf32=False,
        cuda_graph=False,
        strict=strict,
        allow_symlinks=allow_symlinks,
    )

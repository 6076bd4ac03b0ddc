"""Kills a process while it saves models, again and again: ``python -m runtime_tests.crash_writes``.

A child replaces one model by another in a loop, with or without a data file. It is killed with SIGKILL at a random
moment; whatever it was doing, the file that remains must be one of the two models, whole, with its data file whole.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from renorm_onnx import model_file

SCALES = (1.0, 2.0)
SHAPE = (500, 4, 32, 32)


def model(scale: float, *, external: bool) -> ir.Model:
    """A model of 8 MB whose every weight is `scale`."""
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in "xy"]
    weight = numpy_helper.from_array(np.full(SHAPE, scale, np.float32), "w")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", info[:1], info[1:], [weight])
    built = model_file.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    if external:
        model_file.EXTERNAL_ABOVE = 0  # type: ignore[misc]
    return built


def write_forever(path: Path, *, external: bool) -> None:
    """Replace `path` by the one and the other model until somebody ends this."""
    models = [model(scale, external=external) for scale in SCALES]
    while True:
        for each in models:
            model_file.save(each, path, force=True)


def killed_writer(path: Path, moment: float, *, external: bool) -> None:
    """Start a writer in a process of its own, and kill it `moment` seconds after its first file is there.

    Raises:
        AssertionError: The writer ended by itself.
    """
    process = os.fork()
    if process == 0:
        try:
            write_forever(path, external=external)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, "the writer wrote nothing"
        time.sleep(0.001)
    time.sleep(moment)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "the writer ended by itself"


def crash(times: int, seed: int) -> int:
    """Kill `times` writers, each at a moment of its own.

    Args:
        times: How often.
        seed: Chooses the moments.

    Returns:
        How many of the kills left a temporary file behind, that is, hit a writer in the middle.

    Raises:
        AssertionError: What remained was not one of the two models, whole.
    """
    rng = random.Random(seed)
    interrupted = 0
    for index in range(times):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            killed_writer(path, rng.uniform(0.0, 0.2), external=bool(index % 2))
            tensor = model_file.load(path).graph.initializers["w"].const_value
            assert tensor is not None
            values = tensor.numpy()
            assert values.shape == SHAPE
            assert any((values == scale).all() for scale in SCALES), f"kill {index}: a mixture of two models"
            interrupted += any(name.endswith(".tmp") for name in os.listdir(folder))
    return interrupted


def main() -> int:
    """Run by command."""
    parser = argparse.ArgumentParser(description="kill a process while it saves models")
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    interrupted = crash(options.times, options.seed)
    print(f"{options.times} writers killed, {interrupted} of them in the middle of a file; each left a whole model")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Throws damaged models at `model_file.load` and watches what it costs: ``python -m runtime_tests.fuzz_model_file``.

Every input is one of a few seeds (external data, functions, branches, sparse tensors), damaged in one to six places:
bits, bytes and ranges of the file, or fields of the parsed message, set to values that hurt. The answer must be a model
that can be written, or a `ModelFileError` of one line. Inputs run in a child process, which this one watches for
crashes and for answers that take longer than 10 s. The child watches its own memory, which may not grow beyond four
times the file plus 500 MB, and every file that is opened, none of which may lie outside of the model's folder.
"""

import argparse
import json
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from renorm_onnx import model_file
from renorm_onnx.errors import ModelFileError

SECONDS = 10.0
EXTRA_BYTES = 500_000_000
CHILD = ["-m", "runtime_tests.fuzz_model_file"]
HARMFUL_INTEGERS = (-1, 0, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
HARMFUL_TEXTS = (
    "",
    "x",
    "w",
    "y",
    "../secret.data",
    "/etc/passwd",
    ".",
    "a\0b",
    "é" * 300,
    "ai.onnx",
    "f",
    "F",
    "-1",
    "9" * 30,
)


def seeds() -> list[onnx.ModelProto]:
    """Small models that have something of everything; their external data lie in ``w.data``, 4096 bytes."""
    rng = np.random.default_rng(0)
    info = helper.make_tensor_value_info
    ends = [info("x", TensorProto.FLOAT, ["N", 4, 8, 8])], [info("y", TensorProto.FLOAT, ["N", 4, 8, 8])]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)

    norm = [weight(name, 4) for name in "sbmv"]
    conv = helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4)
    nodes = [conv, helper.make_node("BatchNormalization", ["c", *"sbmv"], ["y"])]
    plain = helper.make_graph(nodes, "g", *ends, [weight("w", 4, 4, 3, 3), *norm])

    function = helper.make_function(
        "f", "F", ["a"], ["b"], [helper.make_node("LeakyRelu", ["a"], ["b"])], opsets[:1], ["alpha"]
    )
    function.node[0].attribute.add(name="alpha", ref_attr_name="alpha", type=AttributeProto.FLOAT)
    outer = helper.make_function("f", "G", ["a"], ["b"], [helper.make_node("F", ["a"], ["b"], domain="f")], opsets)
    calls = [
        helper.make_node("G", ["x"], ["a"], domain="f"),
        helper.make_node("F", ["a"], ["y"], domain="f", alpha=0.1),
    ]

    inner = info("t", TensorProto.FLOAT, None)
    branches = [
        helper.make_graph([helper.make_node("Mul", ["x", "k"], ["t"])], "then", [], [inner], [weight("k", 1)]),
        helper.make_graph([helper.make_node("Relu", ["x"], ["t"])], "else", [], [inner]),
    ]
    branch = helper.make_node("If", ["q"], ["y"], then_branch=branches[0], else_branch=branches[1])
    condition = numpy_helper.from_array(np.array(True), "q")

    sparse = onnx.SparseTensorProto(
        values=weight("w", 2), indices=numpy_helper.from_array(np.array([1, 3], np.int64)), dims=[1, 4, 1, 1]
    )
    dense = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", *ends)
    dense.sparse_initializer.append(sparse)

    external = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", *ends)
    for name, offset in (("w", 0), ("v", 1024)):
        tensor = TensorProto(name=name, data_type=1, dims=[4, 8, 8], data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "w.data"), ("offset", str(offset)), ("length", "1024")):
            tensor.external_data.add(key=key, value=value)
        external.initializer.append(tensor)

    graphs = [
        plain,
        helper.make_graph(calls, "g", *ends),
        helper.make_graph([branch], "g", *ends, [condition]),
        dense,
        external,
    ]
    models = [helper.make_model(graph, opset_imports=opsets, ir_version=10) for graph in graphs]
    models[1].functions.extend([function, outer])
    return models


def damaged(seed: onnx.ModelProto, rng: random.Random) -> bytes:
    """The bytes of `seed` with one to six things wrong."""
    if rng.random() < 0.5:
        proto = onnx.ModelProto()
        proto.CopyFrom(seed)
        for _ in range(rng.randint(1, 6)):
            _damage_message(proto, rng)
        try:
            return proto.SerializeToString()
        except ValueError:  # a text that is not UTF-8
            return seed.SerializeToString()
    content = bytearray(seed.SerializeToString())
    for _ in range(rng.randint(1, 6)):
        _damage_bytes(content, rng)
    return bytes(content)


def _damage_bytes(content: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(content) + 1)
    until = min(len(content), at + rng.choice((1, 2, 4, 16, 256)))
    kind = rng.randrange(6)
    if kind == 0:
        content[at:until] = bytes(until - at)
    elif kind == 1:
        content[at:until] = rng.randbytes(until - at)
    elif kind == 2:
        del content[at:until]
    elif kind == 3:
        content[at:at] = content[at:until]
    elif kind == 4:
        del content[at:]
    elif at < len(content):
        content[at] ^= 1 << rng.randrange(8)
    if not content:
        content += b"\x08"


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from _messages(part)


def _damage_message(proto: onnx.ModelProto, rng: random.Random) -> None:
    message = rng.choice(list(_messages(proto)))
    field = rng.choice(message.DESCRIPTOR.fields)
    value = getattr(message, field.name)
    repeated = not isinstance(value, str | bytes | int | float) and not hasattr(value, "DESCRIPTOR")
    if repeated and len(value):
        kind = rng.randrange(4)
        if kind == 0:
            del value[rng.randrange(len(value))]
            return
        if kind == 1:
            value.append(rng.choice(list(value)))
            return
        if kind == 2:
            order = list(value)
            rng.shuffle(order)
            del value[:]
            value.extend(order)
            return
    if field.message_type is not None:
        if repeated:
            value.add()
        elif rng.random() < 0.5:
            message.ClearField(field.name)
        else:
            value.SetInParent()
        return
    new = _harmful(field, rng)
    if repeated:
        if len(value) and rng.random() < 0.7:
            value[rng.randrange(len(value))] = new
        else:
            value.append(new)
    elif rng.random() < 0.2:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, new)


def _harmful(field: Any, rng: random.Random) -> Any:
    if field.type == field.TYPE_STRING:
        return rng.choice(HARMFUL_TEXTS)
    if field.type == field.TYPE_BYTES:
        return rng.choice((b"", b"\xff", bytes(16), rng.randbytes(64)))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice((0.0, float("nan"), float("inf"), 1e30))
    if field.type == field.TYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    number = rng.choice(HARMFUL_INTEGERS)
    if field.type == field.TYPE_INT32:
        return number % 2**32 - 2**31
    return number % 2**64 if field.type == field.TYPE_UINT64 else number


def fuzz(inputs: int, seed: int, report: Callable[[dict[str, Any]], None]) -> None:
    """Load `inputs` damaged models in this process; `report` is told before each input and at the end.

    Raises:
        AssertionError: An answer that is neither a model nor one line; memory or files that are no business of it.
    """
    models = seeds()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model", "m.onnx")
        path.parent.mkdir()
        Path(folder, "secret.data").write_bytes(bytes(4096))
        path.with_name("w.data").write_bytes(bytes(4096))
        watching = _watch(path.parent)
        messages: dict[str, int] = {}
        for index in range(inputs):
            content = damaged(models[index % len(models)], random.Random(f"{seed} {index}"))
            path.write_bytes(content)
            report({"index": index, "bytes": len(content)})
            before = _peak()
            watching["on"] = True
            message = _outcome(path)
            watching["on"] = False
            assert "\n" not in message, f"input {index}: {message}"
            assert not watching["outside"], f"input {index} opened {watching['outside']}"
            assert _peak() - before < EXTRA_BYTES + 4 * len(content), f"input {index} took {_peak() - before:,} bytes"
            messages[message] = messages.get(message, 0) + 1
        report({"done": True, "loaded": messages.pop("", 0), "messages": len(messages), "peak": _peak()})


def _outcome(path: Path) -> str:
    """What was wrong with the model, or nothing; any other exception is a finding."""
    try:
        model_file.model_bytes(model_file.load(path))
    except ModelFileError as error:
        return str(error)
    return ""


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _watch(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = {"on": False, "outside": []}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and state["on"] and isinstance(arguments[0], str | bytes):
            name = os.path.abspath(os.fsdecode(arguments[0]))
            library = name.startswith((sys.prefix, sys.base_prefix))
            if not library and os.path.dirname(name) != str(folder):
                state["outside"].append(name)

    sys.addaudithook(hook)
    return state


def run(inputs: int, seed: int) -> dict[str, Any]:
    """Fuzz in a child process and watch it.

    Returns:
        How many inputs loaded, how many different messages came, the child's peak memory in bytes.

    Raises:
        RuntimeError: The child crashed, hung or found something; the text says at which input.
    """
    command = [sys.executable, *CHILD, "--child", "--inputs", str(inputs), "--seed", str(seed)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    assert child.stdout is not None
    last: dict[str, Any] = {}
    pending = b""
    with child:
        while True:
            # The first answer waits for the imports.
            ready = select.select([child.stdout], [], [], SECONDS if last else 6 * SECONDS)[0]
            if not ready:
                child.kill()
                raise RuntimeError(f"no answer within {SECONDS} s: seed {seed}, {last}")
            chunk = os.read(child.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            *lines, pending = (pending + chunk).split(b"\n")
            last = json.loads(lines[-1]) if lines else last
    if child.returncode or not last.get("done"):
        raise RuntimeError(f"the child ended with {child.returncode}: seed {seed}, {last}")
    return last


def main() -> int:
    """Run by command; exit 1 when something was found."""
    parser = argparse.ArgumentParser(description="throw damaged models at model_file.load")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        fuzz(options.inputs, options.seed, lambda state: print(json.dumps(state), flush=True))
        return 0
    started = time.monotonic()
    try:
        result = run(options.inputs, options.seed)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{options.inputs:,} inputs in {time.monotonic() - started:.0f} s: {result['loaded']:,} loaded, the others "
        f"refused with {result['messages']:,} different messages; peak memory {result['peak'] / 1e6:.0f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

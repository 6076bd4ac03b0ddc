"""What a caller notices who is given another model: names, their order, types, sizes, and what has a default."""

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

from renorm_onnx.errors import InputError
from renorm_onnx.runtime.judging.interface import interface_problems

GIVEN = "float[N,4] x, float[N] z", "float[N,4] y, float[N] w"


def model(inputs, outputs, *, version=8, default=()):
    text = f'<ir_version: {version}, opset_import: ["" : 17]> g ({inputs}) => ({outputs}) {{ a = Relu(x) }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.zeros(3, np.float32), name) for name in default)
    return ir.from_proto(proto)


@pytest.mark.parametrize(
    ("inputs", "outputs", "problem"),
    [
        (GIVEN[0], GIVEN[1], ""),
        ("float[M,4] x, float[5] z", GIVEN[1], ""),
        ("float[N,4] x", GIVEN[1], "inputs differ: missing ['z']"),
        (f"{GIVEN[0]}, float[N] v", GIVEN[1], "inputs differ: unexpected ['v']"),
        ("float[N] z, float[N,4] x", GIVEN[1], "inputs are in another order: ['z', 'x'], expected ['x', 'z']"),
        (GIVEN[0], "float[N,4] y", "outputs differ: missing ['w']"),
        (GIVEN[0], "float[N] w, float[N,4] y", "outputs are in another order: ['w', 'y'], expected ['y', 'w']"),
        ("double[N,4] x, float[N] z", GIVEN[1], "input 'x' has type DOUBLE, expected FLOAT"),
        (GIVEN[0], "float[N,5] y, float[N] w", "output 'y' has declared shape ('None', '5'), expected ('None', '4')"),
        (GIVEN[0], "float[N,4,1] y, float[N] w", "output 'y' has declared shape"),
    ],
)
def test_a_caller_notices_names_order_types_and_sizes(inputs, outputs, problem):
    found = interface_problems(model(*GIVEN), model(inputs, outputs))
    assert len(found) == bool(problem)
    assert problem.split("(")[0] in "".join(found)


def test_what_may_be_overridden_must_stay_an_input_unless_all_initializers_had_to_be_inputs():
    inputs = "float[N,4] x, float[3] k"
    for version, lost in ((8, ["inputs that a caller may override are missing: ['k']"]), (3, [])):
        want = model(inputs, "float[N,4] y", version=version, default=["k"])
        assert interface_problems(want, model("float[N,4] x", "float[N,4] y", version=version)) == lost
    assert interface_problems(want, model(inputs, "float[N,4] y", version=8)) == ["inputs differ: unexpected ['k']"]


def test_a_reference_without_outputs_is_an_input_error():
    with pytest.raises(InputError, match="has no outputs"):
        interface_problems(model("float[N,4] x", ""), model("float[N,4] x", ""))

"""What `functions=False` and `renorm-onnx inline` write is accepted by runtimes that know no functions, and agrees.

Each runtime is asked in a process of its own: they bring their own libraries and warnings. One that is not installed
is skipped by name.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from renorm_onnx.delivery import inline_file
from renorm_onnx.exporter import to_onnx
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d
from renorm_onnx.runtime.comparison import Tolerance, compare
from runtime_tests.write_frozen import calibrated

pytestmark = pytest.mark.peers

#: Other kernels than onnxruntime's, in float32 throughout.
FLOAT32 = Tolerance(rms=1e-5, peak=1e-4)

#: Package to find -> code that turns the file `path` and the array `x` into the array `y`.
RUNTIMES = {
    "openvino": """
import openvino
compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
y = compiled(x)[0]
""",
    "cv2": """
import cv2
net = cv2.dnn.readNetFromONNX(path)
net.setInput(x)
y = net.forward()
""",
    "onnx2torch": """
import torch
try:
    import torchvision
except RuntimeError:  # built for another torch: its operators are not needed, their names are
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
import onnx2torch
y = onnx2torch.convert(path).eval()(torch.from_numpy(x)).detach().numpy()
""",
    "tinygrad": """
from tinygrad import Tensor
from tinygrad.nn.onnx import OnnxRunner
runner = OnnxRunner(path)
y = next(iter(runner({name: Tensor(x) for name in runner.graph_inputs}).values())).numpy()
""",
}

RUN = """
import sys
import numpy as np
path, given, result = sys.argv[1:]
x = np.load(given)
{code}
np.save(result, y)
"""


class Convolutions(nn.Module):
    """Norms after, between and before convolutions, a residual, a grouped and a transposed one.

    Nothing else: onnx2torch knows neither ReduceMean of opset 18 nor the Reshape that torch writes for Flatten.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), BatchRenorm2d(8), nn.ReLU())
        self.before, self.conv = BatchRenorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up, self.after = nn.ConvTranspose2d(8, 4, 2, stride=2), BatchRenorm2d(4, affine=False)
        self.head = nn.Conv2d(4, 5, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.after(self.up(self.conv(self.before(x)).relu() + x)))


class Perceptron(nn.Module):
    """Norms before and after Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            BatchRenorm1d(6), nn.Linear(6, 16), BatchRenorm1d(16), nn.ReLU(), BatchRenorm1d(16), nn.Linear(16, 3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


NETWORKS = {
    "convolutions": (Convolutions, (2, 3, 12, 12)),
    "perceptron": (Perceptron, (4, 6)),
}


def affine_given(net: nn.Module) -> nn.Module:
    """Calibrated in float32, layers without affine parameters included."""
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, (BatchRenorm1d, BatchRenorm2d)) and not m.affine:
            m.running_mean.fill_(0.2)
            m.running_var.fill_(0.7)
            m.num_batches_tracked.fill_(1)
    calibrated(nn.ModuleList(m for m in net.modules() if getattr(m, "affine", False)))
    return net.eval()


def ask(runtime: str, path: Path, x: np.ndarray, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `path` on `x`; the result lies in `folder` as y.npy."""
    np.save(folder / "x.npy", x)
    command = [sys.executable, "-W", "ignore", "-c", RUN.format(code=RUNTIMES[runtime]), str(path)]
    return subprocess.run(
        [*command, str(folder / "x.npy"), str(folder / "y.npy")],
        capture_output=True,
        text=True,
        timeout=300,
        env={"DEV": "PYTHON", **os.environ},  # tinygrad: needs no compiler; the others do not read it
    )


def need(runtime: str) -> None:
    if importlib.util.find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed")


@pytest.mark.parametrize("way", ["functions=False", "inline"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_plain_files_run_and_agree(runtime: str, network: str, way: str, tmp_path: Path) -> None:
    need(runtime)
    build, shape = NETWORKS[network]
    net, path = affine_given(build()), tmp_path / "plain.onnx"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if way == "inline":
        to_onnx(net, x, tmp_path / "functions.onnx")
        inline_file(tmp_path / "functions.onnx", path)
    else:
        to_onnx(net, x, path, functions=False)
    done = ask(runtime, path, x.numpy(), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        want = net.double()(x.double()).numpy().astype(np.float32)
    report = compare(want, np.load(tmp_path / "y.npy").astype(np.float32), FLOAT32)
    assert report.ok, report


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_files_with_functions_are_not_for_these_runtimes(runtime: str, tmp_path: Path) -> None:
    need(runtime)
    build, shape = NETWORKS["convolutions"]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    to_onnx(affine_given(build()), x, tmp_path / "functions.onnx")
    assert ask(runtime, tmp_path / "functions.onnx", x.numpy(), tmp_path).returncode != 0

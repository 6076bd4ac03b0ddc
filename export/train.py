"""Training a network on an image set, with its curves and the corrections that batch renormalization made."""

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own name for it)
from tqdm import tqdm

from export.data import ImageSet
from renorm_onnx.errors import InputError, MachineError
from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

_QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Recipe:
    """How to train; nothing here depends on the network.

    Attributes:
        steps: Updates of the weights.
        batch_size: Images per step.
        learning_rate: At the start; falls to 0 along half a cosine.
        weight_decay: Of all parameters.
        seed: Of the order and the augmentation of the images.
        evaluations: How often the curves are sampled, evenly over the steps.
        curve_images: At most so many test images are evaluated for each point of a curve.
    """

    steps: int
    batch_size: int
    learning_rate: float = 0.02
    weight_decay: float = 1e-3
    seed: int = 0
    evaluations: int = 25
    curve_images: int = 2000

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 2), ("evaluations", 1), ("curve_images", 1)):
            if getattr(self, name) < least:
                raise InputError(f"training: {name}={getattr(self, name)!r}, expected at least {least}")
        if not self.learning_rate > 0:
            raise InputError(f"training: learning_rate={self.learning_rate!r}, expected a number > 0")


@dataclass
class Curves:
    """What was seen while training; every list has one entry per evaluation.

    Attributes:
        step: Steps done.
        train_loss: Mean cross-entropy of the batches since the last entry, in training mode, in nats.
        train_error: Share of wrong answers on the same batches.
        test_loss: Cross-entropy on test images in inference mode, in nats.
        test_error: Share of wrong answers on the same images.
        r: 5 %, 50 % and 95 % quantile of sigma_B / sigma over all channels of one batch, before clipping.
        d: The same of (mu_B - mu) / sigma.
        r_max: Bound on r in force at that step; 1 for plain batch normalization.
        d_max: Bound on d in force at that step; 0 for plain batch normalization.
    """

    step: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_error: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_error: list[float] = field(default_factory=list)
    r: list[tuple[float, float, float]] = field(default_factory=list)
    d: list[tuple[float, float, float]] = field(default_factory=list)
    r_max: list[float] = field(default_factory=list)
    d_max: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The lists as plain data for JSON."""
        return asdict(self)


class CorrectionProbe:
    """Record r and d, before clipping, of every BatchRenorm layer while the context is open.

    Attributes:
        r: One tensor of shape (C,) per layer call, in call order: sigma_B / sigma.
        d: The same of (mu_B - mu) / sigma.
        r_max, d_max: The bounds of the first layer called; 1 and 0 before any.
    """

    def __init__(self, network: nn.Module) -> None:
        self.r: list[Tensor] = []
        self.d: list[Tensor] = []
        self.r_max, self.d_max = 1.0, 0.0
        self._layers = [m for m in network.modules() if isinstance(m, BatchRenorm1d | BatchRenorm2d | BatchRenorm3d)]

    def __enter__(self) -> "CorrectionProbe":
        self._handles = [layer.register_forward_pre_hook(self._observe) for layer in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _observe(self, layer: BatchRenorm1d | BatchRenorm2d | BatchRenorm3d, inputs: tuple[Tensor, ...]) -> None:
        if layer.running_mean is None or layer.running_var is None or layer.num_batches_tracked is None:
            return
        x = inputs[0].transpose(0, 1).flatten(1)  # (N, C, *) -> (C, N*...)
        if not self.r:
            self.r_max, self.d_max = layer.schedule(int(layer.num_batches_tracked), layer.r_max, layer.d_max)
        sigma = (layer.running_var + layer.eps).sqrt()
        self.r.append((x.var(dim=1, unbiased=False) + layer.eps).sqrt() / sigma)
        self.d.append((x.mean(dim=1) - layer.running_mean) / sigma)

    def quantiles(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Return the 5 %, 50 % and 95 % quantiles of r and of d over all channels seen; 1 and 0 if none was."""
        if not self.r:
            return (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
        r = np.quantile(torch.cat(self.r).cpu().numpy(), _QUANTILES)
        d = np.quantile(torch.cat(self.d).cpu().numpy(), _QUANTILES)
        return (float(r[0]), float(r[1]), float(r[2])), (float(d[0]), float(d[1]), float(d[2]))


def choose_device(name: str) -> tuple[torch.device, str]:
    """Find the device to train on.

    Args:
        name: "cpu", "cuda", or "auto" for CUDA where a convolution really runs on it, else the CPU.

    Returns:
        The device and a name for people.

    Raises:
        MachineError: "cuda" was asked for and does not work here.
    """
    if name == "cpu":
        return torch.device("cpu"), "CPU"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reason = "torch finds no CUDA device"
        if torch.cuda.is_available():
            try:
                F.conv2d(torch.zeros(1, 1, 3, 3, device="cuda"), torch.zeros(1, 1, 3, 3, device="cuda")).cpu()
                return torch.device("cuda"), torch.cuda.get_device_name()
            except (RuntimeError, AssertionError) as error:  # The latter: a torch built without CUDA.
                reason = str(error).splitlines()[0]
        elif caught:
            reason = str(caught[0].message).splitlines()[0]
    if name == "cuda":
        raise MachineError(f"device 'cuda': a convolution does not run on it: {reason}")
    return torch.device("cpu"), "CPU"


def augmented(images: Tensor, generator: torch.Generator, *, flips: bool) -> Tensor:
    """Shift each image by up to an eighth of its size, edges repeated, and mirror every other one if `flips`.

    Args:
        images: Shape (N, C, H, W).
        generator: On the CPU; advanced.
        flips: Whether to mirror at random.

    Returns:
        New images of the same shape.
    """
    n, c, h, w = images.shape
    reach = max(h // 8, 1)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * reach + 1, (2, n, 1), generator=generator)
    rows, columns = torch.arange(h) + offsets[0], torch.arange(w).expand(n, w)
    if flips:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, w - 1 - columns, columns)
    columns = columns + offsets[1]
    rows, columns = rows.to(images.device), columns.to(images.device)
    image, channel = torch.arange(n, device=images.device), torch.arange(c, device=images.device)
    # Each index broadcasts to (N, C, H, W).
    return padded[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def train(network: nn.Module, data: ImageSet, recipe: Recipe, device: torch.device, *, label: str) -> Curves:
    """Train a network in place with SGD, Nesterov momentum 0.9 and a cosine schedule; leave it in inference mode.

    Two networks trained by one recipe see the same images in the same order.

    Args:
        network: From (N, C, H, W) to logits (N, classes); moved to `device`.
        data: The images.
        recipe: The numbers.
        device: Where to train.
        label: In front of the progress bar.

    Returns:
        The curves.

    Raises:
        InputError: The training split is smaller than one batch.
    """
    if len(data.train_images) < recipe.batch_size:
        raise InputError(f"training: batch_size={recipe.batch_size}, expected at most {len(data.train_images)} images")
    network.to(device).train()
    images = torch.from_numpy(data.train_images).to(device)
    labels = torch.from_numpy(data.train_labels).to(device)
    optimizer = torch.optim.SGD(
        network.parameters(), recipe.learning_rate, 0.9, weight_decay=recipe.weight_decay, nesterov=True, fused=True
    )
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = _batches(len(images), recipe, generator)
    curves, tally = Curves(), torch.zeros(3, device=device)  # summed loss, wrong answers, images
    sampled = {round((k + 1) * recipe.steps / recipe.evaluations) for k in range(recipe.evaluations)}
    for step in tqdm(range(1, recipe.steps + 1), desc=label, unit="step", mininterval=0.5, leave=True):
        index = next(batches).to(device)
        x, target = augmented(images[index], generator, flips=data.flips), labels[index]
        probe = CorrectionProbe(network)
        if step in sampled:
            with probe:
                logits = network(x)
        else:
            logits = network(x)
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        falling.step()
        with torch.no_grad():
            wrong = (logits.argmax(1) != target).sum()
            tally += torch.stack([loss * len(index), wrong, torch.full_like(loss, len(index))])
        if step in sampled:
            _sample(curves, step, tally, probe, network, data, recipe.curve_images)
            tally.zero_()
    network.eval()
    return curves


def predict(network: nn.Module, images: NDArray[np.float32], device: torch.device, *, batch: int = 500) -> Tensor:
    """Compute the logits of many images in inference mode; the network's mode is restored.

    Args:
        network: From (N, C, H, W) to logits (N, classes), on `device`.
        images: Shape (N, C, H, W).
        device: Where the network is.
        batch: Images per call.

    Returns:
        Logits on the CPU, shape (N, classes).
    """
    was_training = network.training
    network.eval()
    with torch.no_grad():
        parts = [network(chunk.to(device)).cpu() for chunk in torch.split(torch.from_numpy(images), batch)]
    network.train(was_training)
    return torch.cat(parts)


def _batches(count: int, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of full batches for ever, each epoch in a new order."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from torch.split(order[: count - count % recipe.batch_size], recipe.batch_size)


def _sample(
    curves: Curves,
    step: int,
    tally: Tensor,
    probe: CorrectionProbe,
    network: nn.Module,
    data: ImageSet,
    curve_images: int,
) -> None:
    """Append one entry to every list of `curves`."""
    loss, wrong, seen = tally.tolist()
    logits = predict(network, data.test_images[:curve_images], tally.device)
    labels = torch.from_numpy(data.test_labels[:curve_images])
    r, d = probe.quantiles()
    curves.step.append(step)
    curves.train_loss.append(loss / seen)
    curves.train_error.append(wrong / seen)
    curves.test_loss.append(F.cross_entropy(logits, labels).item())
    curves.test_error.append(float((logits.argmax(1) != labels).float().mean()))
    curves.r.append(r)
    curves.d.append(d)
    curves.r_max.append(probe.r_max)
    curves.d_max.append(probe.d_max)

"""MobileNetV2: inverted residuals with linear bottlenecks.

Source: Sandler et al. 2018 (arXiv:1801.04381), table 2. Every norm stands behind a convolution that nobody else reads
(depthwise ones among them), so all 52 fold.
"""

from functools import partial

from torch import Tensor, nn

from models.parts import NormFactory, example_images, initialize_convolutions

# Table 2: expansion t, output channels c, repeats n, stride s of the first repeat.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _scaled(channels: int, width: float) -> int:
    """Scale to the nearest multiple of 8, at least 8, never more than 10 % below: the rule of the authors' code."""
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


def _conv_norm(
    in_channels: int, out_channels: int, norm: NormFactory, *, kernel: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    padding = kernel // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
    return [conv, norm(out_channels)]


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter by depthwise 3x3, project by 1x1 without activation; add the input where shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, norm: NormFactory) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [*_conv_norm(in_channels, hidden, norm), nn.ReLU6()]
        layers += [*_conv_norm(hidden, hidden, norm, kernel=3, stride=stride, groups=hidden), nn.ReLU6()]
        layers += _conv_norm(hidden, out_channels, norm)
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        y: Tensor = self.body(x)
        return x + y if self.residual else y


def mobilenet_v2(
    width: float = 1.0,
    num_classes: int = 1000,
    in_channels: int = 3,
    norm: NormFactory = nn.BatchNorm2d,
    dropout: float = 0.2,
) -> nn.Sequential:
    """Build MobileNetV2.

    With the defaults: 52 convolutions, 52 norms, 3,504,872 parameters.

    Args:
        width: Factor on every number of channels but the last layer's, which never shrinks below 1280.
        num_classes: Length of the output.
        in_channels: Of the images.
        norm: Makes each norm from its number of channels.
        dropout: Probability before the classifier.

    Returns:
        A module from (N, in_channels, H, W) to logits (N, num_classes).
    """
    channels = _scaled(32, width)
    layers: list[nn.Module] = [*_conv_norm(in_channels, channels, norm, kernel=3, stride=2), nn.ReLU6()]
    for expansion, out_channels, repeats, first_stride in _STAGES:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            layers.append(InvertedResidual(channels, _scaled(out_channels, width), stride, expansion, norm))
            channels = _scaled(out_channels, width)
    last = max(1280, _scaled(1280, width))
    layers += [*_conv_norm(channels, last, norm), nn.ReLU6()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(last, num_classes)]
    network = nn.Sequential(*layers)
    initialize_convolutions(network)
    return network


example_inputs = partial(example_images, size=224)
"""One batch of ImageNet-sized images; options as `models.parts.example_images`."""

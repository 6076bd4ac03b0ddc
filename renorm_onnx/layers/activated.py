"""Batch renormalization with a dropout and an activation behind it, in one layer.

Networks of timm are built of such layers (`BatchNormAct2d`). The activation is part of the layer, not a layer beside
it, so that state dicts name the parameters ``bn1.weight``, with or without an activation. What takes the place of such
a layer must be one layer too.
"""

from typing import Any

import torch
from torch import Tensor, nn

from renorm_onnx.layers.modules import BatchRenorm2d, _BatchRenorm, as_leaf


class Activated(_BatchRenorm):
    """A batch renormalization layer whose forward goes on with `drop` and then `act`.

    Args:
        *args: As the layer it is made of.
        origin: Class of the layer that this one took the place of; `to_batchnorm` makes one of it again.
        drop: Applied to what the norm returns.
        act: Applied to what `drop` returns.
        **kwargs: As the layer it is made of.

    Raises:
        InputError: As `BatchRenorm2d`.
    """

    followers = ("drop", "act")

    def __init__(self, *args: Any, origin: type[nn.Module], drop: nn.Module, act: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.origin = origin
        self.drop = drop
        self.act = act

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize x as `BatchRenorm2d` does, then apply `drop` and `act`.

        Args:
            x: Shape (N, C, *).
            mask: Valid positions, as in `BatchRenorm2d`.

        Returns:
            What `act` returns.

        Raises:
            InputError: As `BatchRenorm2d`.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            y = self._scripted_forward(x)
        elif isinstance(x, torch.fx.Proxy):
            return as_leaf(self, x, mask)
        else:
            y = self._normalized(x, mask)
        z: Tensor = self.act(self.drop(y))
        return z

    @torch.jit.unused
    def _normalized(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return super().forward(x, mask)


class BatchRenormAct2d(Activated, BatchRenorm2d):
    """`BatchRenorm2d`, then `drop`, then `act`; arguments as in `Activated`."""

"""LazyBatchRenorm1d, LazyBatchRenorm2d and LazyBatchRenorm3d: layers that take C from their first batch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from renorm_onnx.layers.modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, _BatchRenorm

_ONES = ("weight", "running_var", "renorm_var")


class _LazyBatchRenorm(LazyModuleMixin, _BatchRenorm):
    """What the three share: until the first batch there are parameters and buffers, but no sizes."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(1, eps, momentum, affine, track_running_stats, device, dtype, **options)  # type: ignore[no-untyped-call]
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = UninitializedParameter(device=device, dtype=dtype)  # type: ignore[call-arg, assignment]
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dim() == 1:
                self._buffers[name] = UninitializedBuffer(device=device, dtype=dtype)  # type: ignore[call-arg]
        self.__dict__["num_features"] = 0  # as torch's lazy layers; no option that a layer could be given

    def initialize_parameters(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take C from x, in place; called before the first forward pass.

        Args:
            x: Shape (N, C, *).
            mask: Not read.

        Raises:
            InputError: x has a rank that the layer does not take, or no channels.
        """
        if x.dim() not in self.ranks:
            self._check_input_dim(x)  # raises
        own = {
            name: tensor for name, tensor in (*self._parameters.items(), *self._buffers.items()) if tensor is not None
        }
        loaded = [tensor for tensor in own.values() if not is_lazy(tensor) and tensor.dim() == 1]
        self.num_features = loaded[0].numel() if loaded else x.size(1)
        for name, tensor in own.items():
            if is_lazy(tensor):
                tensor.materialize((self.num_features,))  # type: ignore[attr-defined]
                torch.nn.init.constant_(tensor, 1.0 if name in _ONES else 0.0)

    def reset_parameters(self) -> None:
        """As in the layer that it becomes; before the first batch there is nothing to reset."""
        if not self.has_uninitialized_params():  # type: ignore[no-untyped-call]
            super().reset_parameters()


class LazyBatchRenorm1d(_LazyBatchRenorm):
    """A `BatchRenorm1d` that takes `num_features` from its first batch; the other arguments are the same.

    Like torch's `LazyBatchNorm1d` it is of the class `BatchRenorm1d` from then on. Until then it has no values to
    optimize, convert or export: run one batch through the model first.

    >>> layer = LazyBatchRenorm1d(schedule=None)
    >>> layer(torch.randn(8, 3)).shape, type(layer).__name__
    (torch.Size([8, 3]), 'BatchRenorm1d')

    Raises:
        InputError: As `BatchRenorm2d`.
    """

    ranks = BatchRenorm1d.ranks
    cls_to_become = BatchRenorm1d


class LazyBatchRenorm2d(_LazyBatchRenorm):
    """A `BatchRenorm2d` that takes `num_features` from its first batch; see `LazyBatchRenorm1d`."""

    ranks = BatchRenorm2d.ranks
    cls_to_become = BatchRenorm2d


class LazyBatchRenorm3d(_LazyBatchRenorm):
    """A `BatchRenorm3d` that takes `num_features` from its first batch; see `LazyBatchRenorm1d`."""

    ranks = BatchRenorm3d.ranks
    cls_to_become = BatchRenorm3d

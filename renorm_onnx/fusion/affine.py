"""The value that everything here moves: ``y = scale * x + shift`` along one axis, in float64.

A normalization at inference is such a map (Ioffe 2017, arXiv:1702.03275, Algorithm 2; ONNX BatchNormalization)::

    y = gamma * (x - mean) / sqrt(var + eps) + beta
      = scale * x + shift,   scale = gamma / sqrt(var + eps),   shift = beta - mean * scale
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class AffineMap:
    """``y = scale * x + shift``, one pair of numbers per index of `axis`.

    Args:
        scale: Shape (C,), or (1,) for a uniform map.
        shift: Same shape as `scale`, in units of y.
        axis: Axis of the tensor that C runs along, counted from 0; None for a uniform map, which needs no axis.
    """

    scale: Vector
    shift: Vector
    axis: int | None

    @classmethod
    def of(cls, scale: npt.ArrayLike, shift: npt.ArrayLike, axis: int | None) -> AffineMap:
        """Broadcast `scale` and `shift` to one vector each; equal entries do not make a map uniform."""
        one, two = np.asarray(scale, np.float64), np.asarray(shift, np.float64)
        if one.shape != two.shape or one.ndim != 1:
            one, two = np.broadcast_arrays(np.atleast_1d(one), two)
        return cls(one.reshape(-1), two.reshape(-1), axis)

    @property
    def channels(self) -> int:
        """Length of the axis; 1 for a uniform map."""
        return int(self.scale.size)

    @property
    def is_uniform(self) -> bool:
        """Whether every element of the tensor meets the same two numbers."""
        return self.axis is None

    @property
    def is_identity(self) -> bool:
        """Whether y equals x."""
        return not self.has_scale and not self.has_shift

    @property
    def has_shift(self) -> bool:
        """Whether any shift differs from zero."""
        return bool(np.count_nonzero(self.shift))

    @property
    def has_scale(self) -> bool:
        """Whether any scale differs from one."""
        return bool(np.count_nonzero(self.scale != 1))

    @property
    def is_monotone(self) -> bool:
        """Whether no scale is negative, so that the map keeps order within every channel."""
        return bool((self.scale >= 0).all())

    @property
    def is_finite(self) -> bool:
        """Whether every number is finite."""
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())

    def equals(self, other: AffineMap) -> bool:
        """Whether both are the same map, number by number."""
        return (
            self.axis == other.axis
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.shift, other.shift)
        )

    def then(self, outer: AffineMap) -> AffineMap:
        """``outer(self(x))``: scales multiply, the shift is mapped along.

        Formula::

            outer.scale * (scale * x + shift) + outer.shift
        """
        axis = self.axis if self.axis is not None else outer.axis
        assert outer.axis in (None, axis), "maps along two different axes do not compose to one map"
        return AffineMap.of(self.scale * outer.scale, self.shift * outer.scale + outer.shift, axis)

    def without_shift(self) -> AffineMap:
        """The same scale with a zero shift."""
        return AffineMap(self.scale, np.zeros_like(self.shift), self.axis)

    def without_scale(self) -> AffineMap:
        """The same shift with a scale of one."""
        return AffineMap(np.ones_like(self.scale), self.shift, self.axis)

    def on_axis(self, axis: int | None) -> AffineMap:
        """The same numbers along another axis; a uniform map stays uniform."""
        return self if self.axis is None else AffineMap(self.scale, self.shift, axis)

    def take(self, indices: npt.NDArray[np.int64] | slice) -> AffineMap:
        """The map restricted to some channels, in that order; a uniform map stays as it is."""
        return self if self.axis is None else AffineMap(self.scale[indices], self.shift[indices], self.axis)

    def repeat(self, count: int) -> AffineMap:
        """Each channel `count` times in a row, as Flatten lays out (C, H*W)."""
        if self.axis is None:
            return self
        return AffineMap(np.repeat(self.scale, count), np.repeat(self.shift, count), self.axis)

    def spread(self, channels: int, axis: int) -> AffineMap:
        """A uniform map written out per channel; a per-channel map is returned as it is, whatever its length."""
        if self.axis is not None:
            return self
        return AffineMap(np.full(channels, self.scale[0]), np.full(channels, self.shift[0]), axis)

    def along(self, rank: int) -> tuple[Vector, Vector]:
        """Scale and shift shaped to broadcast against a tensor of that rank: (1, C, 1, ...)."""
        shape = [1] * rank
        if self.axis is not None:
            shape[self.axis] = self.channels
        return self.scale.reshape(shape), self.shift.reshape(shape)


IDENTITY = AffineMap(np.ones(1), np.zeros(1), None)


def concatenate(maps: Sequence[AffineMap], lengths: Sequence[int], axis: int) -> AffineMap:
    """One map along `axis` from maps of consecutive pieces of it, each of the given length."""
    spread = [m.spread(n, axis) for m, n in zip(maps, lengths, strict=True)]
    return AffineMap(np.concatenate([m.scale for m in spread]), np.concatenate([m.shift for m in spread]), axis)

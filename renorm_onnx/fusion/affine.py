"""The value that everything here moves: ``y = scale * x + shift`` along some axes, mostly one, in float64.

A normalization at inference is such a map (Ioffe 2017, arXiv:1702.03275, Algorithm 2; ONNX BatchNormalization)::

    y = gamma * (x - mean) / sqrt(var + eps) + beta
      = scale * x + shift,   scale = gamma / sqrt(var + eps),   shift = beta - mean * scale

A Reshape that splits the channels makes it run along several axes, and one that joins them with a batch of open size
makes it repeat itself along that axis. Carriers that expect one axis ask for `axis`, and are not asked otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


class UnlikeAxesError(ValueError):
    """Two maps run along one axis of open size, and disagree on its length or on its period."""


class AffineMap(NamedTuple):
    """``y = scale * x + shift``, one pair of numbers per index of `axes`.

    Args:
        scale: Shape (C,) along one axis, one length for each of several axes, or (1,) for a uniform map.
        shift: Same shape as `scale`, in units of y.
        axes: Axes of the tensor that the numbers run along, ascending from 0; none for a uniform map.
        periodic: Those of the axes whose length is open and a multiple of that of the numbers, which repeat.
    """

    scale: Vector
    shift: Vector
    axes: tuple[int, ...]
    periodic: frozenset[int] = frozenset()

    @classmethod
    def of(cls, scale: npt.ArrayLike, shift: npt.ArrayLike, axis: int | None) -> AffineMap:
        """Broadcast `scale` and `shift` to one vector each; equal entries do not make a map uniform."""
        one, two = np.asarray(scale, np.float64), np.asarray(shift, np.float64)
        if one.shape != two.shape or one.ndim != 1:
            one, two = (a.reshape(-1) for a in np.broadcast_arrays(np.atleast_1d(one), two))
        return cls(one, two, () if axis is None else (axis,))

    @property
    def is_simple(self) -> bool:
        """Whether the map runs along one axis at most, and has a number for each element of it."""
        return len(self.axes) < 2 and not self.periodic

    @property
    def axis(self) -> int | None:
        """The axis of a simple map; None for a uniform one."""
        assert self.is_simple, f"the map runs along axes {self.axes}"
        return self.axes[0] if self.axes else None

    @property
    def channels(self) -> int:
        """Length of the axis, or product of the lengths; 1 for a uniform map."""
        return int(self.scale.size)

    @property
    def is_uniform(self) -> bool:
        """Whether every element of the tensor meets the same two numbers."""
        return not self.axes

    @property
    def is_identity(self) -> bool:
        """Whether y equals x; not proven by there being no numbers at all."""
        return self.scale.size > 0 and not self.has_scale and not self.has_shift

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
            self.axes == other.axes
            and self.periodic == other.periodic
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.shift, other.shift)
        )

    def means(self, other: AffineMap) -> bool:
        """Whether both are the same map, or both the identity, however it is spelled."""
        return self.equals(other) or (self.is_identity and other.is_identity)

    def overlaid(self, other: AffineMap) -> AffineMap | None:
        """`other`, with the numbers of this map wherever it leaves a number as it is; None if they are unlike."""
        if self.axes != other.axes or self.scale.shape != other.scale.shape or self.periodic != other.periodic:
            return None
        free = (other.scale == 1) & (other.shift == 0)
        scale, shift = (np.where(free, *pair) for pair in ((self.scale, other.scale), (self.shift, other.shift)))
        return self._replace(scale=scale, shift=shift)

    def then(self, outer: AffineMap) -> AffineMap:
        """``outer(self(x))``: scales multiply, the shift is mapped along.

        Formula::

            outer.scale * (scale * x + shift) + outer.shift
        """
        one, two = together(self, outer)
        return one._replace(scale=one.scale * two.scale, shift=one.shift * two.scale + two.shift)

    def without_shift(self) -> AffineMap:
        """The same scale with a zero shift."""
        return AffineMap(self.scale, np.zeros(self.shift.shape), self.axes, self.periodic)

    def with_shift(self, shift: Vector) -> AffineMap:
        """The same scale with another shift, of the same shape."""
        return self._replace(shift=shift)

    def on_axis(self, axis: int | None) -> AffineMap:
        """The same numbers along another axis; a uniform map stays uniform."""
        return self if self.axis is None or axis is None else AffineMap(self.scale, self.shift, (axis,))

    def moved(self, place: Callable[[int], int]) -> AffineMap:
        """The same numbers where each axis has gone to `place(axis)`."""
        axes = [place(a) for a in self.axes]
        order = sorted(range(len(axes)), key=axes.__getitem__)
        if not axes:
            return self
        scale, shift = self.scale.transpose(order), self.shift.transpose(order)
        return AffineMap(scale, shift, tuple(sorted(axes)), frozenset(place(a) for a in self.periodic))

    def reduced(self) -> AffineMap:
        """The same map without the axes along which its numbers do not change."""
        same = [
            i
            for i in range(len(self.axes))
            if self.scale.shape[i] and all((v == v.take([0], axis=i)).all() for v in (self.scale, self.shift))
        ]
        if not same:
            return self
        left = tuple(a for i, a in enumerate(self.axes) if i not in same)
        index = tuple(0 if i in same else slice(None) for i in range(len(self.axes)))
        scale, shift = np.atleast_1d(self.scale[index]), np.atleast_1d(self.shift[index])
        return AffineMap(scale, shift, left, self.periodic & frozenset(left))

    def counted(self, axis: int, length: int) -> AffineMap:
        """The map where an axis that was open turns out to have `length` elements, a multiple of the period."""
        if axis not in self.periodic:
            return self
        place = self.axes.index(axis)
        times = [length // n if i == place else 1 for i, n in enumerate(self.scale.shape)]
        written = np.tile(self.scale, times), np.tile(self.shift, times)
        return AffineMap(*written, self.axes, self.periodic - {axis})

    def take(self, indices: npt.NDArray[np.int64] | slice, axis: int | None = None) -> AffineMap:
        """The map restricted to some places along an axis, in that order; as it is where it does not run along it.

        Args:
            indices: Places from 0.
            axis: None for the only one.
        """
        axis = self.axis if axis is None else axis
        if axis not in self.axes:
            return self
        assert axis not in self.periodic, "places of an open axis are not counted"
        place = self.axes.index(axis)
        where = np.arange(self.scale.shape[place])[indices]
        return self._replace(scale=self.scale.take(where, place), shift=self.shift.take(where, place))

    def spread(self, length: int, axis: int) -> AffineMap:
        """The map written out along an axis, if it does not run along it yet; else as it is, whatever its length."""
        if axis in self.axes:
            return self
        return together(self, AffineMap(np.ones(length), np.zeros(length), (axis,)))[0]

    def scattered(self, indices: npt.NDArray[np.int64] | slice, length: int, axis: int) -> AffineMap:
        """The map of `length` places along `axis` that is this one at `indices`, and the identity elsewhere.

        Raises:
            UnlikeAxesError: This map runs along `axis` with another number of elements than there are `indices`.
        """
        where = np.arange(length)[indices]
        own = self.spread(where.size, axis)
        place = own.axes.index(axis)
        if own.scale.shape[place] != where.size:
            raise UnlikeAxesError(f"{own.scale.shape[place]} elements do not go to {where.size} places")
        shape = (*own.scale.shape[:place], length, *own.scale.shape[place + 1 :])
        scale, shift = np.ones(shape), np.zeros(shape)
        np.moveaxis(scale, place, 0)[where] = np.moveaxis(own.scale, place, 0)
        np.moveaxis(shift, place, 0)[where] = np.moveaxis(own.shift, place, 0)
        return own._replace(scale=scale, shift=shift)

    def along(self, rank: int) -> tuple[Vector, Vector]:
        """Scale and shift shaped to broadcast against a tensor of that rank: (1, C, 1, ...)."""
        assert not self.periodic, "no array of fixed size repeats itself"
        shape = [1] * rank
        for axis, size in zip(self.axes, self.scale.shape, strict=False):
            shape[axis] = size
        return self.scale.reshape(shape), self.shift.reshape(shape)


def together(one: AffineMap, two: AffineMap) -> tuple[AffineMap, AffineMap]:
    """Two maps of the same tensor, with numbers along all axes of both.

    Raises:
        UnlikeAxesError: Both run along one axis, of open size, with different numbers of elements.
    """
    if one.axes == two.axes and one.scale.shape == two.scale.shape:
        return one, two
    axes = tuple(sorted({*one.axes, *two.axes}))
    lengths = [dict(zip(m.axes, m.scale.shape, strict=False)) for m in (one, two)]
    unlike = any(n != lengths[1].get(a, n) for a, n in lengths[0].items())
    if unlike or (one.periodic != two.periodic and one.axes and two.axes):
        raise UnlikeAxesError("maps of one tensor count its elements differently")
    rank = max(axes, default=0) + 1
    arrays = np.broadcast_arrays(*_placed(one, rank), *_placed(two, rank))
    shape = [arrays[0].shape[a] for a in axes] or [1]
    flat = [a.reshape(shape) for a in arrays]
    periodic = one.periodic | two.periodic
    return AffineMap(flat[0], flat[1], axes, periodic), AffineMap(flat[2], flat[3], axes, periodic)


def _placed(given: AffineMap, rank: int) -> tuple[Vector, Vector]:
    return given._replace(periodic=frozenset()).along(rank)


IDENTITY = AffineMap(np.ones(1), np.zeros(1), ())


def concatenate(maps: Sequence[AffineMap], lengths: Sequence[int], axis: int) -> AffineMap:
    """One map from maps of pieces that lie side by side along `axis`, each of the given length there."""
    spread = [m.spread(n, axis) for m, n in zip(maps, lengths, strict=True)]
    axes = tuple(sorted({a for m in spread for a in m.axes}))
    periodic = frozenset[int]().union(*(m.periodic for m in spread))
    assert axis not in periodic, "pieces of an open axis have no length"
    arrays = [np.stack(_placed(m, axes[-1] + 1)) for m in spread]
    shape = np.broadcast_shapes(*((*a.shape[: axis + 1], 1, *a.shape[axis + 2 :]) for a in arrays))
    shapes = [(*shape[: axis + 1], n, *shape[axis + 2 :]) for n in lengths]
    both = np.concatenate([np.broadcast_to(a, s) for a, s in zip(arrays, shapes, strict=True)], axis + 1)
    both = both.reshape([2, *(both.shape[a + 1] for a in axes)])
    return AffineMap(both[0], both[1], axes, periodic)

"""The step of a layer, read without making the host wait for the device."""

import torch
from torch import Tensor


class HostClock:
    """What the host knows of a layer's `num_batches_tracked`.

    On the CPU the buffer is simply read. On another device reading it would stop the host until the device has caught
    up, so the host counts along, and believes its count while nobody else has written to the buffer (torch numbers the
    writes). A write it does not know of, as by `load_state_dict`, is read once. Where such writes keep coming (DDP
    copies buffers before each step; a cumulative average counts there what has taught it), and once a CUDA graph is
    captured (its replays are invisible), the host stops counting for good and the schedule is computed on the device.

    Two kinds of writes torch does not number, so that only waiting for the device would show them: those through
    `.data`, and those of collectives. Who writes another step on a device writes it by `copy_` or `fill_`.
    """

    MAX_READS = 8

    def __init__(self) -> None:
        self._counter: Tensor | None = None
        self._version = -1
        self._step = 0
        self._reads = 0
        self._blind = False

    def read(self, counter: Tensor) -> int | None:
        """Return the step, or None if only the device knows it.

        Args:
            counter: The layer's `num_batches_tracked`.
        """
        if counter.is_cpu:
            return int(counter)
        if self._blind or counter.is_inference() or (counter.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._blind = True
            return None
        if counter is not self._counter or counter._version != self._version:
            if self._reads == self.MAX_READS:
                self._blind = True
                return None
            self._reads += 1
            self._counter, self._version, self._step = counter, counter._version, int(counter)
        return self._step

    def advanced(self, counter: Tensor) -> None:
        """Take note that this layer itself has just added 1 to `counter`, after `read`."""
        if counter is self._counter:
            self._version = counter._version
            self._step += 1

"""A progress bar over named stages of unequal length."""

from types import TracebackType
from typing import Any

from tqdm import tqdm

_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}"


class Stages:
    """Say on stderr which of several stages runs, and how many are done.

    Called with the name of a stage when it begins; leaving the context ends the last one.

    Args:
        total: How many stages will begin.
    """

    def __init__(self, total: int) -> None:
        self._bar: Any = tqdm(total=total, bar_format=_FORMAT)
        self._running = False

    def __enter__(self) -> "Stages":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end_stage()
            self._bar.set_description_str("done".ljust(36))
        self._bar.close()

    def __call__(self, stage: str) -> None:
        """Begin a stage, which ends the one before."""
        self._end_stage()
        self._running = True
        self._bar.set_description_str(stage.ljust(36))

    def _end_stage(self) -> None:
        if self._running:
            self._bar.update(1)
        self._running = False

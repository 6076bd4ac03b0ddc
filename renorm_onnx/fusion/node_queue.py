"""Operators that wait for their turn on the walk of a plan."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

import onnx_ir as ir


class NodeQueue:
    """Operators in the order of their graph, or against it, each once."""

    def __init__(self, order: Mapping[ir.Node, float], *, backward: bool) -> None:
        self._order = order
        self._sign = -1.0 if backward else 1.0
        self._heap: list[tuple[float, int, ir.Node]] = []
        self.seen: set[ir.Node] = set()

    def __bool__(self) -> bool:
        return bool(self._heap)

    def add(self, nodes: Iterable[ir.Node | None]) -> None:
        """Line up those that never stood in line."""
        for node in nodes:
            if node is not None and node not in self.seen:
                self.seen.add(node)
                heapq.heappush(self._heap, (self._sign * self._order.get(node, 0.0), id(node), node))

    def pop(self) -> ir.Node:
        """The next one."""
        return heapq.heappop(self._heap)[2]

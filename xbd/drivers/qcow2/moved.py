"""Clusters of the disk on the move, while answers of `resolve` about them are in use."""

from __future__ import annotations

import threading
from collections.abc import Iterable


class Moved:
    """Clusters of the disk that lie elsewhere now, until nobody looks for them where they were.

    Who writes to them there meanwhile must not be answered: a reader would not see it.
    Thread-safe.
    """

    def __init__(self) -> None:
        self.stamp = 0
        """Grows with each move."""
        self._lock = threading.Lock()
        self._clusters: dict[int, int] = {}
        """With the stamps of their last moves."""

    def __contains__(self, cluster: int) -> bool:
        return cluster in self._clusters

    def note(self, clusters: Iterable[int]) -> None:
        """They move now, or have moved."""
        with self._lock:
            self.stamp += 1
            self._clusters.update(dict.fromkeys(clusters, self.stamp))

    def first(self, start: int, stop: int) -> int:
        """The first one of these, or `stop`."""
        with self._lock:
            return min((one for one in self._clusters if start <= one < stop), default=stop)

    def settled(self, start: int, stop: int, stamp: int) -> None:
        """What was known of these clusters when `stamp` was this is forgotten."""
        with self._lock:
            for cluster, moved in list(self._clusters.items()):
                if start <= cluster < stop and moved <= stamp:
                    del self._clusters[cluster]

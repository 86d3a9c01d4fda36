"""Clusters of the disk on the move, while answers of `resolve` about them are in use."""

from __future__ import annotations


class Moved:
    """Clusters of the disk that lie elsewhere now, until nobody looks for them where they were.

    Who writes to them there meanwhile must not be answered: a reader would not see it.
    """

    def __init__(self) -> None:
        self.stamp = 0
        """Grows with each move."""
        self._clusters: dict[int, int] = {}
        """With the stamps of their last moves."""

    def __contains__(self, cluster: int) -> bool:
        return cluster in self._clusters

    def note(self, cluster: int) -> None:
        """It has moved.  Under the image's lock."""
        self.stamp += 1
        self._clusters[cluster] = self.stamp

    def first(self, start: int, stop: int) -> int:
        """The first one of these, or `stop`."""
        if not self._clusters:
            return stop
        return min((one for one in list(self._clusters) if start <= one < stop), default=stop)

    def settled(self, start: int, stop: int, stamp: int) -> None:
        """What was known of these clusters when `stamp` was this is forgotten."""
        for cluster, moved in list(self._clusters.items()):
            if start <= cluster < stop and moved <= stamp:
                del self._clusters[cluster]

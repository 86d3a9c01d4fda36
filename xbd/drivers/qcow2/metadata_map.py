"""Which host clusters hold metadata, so that nothing else is ever written over them."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence


class MetadataMap:
    """A sorted set of host clusters' numbers; 8 bytes each.

    Changing it belongs under the image's lock; asking does not.
    """

    def __init__(self) -> None:
        self._clusters = array("Q")

    def replace(self, clusters: Iterable[int]) -> None:
        """Hold these and no others."""
        self._clusters = array("Q", sorted(clusters))

    def overlaps(self, first: int, count: int = 1) -> bool:
        """Whether one of `count` clusters from `first` on holds metadata."""
        at = bisect_left(self._clusters, first)
        # Not by its index: others may take something out at any time.
        found = self._clusters[at : at + 1]
        return bool(found) and found[0] < first + count

    def find(self, clusters: Sequence[int]) -> int | None:
        """The first of these clusters, which ascend, that holds metadata; None: none does."""
        if not clusters:
            return None
        low = bisect_left(self._clusters, clusters[0])
        ours: Sequence[int] = self._clusters[low : bisect_right(self._clusters, clusters[-1])]
        few, many = (ours, clusters) if len(ours) < len(clusters) else (clusters, ours)
        for cluster in few:
            at = bisect_left(many, cluster)
            if at < len(many) and many[at] == cluster:
                return cluster
        return None

    def add(self, first: int, count: int = 1) -> None:
        for cluster in range(first, first + count):
            at = bisect_left(self._clusters, cluster)
            if at == len(self._clusters) or self._clusters[at] != cluster:
                self._clusters.insert(at, cluster)

    def remove(self, first: int, count: int = 1) -> None:
        at = bisect_left(self._clusters, first)
        end = bisect_left(self._clusters, first + count)
        del self._clusters[at:end]

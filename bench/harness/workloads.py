"""What is asked of the disks."""

from __future__ import annotations

import enum
from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20


class Image(enum.Enum):
    """Which file a workload uses; all have the same content to begin with."""

    CACHED = "cached"
    """Read through the host's page cache, and never written."""
    DIRECT = "direct"
    """Read past the page cache, and never written."""
    WRITTEN = "written"
    """Written past the page cache."""

    @property
    def through_cache(self) -> bool:
        return self is Image.CACHED


@dataclass(frozen=True)
class Workload:
    """A closed loop of one kind of operation."""

    image: Image
    depth: int
    block: int = 4 * KIB
    """Bytes."""
    sequential: bool = False

    @property
    def write(self) -> bool:
        return self.image is Image.WRITTEN

    @property
    def size_text(self) -> str:
        return f"{self.block // MIB} MiB" if self.block >= MIB else f"{self.block // KIB} KiB"

    @property
    def name(self) -> str:
        order = "sequential" if self.sequential else "random"
        what = "write" if self.write else "read"
        where = "page cache" if self.image.through_cache else "O_DIRECT"
        return f"{self.size_text} {order} {what}, {where}, depth {self.depth}"


CACHED_DEPTH_32 = Workload(Image.CACHED, 32)
DIRECT_DEPTH_32 = Workload(Image.DIRECT, 32)

QUICK = (CACHED_DEPTH_32, DIRECT_DEPTH_32)
"""Those that there are targets for."""

FULL = (
    *(Workload(Image.CACHED, depth) for depth in (1, 8, 32, 128)),
    *(Workload(Image.DIRECT, depth) for depth in (1, 8, 32, 128)),
    *(Workload(Image.WRITTEN, depth) for depth in (1, 32)),
    *(
        Workload(image, 8, block, sequential=True)
        for image in Image
        for block in (64 * KIB, 1 * MIB)
    ),
)

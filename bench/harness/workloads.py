"""What is asked of the disks."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Workload:
    """A closed loop of one kind of operation."""

    disk: str
    """Which one, among those of its part of the measurements."""
    depth: int
    block: int = 4 * KIB
    """Bytes."""
    write: bool = False
    sequential: bool = False
    through_cache: bool = False
    """Through the host's page cache; otherwise with O_DIRECT."""
    operations: int = 0
    """So many, and nothing before them that is not counted; 0: for some seconds."""
    touch: int = 0
    """Before anything is counted, an operation in each so many bytes of the disk."""
    subject: str = ""
    """What is special about the disk."""
    spin_us: int = 0
    """How long the guest looks for answers before it sleeps."""

    @property
    def size_text(self) -> str:
        return f"{self.block // MIB} MiB" if self.block >= MIB else f"{self.block // KIB} KiB"

    @property
    def name(self) -> str:
        order = "sequential" if self.sequential else "random"
        what = "write" if self.write else "read"
        where = "page cache" if self.through_cache else "O_DIRECT"
        subject = f"{self.subject}: " if self.subject else ""
        return f"{subject}{self.size_text} {order} {what}, {where}, depth {self.depth}"

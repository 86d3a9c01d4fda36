"""Disks of a Linux guest on Xen: xbd's, beside those of QEMU's backend and the kernel's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from harness.figures import backend_cpu, iops
from harness.guest import Figures, RunFailed
from harness.parts import Part
from harness.servers import DATAPATHS, XBD, XBD_PYTHON
from harness.targets import AT_LEAST, AT_MOST, Target, for_the_record
from harness.workloads import KIB, MIB, Workload
from harness.xen_host import XenHost

QDISK, BLKBACK = "qdisk", "blkback"
_DISKS = {QDISK: ("xvda",), BLKBACK: ("xvdb", "xvdc"), XBD: ("xvdd", "xvde")}
_DISKS[XBD_PYTHON] = _DISKS[XBD]
"""The guest's: the file through dom0's page cache, and the one past it.  qdisk has no such one:
xl's option for it (direct-io-safe) makes it want Linux's asynchronous I/O (aio=native), which
Debian's QEMU for Xen is built without."""
_IDLE_SECONDS = 5


def _workloads() -> Iterator[Workload]:
    for cached in (True, False):
        for write in (False, True):
            for depth in (1, 32):
                yield Workload("image", depth, write=write, through_cache=cached)
        for block in (64 * KIB, 1 * MIB):
            for write in (False, True):
                yield Workload("image", 8, block, write, sequential=True, through_cache=cached)


WORKLOADS = tuple(_workloads())


def has(backend: str, workload: Workload) -> bool:
    """Whether there is such a disk."""
    return workload.through_cache or len(_DISKS[backend]) > 1


def _targets(*, through_cache: bool) -> tuple[Target, ...]:
    """What is to be reached beside each of the others."""
    return tuple(
        Target(what, workload, metric, relation, limit, XBD, peer)
        for workload in WORKLOADS
        if workload.through_cache == through_cache
        for peer, rate, cpu in ((QDISK, 1.5, 0.5), (BLKBACK, 0.9, 1.5))
        if has(peer, workload)
        for what, metric, relation, limit in (
            ("IOPS, MiB/s", iops, AT_LEAST, rate),
            ("dom0 CPU", backend_cpu, AT_MOST, cpu),
        )
    )


def fio(backend: str, workload: Workload, seconds: float) -> dict[str, str | int]:
    """The run's details as dom0 is ordered to make it."""
    direction = "write" if workload.write else "read"
    return {
        "disk": _DISKS[backend][0 if workload.through_cache else 1],
        "rw": direction if workload.sequential else f"rand{direction}",
        "block": workload.block,
        "depth": workload.depth,
        "seconds": round(seconds),
    }


class CachedPart(Part):
    """The threads in C, a file through dom0's page cache."""

    title = "A guest's disks through dom0's page cache"
    backends: Sequence[str] = (QDISK, XBD, BLKBACK)
    peer = QDISK
    targets: Sequence[Target] = _targets(through_cache=True)
    cpu_of = "dom0's"
    through_cache = True

    def __init__(self, host: XenHost, repeat: int, seconds: float) -> None:
        self._host = host
        self._repeat = repeat
        self._seconds = seconds
        self._idle: Figures = {}

    @property
    def repeat(self) -> int:
        return self._repeat

    def workloads(self) -> Sequence[Workload]:
        return [workload for workload in WORKLOADS if workload.through_cache == self.through_cache]

    @contextmanager
    def running(self, backends: Sequence[str]) -> Iterator[None]:
        for name in backends:
            if name in DATAPATHS:
                self._host.order("serve", datapath=DATAPATHS[name])
            for workload in self.workloads():
                if workload.block == MIB:  # not counted: grants become persistent
                    self._host.order("run", **fio(name, workload, 1))
        self._idle = self._host.order("idle", _IDLE_SECONDS, seconds=_IDLE_SECONDS)
        yield

    def measure(self, backend: str, workload: Workload, seed: int) -> Figures:
        """One run.  What dom0 and the guest take without any work is subtracted."""
        run = fio(backend, workload, self._seconds)
        told: Figures = self._host.order("run", self._seconds, **run)
        cpu = {
            f"{whose}_cpu_us": self._per_request(told, domain)
            for whose, domain in (("backend", "dom0"), ("guest", "guest"))
        }
        return {**told, **cpu, "idle": self._idle}

    def _per_request(self, told: Figures, domain: str) -> float:
        idle = self._idle[f"{domain}_cpu_us_per_s"] * told["elapsed_s"]
        used: float = (told[f"{domain}_cpu_us"] - idle) / told["requests"]
        if used <= 0:
            raise RunFailed(f"{domain} was less busy than when idle")
        return used


class DirectPart(CachedPart):
    """The threads in C, a file with O_DIRECT."""

    title = "A guest's disks past dom0's page cache"
    backends = (BLKBACK, XBD)
    peer = BLKBACK
    targets = _targets(through_cache=False)
    through_cache = False


class CachedPythonPart(CachedPart):
    """The data path in Python, for the record."""

    title = f"{CachedPart.title}, the data path in Python"
    backends = (QDISK, XBD_PYTHON, BLKBACK)
    targets = for_the_record(CachedPart.targets, XBD_PYTHON)


class DirectPythonPart(DirectPart):
    """The data path in Python, for the record."""

    title = f"{DirectPart.title}, the data path in Python"
    backends = (BLKBACK, XBD_PYTHON)
    targets = for_the_record(DirectPart.targets, XBD_PYTHON)


NATIVE: tuple[type[CachedPart], ...] = (CachedPart, DirectPart)
PYTHON: tuple[type[CachedPart], ...] = (CachedPythonPart, DirectPythonPart)

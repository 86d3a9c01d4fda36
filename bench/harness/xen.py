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
"""The guest's: the file through dom0's page cache, and the one past it.  QEMU's backend has none of
these: with xl's option for it (direct-io-safe) it wants Linux's asynchronous I/O (aio=native), which
Debian's build for Xen does not have."""
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


def _targets() -> Iterator[Target]:
    for workload in WORKLOADS:
        for peer, rate, cpu in ((QDISK, 1.5, 0.5), (BLKBACK, 0.9, 1.5)):
            if has(peer, workload):
                yield Target("IOPS, MiB/s", workload, iops, AT_LEAST, rate, XBD, peer)
                yield Target("dom0 CPU", workload, backend_cpu, AT_MOST, cpu, XBD, peer)


_TARGETS = tuple(_targets())


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


class XenPart(Part):
    """The data path in C."""

    title = "Disks of a Linux guest"
    backends: Sequence[str] = (QDISK, XBD, BLKBACK)
    peer = QDISK
    targets: Sequence[Target] = _TARGETS
    cpu_of = "dom0's"
    _xbd = XBD

    def __init__(self, host: XenHost, repeat: int, seconds: float) -> None:
        self._host = host
        self._repeat = repeat
        self._seconds = seconds
        self._idle: Figures = {}

    @property
    def repeat(self) -> int:
        return self._repeat

    def workloads(self) -> Sequence[Workload]:
        return WORKLOADS

    def has(self, backend: str, workload: Workload) -> bool:
        return has(backend, workload)

    @contextmanager
    def running(self, backends: Sequence[str]) -> Iterator[None]:
        self._host.order("serve", datapath=DATAPATHS[self._xbd])
        for backend in backends:  # once, not counted: grants become persistent, files are opened
            for workload in WORKLOADS:
                if workload.block == MIB and has(backend, workload):
                    self._host.order("run", **fio(backend, workload, 1))
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


class XenPythonPart(XenPart):
    """The data path in Python, for the record."""

    title = "Disks of a Linux guest, the data path in Python"
    backends = (QDISK, XBD_PYTHON, BLKBACK)
    targets = for_the_record(_TARGETS, XBD_PYTHON)
    _xbd = XBD_PYTHON

"""Plain files: the data path itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from harness import guest
from harness.disks import Disk
from harness.figures import Metric, backend_cpu, both_cpus, iops, p50
from harness.guest import Figures
from harness.machine import read_afresh
from harness.parts import Part
from harness.servers import (
    DATAPATHS,
    PLAIN,
    QEMU,
    XBD,
    XBD_PYTHON,
    PlainServer,
    QemuServer,
    Server,
    XbdServer,
)
from harness.targets import AT_LEAST, AT_MOST, Target, for_the_record
from harness.workloads import KIB, MIB, Workload

CACHED, DIRECT, WRITTEN = "cached", "direct", "written"
"""Files of the same content to begin with; only the last is written to."""


def _read(depth: int, block: int = 4 * KIB, *, cached: bool, sequential: bool = False) -> Workload:
    return Workload(
        CACHED if cached else DIRECT, depth, block, sequential=sequential, through_cache=cached
    )


WORKLOADS = (
    *(_read(depth, cached=True) for depth in (1, 8, 32, 128)),
    *(_read(depth, cached=False) for depth in (1, 8, 32, 128)),
    *(Workload(WRITTEN, depth, write=True) for depth in (1, 8, 32, 128)),
    *(
        _read(8, block, cached=cached, sequential=True)
        for cached in (True, False)
        for block in (64 * KIB, 1 * MIB)
    ),
    *(Workload(WRITTEN, 8, block, write=True, sequential=True) for block in (64 * KIB, 1 * MIB)),
)


QUICK = (_read(32, cached=True), _read(32, cached=False), Workload(WRITTEN, 32, write=True))


def _beside_qemu(workload: Workload) -> Iterator[Target]:
    """What is to be reached beside QEMU: CPU, both sides' CPU, IOPS, latency."""

    def target(what: str, metric: Metric, relation: str, limit: float) -> Target:
        return Target(what, workload, metric, relation, limit, XBD, QEMU)

    if workload.sequential:
        yield target("CPU per MiB", backend_cpu, AT_MOST, 0.70)
    elif workload.depth == 1:
        cpu = 1.2 if workload.through_cache else 0.9
        yield target("backend CPU", backend_cpu, AT_MOST, cpu)
        yield target("median latency", p50, AT_MOST, 1)
    elif workload.depth == 32 and workload.through_cache:
        yield target("backend CPU", backend_cpu, AT_MOST, 0.30)
        yield target("both sides' CPU", both_cpus, AT_MOST, 0.20)
        yield target("IOPS", iops, AT_LEAST, 2)
    elif workload.depth in (32, 128) and not workload.through_cache:
        yield target("backend CPU", backend_cpu, AT_MOST, 0.50 if workload.depth == 32 else 0.40)
        yield target("IOPS", iops, AT_LEAST, 1)


_TARGETS = (
    *(
        Target("backend CPU", workload, backend_cpu, AT_MOST, 1.10, XBD, PLAIN)
        for workload in WORKLOADS
        if workload.depth >= 8
    ),
    *(target for workload in WORKLOADS for target in _beside_qemu(workload)),
)


class RawPart(Part):
    """Against qemu-storage-daemon over vhost-user-blk, and against plain C."""

    title = "Plain files"
    backends = (QEMU, XBD, XBD_PYTHON, PLAIN)
    peer = QEMU
    targets = (*_TARGETS, *for_the_record(_TARGETS, XBD_PYTHON))

    def workloads(self) -> Sequence[Workload]:
        return QUICK if self.settings.quick else WORKLOADS

    @contextmanager
    def running(self, backends: Sequence[str]) -> Iterator[None]:
        settings = self.settings
        self._disks = {
            name: Disk(settings.images / f"{name}.img", through_cache=name == CACHED)
            for name in (CACHED, DIRECT, WRITTEN)
        }
        for disk in self._disks.values():
            guest.fill(disk.path, settings.size)
        self._servers: dict[str, Server] = {}
        with ExitStack() as stack:
            for name in backends:
                self._servers[name] = self._server(name)
                stack.enter_context(self._servers[name].running())
            yield

    def _server(self, name: str) -> Server:
        settings = self.settings
        if name == QEMU:
            return QemuServer(settings.runtime, self._disks, settings.qemu_poll_ns)
        if name == PLAIN:
            return PlainServer(settings.runtime, self._disks)
        spin_us = 0 if settings.cpus.guest == settings.cpus.backend else -1
        return XbdServer(
            name, settings.runtime, self._disks, datapath=DATAPATHS[name], spin_us=spin_us
        )

    def measure(self, backend: str, workload: Workload, seed: int) -> Figures:
        settings = self.settings
        disk = self._disks[workload.disk]
        read_afresh(disk.path, through_cache=disk.through_cache)
        return self._servers[backend].run(
            workload,
            seconds=settings.seconds,
            seed=seed,
            cpus=settings.cpus,
            more=settings.guest_options if backend in DATAPATHS else (),
        )

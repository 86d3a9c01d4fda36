"""One request at a time, where guest and backend have a CPU each and look for work before they
sleep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from harness import guest
from harness.disks import Disk
from harness.figures import iops
from harness.guest import Figures, RunFailed
from harness.machine import Cpus, read_afresh
from harness.parts import Part, Settings
from harness.servers import QEMU, XBD, QemuServer, Server, XbdServer
from harness.targets import AT_LEAST, Target
from harness.workloads import Workload

CACHED, DIRECT = "cached", "direct"
_GUEST_SPIN_US = 50
_QEMU_POLL_NS = 32768
"""Its own default."""

CACHED_READ = Workload(CACHED, 1, through_cache=True, spin_us=_GUEST_SPIN_US, subject="spinning")
DIRECT_READ = Workload(DIRECT, 1, spin_us=_GUEST_SPIN_US, subject="spinning")


class Depth1Part(Part):
    """Both sides spin as they do by default, the guest too."""

    title = "Depth 1 on two cores, spinning on both sides"
    backends = (QEMU, XBD)
    peer = QEMU
    targets = (Target("IOPS", CACHED_READ, iops, AT_LEAST, 3, XBD, QEMU),)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        try:
            self._cpus = Cpus.choose(2, settings.cpus.backend)
        except ValueError as error:
            raise RunFailed(f"{self.title}: {error}") from None

    def workloads(self) -> Sequence[Workload]:
        return (CACHED_READ,) if self.settings.quick else (CACHED_READ, DIRECT_READ)

    @contextmanager
    def running(self, backends: Sequence[str]) -> Iterator[None]:
        settings = self.settings
        self._disks = {
            name: Disk(settings.images / f"depth1-{name}.img", through_cache=name == CACHED)
            for name in (CACHED, DIRECT)
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
        if name == QEMU:
            return QemuServer(self.settings.runtime, self._disks, _QEMU_POLL_NS)
        return XbdServer("depth1-xbd", self.settings.runtime, self._disks, spin_us=-1)

    def measure(self, backend: str, workload: Workload, seed: int) -> Figures:
        disk = self._disks[workload.disk]
        read_afresh(disk.path, through_cache=disk.through_cache)
        return self._servers[backend].run(
            workload,
            seconds=self.settings.seconds,
            seed=seed,
            cpus=self._cpus,
            more=self.settings.guest_options if backend == XBD else (),
        )

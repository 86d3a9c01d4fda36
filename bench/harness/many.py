"""Many disks with one request each: what there is to do comes in batches, whosever it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from harness import guest
from harness.disks import Disk
from harness.figures import backend_cpu
from harness.guest import Figures
from harness.machine import read_afresh
from harness.parts import Part
from harness.servers import DATAPATHS, XBD, XBD_PYTHON, Server, XbdServer
from harness.targets import AT_MOST, Target
from harness.workloads import Workload

DISKS = 100
ONE, MANY = "1 disk", f"{DISKS} disks"
PYTHON_ONE, PYTHON_MANY = "1, python", f"{DISKS}, python"
_SERVERS = {
    ONE: (1, XBD),
    MANY: (DISKS, XBD),
    PYTHON_ONE: (1, XBD_PYTHON),
    PYTHON_MANY: (DISKS, XBD_PYTHON),
}
_FILE = "many"
READ = Workload(_FILE, 1, through_cache=True, subject="each disk")


class ManyPart(Part):
    """All in one guest, so that nothing but their number differs."""

    title = f"{DISKS} disks at depth 1 each (ratios to one disk)"
    backends = tuple(_SERVERS)
    peer = ONE
    targets = (
        Target("backend CPU", READ, backend_cpu, AT_MOST, 0.6, MANY, ONE),
        Target("backend CPU", READ, backend_cpu, AT_MOST, 0.6, PYTHON_MANY, PYTHON_ONE, False),
    )

    def workloads(self) -> Sequence[Workload]:
        return (READ,)

    @contextmanager
    def running(self, backends: Sequence[str]) -> Iterator[None]:
        disk = Disk(self.settings.images / "many.img", through_cache=True)
        guest.fill(disk.path, self.settings.size)
        self._disk = disk
        self._servers: dict[str, Server] = {}
        with ExitStack() as stack:
            for name in backends:
                copies, datapath = _SERVERS[name]
                server = XbdServer(
                    f"many-{copies}-{DATAPATHS[datapath]}",
                    self.settings.runtime,
                    {_FILE: disk},
                    datapath=DATAPATHS[datapath],
                    copies=copies,
                )
                self._servers[name] = server
                stack.enter_context(server.running())
            yield

    def measure(self, backend: str, workload: Workload, seed: int) -> Figures:
        read_afresh(self._disk.path, through_cache=True)
        return self._servers[backend].run(
            workload,
            seconds=self.settings.seconds,
            seed=seed,
            cpus=self.settings.cpus,
            more=self.settings.guest_options,
        )

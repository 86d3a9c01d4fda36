"""A thousand disks that nobody uses: what they cost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from harness import guest
from harness.disks import Disk
from harness.figures import (
    idle_cpu,
    kib_per_disk,
    own_start_seconds,
    start_seconds,
    store_seconds,
    wakeups,
)
from harness.guest import Figures, RunFailed, idling
from harness.parts import Column, Part
from harness.servers import (
    DATAPATHS,
    XBD,
    XBD_PYTHON,
    NumberedDisk,
    StoreServer,
    XbdServer,
)
from harness.targets import AT_MOST, Bound, for_the_record
from harness.workloads import MIB, Workload
from xbd.core.errors import XbdError
from xbd.core.frontend.toolstack import DiskLine, Toolstack
from xbd.core.units import Domid
from xbd.core.xenstore.client import StoreClient

GUESTS, DISKS_EACH = 20, 50
DISKS = GUESTS * DISKS_EACH
_SETTLE_SECONDS = 3.0
"""After connecting, until nothing is left to do."""
_FILE = "idle"
IDLE = Workload(_FILE, 1, subject=f"{DISKS} idle disks")
_UNSERVED = "vbd"
"""A kind of backend that this daemon does not look after."""


@dataclass(frozen=True)
class _Process:
    """What a process has used so far."""

    cpu_ticks: int
    wakeups: int
    private_kib: int
    """Without what is shared with guests: rings and grants."""

    @classmethod
    def of(cls, pid: int) -> _Process:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        voluntary = 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            voluntary += _numbers(task / "status")["voluntary_ctxt_switches"]
        memory = _numbers(Path(f"/proc/{pid}/smaps_rollup"))
        return cls(
            cpu_ticks=int(stat[11]) + int(stat[12]),
            wakeups=voluntary,
            private_kib=memory["Pss_Anon"] + memory["Pss_File"],
        )


def _numbers(path: Path) -> Mapping[str, int]:
    """``name: number [kB]`` of each line that is like that."""
    numbers = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            numbers[name] = int(words[0])
    return numbers


class IdlePart(Part):
    """XenStore is a process of its own, as it is beside Xen.  How long the toolstack takes to
    write the disks' entries is found out with a daemon that does not look after them, and
    subtracted."""

    title = f"{DISKS} idle disks"
    backends = (XBD, XBD_PYTHON)
    peer = XBD
    columns = (
        Column("wake-ups/s", wakeups, "{:.1f}"),
        Column("CPU ms/s", idle_cpu, "{:.1f}"),
        Column("KiB per disk", kib_per_disk, "{:.1f}"),
        Column("start s", own_start_seconds, "{:.2f}"),
        Column("toolstack s", store_seconds, "{:.2f}"),
        Column("both s", start_seconds, "{:.2f}"),
    )
    _bounds = (
        Bound("wake-ups per second", IDLE, wakeups, AT_MOST, 0, XBD, ""),
        Bound("KiB per disk", IDLE, kib_per_disk, AT_MOST, 15, XBD, ""),
        Bound("seconds to start all", IDLE, own_start_seconds, AT_MOST, 5, XBD, ""),
    )
    targets = (*_bounds, *for_the_record(_bounds, XBD_PYTHON))

    def workloads(self) -> Sequence[Workload]:
        return (IDLE,)

    @contextmanager
    def running(self, backends: Sequence[str]) -> Iterator[None]:
        path = self.settings.images / "idle.img"
        guest.fill(path, MIB)
        disk = Disk(path, through_cache=True)
        self._line = disk.spec
        yield

    def _lines(self, kind: str = "vbd3") -> list[DiskLine]:
        return [
            NumberedDisk(target=self._line, number=number, read_only=True, kind=kind)
            for number in range(DISKS_EACH)
        ]

    def measure(self, backend: str, workload: Workload, seed: int) -> Figures:
        server = self._server(backend)
        try:
            with self._store(server).running(), server.running(), ExitStack() as guests:
                before = _Process.of(server.pid)
                domids = self._guests(server, guests)
                started = time.monotonic()
                trio.run(self._attach_all, server, list(domids), self._lines())
                for one in domids.values():
                    one.connected()
                figures = {"start_seconds": time.monotonic() - started}
                time.sleep(_SETTLE_SECONDS)
                figures |= self._watch(server)
                grown = _Process.of(server.pid).private_kib - before.private_kib
            figures["store_seconds"] = self._store_seconds(backend)
        except XbdError as error:
            raise RunFailed(str(error)) from None
        figures["kib_per_disk"] = grown / DISKS
        return figures

    def _server(self, backend: str) -> XbdServer:
        return XbdServer(
            "idle",
            self.settings.runtime,
            {},
            datapath=DATAPATHS[backend],
            spin_us=-1,
            copies=DISKS_EACH,
        )

    def _store(self, server: XbdServer) -> StoreServer:
        return StoreServer("xenstored", self.settings.runtime, server.host)

    def _guests(self, server: XbdServer, stack: ExitStack) -> dict[Domid, guest.Guest]:
        guests = {}
        for _ in range(GUESTS):
            one = stack.enter_context(idling(["blkif", str(server.host)], DISKS_EACH))
            guests[Domid(one.domid())] = one
        return guests

    def _watch(self, server: XbdServer) -> dict[str, float]:
        """What it does while nothing is to be done."""
        seconds = max(self.settings.seconds, 1.0)
        before, began = _Process.of(server.pid), time.monotonic()
        time.sleep(seconds)
        after, took = _Process.of(server.pid), time.monotonic() - began
        ticks = (after.cpu_ticks - before.cpu_ticks) / os.sysconf("SC_CLK_TCK")
        return {
            "wakeups_per_second": (after.wakeups - before.wakeups) / took,
            "idle_cpu_ms_per_second": ticks * 1000 / took,
        }

    async def _attach_all(
        self, server: XbdServer, domids: Sequence[Domid], lines: list[DiskLine]
    ) -> None:
        # One after the other: transactions side by side would be refused and begin again.
        async with StoreClient.connect(server.store_socket) as store:
            toolstack = Toolstack(store)
            for domid in domids:
                await toolstack.create_domain(domid, "bench")
            for line in lines:
                for domid in domids:
                    await toolstack.attach(domid, line, wait=False)
                    backend = f"/local/domain/0/backend/{line.kind}/{domid}/{line.devid}"
                    await store.write(f"{backend}/hotplug-status", "connected")

    def _store_seconds(self, backend: str) -> float:
        """How long the toolstack writes its entries when nobody looks after them."""
        server = self._server(backend)
        with self._store(server).running(), server.running(), ExitStack() as stack:
            domids = [
                Domid(stack.enter_context(idling(["blkif", str(server.host)], 1)).domid())
                for _ in range(GUESTS)
            ]
            started = time.monotonic()
            trio.run(self._attach_all, server, domids, self._lines(_UNSERVED))
            return time.monotonic() - started

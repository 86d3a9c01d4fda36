"""What a thread that computes in Python does to latencies: nothing, if no request waits for it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from drivers import xbd_bench_scattered as scattered

from harness import guest
from harness.disks import Disk
from harness.extents import install_driver
from harness.figures import p99
from harness.guest import Figures
from harness.machine import read_afresh
from harness.parts import Part, Settings
from harness.servers import DATAPATHS, XBD, XBD_PYTHON, XbdServer
from harness.targets import AT_MOST, Target
from harness.workloads import Workload

DISK = "busy"
QUIET, BUSY = XBD, "xbd, busy"
PYTHON_QUIET, PYTHON_BUSY = XBD_PYTHON, "python, busy"
_WORKLOADS = tuple(
    Workload(DISK, depth, through_cache=True, subject="busy Python") for depth in (1, 32)
)


class BusyPart(Part):
    """The thread has a CPU of its own: it competes for the interpreter alone."""

    title = "A busy Python thread in the daemon (ratios to xbd without one)"
    backends = (QUIET, BUSY, PYTHON_QUIET, PYTHON_BUSY)
    peer = QUIET
    targets = (
        *(Target("p99 latency", each, p99, AT_MOST, 1.2, BUSY, QUIET) for each in _WORKLOADS),
        *(
            Target("p99 latency", each, p99, AT_MOST, 1.2, PYTHON_BUSY, PYTHON_QUIET, judged=False)
            for each in _WORKLOADS
        ),
    )

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        others = sorted(os.sched_getaffinity(0) - {settings.cpus.backend, settings.cpus.guest})
        self._busy_cpu = others[0] if others else settings.cpus.backend

    def workloads(self) -> Sequence[Workload]:
        return _WORKLOADS

    @contextmanager
    def running(self, backends: Sequence[str]) -> Iterator[None]:
        self._path = self.settings.images / "busy.img"
        guest.fill(self._path, self.settings.size)
        self._drivers = self.settings.runtime / "busy-drivers"
        install_driver(self._drivers)
        yield

    def measure(self, backend: str, workload: Workload, seed: int) -> Figures:
        settings = self.settings
        read_afresh(self._path, through_cache=True)
        busy = f"&busy={self._busy_cpu}" if backend in (BUSY, PYTHON_BUSY) else ""
        # In one extent, the whole file.
        options = f"&extent={settings.size}{busy}"
        disk = Disk(self._path, through_cache=True, driver=scattered.DRIVER.name, options=options)
        python = backend in (PYTHON_QUIET, PYTHON_BUSY)
        server = XbdServer(
            "busy",
            settings.runtime,
            {DISK: disk},
            drivers=self._drivers,
            datapath=DATAPATHS[XBD_PYTHON if python else XBD],
        )
        with server.running():
            return server.run(
                workload,
                seconds=settings.seconds,
                seed=seed,
                cpus=settings.cpus,
                more=settings.guest_options,
            )

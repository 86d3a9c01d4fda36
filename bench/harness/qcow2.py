"""qcow2 images over the ring, against QEMU's over vhost-user-blk."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness import guest, images
from harness.disks import Disk
from harness.figures import backend_cpu, iops
from harness.guest import Figures, RunFailed
from harness.machine import read_afresh
from harness.parts import Part, Settings
from harness.servers import QEMU, XBD, QemuServer, Server, XbdServer
from harness.targets import AT_LEAST, AT_MOST, MORE_THAN, Target, workloads_of
from harness.workloads import GIB, KIB, MIB, Workload

RAW = "xbd raw"
"""xbd with a plain file of the same content, or as empty."""
QEMU_IMG = "qemu-img"
"""``qemu-img bench``: QEMU's format driver without any transport."""

ALLOCATED, WRITTEN, EMPTY, OVERLAY, COMPRESSED = (
    "allocated",
    "written",
    "empty",
    "overlay",
    "compressed",
)
FRESH = (EMPTY, OVERLAY)
"""Made anew for each run, since every operation changes what the next one costs."""
_EMPTY_BYTES = 16 * GIB
_LONGEST_STRIDE = (1 << 31) - 1
"""Of ``qemu-img bench``, in bytes."""
_OPERATIONS = {ALLOCATED: 20_000, WRITTEN: 20_000, COMPRESSED: 3_000}
"""Of ``qemu-img bench``, which can't be told a time."""
_SUBJECTS = {
    ALLOCATED: "allocated",
    WRITTEN: "allocated",
    EMPTY: "empty image",
    OVERLAY: "over a backing file",
    COMPRESSED: "compressed",
}


def workload(
    disk: str,
    depth: int,
    block: int = 4 * KIB,
    *,
    sequential: bool = False,
    through_cache: bool = False,
    operations: int = 0,
) -> Workload:
    """On an image of this kind."""
    return Workload(
        disk,
        depth,
        block,
        write=disk in (WRITTEN, EMPTY, OVERLAY),
        sequential=sequential,
        through_cache=through_cache,
        operations=operations,
        touch=images.CLUSTER if disk in (ALLOCATED, WRITTEN) and not sequential else 0,
        subject=_SUBJECTS[disk],
    )


READS = tuple(
    workload(ALLOCATED, depth, through_cache=cached)
    for cached in (True, False)
    for depth in (1, 32)
)
WRITES = tuple(workload(WRITTEN, depth) for depth in (1, 32))
SEQUENTIAL_READ = workload(ALLOCATED, 8, 1 * MIB, sequential=True)
ALLOCATING = (
    workload(EMPTY, 1, operations=3000),
    workload(EMPTY, 32, operations=6000),
    workload(EMPTY, 8, 1 * MIB, sequential=True, operations=600),
    workload(OVERLAY, 32, operations=2000),
)
COMPRESSED_READS = (
    workload(COMPRESSED, 1),
    workload(COMPRESSED, 32),
    workload(COMPRESSED, 8, 1 * MIB, sequential=True),
)


class Images:
    """The files that both parts about qcow2 use."""

    def __init__(self, settings: Settings) -> None:
        self._directory = settings.images
        self._size = settings.size
        self._made: set[str] = set()

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.qcow2"

    @property
    def content(self) -> Path:
        return self._directory / "content.img"

    def make(self) -> None:
        """Those that are not made for each run.  Raises `RunFailed`."""
        guest.fill(self.content, self._size)
        images.allocated(self._path(ALLOCATED), self.content)
        shutil.copy(self._path(ALLOCATED), self._path(WRITTEN))
        shutil.copy(self.content, self._directory / "written.img")
        images.compressed(self._path(COMPRESSED), self.content)

    def qcow2(self, workload: Workload) -> Disk:
        """The image for one run."""
        path = self._path(workload.disk)
        if workload.disk in FRESH:
            path.unlink(missing_ok=True)
        if workload.disk == EMPTY:
            images.empty(path, _EMPTY_BYTES)
        elif workload.disk == OVERLAY:
            images.overlay(path, self._path(ALLOCATED))
            read_afresh(self._path(ALLOCATED), through_cache=workload.through_cache)
        read_afresh(path, through_cache=workload.through_cache)
        return Disk(
            path,
            workload.through_cache,
            driver="qcow2",
            format="qcow2",
            backing=self._path(ALLOCATED) if workload.disk == OVERLAY else None,
        )

    def raw(self, workload: Workload) -> Disk:
        """A plain file for the same run."""
        path = self.content if workload.disk == ALLOCATED else self._directory / "written.img"
        if workload.disk == EMPTY:
            path = self._directory / "empty.img"
            path.unlink(missing_ok=True)
            with path.open("wb") as file:
                file.truncate(_EMPTY_BYTES)
        read_afresh(path, through_cache=workload.through_cache)
        return Disk(path, workload.through_cache)


def has_raw_counterpart(workload: Workload) -> bool:
    """Whether a plain file can do the same."""
    return workload.disk in (ALLOCATED, WRITTEN, EMPTY)


class Qcow2Part(Part):
    """Each run has a server of its own."""

    title = "qcow2 over the ring (clusters of 64 KiB)"
    backends = (QEMU, XBD, RAW, QEMU_IMG)
    peer = QEMU
    targets = (
        *(
            Target("backend CPU", workload, backend_cpu, AT_MOST, 1.05, XBD, RAW)
            for workload in (*READS, *WRITES)
        ),
        *(
            Target(
                "backend CPU",
                workload,
                backend_cpu,
                AT_MOST,
                0.55 if workload.write else 0.45,
                XBD,
                QEMU,
            )
            for workload in (*READS, *WRITES)
            if workload.depth > 1  # a single request has targets of its own: see plain files
        ),
        *(
            Target("rate", workload, iops, AT_LEAST, limit, XBD, peer)
            for workload in (*READS, *WRITES, SEQUENTIAL_READ)
            for limit, peer in ((0.9, RAW), (1, QEMU))
        ),
        *(Target("rate", workload, iops, AT_LEAST, 1, XBD, QEMU) for workload in ALLOCATING),
        *(Target("rate", workload, iops, MORE_THAN, 1, XBD, QEMU) for workload in COMPRESSED_READS),
    )

    def workloads(self) -> Sequence[Workload]:
        if self.settings.quick:
            return workloads_of(self.targets)
        return (*READS, *WRITES, SEQUENTIAL_READ, *ALLOCATING, *COMPRESSED_READS)

    def has(self, backend: str, workload: Workload) -> bool:
        if backend == RAW:
            return has_raw_counterpart(workload)
        return True

    @contextmanager
    def running(self, backends: Sequence[str]) -> Iterator[None]:
        self._images = Images(self.settings)
        self._images.make()
        yield

    def measure(self, backend: str, workload: Workload, seed: int) -> Figures:
        settings = self.settings
        disk = self._images.raw(workload) if backend == RAW else self._images.qcow2(workload)
        if backend == QEMU_IMG:
            figures = bench_by_qemu_img(disk, workload, settings, seed)
        else:
            server = self._server(backend, {workload.disk: disk})
            with server.running():
                figures = server.run(
                    workload,
                    seconds=settings.seconds,
                    seed=seed,
                    cpus=settings.cpus,
                    more=() if backend == QEMU else settings.guest_options,
                )
        if workload.write and backend != RAW:
            images.check(disk.path)
        return figures

    def _server(self, backend: str, disks: dict[str, Disk]) -> Server:
        settings = self.settings
        if backend == QEMU:
            return QemuServer(settings.runtime, disks, settings.qemu_poll_ns, locking=True)
        return XbdServer("xbd", settings.runtime, disks, image_directory=settings.images)


def bench_by_qemu_img(disk: Disk, workload: Workload, settings: Settings, seed: int) -> Figures:
    """``qemu-img bench``.  It knows no random order: a stride goes through all clusters."""
    size = _EMPTY_BYTES if workload.disk == EMPTY else settings.size
    clusters = size // images.CLUSTER
    count = workload.operations or min(_OPERATIONS[workload.disk], 4 * size // workload.block)
    stride = workload.block if workload.sequential else _stride(clusters) * images.CLUSTER
    command = ["qemu-img", "bench", "-f", disk.format, "-i", "io_uring"]
    command += ["-t", "writeback" if workload.through_cache else "none", "-c", str(count)]
    command += ["-d", str(workload.depth), "-s", str(workload.block), "-S", str(stride)]
    command += ["-o", str(seed % clusters * images.CLUSTER if not workload.sequential else 0)]
    command += ["-w", str(disk.path)] if workload.write else [str(disk.path)]
    process = subprocess.Popen(
        ["taskset", "--cpu-list", str(settings.cpus.backend), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = process.stdout.read().strip()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    found = re.search(r"completed in ([0-9.]+) seconds", said)
    if process.returncode or not found:
        raise RunFailed(f"{' '.join(command)} failed: {said}")
    seconds = float(found[1])
    return {
        "operations": count,
        "seconds": seconds,
        "iops": count / seconds,
        "mib_s": count * workload.block / MIB / seconds,
        "backend_cpu_us": (used.ru_utime + used.ru_stime) / count * 1e6,
    }


def _stride(clusters: int) -> int:
    """Clusters from one request to the next, so that it comes to all of them in no near order."""
    stride = min(int(clusters * 0.618), _LONGEST_STRIDE // images.CLUSTER)
    while math.gcd(stride, clusters) > 1:
        stride -= 1
    return stride

"""qcow2 images over NBD, from several servers to the same client: fio."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness import images
from harness.disks import Disk
from harness.figures import iops
from harness.guest import Figures, RunFailed
from harness.parts import Part
from harness.qcow2 import (
    ALLOCATED,
    ALLOCATING,
    COMPRESSED_READS,
    RAW,
    SEQUENTIAL_READ,
    WRITTEN,
    Images,
    has_raw_counterpart,
    workload,
)
from harness.servers import QEMU, XBD, Server
from harness.targets import AT_LEAST, MORE_THAN, Target, workloads_of
from harness.workloads import MIB, Workload

QEMU_NBD = "qemu-nbd"
_SLACK_SECONDS = 120.0

READS = tuple(
    workload(ALLOCATED, depth, through_cache=cached)
    for cached, depth in ((True, 32), (False, 1), (False, 32))
)
WRITES = tuple(workload(WRITTEN, depth) for depth in (1, 32))


class NbdPart(Part):
    """Each run has a server of its own, with one connection."""

    title = "qcow2 over NBD (fio, one connection)"
    backends = (QEMU, QEMU_NBD, XBD, RAW)
    peer = QEMU
    targets = (
        *(Target("rate", workload, iops, AT_LEAST, 1, XBD, QEMU) for workload in ALLOCATING),
        *(Target("rate", workload, iops, MORE_THAN, 1, XBD, QEMU) for workload in COMPRESSED_READS),
    )

    def workloads(self) -> Sequence[Workload]:
        if self.settings.quick:
            return workloads_of(self.targets)
        return (*READS, *WRITES, SEQUENTIAL_READ, *ALLOCATING, *COMPRESSED_READS)

    def has(self, backend: str, workload: Workload) -> bool:
        return backend != RAW or has_raw_counterpart(workload)

    @contextmanager
    def running(self, backends: Sequence[str]) -> Iterator[None]:
        if shutil.which("fio") is None:
            raise RunFailed("fio is not installed (Debian: fio)")
        self._images = Images(self.settings)
        self._images.make()
        yield

    def measure(self, backend: str, workload: Workload, seed: int) -> Figures:
        settings = self.settings
        disk = self._images.raw(workload) if backend == RAW else self._images.qcow2(workload)
        server = NbdServer(backend, settings.runtime, disk, settings.images)
        with server.running():
            figures = server.run(
                workload, seconds=settings.seconds, seed=seed, cpus=settings.cpus, more=()
            )
        if workload.write and backend != RAW:
            images.check(disk.path)
        return figures


class NbdServer(Server):
    """Any of them: they differ in their command lines."""

    def __init__(self, name: str, directory: Path, disk: Disk, image_directory: Path) -> None:
        super().__init__(name, directory, {"": disk})
        self._disk = disk
        self._image_directory = image_directory
        self._socket = directory / f"{name.replace(' ', '-')}.nbd"

    def _sockets(self) -> list[tuple[Path, int | None]]:
        return [(self._socket, socket.SOCK_STREAM)]

    def _command(self) -> list[str]:
        self._socket.unlink(missing_ok=True)
        if self.name == QEMU:
            return self._storage_daemon()
        if self.name == QEMU_NBD:
            return self._qemu_nbd()
        command = [sys.executable, "-m", "xbd", "export", "--nbd", str(self._socket)]
        command += ["--image-dirs", str(self._image_directory), "--log-level", "warning"]
        return [*command, self._disk.spec]

    def _storage_daemon(self) -> list[str]:
        command = ["qemu-storage-daemon", *self._disk.qemu_blockdevs("disk", locking=True)]
        command += ["--nbd-server", f"addr.type=unix,addr.path={self._socket}"]
        return [*command, "--export", "type=nbd,id=export,node-name=disk,name=,writable=on"]

    def _qemu_nbd(self) -> list[str]:
        cache = "writeback" if self._disk.through_cache else "none"
        command = ["qemu-nbd", "--persistent", "--format", self._disk.format]
        command += [f"--cache={cache}", "--aio=io_uring", "--socket", str(self._socket)]
        return [*command, str(self._disk.path)]

    def _drive(
        self, workload: Workload, *, seconds: float, seed: int, cpu: int, more: Sequence[str]
    ) -> Figures:
        order = "" if workload.sequential else "rand"
        output = self._directory / "fio.json"
        command = ["fio", "--name=bench", "--ioengine=nbd"]
        command += ["--output-format=json", f"--output={output}"]
        command += [f"--uri=nbd+unix:///?socket={self._socket}", "--norandommap", *more]
        command += [
            f"--rw={order}{'write' if workload.write else 'read'}",
            f"--bs={workload.block}",
        ]
        command += [f"--iodepth={workload.depth}", f"--randseed={seed}", f"--cpus_allowed={cpu}"]
        if workload.operations:
            command.append(f"--number_ios={workload.operations}")
        else:
            # It drops fractions of a second.
            command += ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
        before = _cpu_seconds(self.pid)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds + _SLACK_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise RunFailed("fio hangs") from None
        used = _cpu_seconds(self.pid) - before
        if done.returncode:
            raise RunFailed(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
        _, brace, told = output.read_text().partition("{")  # it greets the server first
        try:
            return _figures(json.loads(brace + told), workload, used)
        except ValueError:
            raise RunFailed(f"fio said: {told or done.stdout}") from None


def _cpu_seconds(pid: int) -> float:
    """The process's CPU-time clock; its number is what clock_getcpuclockid(3) makes of the pid."""
    return time.clock_gettime(~pid << 3 | 2)


def _figures(told: Figures, workload: Workload, cpu_seconds: float) -> Figures:
    [job] = told["jobs"]
    side = job["write" if workload.write else "read"]
    count = side["total_ios"]
    if job["error"] or not count:
        raise RunFailed(f"fio ended with error {job['error']} after {count} operations")
    latency = side["clat_ns"]["percentile"]
    fio_cpu_seconds = (job["usr_cpu"] + job["sys_cpu"]) / 100 * side["runtime"] / 1e3
    return {
        "operations": count,
        "iops": side["iops"],
        "mib_s": side["bw_bytes"] / MIB,
        "p50_us": latency["50.000000"] / 1e3,
        "p99_us": latency["99.000000"] / 1e3,
        "backend_cpu_us": cpu_seconds / count * 1e6,
        "guest_cpu_us": fio_cpu_seconds / count * 1e6,
    }

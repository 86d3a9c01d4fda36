"""The backends that guests drive, each a process with one or more disks."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import attrs
import trio

from harness.disks import Disk
from harness.guest import REFERENCE, Figures, RunFailed, running
from harness.machine import Cpus, pin_process
from harness.targets import PLAIN
from harness.workloads import Workload
from xbd.core.errors import XbdError
from xbd.core.frontend.toolstack import DiskLine, Toolstack
from xbd.core.units import Domid
from xbd.core.xenstore.client import StoreClient

QEMU = "qemu"
XBD = "xbd"
XBD_PYTHON = "xbd python"
"""Its data path in Python."""
DATAPATHS = {XBD: "native", XBD_PYTHON: "python"}

_START_SECONDS = 20.0
_STOP_SECONDS = 20.0
_LOG_LINES = 15


class Server(ABC):
    """A backend's process, from start to stop."""

    def __init__(self, name: str, directory: Path, disks: Mapping[str, Disk]) -> None:
        self.name = name
        self._directory = directory
        self._disks = disks
        self._environment: Mapping[str, str] = {}
        """What to add to the process's environment."""
        self._log = directory / f"{name.replace(' ', '-')}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process is gone, which it should not be."""
        assert self._process is not None
        return self._process.poll() is not None

    @abstractmethod
    def _command(self) -> list[str]:
        """What to run."""

    @abstractmethod
    def _sockets(self) -> list[tuple[Path, int | None]]:
        """What listens when it is ready: path and socket type, or None: don't try it, just look."""

    @abstractmethod
    def _drive(
        self, workload: Workload, *, seconds: float, seed: int, cpu: int, more: Sequence[str]
    ) -> Figures:
        """Run the load generator once.  Raises `RunFailed`."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start, wait until it is ready, and stop in the end.  Raises `RunFailed`."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self._environment,
            )
        try:
            for path, kind in self._sockets():
                self._await_socket(path, kind)
            yield
        finally:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def run(
        self, workload: Workload, *, seconds: float, seed: int, cpus: Cpus, more: Sequence[str]
    ) -> Figures:
        """Measure once.  Raises `RunFailed` with the server's last words."""
        try:
            if self.ended:
                raise RunFailed("it is not running")
            pin_process(self.pid, cpus.backend)
            return self._drive(workload, seconds=seconds, seed=seed, cpu=cpus.guest, more=more)
        except RunFailed as error:
            raise RunFailed(f"{error}{self._last_words()}") from None

    def _last_words(self) -> str:
        assert self._process is not None
        code = self._process.poll()
        ended = "" if code is None else f"; it ended with {code}"
        lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return ended + "".join(f"\n    {line}" for line in lines)

    def _await_socket(self, path: Path, kind: int | None) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(path, kind):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RunFailed(f"{self.name} did not start{self._last_words()}")
            time.sleep(0.02)


def _answers(path: Path, kind: int | None) -> bool:
    if kind is None:
        return path.exists()
    with socket.socket(socket.AF_UNIX, kind) as probe:
        return probe.connect_ex(str(path)) == 0


class QemuServer(Server):
    """qemu-storage-daemon with an export over vhost-user-blk for each disk."""

    def __init__(
        self, directory: Path, disks: Mapping[str, Disk], poll_ns: int, *, locking: bool = False
    ) -> None:
        """`locking`: needed for images with tables; otherwise others may use the disks, too."""
        super().__init__(QEMU, directory, disks)
        self._poll_ns = poll_ns
        self._locking = locking

    @staticmethod
    def binary() -> str | None:
        """Where it is, if it is installed."""
        return shutil.which("qemu-storage-daemon")

    def _socket(self, disk: str) -> Path:
        return self._directory / f"qemu-{disk}.sock"

    def _sockets(self) -> list[tuple[Path, int | None]]:
        # It would take a connection for its only guest.
        return [(self._socket(disk), None) for disk in self._disks]

    def _command(self) -> list[str]:
        command = [self.binary() or "qemu-storage-daemon"]
        command += ["--object", f"iothread,id=io,poll-max-ns={self._poll_ns}"]
        for name, disk in self._disks.items():
            command += disk.qemu_blockdevs(name, locking=self._locking)
            export = f"type=vhost-user-blk,id={name}-export,node-name={name},iothread=io"
            address = f"addr.type=unix,addr.path={self._socket(name)}"
            command += ["--export", f"{export},{address},writable=on"]
        return command

    def _drive(
        self, workload: Workload, *, seconds: float, seed: int, cpu: int, more: Sequence[str]
    ) -> Figures:
        transport = ["vhost-user", str(self._socket(workload.disk))]
        with running(
            transport, workload, seconds=seconds, seed=seed, cpu=cpu, watch=self.pid, more=[]
        ) as guest:
            return guest.figures()


class PlainServer(Server):
    """bench-reference, with all disks in one process."""

    def __init__(self, directory: Path, disks: Mapping[str, Disk]) -> None:
        super().__init__(PLAIN, directory, disks)
        self._socket = directory / "plain.socket"

    def _sockets(self) -> list[tuple[Path, int | None]]:
        # It would take a connection for its only guest.
        return [(self._socket, None)]

    def _command(self) -> list[str]:
        files = [
            f"{'cached' if disk.through_cache else 'direct'}:{disk.path}"
            for disk in self._disks.values()
        ]
        return [str(REFERENCE), str(self._socket), *files]

    def _drive(
        self, workload: Workload, *, seconds: float, seed: int, cpu: int, more: Sequence[str]
    ) -> Figures:
        transport = [
            "bare",
            str(self._socket),
            "--disk",
            str(list(self._disks).index(workload.disk)),
        ]
        with running(
            transport, workload, seconds=seconds, seed=seed, cpu=cpu, watch=self.pid, more=[]
        ) as guest:
            return guest.figures()


@attrs.frozen(kw_only=True)
class NumberedDisk(DiskLine):
    """One of more disks than there are letters."""

    @property
    def vdev(self) -> str:
        return f"xvd{self.number}"


class BenchToolstack(Toolstack):
    """One that knows how to have a hundred disks in a guest."""

    async def drop_needless(self, domid: Domid, disk: DiskLine) -> None:
        """Remove what no frontend reads.  A guest owns 1000 nodes at most, and has ten per disk."""
        path = f"/local/domain/{domid}/device/vbd/{disk.devid}"
        await self._store.remove(f"{path}/device-type")


class StoreServer(Server):
    """``xbd xenstored``: the embedded host's XenStore alone, for daemons that start later."""

    def __init__(self, name: str, directory: Path, host: Path) -> None:
        """`host`: the embedded host's directory."""
        super().__init__(name, directory, {})
        self._host = host

    def _sockets(self) -> list[tuple[Path, int | None]]:
        return [(self._host / "xenstored.socket", socket.SOCK_STREAM)]

    def _command(self) -> list[str]:
        options = ["--log-level", "warning"]
        return [sys.executable, "-m", "xbd", "xenstored", str(self._host), *options]

    def _drive(
        self, workload: Workload, *, seconds: float, seed: int, cpu: int, more: Sequence[str]
    ) -> Figures:
        raise RunFailed("a XenStore has no disks")


class XbdServer(Server):
    """``xbd serve --embedded``; each run is a guest of its own."""

    def __init__(
        self,
        name: str,
        directory: Path,
        disks: Mapping[str, Disk],
        *,
        image_directory: Path | None = None,
        drivers: Path | None = None,
        datapath: str = DATAPATHS[XBD],
        spin_us: int = 0,
        copies: int = 1,
    ) -> None:
        """`image_directory`: where images may have others behind them; `drivers`: a directory
        with more of them, as installed; `spin_us`: -1 for the daemon's own choice, 0 to sleep, as
        it must where it shares a CPU with the guest; `copies`: so many disks per guest, which
        are one file."""
        super().__init__(name, directory, disks)
        self._copies = copies
        self._host = directory / name.replace(" ", "-")
        self._config = directory / f"{self._host.name}.toml"
        backend = [f'datapath = "{datapath}"', f"spin_us = {spin_us}"]
        if image_directory is not None:
            backend.append(f'image_dirs = ["{image_directory}"]')
        limits = [f"disks_per_domain = {copies}"]
        self._config.write_text("\n".join(["[backend]", *backend, "[limits]", *limits, ""]))
        if drivers is not None:
            cache = {"XDG_CACHE_HOME": str(directory)}  # with only the usual ones in the user's own
            self._environment = {"PYTHONPATH": str(drivers), **cache}

    @property
    def host(self) -> Path:
        """The embedded host's directory."""
        return self._host

    @property
    def store_socket(self) -> Path:
        """Domain 0's, of XenStore."""
        return self._host / "xenstored.socket"

    def _sockets(self) -> list[tuple[Path, int | None]]:
        return [
            (self._host / "hypervisor.socket", socket.SOCK_SEQPACKET),
            (self._host / "xenstored.socket", socket.SOCK_STREAM),
        ]

    def _command(self) -> list[str]:
        options = ["--embedded", str(self._host), "--config", str(self._config)]
        return [sys.executable, "-m", "xbd", "serve", *options, "--log-level", "warning"]

    def _drive(
        self, workload: Workload, *, seconds: float, seed: int, cpu: int, more: Sequence[str]
    ) -> Figures:
        if self._copies > 1:
            workload = replace(workload, depth=workload.depth * self._copies)
        transport = ["blkif", str(self._host), "--disks", str(self._copies)]
        with running(
            transport, workload, seconds=seconds, seed=seed, cpu=cpu, watch=self.pid, more=more
        ) as guest:
            domid = Domid(guest.domid())
            with self._attached(domid, self._lines(self._disks[workload.disk])):
                return guest.figures()

    def _lines(self, disk: Disk) -> list[DiskLine]:
        if self._copies == 1:
            return [DiskLine(target=disk.spec)]
        # Several writers of one file would not be let in.
        return [
            NumberedDisk(target=disk.spec, number=number, read_only=True)
            for number in range(self._copies)
        ]

    @contextmanager
    def _attached(self, domid: Domid, lines: Sequence[DiskLine]) -> Iterator[None]:
        async def attach(toolstack: BenchToolstack) -> None:
            await toolstack.create_domain(domid, "bench")
            for line in lines:
                await toolstack.attach(domid, line)
                if self._copies > 1:
                    await toolstack.drop_needless(domid, line)

        async def destroy(toolstack: BenchToolstack) -> None:
            for line in lines:
                await toolstack.detach(domid, line)
            await toolstack.destroy_domain(domid)

        try:
            trio.run(self._with_toolstack, attach)
            yield
        except XbdError as error:
            raise RunFailed(str(error)) from None
        finally:
            with contextlib.suppress(XbdError):  # the run's own failure says more
                trio.run(self._with_toolstack, destroy)

    async def _with_toolstack(self, act: Callable[[BenchToolstack], Awaitable[None]]) -> None:
        async with StoreClient.connect(self._host / "xenstored.socket") as store:
            await act(BenchToolstack(store))

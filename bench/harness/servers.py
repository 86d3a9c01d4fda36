"""The backends that are compared.  Each serves all images, from one process."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import trio

from harness.guest import Figures, RunFailed, running
from harness.machine import Cpus, pin_process
from harness.workloads import Image, Workload
from xbd.core.errors import XbdError
from xbd.core.frontend.toolstack import DiskLine, Toolstack
from xbd.core.units import Domid
from xbd.core.xenstore.client import StoreClient

QEMU = "qemu"
DATA_PATHS: Mapping[str, str] = {"python": ""}
"""xbd's data paths, and the configuration (TOML) that chooses each."""

_START_SECONDS = 20.0
_STOP_SECONDS = 20.0
_LOG_LINES = 15


class Server(ABC):
    """A backend's process, from start to stop."""

    def __init__(self, name: str, directory: Path, images: Mapping[Image, Path]) -> None:
        self.name = name
        self._directory = directory
        self._images = images
        self._log = directory / f"{name}.log"
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
    def _sockets(self) -> list[tuple[Path, int]]:
        """What listens when it is ready: path and socket type."""

    @abstractmethod
    def _drive(
        self, workload: Workload, *, seconds: float, seed: int, cpu: int, more: list[str]
    ) -> Figures:
        """Run the load generator once.  Raises `RunFailed`."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start, wait until it is ready, and stop in the end.  Raises `RunFailed`."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
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
        self, workload: Workload, *, seconds: float, seed: int, cpus: Cpus, more: list[str]
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

    def _await_socket(self, path: Path, kind: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(path, kind):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RunFailed(f"{self.name} did not start{self._last_words()}")
            time.sleep(0.02)


def _answers(path: Path, kind: int) -> bool:
    if kind == socket.SOCK_STREAM and not path.name.startswith("xenstored"):
        return path.exists()  # QEMU would take a connection for its only guest
    with socket.socket(socket.AF_UNIX, kind) as probe:
        return probe.connect_ex(str(path)) == 0


class QemuServer(Server):
    """qemu-storage-daemon with an export over vhost-user-blk for each image."""

    def __init__(self, directory: Path, images: Mapping[Image, Path], poll_ns: int) -> None:
        super().__init__(QEMU, directory, images)
        self._poll_ns = poll_ns

    @staticmethod
    def binary() -> str | None:
        """Where it is, if it is installed."""
        return shutil.which("qemu-storage-daemon")

    def _socket(self, image: Image) -> Path:
        return self._directory / f"qemu-{image.value}.sock"

    def _sockets(self) -> list[tuple[Path, int]]:
        return [(self._socket(image), socket.SOCK_STREAM) for image in self._images]

    def _command(self) -> list[str]:
        command = [self.binary() or "qemu-storage-daemon"]
        command += ["--object", f"iothread,id=io,poll-max-ns={self._poll_ns}"]
        for image, path in self._images.items():
            name, direct = image.value, "off" if image.through_cache else "on"
            # xbd has the same files open, at other times: no locks.
            file = f"driver=file,node-name={name}-file,filename={path},locking=off,aio=io_uring"
            command += ["--blockdev", f"{file},cache.direct={direct}"]
            command += ["--blockdev", f"driver=raw,node-name={name},file={name}-file"]
            export = f"type=vhost-user-blk,id={name}-export,node-name={name},iothread=io"
            address = f"addr.type=unix,addr.path={self._socket(image)}"
            command += ["--export", f"{export},{address},writable=on"]
        return command

    def _drive(
        self, workload: Workload, *, seconds: float, seed: int, cpu: int, more: list[str]
    ) -> Figures:
        transport = ["vhost-user", str(self._socket(workload.image))]
        with running(
            transport, workload, seconds=seconds, seed=seed, cpu=cpu, watch=self.pid, more=[]
        ) as guest:
            return guest.figures()


class XbdServer(Server):
    """``xbd serve --embedded`` with one of its data paths; each run is a guest of its own."""

    def __init__(self, data_path: str, directory: Path, images: Mapping[Image, Path]) -> None:
        super().__init__(f"xbd-{data_path}", directory, images)
        self._host = directory / f"xbd-{data_path}"
        self._config = directory / f"xbd-{data_path}.toml"
        self._config.write_text(DATA_PATHS[data_path])

    def _sockets(self) -> list[tuple[Path, int]]:
        return [
            (self._host / "hypervisor.socket", socket.SOCK_SEQPACKET),
            (self._host / "xenstored.socket", socket.SOCK_STREAM),
        ]

    def _command(self) -> list[str]:
        options = ["--embedded", str(self._host), "--config", str(self._config)]
        return [sys.executable, "-m", "xbd", "serve", *options, "--log-level", "warning"]

    def _drive(
        self, workload: Workload, *, seconds: float, seed: int, cpu: int, more: list[str]
    ) -> Figures:
        transport = ["blkif", str(self._host)]
        with running(
            transport, workload, seconds=seconds, seed=seed, cpu=cpu, watch=self.pid, more=more
        ) as guest:
            domid = Domid(guest.domid())
            with self._attached(domid, workload.image):
                return guest.figures()

    @contextmanager
    def _attached(self, domid: Domid, image: Image) -> Iterator[None]:
        cache = "writeback" if image.through_cache else "none"
        disk = DiskLine(target=f"imagefile:{self._images[image]}?cache={cache}")

        async def attach(toolstack: Toolstack) -> None:
            await toolstack.create_domain(domid, "bench")
            await toolstack.attach(domid, disk)

        async def destroy(toolstack: Toolstack) -> None:
            await toolstack.detach(domid, disk)
            await toolstack.destroy_domain(domid)

        try:
            trio.run(self._with_toolstack, attach)
            yield
        except XbdError as error:
            raise RunFailed(str(error)) from None
        finally:
            with contextlib.suppress(XbdError):  # the run's own failure says more
                trio.run(self._with_toolstack, destroy)

    async def _with_toolstack(self, act: Callable[[Toolstack], Awaitable[None]]) -> None:
        async with StoreClient.connect(self._host / "xenstored.socket") as store:
            await act(Toolstack(store))

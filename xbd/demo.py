"""The demonstration: a daemon, some images and some guests on a machine without Xen.

Everything is real but the hypervisor: the daemon is a process of its own that serves the embedded
host, the guests negotiate over XenStore and use rings in shared memory.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import attrs
import trio

from xbd.core.blkif import X86_32, X86_64
from xbd.core.errors import ConfigError
from xbd.core.frontend import BlockFrontend, DiskLine, FrontendOptions, Toolstack, connect
from xbd.core.frontend.exercise import Exercise, Timing
from xbd.core.hypervisor.embedded_guest import GuestDomain
from xbd.core.units import MIB, PAGE_SIZE, Domid
from xbd.core.xenstore.client import StoreClient

START_SECONDS = 30.0
STOP_SECONDS = 20.0
GUEST_PAGES = 4096
RANDOM_READS = 4000


class DemoFailed(ConfigError):
    """Something did not work; the text says what."""

    exit_code = 1


@attrs.frozen(kw_only=True)
class DemoDisk:
    """One guest with one disk."""

    title: str
    target: str
    image: Path
    size: int
    options: FrontendOptions


@attrs.define
class DemoResult:
    """What one guest saw."""

    disk: DemoDisk
    write: Timing
    read: Timing
    random: Timing
    wrong: list[int]
    """Offsets at which the guest, or the host after it, found something else than was written."""


@attrs.define
class Demo:
    """A running daemon with its disks; made by `running`."""

    directory: Path
    disks: list[DemoDisk]
    notes: list[str]
    """What could not be shown on this machine, and why."""

    @property
    def control_socket(self) -> Path:
        return self.directory / "control.sock"


def plan(directory: Path, stack: ExitStack, size: int) -> tuple[list[DemoDisk], list[str]]:
    """Images of every driver that can be shown here, each used in another way."""
    plain = FrontendOptions(ring_order=2, queues=1)
    disks: list[DemoDisk] = []
    notes: list[str] = []
    for title, query, options in (
        ("imagefile, 4-page ring", "", plain),
        (
            "imagefile, cached, 2 queues",
            "?cache=writeback",
            FrontendOptions(ring_order=1, queues=2, indirect_segments=128),
        ),
        (
            "imagefile, 32-bit, no mapping",
            "",
            FrontendOptions(abi=X86_32, persistent=False, indirect_segments=0),
        ),
    ):
        image = directory / f"disk{len(disks)}.img"
        with image.open("wb") as file:
            file.truncate(size)
        target = f"imagefile:{image}{query}"
        disks.append(DemoDisk(title=title, target=target, image=image, size=size, options=options))
    try:
        device = stack.enter_context(_loop_device(directory / "device.img", size))
    except (OSError, subprocess.CalledProcessError) as error:
        notes.append(f"raw: not shown, a loop device can't be made here ({_reason(error)})")
    else:
        options = FrontendOptions(abi=X86_64, ring_order=4, indirect_segments=256)
        disks.append(
            DemoDisk(
                title="raw, 16-page ring",
                target=f"raw:{device}",
                image=directory / "device.img",
                size=size,
                options=options,
            )
        )
    return disks, notes


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return str(error.stderr.strip() or error)
    return str(error)


@contextmanager
def _loop_device(image: Path, size: int) -> Iterator[str]:
    if os.geteuid() != 0:
        raise PermissionError("needs root")
    if shutil.which("losetup") is None:
        raise FileNotFoundError("losetup is not installed")
    with image.open("wb") as file:
        file.truncate(size)
    done = subprocess.run(
        ["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True
    )
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@asynccontextmanager
async def running(size: int = 32 * MIB) -> AsyncIterator[Demo]:
    """A daemon on an embedded host of its own; everything is removed on the way out.

    Raises `DemoFailed`.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xbd-demo-")))
        disks, notes = plan(directory, stack, size)
        demo = Demo(directory, disks, notes)
        async with _daemon(demo):
            yield demo


@asynccontextmanager
async def _daemon(demo: Demo) -> AsyncIterator[None]:
    log = demo.directory / "daemon.log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, log.open("wb") as output:
        notify.bind(str(demo.directory / "notify"))
        notify.setblocking(False)
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "xbd", "serve", "--embedded", str(demo.directory)],
            stdout=output,
            stderr=output,
            env={**os.environ, "NOTIFY_SOCKET": str(demo.directory / "notify")},
        )
        try:
            await _wait_ready(notify, process, log)
            yield
        finally:
            process.terminate()
            with trio.move_on_after(STOP_SECONDS, shield=True):
                await process.wait()
            if process.poll() is None:
                process.kill()
    if process.returncode != 0:
        raise DemoFailed(f"the daemon ended with status {process.returncode}: {_tail(log)}")


async def _wait_ready(notify: socket.socket, process: trio.Process, log: Path) -> None:
    with trio.move_on_after(START_SECONDS):
        while True:
            with trio.move_on_after(0.5):
                await trio.lowlevel.wait_readable(notify)
                if b"READY=1" in notify.recv(4096):
                    return
            if process.poll() is not None:
                raise DemoFailed(f"the daemon did not start: {_tail(log)}")
    raise DemoFailed(f"the daemon was not ready in {START_SECONDS:g} s: {_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote no log"


async def use_disk(
    demo: Demo, number: int, progress: Callable[[int], None], meet: Callable[[], Awaitable[None]]
) -> DemoResult:
    """One guest from creation to destruction: attach, fill, verify, detach, look at the image.

    `progress` hears of every byte written or verified; `meet` is awaited before the disk is
    disconnected.
    """
    disk = demo.disks[number]
    domid = Domid(number + 1)
    line = DiskLine(target=disk.target)
    async with (
        StoreClient.connect(demo.directory / "xenstored.socket") as store,
        GuestDomain.connect(demo.directory, domid, pages=GUEST_PAGES) as guest,
    ):
        toolstack = Toolstack(store)
        await toolstack.create_domain(domid, f"demo{domid}")
        try:
            devid = await toolstack.attach(domid, line)
            own_store = StoreClient.connect(demo.directory / f"xenstored-{domid}.socket")
            async with own_store as own, connect(own, guest, devid, disk.options) as frontend:
                result = await _exercise(disk, frontend, number, progress)
                await meet()
            if not await toolstack.detach(domid, line):
                raise DemoFailed(f"{disk.title}: the backend did not let go of the disk")
        finally:
            with trio.move_on_after(STOP_SECONDS, shield=True):
                await toolstack.destroy_domain(domid)
    result.wrong += await trio.to_thread.run_sync(_compare_image, disk, number)
    return result


async def _exercise(
    disk: DemoDisk, frontend: BlockFrontend, seed: int, progress: Callable[[int], None]
) -> DemoResult:
    exercise = Exercise(frontend, seed)
    written = await exercise.fill(progress)
    read = await exercise.verify(progress)
    random = await exercise.random_reads(RANDOM_READS)
    return DemoResult(disk, written, read, random, exercise.wrong)


def _compare_image(disk: DemoDisk, seed: int) -> list[int]:
    """The host's view of the same bytes, without any ring."""
    wrong = []
    pattern = Exercise.pattern_of
    with disk.image.open("rb") as file:
        for offset in range(0, disk.size, PAGE_SIZE):
            if file.read(PAGE_SIZE) != pattern(seed, offset, PAGE_SIZE):
                wrong.append(offset)
    return wrong

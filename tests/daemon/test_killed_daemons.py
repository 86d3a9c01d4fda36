"""Daemons that are killed again and again while a guest works, and what follows them."""

from __future__ import annotations

import itertools
import random
import signal
import struct

import pytest
import trio
from daemon_process import SECONDS, disk_of, guest_with, run, starter

from xbd.core.datapath import native
from xbd.core.frontend.options import FrontendOptions
from xbd.core.frontend.toolstack import DiskLine
from xbd.core.units import PAGE_SIZE

pytestmark = pytest.mark.slow

WORKERS = 12
PAGES = 120
"""Of each worker."""
SIZE = WORKERS * PAGES * PAGE_SIZE
OPTIONS = FrontendOptions(ring_order=0, queues=2, indirect_segments=32)
PYTHON, NATIVE = "python", "native"
GOING_ON = "going on where the last backend died"


def content(page: int, version: int) -> bytes:
    """What a page has after so many writes."""
    return struct.pack("<QQ", page, version) * (PAGE_SIZE // 16) if version else bytes(PAGE_SIZE)


class Load:
    """Writes, reads back and flushes; each worker on pages of its own, one request at a time.

    So every answer is known: what was acknowledged last, and nothing else, whoever gave it.  (That
    no request is answered twice, or with another's operation, is seen to by the frontend.)
    """

    def __init__(self, disk, seed: int) -> None:
        self.disk = disk
        self.written = [0] * (WORKERS * PAGES)
        """By page: the version that was acknowledged."""
        self.answered = 0
        self.ending = False
        self._dice = random.Random(seed)
        self._more = trio.Event()

    async def work(self, worker: int) -> None:
        dice = random.Random(self._dice.random())
        for version in itertools.count(1):
            count = dice.choice((1, 1, 2, 11, 12, 30))
            first = worker * PAGES + dice.randrange(PAGES - count)
            pages = range(first, first + count)
            what = dice.random()
            if what < 0.5:
                data = b"".join(content(page, version) for page in pages)
                await self.disk.write(first * PAGE_SIZE, data)
                for page in pages:
                    self.written[page] = version
            elif what < 0.95:
                await self.check(pages)
            else:
                await self.disk.flush()
            self.answered += 1
            self._more.set()
            self._more = trio.Event()
            if self.ending:
                break

    async def check(self, pages: range) -> None:
        data = await self.disk.read(pages.start * PAGE_SIZE, len(pages) * PAGE_SIZE)
        assert data == self.expected(pages), "an acknowledged write was lost"

    def expected(self, pages: range) -> bytes:
        return b"".join(content(page, self.written[page]) for page in pages)

    async def until(self, answered: int) -> None:
        with trio.fail_after(SECONDS):
            while self.answered < answered:
                await self._more.wait()


@pytest.mark.skipif(native.why_not is not None, reason=f"no native data path: {native.why_not}")
@pytest.mark.parametrize(
    ("driver", "paths"),
    [
        ("imagefile", [NATIVE, PYTHON, PYTHON, NATIVE, NATIVE]),
        ("qcow2", [NATIVE, NATIVE, PYTHON, NATIVE]),
    ],
)
async def test_killed_daemons_that_no_guest_notices(tmp_path, driver, paths):
    """Whichever data path each of them has; every write is done once it is answered."""
    directory, image = tmp_path / "host", tmp_path / "disk"
    code, _, error = await run("image", "create", f"{driver}:{image}", str(SIZE))
    assert code == 0, error
    line = DiskLine(target=f"{driver}:{image}")
    dice = random.Random()
    said = ""

    async def start(data_path):
        config = tmp_path / f"{data_path}.toml"
        config.write_text(f'[backend]\ndatapath = "{data_path}"\n')
        daemon = await start_process("serve", "--config", config, "--embedded", directory)
        await daemon.says("serves vbd3")
        return daemon

    async with starter() as start_process:
        store = await start_process("xenstored", directory)
        await store.says("XenStore is served")
        daemon = await start(paths[0])
        async with (
            guest_with(directory, line) as (_, _, guest),
            disk_of(directory, guest, line, OPTIONS) as disk,
        ):
            load = Load(disk, dice.getrandbits(32))
            async with trio.open_nursery() as nursery:
                for worker in range(WORKERS):
                    nursery.start_soon(load.work, worker)
                for killed, data_path in enumerate(itertools.cycle(paths[1:])):
                    # Seldom has none of the first few left anything undone.
                    if killed >= len(paths) - 1 and GOING_ON in said + daemon.said:
                        break
                    # Now and then before the debts of the last one are paid.
                    await load.until(load.answered + dice.choice((0, 1, 30, 200)))
                    await daemon.stop(signal.SIGKILL)
                    said += daemon.said
                    daemon = await start(data_path)
                    await daemon.says("connect identifier")
                    assert f"{data_path}, " in daemon.said
                await load.until(load.answered + 200)
                load.ending = True
            with trio.fail_after(SECONDS):
                for worker in range(WORKERS):
                    await load.check(range(worker * PAGES, (worker + 1) * PAGES))
        assert await daemon.stop() == 0
        said += daemon.said
        assert await store.stop() == 0
    for unwanted in ("another ring", "Traceback", "left over", "request failed"):
        assert unwanted not in said
    if driver == "imagefile":
        assert image.read_bytes() == load.expected(range(WORKERS * PAGES))
    else:
        code, told, error = await run("image", "check", f"{driver}:{image}")
        assert code in (0, 3), told + error  # leaked clusters are allowed

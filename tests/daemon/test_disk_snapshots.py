"""Snapshots of disks that guests are writing to."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import trio
from daemon_process import SECONDS, guest_disk, run, running

from xbd.core.control.client import DaemonUnavailable, ask

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")

MIB = 1 << 20
DISK = "xbdback5i51712"
BLOCK = 4096
BLOCKS = 100
"""Of each writer; they lie in two clusters, which are written again and again."""
WRITERS = 3


def qemu_img(*arguments):
    done = subprocess.run(
        ["qemu-img", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Writer:
    """Writes numbered blocks one after the other, round and round, and flushes now and then."""

    def __init__(self, disk, number):
        self.disk = disk
        self.start = number * MIB
        self.begun = self.answered = 0
        self.stopping = False
        self.progress = trio.Event()

    async def run(self):
        while not self.stopping:
            at = self.start + self.begun % BLOCKS * BLOCK
            self.begun += 1
            await self.disk.write(at, self.begun.to_bytes(8, "big") * (BLOCK // 8))
            self.answered = self.begun
            if self.answered % 7 == 0:
                await self.disk.flush()
            self.progress.set()
            self.progress = trio.Event()

    async def reach(self, number):
        with trio.fail_after(SECONDS):
            while self.answered < number:
                await self.progress.wait()

    def check(self, content, least, most):
        """It is what one moment left, between so many and so many writes."""
        blocks = [
            content[self.start + n * BLOCK : self.start + (n + 1) * BLOCK] for n in range(BLOCKS)
        ]
        numbers = [int.from_bytes(block[:8], "big") for block in blocks]
        assert blocks == [number.to_bytes(8, "big") * (BLOCK // 8) for number in numbers]
        last = max(numbers)
        assert least <= last <= most
        for place, number in enumerate(numbers):
            assert number == max((last - 1 - place) // BLOCKS * BLOCKS + place + 1, 0)


@pytest.mark.slow
async def test_a_snapshot_is_one_moment_of_a_guest_that_writes(tmp_path):
    directory, image = tmp_path / "host", tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, 16 * MIB)
    bounds = {}
    async with running("serve", "--embedded", directory) as daemon:
        await daemon.says("serves vbd3")
        async with guest_disk(directory, f"qcow2:{image}") as disk:
            writers = [Writer(disk, number) for number in range(WRITERS)]
            async with trio.open_nursery() as nursery:
                for writer in writers:
                    nursery.start_soon(writer.run)
                for name in ("one", "two", "three", "by command"):
                    before = [writer.answered for writer in writers]
                    for writer, number in zip(writers, before, strict=True):
                        await writer.reach(number + BLOCKS // 2)
                    least = [writer.answered for writer in writers]
                    if name == "by command":
                        answer = await run("snapshot", "--embedded", directory, DISK, name)
                        assert answer == (0, f"Created snapshot 'by command' of {DISK}.\n", "")
                    else:
                        await ask(directory / "control.sock", "snapshot", disk=DISK, name=name)
                    bounds[name] = list(zip(least, [w.begun for w in writers], strict=True))
                for writer in writers:
                    await writer.reach(writer.answered + BLOCKS // 2)
                    writer.stopping = True
            content = b"".join([await disk.read(n * MIB, MIB) for n in range(WRITERS)])
        await daemon.says(f"created snapshot 'one' of {DISK}")
        assert await daemon.stop() == 0
    for writer in writers:
        writer.check(content, writer.answered, writer.answered)
    qemu_img("check", "-q", image)
    told = json.loads(qemu_img("info", "--output=json", image))["snapshots"]
    assert [one["name"] for one in told] == list(bounds)
    for one in told:
        copy = tmp_path / "copy"
        named = f"snapshot.id={one['id']}"
        qemu_img("convert", "-l", named, "-f", "qcow2", "-O", "raw", image, copy)
        for writer, (least, most) in zip(writers, bounds[one["name"]], strict=True):
            writer.check(copy.read_bytes(), least, most)
    assert "Traceback" not in daemon.said


async def test_what_cannot_be_kept_is_one_line(tmp_path):
    directory, image = tmp_path / "host", tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    async with running("serve", "--embedded", directory) as daemon:
        await daemon.says("serves vbd3")
        async with guest_disk(directory, f"imagefile:{image}") as disk:
            for name, said in (
                (DISK, f"{DISK}: can't be kept in snapshots"),
                ("xbdback5i768", "there is no disk 'xbdback5i768': xbd list"),
            ):
                code, told, error = await run("snapshot", "--embedded", directory, name, "one")
                assert (code, told) == (1, "")
                assert said in error
                assert error.count("\n") == 1
            with pytest.raises(DaemonUnavailable, match='needs "name"'):
                await ask(directory / "control.sock", "snapshot", disk=DISK, name=5)
            assert await disk.read(0, 4096) == bytes(4096)
        assert await daemon.stop() == 0
    assert "Traceback" not in daemon.said

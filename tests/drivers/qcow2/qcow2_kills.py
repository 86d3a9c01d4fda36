"""Killing processes that write to an image, and looking at what they leave."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
from qcow2_bytes import ImageBytes
from qcow2_history import SECTOR, ZEROES, History, Version, stamp
from qcow2_recipes import Made
from qcow2_walk import tool

VICTIM = Path(__file__).with_name("kill_victim.py")


@attrs.define
class Killer:
    """Sends one process after the other to its death, on the same image."""

    made: Made
    below: bytes
    chance: random.Random
    unit: int
    """Sectors that can be discarded."""
    process: subprocess.Popen[str]
    kills: int = 0
    answered: int = 0
    leaked: int = 0

    @classmethod
    @contextmanager
    def start(cls, made: Made, below: bytes, seed: int) -> Iterator[Killer]:
        process = subprocess.Popen(
            [sys.executable, VICTIM, made.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        image = ImageBytes(made.path.read_bytes())
        unit = image.cluster // SECTOR
        try:
            yield cls(made, below, random.Random(seed), unit, process)
        finally:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()
            process.kill()
            process.wait()

    def kill_one(self) -> None:
        """A process lives for a while; what it was answered is there afterwards."""
        assert self.process.stdin is not None
        disk = self._disk()
        history = History(disk)
        seed = self.chance.randrange(1 << 30)
        print(seed, len(disk) // SECTOR, self.unit, file=self.process.stdin, flush=True)
        begun: dict[int, tuple[int, list[Version]]] = {}
        patience = self.chance.choice((3, 10, 30, 100, 300))
        lines = self._lines()
        victim = int(next(lines)[1])
        place = 0
        try:
            for place, words in enumerate(lines, 1):
                if place == patience:
                    os.kill(victim, signal.SIGKILL)
                if words[0] == "B":
                    number, first, count, stamped = map(int, words[1:])
                    sectors = range(first, first + count)
                    values = [stamp(stamped, at) if stamped else ZEROES for at in sectors]
                    begun[number] = first, history.begin(first * SECTOR, values, place)
                else:
                    self.answered += 1
                    number, stayed = map(int, words[1:])
                    first, versions = begun[number]
                    for at, version in enumerate(versions):
                        if stayed >> at & 1:
                            before = history.sectors[first + at][-2].value
                            history.sectors[first + at].append(Version(before, place, place))
                        else:
                            version.done = place
        except BaseException:
            os.kill(victim, signal.SIGKILL)
            raise
        assert place >= patience, "the process died by itself"
        self.kills += 1
        self.leaked = ImageBytes(self.made.path.read_bytes()).check()
        history.compare(self._disk(), 1 << 40, flushed=False)

    def _lines(self) -> Iterator[list[str]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "D\n":
                return
            yield line.split()
        raise AssertionError("the process that sends others to death has died itself")

    def _disk(self) -> bytearray:
        return ImageBytes(self.made.path.read_bytes()).disk(self.below)

    def qemu_finds_leaks_at_most(self) -> None:
        try:
            tool("qemu-img", "check", "-f", "qcow2", self.made.path)
        except AssertionError as error:
            if "leaked clusters" not in str(error) or "ERROR" in str(error):
                raise

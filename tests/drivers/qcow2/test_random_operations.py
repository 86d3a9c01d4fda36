"""Many threads on one image: each finds what it wrote, no reader sees what was never there."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from qcow2_history import SECTOR, History
from qcow2_player import Player
from qcow2_recipes import NAMED, assert_same

from xbd.core.datapath import native
from xbd.core.datapath.native.claims import NativeClaims
from xbd.core.datapath.native.extents import NativeExtents
from xbd.core.units import KIB
from xbd.drivers.qcow2 import placing
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.opening import open_image

pytestmark = pytest.mark.usefixtures("no_power_cuts")

WRITERS = 4
STEPS = 40


class Reader:
    """Reads anywhere, at any time: each sector is something that was written to it."""

    def __init__(self, image: Image, history: History, chance: random.Random) -> None:
        self.image = image
        self.history = history
        self.chance = chance
        self.sectors = 0

    def step(self) -> None:
        length = self.chance.choice((1, 8, 40, 200))
        first = self.chance.randrange(self.image.size // SECTOR - length + 1)
        target = self.image.buffer(length * SECTOR)
        self.image.readv(first * SECTOR, [target])
        for number, at in enumerate(range(0, len(target), SECTOR), first):
            value = target[at : at + SECTOR]
            # What was begun before the read came back is in the history.
            versions = list(self.history.sectors[number])
            assert any(value == version.value for version in versions), (
                f"sector {number} reads {bytes(value[:8]).hex()}, which nobody wrote there"
            )
        self.sectors += length
        self.image.resolve(first * SECTOR, length * SECTOR)
        self.image.block_status(first * SECTOR, length * SECTOR)


def in_threads(jobs: list[Callable[[], None]]) -> None:
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread waits for ever"
    if errors:
        raise errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "default",
        "512",
        "over-two",
        "v2-over",
        "subclusters-over",
        "zlib-4k",
        "snapshots",
        "external-4k",
        "luks-4k-over",
        "4k ahead",
        "snapshots ahead",
    ],
)
def test_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    name, _, ahead = name.partition(" ")
    if ahead:  # every write links more than it needs
        monkeypatch.setattr(placing, "STREAK", 0)
    recipe = attrs.evolve(NAMED[name], size=256 * KIB)
    made = recipe.make(tmp_path)
    image = open_image(made.path, made.wishes(direct=True))
    history = History(made.content)
    sectors = made.size // SECTOR
    players = [
        Player(
            image,
            history,
            random.Random(f"{name} {number}"),
            lambda: 0,
            low=sectors * number // WRITERS,
            high=sectors * (number + 1) // WRITERS,
            number=number + 1,
            claims=native_claims(),
        )
        for number in range(WRITERS)
    ]
    reader = Reader(image, history, random.Random(name))
    playing = WRITERS

    def play(player: Player) -> None:
        nonlocal playing
        try:
            for _ in range(STEPS):
                player.step("WWWZUDFR")
        finally:
            playing -= 1

    def read() -> None:
        while playing:
            reader.step()

    try:
        in_threads([*(lambda player=player: play(player) for player in players), read])  # type: ignore[misc]
    finally:
        image.close()
    assert reader.sectors
    assert not any(player.failures for player in players)
    made.content[:] = history.content(sectors)
    made.agree()


def native_claims() -> NativeClaims | None:
    """Those of the data path in C, where there is one."""
    return None if native.why_not is not None else NativeExtents(lambda *_, **__: None).claims


@pytest.mark.parametrize("name", ["4k", "subclusters-over", "over-longer"])
def test_many_threads_in_one_cluster(tmp_path: Path, name: str) -> None:
    """Each has some sectors of each cluster: allocating is everybody's business."""
    made = attrs.evolve(NAMED[name], size=64 * KIB).make(tmp_path)
    image = open_image(made.path, made.wishes())
    content = bytearray(made.content)

    def write(number: int) -> None:
        chance = random.Random(f"{name} {number}")
        player = Player(image, History(content), chance, lambda: 0, number=number)
        mine = list(range(number, made.size // SECTOR, WRITERS))
        chance.shuffle(mine)
        for sector in mine:
            value = chance.randbytes(SECTOR)
            player.write_one(sector, value)
            content[sector * SECTOR : (sector + 1) * SECTOR] = value

    try:
        in_threads([lambda number=number: write(number) for number in range(WRITERS)])  # type: ignore[misc]
        there = image.buffer(made.size)
        image.readv(0, [there])
        assert_same(there, content)
    finally:
        image.close()
    attrs.evolve(made, content=content).agree()

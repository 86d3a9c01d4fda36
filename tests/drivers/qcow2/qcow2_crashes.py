"""Runs of random operations on recorded hosts, and the judgement of what crashes make of them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import attrs
from qcow2_bytes import ImageBytes, Wrong
from qcow2_history import SECTOR, History
from qcow2_player import Player, Shot
from qcow2_recipes import SECRET, Made, Recipe
from qcow2_tape import Crashes, Fault, RecordingHost, Tape
from qcow2_walk import tool

from xbd.core.driver import DriverError
from xbd.drivers.qcow2.host import open_host
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.offline import read_header
from xbd.drivers.qcow2.opening import Wishes, make_image, open_image

KINDS = "WWWWWWZUUDDFFR"


@attrs.define
class Recording:
    """A run: what was done to the files, and what the disk may be at each place of it."""

    recipe: Recipe
    directory: Path
    made: Made
    tape: Tape
    history: History
    below: bytes
    kept: dict[str, bytes]
    """Content of the internal snapshots."""
    shots: dict[str, list[Shot]] = attrs.field(factory=dict)
    """Snapshots that were taken in the run."""
    failures: int = 0
    faulty: bool = False
    """Whether the host was to fail."""

    def is_strict(self, image: ImageBytes) -> bool:
        """Whether counts and COPIED flags must be exactly right in a crash state.

        They need not be while a snapshot is deleted on a host that has no room; version 3 says so.
        """
        if self.faulty and self.shots:
            return not image.dirty and image.version >= 3
        assert not image.dirty
        return True

    def compare_snapshots(self, image: ImageBytes, place: int) -> None:
        """Each is as it was when it was taken, and there if it must be."""
        there = {shot.name: image.disk(self.below, snapshot=shot) for shot in image.snapshot_list()}
        for name, content in self.kept.items():
            assert there.pop(name) == content, f"the snapshot {name} has changed"
        for name, shots in self.shots.items():
            sure = [shot.there for shot in shots if shot.done <= place]
            maybe = [shot.there for shot in shots if shot.begun < place < shot.done]
            assert (name in there) in {*sure[-1:], *maybe, *([] if sure else [False])}, (
                f"the snapshot {name} is {'' if name in there else 'not '}there"
            )
            if name in there:
                assert there.pop(name) == shots[0].content, f"the snapshot {name} is not right"
        assert not there, f"nobody took the snapshots {', '.join(there)}"


def open_recorded(made: Made, tape: Tape) -> tuple[Image, list[RecordingHost]]:
    """Open an image over hosts that record."""
    host = RecordingHost.over(open_host(made.path, writable=True), tape, "image")
    image = make_image(host, read_header(host), made.wishes())
    hosts = [host]
    if image.data_host is not host:
        image.data_host = RecordingHost.over(image.data_host, tape, "data")
        hosts.append(image.data_host)
    return image, hosts


def record(
    recipe: Recipe,
    directory: Path,
    seed: int,
    *,
    steps: int = 60,
    kinds: str = KINDS,
    threads: int = 1,
    faults: Callable[[random.Random], Fault] | None = None,
    compress: bool = False,
) -> Recording:
    """Random operations, and at last `Image.close`.

    `threads` change parts of the disk of their own.  `faults(chance)` says what fails; then the
    run ends without a comparison of all content.  `compress`: whole clusters are written packed.
    """
    chance = random.Random(f"{recipe.name} {seed} {steps} {kinds} {threads}")
    made = recipe.make(directory, seed)
    below = below_of(made)
    kept = {
        shot.name: bytes(ImageBytes(made.path.read_bytes()).disk(below, snapshot=shot))
        for shot in ImageBytes(made.path.read_bytes()).snapshot_list()
    }
    tape = Tape()
    history = History(made.content)
    image, hosts = open_recorded(made, tape)
    faulty = faults is not None
    recording = Recording(recipe, directory, made, tape, history, below, kept, faulty=faulty)
    if faults is not None:
        fault = faults(chance)
        for host in hosts:
            host.fault, host.chance = fault, chance
    sectors = made.size // SECTOR
    players = [
        Player(
            image,
            history,
            random.Random(chance.random()),
            tape.now,
            low=sectors * number // threads,
            high=sectors * (number + 1) // threads,
            number=number + 1,
            compress=compress,
        )
        for number in range(threads)
    ]
    try:
        _play(players, steps, kinds)
    finally:
        recording.failures = sum(player.failures for player in players)
        recording.shots = players[0].shots
        begun = tape.now()
        try:
            image.close()
            history.flushes.append((begun, tape.now()))
        except DriverError:
            if faults is None:
                raise
    if faults is None:
        leaked = ImageBytes(made.path.read_bytes()).check()
        assert leaked <= ImageBytes(tape.start["image"]).check(), "clusters are leaked"
    return recording


def _play(players: list[Player], steps: int, kinds: str) -> None:
    if len(players) == 1:
        for _ in range(steps):
            players[0].step(kinds)
        return
    errors: list[BaseException] = []

    def run(player: Player) -> None:
        try:
            for _ in range(steps):
                player.step(kinds)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(player,)) for player in players]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def below_of(made: Made) -> bytes:
    """What lies behind the image."""
    raw = made.path.with_name("base.raw")
    if not raw.exists():
        return b""
    base = made.path.with_name("base.qcow2")
    if not base.exists():
        return raw.read_bytes()
    return bytes(ImageBytes(base.read_bytes()).disk(raw.read_bytes()))


@attrs.define
class Judge:
    """Looks at crash states of a recording, and counts them."""

    recording: Recording
    chance: random.Random
    states: int = 0
    reopened: int = 0
    checked_by_qemu: int = 0
    most_leaked: int = 0

    def judge(self, per_place: int, *, places: int | None = None, reopen: float = 0.0) -> None:
        """States after `places` of the events (None: each), so many after each of them; a share
        is opened again and written on.  The first that is wrong raises `AssertionError`.
        """
        crashes = Crashes(self.recording.tape)
        end = self.recording.tape.now()
        when = range(end + 1)
        if places is not None and places < len(when):
            when = sorted({*self.chance.sample(when, places), end})
        for place in when:
            crashes.go_to(place)
            for turn in range(per_place + 1):
                flushed = turn > 0
                files = crashes.power_failed(self.chance) if flushed else crashes.process_died()
                try:
                    self.look(files, place, flushed=flushed)
                    if self.chance.random() < reopen:
                        self.reopen(files, place, flushed=flushed)
                except Exception as error:
                    what = "a power failure" if flushed else "the process's death"
                    error.add_note(f"{what} after event {place} of {end}, state {turn}")
                    raise

    def look(self, files: dict[str, bytearray], place: int, *, flushed: bool) -> None:
        """One state: is it whole, and is the content what may be there?"""
        self.states += 1
        image = ImageBytes(files["image"])
        leaked = image.check(strict=self.recording.is_strict(image))
        self.most_leaked = max(self.most_leaked, leaked)
        if self.recording.made.encrypted:
            return  # only the driver can read it: see `reopen`
        disk = image.disk(self.recording.below, files.get("data"))
        self.recording.history.compare(disk, place, flushed=flushed)
        self.recording.compare_snapshots(image, place)
        if image.has_valid_bitmap():
            assert disk == self.recording.made.content, "a bitmap has missed a write"

    def reopen(self, files: dict[str, bytearray], place: int, *, flushed: bool) -> None:
        """Open a state, compare, write on, close: it is whole then, without new leaks."""
        self.reopened += 1
        recording = self.recording
        for name, path in self._paths().items():
            path.write_bytes(files[name])
        path = self._paths()["image"]
        before = ImageBytes(files["image"])
        strict = recording.is_strict(before)
        if strict and self.chance.random() < 0.3:
            self.checked_by_qemu += 1
            self._qemu_finds_leaks_at_most(path)
        leaked = before.check(strict=strict)
        data = self._paths().get("data")
        key = SECRET.encode() if recording.made.encrypted else None
        image = open_image(path, Wishes(writable=True, data_file=data, key=key))
        try:
            disk = bytearray(image.size)
            image.readv(0, [memoryview(disk)])
            recording.history.compare(disk, place, flushed=flushed)
            history = History(disk)
            player = Player(image, history, self.chance, lambda: 0, number=99)
            for _ in range(6):
                player.step("WWZUDFRSS")
            disk = bytearray(image.size)
            image.readv(0, [memoryview(disk)])
            player.compare(disk, 0)
        finally:
            image.close()
        after = ImageBytes(path.read_bytes())
        now = after.check(strict=strict or before.dirty)
        recording.compare_snapshots(after, place)
        if before.dirty:
            self.checked_by_qemu += 1
            self._qemu_finds_leaks_at_most(path)
        assert now <= leaked, f"{now} clusters are leaked after a clean close, {leaked} before"
        if key is None:
            content = data.read_bytes() if data is not None else None
            player.compare(after.disk(recording.below, content), 0)

    def _paths(self) -> dict[str, Path]:
        directory = self.recording.directory
        return {name: directory / f"crashed.{name}" for name in self.recording.tape.start}

    def _qemu_finds_leaks_at_most(self, path: Path) -> None:
        data = self._paths().get("data")
        if data is None:
            named: tuple[str | Path, ...] = ("-f", "qcow2", path)
        else:
            options = f"driver=qcow2,file.filename={path},data-file.filename={data}"
            named = ("--image-opts", f"{options},data-file.driver=file")
        if self.recording.made.encrypted:
            named = attrs.evolve(self.recording.made, path=path).named()
        try:
            tool("qemu-img", "check", *named)
        except AssertionError as error:
            if "leaked clusters" not in str(error) or "ERROR" in str(error):
                raise


__all__ = ["KINDS", "Judge", "Recording", "Wrong", "record"]

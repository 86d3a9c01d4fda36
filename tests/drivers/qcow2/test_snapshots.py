"""Snapshots inside an image: QEMU and xbd take turns, and crashes come at every write."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from qcow2_bytes import ImageBytes
from qcow2_recipes import NAMED, Made, Recipe, assert_same, scribble
from qcow2_tape import Crashes, Fault, RecordingHost, Tape, failing_at
from qcow2_walk import tool

from xbd.core.driver import ConfigError, DriverError, NoSpace, Unsupported, WriteRequest
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import snapshots, switch, trees
from xbd.drivers.qcow2.check import check_image
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.host import open_host
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.layout import COPIED, OFFSET_MASK, Incompatible
from xbd.drivers.qcow2.offline import read_header
from xbd.drivers.qcow2.opening import Wishes, make_image, open_image
from xbd.drivers.qcow2.repair import repair_dirty
from xbd.drivers.qcow2.snapshot_table import load_snapshots, pack_snapshots
from xbd.drivers.qcow2.writing import Writer
from xbd.drivers.qcow2.zeroing import Zeroer

pytestmark = pytest.mark.usefixtures("no_power_cuts")

SECTOR = 512
DISCARDED = 0xDD


@contextmanager
def opened(made: Made, **wishes: Any) -> Iterator[Image]:
    image = open_image(made.path, attrs.evolve(made.wishes(), **wishes))
    try:
        yield image
    finally:
        image.close()


def write(image: Image, offset: int, data: bytes) -> None:
    request = WriteRequest(offset, [memoryview(bytearray(data))])
    Writer(image).write([request])
    assert request.error is None


def table(path: Path) -> list[dict[str, Any]]:
    told = json.loads(tool("qemu-img", "info", "--output=json", path))
    return list(told.get("snapshots", []))


def names(path: Path) -> list[tuple[str, str]]:
    return [(one["id"], one["name"]) for one in table(path)]


def snapshot_content(made: Made, number: str) -> bytes:
    copy = made.path.with_name("as-qemu-sees-the-snapshot")
    told = f"snapshot.id={number}"
    tool("qemu-img", "convert", "-l", told, "-f", "qcow2", "-O", "raw", made.path, copy)
    data = copy.read_bytes()
    copy.unlink()
    return data


# -- in turns with QEMU ------------------------------------------------------------------------


@attrs.define
class Kept:
    """A snapshot that should be there."""

    id: str
    name: str
    content: bytes


class Turns:
    """Random changes by xbd or by QEMU, with a model of what comes of them."""

    def __init__(self, made: Made, chance: random.Random) -> None:
        self.made = made
        self.chance = chance
        self.kept = [Kept(i, n, snapshot_content(made, i)) for i, n in names(made.path)]

    def turn(self) -> None:
        if self.chance.random() < 0.4:
            self.qemu(self.chance.choice(("scribble", "create", "apply", "delete")))
        else:
            with opened(self.made) as image:
                for _ in range(self.chance.randrange(1, 5)):
                    kind = self.chance.choice(("write",) * 4 + ("zero", "discard"))
                    kind = self.chance.choice((kind, kind, "create", "apply", "delete"))
                    self.xbd(image, kind)
        self.made.agree()
        assert names(self.made.path) == [(one.id, one.name) for one in self.kept]

    def qemu(self, kind: str) -> None:
        if kind == "scribble":
            scribble(self.made, self.chance)
        elif kind == "create":
            name = self.created()
            tool("qemu-img", "snapshot", "-c", name, self.made.path)
        elif kind == "apply" and self.kept:
            one = self.chance.choice(self.kept)
            tool("qemu-img", "snapshot", "-a", one.id, self.made.path)
            self.made.content[:] = one.content
        elif self.kept:
            one = self.chance.choice(self.kept)
            self.kept.remove(one)
            tool("qemu-img", "snapshot", "-d", one.name, self.made.path)

    def xbd(self, image: Image, kind: str) -> None:
        content = self.made.content
        size = len(content) - len(content) % SECTOR
        length = min(SECTOR * self.chance.choice((1, 3, 16, 128, 300)), size)
        at = SECTOR * self.chance.randrange((size - length) // SECTOR + 1)
        if kind == "write":
            data = self.chance.randbytes(length)
            write(image, at, data)
            content[at : at + length] = data
        elif kind == "zero":
            unmap = self.chance.random() < 0.5
            Zeroer(image, Writer(image)).zero(at, length, may_unmap=unmap)
            content[at : at + length] = bytes(length)
        elif kind == "discard":
            Zeroer(image, Writer(image)).discard(at, length)
            found = memoryview(bytearray(length))
            image.readv(at, [found])
            content[at : at + length] = found
        elif kind == "create":
            snapshots.create(image, self.created())
        elif self.kept:
            one = self.chance.choice(self.kept)
            by = self.chance.choice((one.id, one.name))
            if kind == "apply":
                snapshots.apply(image, by)
                content[:] = one.content
            else:
                self.kept.remove(one)
                snapshots.delete(image, by)

    def created(self) -> str:
        number = max((int(one.id) for one in self.kept), default=0) + 1
        name = f"name {self.chance.randrange(10**6)}"
        self.kept.append(Kept(str(number), name, bytes(self.made.content)))
        return name

    def end(self) -> None:
        for one in self.kept:
            assert_same(snapshot_content(self.made, one.id), one.content)
        while self.kept:
            self.qemu("delete")
            self.made.qemu_checks()
            with opened(self.made) as image:
                self.xbd(image, "delete")
            self.made.agree()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "default",
        "4k",
        "8-bit",
        "metadata",
        "subclusters-over",
        "snapshots-over",
        "snapshots-zlib",
        "zlib-subclusters",
        "snapshots-v2",
        "snapshots-subclusters",
    ],
)
def test_xbd_and_qemu_take_turns(tmp_path: Path, name: str) -> None:
    turns = Turns(NAMED[name].make(tmp_path), random.Random(name))
    for _ in range(7):
        turns.turn()
    turns.end()


def test_encrypted_disks_have_snapshots_too(tmp_path: Path) -> None:
    made = NAMED["luks-4k-over"].make(tmp_path)
    with opened(made) as image:
        write(image, 0, b"x" * 8192)
        snapshots.create(image, "one")
        write(image, 4096, b"y" * 8192)
        snapshots.apply(image, "one")
    made.content[:8192] = b"x" * 8192
    made.agree()


def test_what_a_snapshot_needs_does_not_fill_the_image_for_ever(tmp_path: Path) -> None:
    made = NAMED["snapshots"].make(tmp_path)
    size = made.path.stat().st_blocks
    for _ in range(5):
        snapshots.create_snapshot(made.path, "again")
        snapshots.delete_snapshot(made.path, "again")
    assert made.path.stat().st_blocks <= size + 64
    made.agree()


def test_a_disk_of_no_size(tmp_path: Path) -> None:
    made = Recipe(name="nothing", size=0).make(tmp_path)
    snapshots.create_snapshot(made.path, "one")
    snapshots.apply_snapshot(made.path, "one")
    made.agree()
    tool("qemu-img", "snapshot", "-d", "one", made.path)
    made.agree()


# -- what is said of them ----------------------------------------------------------------------


def test_they_are_listed_as_qemu_lists_them(tmp_path: Path) -> None:
    made = NAMED["snapshots"].make(tmp_path)
    snapshots.create_snapshot(made.path, "of \N{SNOWMAN}")
    with opened(made, writable=False) as image:
        listed = snapshots.list_(image)
    told = table(made.path)
    assert [(one.id, one.name) for one in listed] == [(one["id"], one["name"]) for one in told]
    for ours, theirs in zip(listed, told, strict=True):
        assert int(ours.date.timestamp()) == theirs["date-sec"]
        assert ours.vm_state_size == theirs["vm-state-size"] == 0
        assert ours.size == made.size


def test_a_name_may_be_there_twice_and_the_oldest_goes_first(tmp_path: Path) -> None:
    made = NAMED["default"].make(tmp_path)
    for name in ("two", "two", "1", "nine"):
        snapshots.create_snapshot(made.path, name)
    tool("qemu-img", "snapshot", "-d", "nine", made.path)
    snapshots.create_snapshot(made.path, "new")
    assert names(made.path) == [("1", "two"), ("2", "two"), ("3", "1"), ("4", "new")]
    snapshots.delete_snapshot(made.path, "two")
    # A name counts before an ID.
    snapshots.delete_snapshot(made.path, "1")
    assert names(made.path) == [("2", "two"), ("4", "new")]
    snapshots.delete_snapshot(made.path, "4")
    assert names(made.path) == [("2", "two")]


def test_an_id_is_applied_before_a_name(tmp_path: Path) -> None:
    made = NAMED["default"].make(tmp_path)
    made.qemu_io("write -P 7 0 64k")
    snapshots.create_snapshot(made.path, "2")
    made.qemu_io("write -P 8 0 64k")
    snapshots.create_snapshot(made.path, "other")
    snapshots.apply_snapshot(made.path, "2")
    made.qemu_io("read -P 8 0 64k")
    tool("qemu-img", "snapshot", "-a", "2", made.path)
    made.qemu_io("read -P 8 0 64k")


@pytest.mark.parametrize("bad", ["", "x" * 256, "\N{SNOWMAN}" * 86, "a\0b", "\ud800"])
def test_names_that_cannot_be(tmp_path: Path, bad: str) -> None:
    made = NAMED["default"].make(tmp_path)
    before = made.path.read_bytes()
    with pytest.raises(ConfigError, match="name"):
        snapshots.create_snapshot(made.path, bad)
    with opened(made) as image, pytest.raises(DriverError, match="name"):
        snapshots.create(image, bad)
    assert made.path.read_bytes() == before


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    made = NAMED["snapshots"].make(tmp_path)
    before = made.path.read_bytes()
    for change in (snapshots.apply_snapshot, snapshots.delete_snapshot):
        with pytest.raises(ConfigError, match="has no snapshot 'third'") as caught:
            change(made.path, "third")
        assert "\n" not in str(caught.value)
    assert made.path.read_bytes() == before


# -- what can't be -----------------------------------------------------------------------------


def test_one_bit_refcounts_share_nothing(tmp_path: Path) -> None:
    made = Recipe(name="1-bit", options="refcount_bits=1", written=True).make(tmp_path)
    before = made.path.read_bytes()
    with pytest.raises(Unsupported, match="refcount-bits=16"):
        snapshots.create_snapshot(made.path, "one")
    assert made.path.read_bytes() == before


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_a_count_that_can_be_no_higher_stops_it_all(
    tmp_path: Path, compat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = "" if compat == "0.10" else ",refcount_bits=2"
    options = f"compat={compat},cluster_size=4k{bits}"
    made = Recipe(name="narrow", options=options, written=True).make(tmp_path)
    # Several batches, so that some are to be taken back.
    monkeypatch.setattr(trees, "_MOST_CLUSTERS", 4)
    if compat == "0.10":
        with opened(made) as image:
            snapshots.create(image, "one")
            # So often that one more is too much.
            shared = (image.tables.l1[-1] & OFFSET_MASK) >> 12
            before = image.refcounts.get(shared)
            image.refcounts.change(shared, 0xFFFF - before)
            with pytest.raises(DriverError, match="65535"):
                snapshots.create(image, "too many")
            image.refcounts.change(shared, before - 0xFFFF)
        made.agree()
        return
    for name in ("one", "two"):
        snapshots.create_snapshot(made.path, name)
    before = ImageBytes(made.path.read_bytes())
    for change in (
        lambda: snapshots.create_snapshot(made.path, "three"),
        lambda: snapshots.apply_snapshot(made.path, "one"),
    ):
        with pytest.raises(DriverError, match="shared more than 3 times"):
            change()
        after = ImageBytes(made.path.read_bytes())
        assert not after.incompatible
        assert after.counts() == before.counts()
        made.agree()
    snapshots.delete_snapshot(made.path, "one")
    snapshots.create_snapshot(made.path, "three")
    made.agree()


def test_data_in_another_file_is_refused_as_qemu_refuses_it(tmp_path: Path) -> None:
    made = NAMED["external"].make(tmp_path)
    command = ["qemu-img", "snapshot", "-c", "one", made.path]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    for change in (
        snapshots.create_snapshot,
        snapshots.apply_snapshot,
        snapshots.delete_snapshot,
    ):
        with pytest.raises(Unsupported, match="another file"):
            change(made.path, "one")


def test_a_tree_that_is_corrupt_is_not_kept(tmp_path: Path) -> None:
    made = NAMED["written"].make(tmp_path)
    found = ImageBytes(made.path.read_bytes())
    with made.path.open("r+b") as file:
        file.seek(found.l1[0] & OFFSET_MASK)
        file.write(struct.pack(">Q", COPIED | 0x10200))
    with pytest.raises(DriverError, match="inside a cluster"):
        snapshots.create_snapshot(made.path, "one")
    after = ImageBytes(made.path.read_bytes())
    assert not after.incompatible
    assert not after.snapshots


def test_what_is_not_counted_is_not_shared(tmp_path: Path) -> None:
    made = NAMED["written"].make(tmp_path)
    with opened(made) as image:
        cluster = image.tables.l1[0] >> 16 & 0xFFFF
        image.refcounts.change(cluster, -1)
        with pytest.raises(CorruptImage, match=f"{cluster} is in use and has no refcount"):
            snapshots.create(image, "one")
        image.refcounts.change(cluster, 1)
    made.agree()


def test_a_table_that_is_there_twice_is_read_once(tmp_path: Path) -> None:
    made = Recipe(name="two", options="cluster_size=512", size=64 * KIB, written=True).make(
        tmp_path
    )
    found = ImageBytes(made.path.read_bytes())
    used = [entry for entry in found.l1 if entry]
    with made.path.open("r+b") as file:
        file.seek(found.l1_at)
        file.write(struct.pack(">QQ", used[0], used[0]))
    with pytest.raises(Unsupported, match="an L2 table twice"):
        snapshots.create_snapshot(made.path, "one")


# -- sizes and saved machines ------------------------------------------------------------------


@pytest.mark.parametrize("backing", ["", "raw"])
def test_the_disk_gets_its_size_back(tmp_path: Path, backing: str) -> None:
    options = "cluster_size=512"
    made = Recipe(name="resized", options=options, backing=backing, written=True).make(tmp_path)
    small, large = bytes(made.content), 9 * MIB + 512
    snapshots.create_snapshot(made.path, "small")
    tool("qemu-img", "resize", "-q", made.path, str(large))
    made.qemu_io(f"write -P 5 {large - 512} 512")
    snapshots.create_snapshot(made.path, "large")
    with opened(made) as image:
        snapshots.apply(image, "small")
        assert image.size == len(small)
        write(image, 0, b"a" * 512)
        snapshots.apply(image, "large")
        assert image.size == large
        write(image, large - 1024, b"b" * 512)
    made.qemu_io(f"read -P 5 {large - 512} 512", f"read -P 98 {large - 1024} 512")
    made.qemu_checks()
    tool("qemu-img", "snapshot", "-a", "small", made.path)
    made.content[:] = small
    made.agree()


def test_sizes_do_not_change_where_qemu_can_not_change_them(tmp_path: Path) -> None:
    made = Recipe(name="v2", options="compat=0.10").make(tmp_path)
    snapshots.create_snapshot(made.path, "one")
    image = open_image(made.path, Wishes(writable=True))
    # As of an image that was changed from version 3.
    (one,) = load_snapshots(image.host, image.header)
    other = one.extra_data[:8] + (made.size + 512).to_bytes(8, "big") + one.extra_data[16:]
    packed = pack_snapshots([attrs.evolve(one, extra_data=other)])
    image.host.write(image.header.snapshots_offset, packed)
    image.close()
    with pytest.raises(ConfigError, match="version 2"):
        snapshots.apply_snapshot(made.path, "one")


def test_bitmaps_are_in_the_way_of_other_sizes(tmp_path: Path) -> None:
    made = NAMED["default"].make(tmp_path)
    snapshots.create_snapshot(made.path, "one")
    tool("qemu-img", "resize", "-q", made.path, "+64k")
    tool("qemu-img", "bitmap", "--add", made.path, "b")
    with pytest.raises(ConfigError, match="bitmap"):
        snapshots.apply_snapshot(made.path, "one")
    made.qemu_checks()


def test_a_saved_machine_stays_saved(tmp_path: Path) -> None:
    made = NAMED["written"].make(tmp_path)
    made.qemu_io("write -b -P 5 0 300k")
    tool("qemu-img", "snapshot", "-c", "machine", made.path)
    with opened(made) as image:
        (one,) = load_snapshots(image.host, image.header)
        told = (300 * KIB).to_bytes(8, "big") + one.extra_data[8:]
        packed = pack_snapshots([attrs.evolve(one, extra_data=told)])
        image.host.write(image.header.snapshots_offset, packed)
        snapshots.create(image, "again")
        snapshots.create(image, "and again")
        snapshots.delete(image, "again")
    assert [one["vm-state-size"] for one in table(made.path)] == [300 * KIB, 0]
    made.agree()
    made.qemu_io("write -b -P 6 0 300k")
    snapshots.apply_snapshot(made.path, "machine")
    made.qemu_io("read -b -P 5 0 300k")
    snapshots.delete_snapshot(made.path, "machine")
    snapshots.delete_snapshot(made.path, "and again")
    made.qemu_io("read -b -P 5 0 300k")
    made.agree()


# -- crashes and failures ----------------------------------------------------------------------


@attrs.frozen
class Change:
    """One change of an image with the snapshots ``first`` and ``second``."""

    name: str
    do: Callable[[Image], None]
    names: tuple[str, ...]
    """Of the snapshots afterwards."""
    applied: str | None = None


CHANGES = (
    Change("create", lambda image: snapshots.create(image, "third"), ("first", "second", "third")),
    Change("apply", lambda image: snapshots.apply(image, "1"), ("first", "second"), "first"),
    Change("delete", lambda image: snapshots.delete(image, "second"), ("first",)),
)


def recorded(path: Path, tape: Tape) -> tuple[Image, RecordingHost]:
    host = RecordingHost.over(open_host(path, writable=True), tape, "image")
    return make_image(host, read_header(host), Wishes(writable=True)), host


def contents(image: ImageBytes, below: bytes) -> dict[str, bytes]:
    """Of all snapshots by name; the disk is ``""``."""
    found = {one.name: bytes(image.disk(below, snapshot=one)) for one in image.snapshot_list()}
    return found | {"": bytes(image.disk(below))}


def assert_nothing_lost(image: ImageBytes) -> None:
    """No count is too low, and COPIED is said of nothing that is used twice."""
    counts = image.counts()
    uses: Counter[int] = Counter()
    copied = []
    for entry, _ in image._count_tables(image.l1, uses):
        if entry & COPIED:
            copied.append((entry & OFFSET_MASK) >> image.bits)
    for one in image.snapshot_list():
        for _ in image._count_tables(one.l1, uses):
            pass
    assert all(counts.get(cluster, 0) >= count for cluster, count in uses.items())
    assert all(uses[cluster] == 1 for cluster in copied)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
@pytest.mark.parametrize("name", ["snapshots-over", "snapshots-v2", "snapshots-subclusters"])
def test_a_crash_at_any_write_leaves_the_one_or_the_other(
    tmp_path: Path, name: str, change: Change
) -> None:
    made = NAMED[name].make(tmp_path)
    scribble(made, random.Random(name), times=3)
    below = (tmp_path / "base.raw").read_bytes() if "over" in name else b""
    tape = Tape()
    image, _ = recorded(made.path, tape)
    change.do(image)
    image.close()
    before = contents(ImageBytes(tape.start["image"]), below)
    after = contents(ImageBytes(made.path.read_bytes()), below)
    assert set(after) == {"", *change.names}
    assert after[""] == (before[change.applied] if change.applied else before[""])
    seen = set()
    for crashed in crash_states(tape, random.Random(name)):
        state = ImageBytes(crashed)
        found = contents(state, below)
        assert found in (before, after)
        seen.add(found == after)
        # Whatever the moment, nothing is wrong but leaks.
        assert not state.dirty
        state.check()
        made.path.write_bytes(crashed)
        assert not check_image(made.path).corruptions
    assert seen == {False, True}
    qemu_finds_leaks_at_most(made.path)


def qemu_finds_leaks_at_most(path: Path) -> None:
    done = subprocess.run(["qemu-img", "check", "-q", path], check=False, capture_output=True)
    assert done.returncode in (0, 3), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["snapshots-over", "snapshots-v2", "snapshots-subclusters"])
def test_a_crash_while_a_snapshot_makes_room_loses_nothing(tmp_path: Path, name: str) -> None:
    """Where the host has none for anything else, counts and flags are corrected in place."""
    made = NAMED[name].make(tmp_path)
    scribble(made, random.Random(name), times=3)
    below = (tmp_path / "base.raw").read_bytes() if "over" in name else b""
    tape = Tape()
    image, _ = recorded(made.path, tape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(switch, "put_into_force", no_room)
        snapshots.delete(image, "second")
        with pytest.raises(NoSpace):
            snapshots.create(image, "third")
    image.close()
    before = contents(ImageBytes(tape.start["image"]), below)
    after = contents(ImageBytes(made.path.read_bytes()), below)
    assert set(after) == {"", "first"}
    seen = set()
    for crashed in crash_states(tape, random.Random(name)):
        found = contents(ImageBytes(crashed), below)
        assert found in (before, after)
        seen.add(found == after)
        assert_nothing_lost(ImageBytes(crashed))
        assert_same(recovered(made, crashed), found[""])
    assert seen == {False, True}


def test_no_room_for_holes_deletes_nothing_twice(tmp_path: Path) -> None:
    made = NAMED["snapshots"].make(tmp_path)
    below = contents(ImageBytes(made.path.read_bytes()), b"")
    image, host = recorded(made.path, Tape())
    host.fault = lambda what: NoSpace("full") if what == "punch" else None
    with pytest.raises(NoSpace):
        snapshots.delete(image, "second")
    host.fault = lambda what: None
    write(image, 0, b"w" * 100_000)
    image.close()
    after = contents(ImageBytes(made.path.read_bytes()), b"")
    assert set(after) == {"", "first"}
    assert after["first"] == below["first"]
    assert after[""][100_000:] == below[""][100_000:]
    ImageBytes(made.path.read_bytes()).check()
    qemu_finds_leaks_at_most(made.path)


def no_room(*_: object) -> None:
    raise NoSpace("full")


def crash_states(tape: Tape, chance: random.Random) -> Iterator[bytes]:
    """Each of the image's file once."""
    crashes = Crashes(tape)
    seen = set()
    for when in range(len(tape.events) + 1):
        crashes.go_to(when)
        states = [crashes.process_died()["image"]]
        states += [crashes.power_failed(chance)["image"] for _ in range(4)]
        for state in map(bytes, states):
            if state not in seen:
                seen.add(state)
                yield state


def recovered(made: Made, crashed: bytes) -> bytes:
    """The disk after whoever opens the image has put it right."""
    made.path.write_bytes(crashed)
    image = ImageBytes(crashed)
    if image.incompatible & Incompatible.DIRTY:
        host = open_host(made.path, writable=True)
        repair_dirty(host)
        host.close()
    else:
        report = check_image(made.path)
        if image.version >= 3:
            assert report.corruptions == 0
        if report.leaks or report.corruptions:
            report = check_image(made.path, repair="all")
            assert (report.leaks, report.corruptions) == (0, 0)
    data = ImageBytes(made.path.read_bytes())
    # What is counted behind the file's end QEMU does not call a leak.
    assert data.check() == sum(cluster << data.bits >= len(data.data) for cluster in data.counts())
    below = made.path.with_name("base.raw")
    return bytes(data.disk(below.read_bytes() if below.exists() else b""))


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_what_the_host_refuses_loses_nothing(tmp_path: Path, change: Change) -> None:
    made = NAMED["snapshots"].make(tmp_path)
    original = made.path.read_bytes()
    before = contents(ImageBytes(original), b"")
    failed = number = 0
    while True:
        number += 1
        made.path.write_bytes(original)
        image, host = recorded(made.path, Tape())
        fails = failing_at({number}, random.Random(number), spare=frozenset())
        fired: list[DriverError] = []

        def fault(
            what: str, fails: Fault = fails, fired: list[DriverError] = fired
        ) -> DriverError | None:
            error = fails(what)
            fired += [error] if error is not None else []
            return error

        host.fault = fault
        problem = None
        try:
            change.do(image)
        except DriverError as error:
            problem = error
        host.fault = lambda what: None
        if not fired:
            assert problem is None
            image.close()
            break
        # Without room it is done in place.
        assert problem is not None or isinstance(fired[0], NoSpace)
        failed += 1
        if not host._lost:
            # Whatever went wrong, the image can be used further.
            write(image, 8192, b"w" * 5000)
        after = contents(ImageBytes(made.path.read_bytes()), b"")
        for name in ("first", "second"):
            if name in after:
                assert after[name] == before[name]
        image.host.close()
        assert_nothing_lost(ImageBytes(made.path.read_bytes()))
        assert_same(recovered(made, made.path.read_bytes()), after[""])
        assert "\n" not in str(problem)
    assert failed > 10

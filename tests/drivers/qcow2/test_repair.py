"""Mending when something is in the way: crashes, full disks, marks, absurd sizes."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from qcow2_damage import DAMAGES, Victim, victim
from qcow2_seeds import Seed, Seeds, qemu_check, qemu_reads, run, seeds

from xbd.core.driver import CheckReport, DriverError, NoSpace
from xbd.core.units import GIB
from xbd.drivers.qcow2 import references
from xbd.drivers.qcow2.check import check_image, examine
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.host import Host, open_host
from xbd.drivers.qcow2.layout import Incompatible
from xbd.drivers.qcow2.offline import read_header
from xbd.drivers.qcow2.repair import repair_dirty, repair_image

__all__ = ["seeds"]


def damaged(seeds: Seeds, tmp_path: Path, *names: str) -> Seed:
    """An image with all these kinds of damage, which are for the same one."""
    seed = seeds.copy(DAMAGES[names[0]].recipe, tmp_path / "image")
    for name in names:
        DAMAGES[name].act(victim(seed.path))
    return seed


def assert_clean(seed: Seed) -> None:
    found = qemu_check(seed)
    assert found is not None
    assert not found.get("corruptions")
    assert not found.get("leaks")


def left_in(found: CheckReport) -> tuple[int, int, int]:
    """What is still wrong."""
    return found.corruptions, found.leaks, found.errors


def incompatible(seed: Seed) -> int:
    return Victim.open(seed.path).header.incompatible


# -- crashes ------------------------------------------------------------------------------------


@attrs.define
class Tape:
    """What a repair did to its file, in order; None: a flush."""

    done: list[Callable[[Path], None] | None] = attrs.field(factory=list)

    def record(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        write, flush, grow = host.write, host.flush, host.grow

        def record_write(offset: int, data: bytes) -> None:
            kept = bytes(data)

            def again(path: Path) -> None:
                with path.open("r+b") as file:
                    file.seek(offset)
                    file.write(kept)

            self.done.append(again)
            write(offset, data)

        def record_grow(size: int) -> None:
            def again(path: Path) -> None:
                with path.open("r+b") as file:
                    file.truncate(max(size, path.stat().st_size))

            self.done.append(again)
            grow(size)

        monkeypatch.setattr(host, "write", record_write)
        monkeypatch.setattr(host, "grow", record_grow)
        monkeypatch.setattr(host, "flush", lambda: (self.done.append(None), flush()))


CRASHES = [
    ("zeroes: all refcounts 0",),
    ("preallocated: no refcount block",),
    (
        "refcounts32: copied flags on shared clusters",
        "refcounts32: one l2 table for two l1 entries",
    ),
    ("plain: an entry behind the end", "plain: a refcount block on its table"),
    ("plain: a leaked cluster", "plain: a refcount of 0", "plain: copied flags missing"),
    ("zstd: a snapshot without the disks size",),
    ("version2: a snapshots l1 table inside a cluster",),
    ("bitmaps: a bitmap of an unknown type", "bitmaps: a bitmap on data"),
]


@pytest.mark.slow
@pytest.mark.parametrize("names", CRASHES, ids=lambda names: names[0])
def test_a_repair_that_is_killed_leaves_the_image_no_worse(
    seeds: Seeds, tmp_path: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every write, with any of those that are not flushed lost."""
    seed = damaged(seeds, tmp_path, *names)
    before = seed.path.read_bytes()
    tape = Tape()
    host = open_host(seed.path, writable=True)
    with monkeypatch.context() as patch:
        tape.record(host, patch)
        repair_image(host, everything=True)
    host.close()
    assert_clean(seed)
    content = qemu_reads(seed, tmp_path / "content")
    dice = random.Random(0)
    assert len(tape.done) > 1
    for cut in range(len(tape.done)):
        flushes = [place for place in range(cut) if tape.done[place] is None]
        safe = flushes[-1] if flushes else 0
        seed.path.write_bytes(before)
        for place, again in enumerate(tape.done[:cut]):
            if again is not None and (place < safe or dice.random() < 0.5):
                again(seed.path)
        after = check_image(seed.path, repair="all")
        assert left_in(after) == (0, 0, 0), (cut, after.messages)
        assert_clean(seed)
        assert qemu_reads(seed, tmp_path / "content") == content, cut


def test_the_marks_go_last(seeds: Seeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = damaged(seeds, tmp_path, "plain: an entry behind the end")
    victim(seed.path).set_word(72, int(Incompatible.DIRTY | Incompatible.CORRUPT))
    tape = Tape()
    host = open_host(seed.path, writable=True)
    with monkeypatch.context() as patch:
        tape.record(host, patch)
        repair_image(host, everything=True)
    host.close()
    assert not incompatible(seed)
    # ...the mark, and its flush; everything before it is durable.
    assert tape.done[-1] is None
    assert tape.done[-2] is not None
    assert tape.done[-3] is None
    assert_clean(seed)


# -- marks --------------------------------------------------------------------------------------


def test_marks_stay_while_something_is_wrong(seeds: Seeds, tmp_path: Path) -> None:
    seed = damaged(seeds, tmp_path, "plain: an l1 table behind the end")
    victim(seed.path).set_word(72, int(Incompatible.CORRUPT))
    after = check_image(seed.path, repair="all")
    assert after.corruptions
    assert incompatible(seed) == Incompatible.CORRUPT


def test_a_mark_alone_is_taken_off(seeds: Seeds, tmp_path: Path) -> None:
    seed = seeds.copy("plain", tmp_path / "image")
    before = seed.path.read_bytes()
    victim(seed.path).set_word(72, int(Incompatible.CORRUPT))
    check_image(seed.path)
    assert incompatible(seed) == Incompatible.CORRUPT
    check_image(seed.path, repair="all")
    assert seed.path.read_bytes() == before


def test_an_image_that_was_not_closed_is_put_right_on_opening(seeds: Seeds, tmp_path: Path) -> None:
    seed = seeds.copy("lazy", tmp_path / "image")
    assert incompatible(seed) == Incompatible.DIRTY
    found = check_image(seed.path)
    assert found.corruptions
    content = qemu_reads(seed, tmp_path / "before")
    host = open_host(seed.path, writable=True)
    repair_dirty(host)
    host.close()
    assert not incompatible(seed)
    assert_clean(seed)
    assert qemu_reads(seed, tmp_path / "after") == content


@pytest.mark.parametrize(
    "name",
    [
        "plain: an entry behind the end",
        "plain: reserved bits of an l2 entry",
        "zeroes: an l2 table inside a cluster",
        "version2: a snapshots l1 table behind the end",
        "bitmaps: a bitmap of an unknown type",
    ],
)
def test_opening_gives_nothing_up(seeds: Seeds, tmp_path: Path, name: str) -> None:
    seed = damaged(seeds, tmp_path, name)
    before = seed.path.read_bytes()
    host = open_host(seed.path, writable=True)
    with pytest.raises(CorruptImage, match="xbd image check --repair all") as caught:
        repair_dirty(host)
    host.close()
    assert str(caught.value).isprintable()
    assert seed.path.read_bytes() == before


# -- room ---------------------------------------------------------------------------------------


def no_room(size: int) -> None:
    raise NoSpace("this device has only so many bytes")


def test_a_device_that_cannot_grow_is_mended_with_what_is_free_in_it(
    seeds: Seeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = damaged(seeds, tmp_path, "zeroes: all refcounts 0")
    target = victim(seed.path)
    target.set_word(target.header.refcount_table_offset, target.header.refcount_table_offset)
    with seed.path.open("r+b") as file:
        file.truncate(target.size + 4 * target.cluster)
    host = open_host(seed.path, writable=True)
    monkeypatch.setattr(host, "grow", no_room)
    size = host.size()
    after = repair_image(host, everything=True)
    assert left_in(after) == (0, 0, 0), after.messages
    assert host.size() == size
    host.close()
    assert_clean(seed)


def test_without_any_room_nothing_is_changed(
    seeds: Seeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = damaged(seeds, tmp_path, "preallocated: no refcount block")
    before = seed.path.read_bytes()
    host = open_host(seed.path, writable=True)
    monkeypatch.setattr(host, "grow", no_room)
    with pytest.raises(NoSpace):
        repair_image(host, everything=True)
    host.close()
    assert seed.path.read_bytes() == before


def test_space_that_was_only_leaked_is_given_back(seeds: Seeds, tmp_path: Path) -> None:
    seed = seeds.copy("plain", tmp_path / "image")
    target = victim(seed.path)
    place = target.free_cluster()
    target.write(place, b"x" * target.cluster)
    target.set_refcount(place, 1)
    assert check_image(seed.path, repair="leaks").leaks_fixed == 1
    assert not any(target.read(place, target.cluster))


# -- size ---------------------------------------------------------------------------------------


def test_a_million_clusters_take_seconds(tmp_path: Path) -> None:
    path = tmp_path / "image"
    run(*("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"), path, "64G")
    steps: list[tuple[int, int]] = []
    begin = time.process_time()
    found = check_image(path, progress=lambda done, total: steps.append((done, total)))
    assert time.process_time() - begin < 8
    assert found.allocated_clusters == found.total_clusters == 1 << 20
    assert left_in(found) == (0, 0, 0)
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] == 2 * 128


def test_many_refcounts_are_mended_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "image"
    run(*("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"), path, "16G")
    target = victim(path)
    for index in range(8):
        target.set_word(target.header.refcount_table_offset + 8 * index, 0)
    begin = time.process_time()
    after = check_image(path, repair="all")
    assert time.process_time() - begin < 15
    assert left_in(after) == (0, 0, 0)
    assert after.corruptions_fixed > 1 << 18
    assert len(after.messages) < 5000
    run("qemu-img", "check", "-q", path)


def test_a_file_of_too_many_clusters_is_refused(seeds: Seeds, tmp_path: Path) -> None:
    seed = seeds.copy("tiny-clusters", tmp_path / "image")
    with seed.path.open("r+b") as file:
        file.truncate(600 * GIB)
    with pytest.raises(DriverError, match="too large to be checked") as caught:
        check_image(seed.path)
    assert caught.value.errno == errno.EFBIG


def test_memory_that_the_machine_does_not_have(
    seeds: Seeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references.mmap, "mmap", _no_memory)
    with pytest.raises(DriverError) as caught:
        check_image(seeds["plain"].path)
    assert caught.value.errno == errno.ENOMEM


def _no_memory(*_: object, **__: object) -> None:
    raise OSError(errno.ENOMEM, "")


def test_an_examination_changes_nothing_and_needs_no_right_to_write(
    seeds: Seeds, tmp_path: Path
) -> None:
    seed = damaged(seeds, tmp_path, "plain: an entry behind the end")
    host = open_host(seed.path, writable=False)
    seen = examine(host)
    assert seen.structure == 1
    assert not seen.clean
    assert read_header(host) == seen.header
    host.close()

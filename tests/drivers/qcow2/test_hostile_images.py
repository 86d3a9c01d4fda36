"""Images made to do harm: each named danger, and some hundred damaged by chance."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import attrs
import pytest
from qcow2_damage import Victim, victim
from qcow2_seeds import Find, Ordeal, Seed, Seeds, image, limited, no_power_cuts, run, seeds

from xbd.core.driver import DriverError, OpenFailed, WriteRequest
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2.bitmaps import directory_of
from xbd.drivers.qcow2.check import check_image
from xbd.drivers.qcow2.compressing import CompressedWriter
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import pack_header
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.info import read_info
from xbd.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ExtensionType, Incompatible
from xbd.drivers.qcow2.map import map_image
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.sizing import set_size
from xbd.drivers.qcow2.snapshot_table import Snapshot, extra_data, pack_snapshots
from xbd.drivers.qcow2.snapshots import apply_snapshot, create_snapshot, delete_snapshot
from xbd.drivers.qcow2.writing import Writer
from xbd.drivers.qcow2.zeroing import Zeroer

__all__ = ["image", "seeds"]

FUZZER = Path(__file__).parents[2] / "fuzz" / "fuzz_qcow2.py"


def write(target: Image, offset: int, length: int) -> DriverError | None:
    request = WriteRequest(offset, [memoryview(bytearray(b"w" * length))])
    Writer(target).write([request])
    return request.error


def endure(seed: Seed, tmp_path: Path, times: int = 2) -> None:
    """Everything that xbd does with images, with nothing but deliberate errors."""
    with no_power_cuts():
        for number in range(times):
            scratch = tmp_path / f"scratch-{number}"
            scratch.mkdir()
            with limited(20):
                Ordeal(seed.path, seed, random.Random(number), scratch).run()


# -- by chance ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_images_damaged_by_chance_do_no_harm(tmp_path: Path, seeds: Seeds) -> None:
    """A process of its own has a limit for its memory."""
    command = [sys.executable, FUZZER, "--seed", "1", "--count", "60", "--keep", tmp_path]
    command += ["--seeds", seeds.directory]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 finds" in done.stdout


def test_a_find_is_kept_and_told(
    seeds: Seeds,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The fuzzer notices what it should."""
    from fuzz_qcow2 import Fuzzer
    from qcow2_ordeal import read_info as told

    assert told is read_info
    monkeypatch.setattr("qcow2_ordeal.read_info", lambda path: {}["oops"])
    (tmp_path / "work").mkdir()
    fuzzer = Fuzzer(tmp_path / "work", tmp_path / "finds", ["plain"], seeds)
    fuzzer.make_seeds()
    fuzzer.round(1)
    assert fuzzer.finds == 1
    (kept,) = (tmp_path / "finds").iterdir()
    assert kept.name == "plain-1.qcow2"
    assert "KeyError: 'oops'" in capsys.readouterr().out


def test_a_clean_image_that_goes_bad_is_a_find(
    seeds: Seeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = seeds.copy("plain", tmp_path / "image")
    monkeypatch.setattr(Zeroer, "zero", lambda *_, **__: None)
    monkeypatch.setattr(Writer, "write", lambda *_: [])
    with pytest.raises(Find, match="instead of"):
        endure(seed, tmp_path, times=10)


# -- names --------------------------------------------------------------------------------------


def name_backing(seed: Seed, name: str, kind: bytes = b"raw") -> None:
    header = victim(seed.path).header
    header = attrs.evolve(header, backing_file=name, extensions=())
    header = header.with_extension(ExtensionType.BACKING_FORMAT, kind)
    with seed.path.open("r+b") as file:
        file.write(pack_header(header).ljust(header.cluster_size, b"\0"))


NAMES_OF_NOTHING_GOOD = [
    "/etc/passwd",
    "../../../../../../etc/passwd",
    "/proc/self/mem",
    "/dev/zero",
    "/dev/stdin",
    "fifo",
    "/",
    ".",
    "",
    "nbd:127.0.0.1:10809",
    "nbd+unix:///?socket=/run/x",
    "http://127.0.0.1/secret",
    'json:{"driver":"file","filename":"/etc/passwd"}',
    "file:../secret",
    "fat:rw:/",
    "inside/../../secret",
    "link",
    "name\0hidden",
    "two\nlines\x1b[31m",
    "x" * 1000,
]


@pytest.mark.parametrize("name", NAMES_OF_NOTHING_GOOD, ids=ascii)
@pytest.mark.parametrize("kind", [b"raw", b"qcow2"])
def test_names_in_an_image_open_nothing_outside(
    seeds: Seeds, tmp_path: Path, name: str, kind: bytes
) -> None:
    allowed = tmp_path / "images"
    allowed.mkdir()
    (tmp_path / "secret").write_bytes(b"secret" * KIB)
    (allowed / "inside").mkdir()
    (allowed / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(allowed / "fifo")
    seed = seeds.copy("plain", allowed / "image")
    name_backing(seed, name, kind)
    if not name:
        # No name is no backing file.
        open_image(seed.path, Wishes(image_dirs=[allowed])).close()
        return
    with limited(10):
        for attempt in (
            lambda: open_image(seed.path, Wishes(image_dirs=[allowed])),
            lambda: list(map_image(seed.path, image_dirs=[allowed])),
        ):
            with pytest.raises(OpenFailed) as caught:
                attempt()
            assert str(caught.value).isprintable()
            assert "secretsecret" not in str(caught.value)
        assert str(read_info(seed.path))
        assert not check_image(seed.path).corruptions


@pytest.mark.parametrize("length", [1, 2, 3])
def test_chains_that_bite_their_tail(seeds: Seeds, tmp_path: Path, length: int) -> None:
    made = [seeds.copy("plain", tmp_path / f"image-{number}") for number in range(length)]
    for number, seed in enumerate(made):
        name_backing(seed, f"image-{(number + 1) % length}", b"qcow2")
    with limited(10), pytest.raises(OpenFailed, match="circle"):
        open_image(made[0].path, Wishes())
    with limited(10), pytest.raises(OpenFailed, match="circle"):
        list(map_image(made[0].path))


# -- metadata over metadata ---------------------------------------------------------------------


def l2_on(victim: Victim, offset: int) -> None:
    place, _ = victim.l1()
    victim.set_word(place, offset | COPIED)


def data_on(victim: Victim, offset: int) -> None:
    _, _, place = victim.data()
    victim.set_word(place, offset | COPIED)


OVERLAPS: dict[str, Callable[[Victim], None]] = {
    "L2 on L1": lambda v: l2_on(v, v.header.l1_table_offset),
    "L2 on the refcount table": lambda v: l2_on(v, v.header.refcount_table_offset),
    "L2 on a refcount block": lambda v: l2_on(v, v.block),
    "data on L1": lambda v: data_on(v, v.header.l1_table_offset),
    "data on L2": lambda v: data_on(v, v.l1()[1] & OFFSET_MASK),
    "data on the refcount table": lambda v: data_on(v, v.header.refcount_table_offset),
    "data on a refcount block": lambda v: data_on(v, v.block),
    "the refcount table on L1": lambda v: v.set_word(48, v.header.l1_table_offset),
    "the refcount block on L1": lambda v: v.set_word(
        v.header.refcount_table_offset, v.header.l1_table_offset
    ),
    "L1 on the refcount table": lambda v: v.set_word(40, v.header.refcount_table_offset),
    "L1 on data": lambda v: v.set_word(40, v.data()[1] & OFFSET_MASK),
    "snapshots on L1": lambda v: v.set_word(60, 1 << 64 | v.header.l1_table_offset, 12),
    "all on one": lambda v: [
        v.set_word(40, v.header.refcount_table_offset),
        l2_on(v, v.header.refcount_table_offset),
        v.set_word(v.header.refcount_table_offset, v.header.refcount_table_offset),
    ][0],
}


@pytest.mark.parametrize("name", ["plain"])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_metadata_that_overlap(image: Seed, tmp_path: Path, overlap: str) -> None:
    OVERLAPS[overlap](victim(image.path))
    found = check_image(image.path)
    assert found.corruptions
    endure(image, tmp_path)


TWO_TABLES = [name for name in OVERLAPS if not (name.startswith("data") or name.endswith("data"))]


@pytest.mark.parametrize("name", ["plain"])
@pytest.mark.parametrize("overlap", TWO_TABLES)
def test_nothing_is_written_where_two_tables_are_one(image: Seed, overlap: str) -> None:
    OVERLAPS[overlap](victim(image.path))
    before = image.path.read_bytes()
    with pytest.raises(OpenFailed, match=r"lie at 0x|L1 table can't be"):
        open_image(image.path, Wishes(writable=True))
    with pytest.raises(OpenFailed):
        create_snapshot(image.path, "now")
    assert image.path.read_bytes() == before
    open_image(image.path, Wishes()).close()
    assert not check_image(image.path, repair="all").corruptions
    open_image(image.path, Wishes(writable=True)).close()


@pytest.mark.parametrize("name", ["bitmaps"])
def test_nothing_is_written_over_the_bitmaps_directory(image: Seed) -> None:
    target = victim(image.path)
    directory = directory_of(target.header)
    assert directory is not None
    guest, _, place = target.data()
    target.set_word(place, directory.offset | COPIED)
    opened = open_image(image.path, Wishes(writable=True))
    before = target.read(directory.offset, target.cluster)
    assert isinstance(write(opened, guest, 4096), CorruptImage)
    opened.close()
    assert target.read(directory.offset, target.cluster) == before


@pytest.mark.parametrize("name", ["plain", "extended", "compressed"])
@pytest.mark.parametrize("what", ["discard", "zero", "write packed"])
def test_metadata_that_an_entry_names_are_not_given_up(image: Seed, what: str) -> None:
    target = victim(image.path)
    guest, entry, place = target.data(compressed=image.name == "compressed")
    l1 = target.header.l1_table_offset
    flags = entry & ~OFFSET_MASK
    if entry & COMPRESSED:
        flags = COMPRESSED
    target.set_word(place, l1 | flags)
    before = target.read(l1, target.cluster)
    opened = open_image(image.path, Wishes(writable=True))
    writer = Writer(opened)
    zeroer = Zeroer(opened, writer)
    if what == "write packed":
        request = WriteRequest(guest, [memoryview(bytearray(target.cluster))])
        CompressedWriter(opened, writer).write([request])
        assert "names metadata" in str(request.error)
    elif what == "discard":
        with pytest.raises(CorruptImage, match="names metadata"):
            zeroer.discard(guest, target.cluster)
    else:
        with pytest.raises(CorruptImage, match="names metadata"):
            zeroer.zero(guest, target.cluster, may_unmap=True)
    assert opened.broken is not None
    assert isinstance(write(opened, guest + MIB, 4096), DriverError)
    opened.close()
    assert target.read(l1, target.cluster) == before
    assert Victim.open(image.path).header.incompatible & Incompatible.CORRUPT


@pytest.mark.parametrize("name", ["plain"])
def test_a_disk_keeps_its_size_when_its_image_turns_out_to_be_corrupt(image: Seed) -> None:
    target = victim(image.path)
    # The last cluster of a disk that was larger once.
    size = target.header.size - 2 * target.cluster
    l2 = target.l1()[1] & OFFSET_MASK
    target.set_word(l2 + 8 * (size // target.cluster), target.header.l1_table_offset | COPIED)
    size += 512
    target.set_word(24, size)
    opened = open_image(image.path, Wishes(writable=True))
    with pytest.raises(CorruptImage, match="metadata"):
        set_size(opened, Zeroer(opened, Writer(opened)), size + MIB)
    opened.close()
    header = Victim.open(image.path).header
    assert header.incompatible & Incompatible.CORRUPT
    assert header.size == size


@pytest.mark.parametrize("name", ["data-file"])
def test_an_entry_of_a_data_file_that_is_not_where_it_should_be_moves(
    image: Seed, tmp_path: Path
) -> None:
    """Who has resolved it is told."""
    target = victim(image.path)
    guest, _, place = target.data(2)
    target.set_word(place, guest - target.cluster)
    data = tmp_path / "data"
    data.write_bytes(b"d" * target.header.size)
    opened = open_image(image.path, Wishes(writable=True, data_file=data))
    opened.readv(guest, [memoryview(bytearray(512))])
    extent = opened.resolve(guest, target.cluster)
    assert extent is not None
    assert extent.offset == guest - target.cluster
    assert opened.resolve(guest, target.cluster, for_write=True) is None
    request = WriteRequest(guest, [memoryview(bytearray(b"w" * 4096))])
    assert Writer(opened).write([request]) == [(guest, target.cluster)]
    extent = opened.resolve(guest, target.cluster, for_write=True)
    assert extent is not None
    assert extent.offset == guest
    opened.close()


@pytest.mark.parametrize("name", ["zstd"])
@pytest.mark.parametrize("command", [apply_snapshot, delete_snapshot])
@pytest.mark.parametrize("where", ["a table", "data"])
def test_metadata_that_a_snapshot_names_are_not_given_up(
    image: Seed, command: Callable[[Path, str], None], where: str
) -> None:
    target = victim(image.path)
    l1 = target.word(target.header.snapshots_offset)
    if where == "a table":
        target.set_word(l1, target.block)
    else:
        l2 = target.word(l1) & OFFSET_MASK
        target.set_word(l2, target.header.refcount_table_offset)
    before = image.path.read_bytes()
    with pytest.raises(CorruptImage, match="names metadata"):
        command(image.path, "1")
    assert Victim.open(image.path).header.incompatible & Incompatible.DIRTY == 0
    assert image.path.read_bytes()[: len(before)] == before


@pytest.mark.parametrize("name", ["plain"])
@pytest.mark.parametrize("overlap", [name for name in OVERLAPS if name.startswith("data on")])
def test_a_guest_cannot_write_into_metadata(image: Seed, overlap: str) -> None:
    """Nor through what is resolved for it."""
    target = victim(image.path)
    guest, _, place = target.data()
    OVERLAPS[overlap](target)
    where = target.word(place) & OFFSET_MASK
    before = target.read(where, target.cluster)
    opened = open_image(image.path, Wishes(writable=True))
    assert opened.resolve(guest, 4096, for_write=True) is None
    error = write(opened, guest, 4096)
    assert isinstance(error, CorruptImage)
    assert isinstance(write(opened, guest + MIB, 4096), DriverError)
    opened.close()
    assert target.read(where, target.cluster) == before
    assert Victim.open(image.path).header.incompatible & Incompatible.CORRUPT


@pytest.mark.parametrize("name", ["plain", "tiny-clusters", "wide-refcounts", "extended", "lazy"])
def test_refcounts_that_lie(image: Seed, tmp_path: Path) -> None:
    """Nothing is in use, they say; what holds metadata is not given away for that."""
    target = victim(image.path)
    target.write(target.block, bytes(target.cluster))
    opened = open_image(image.path, Wishes(writable=True))
    for offset in range(0, opened.size, 256 * KIB):
        write(opened, offset, 4096)
    with suppress(CorruptImage):
        opened.close()
    again = victim(image.path)
    assert len(list(again.entries())) > 1
    for _, entry, _ in again.entries():
        offset = entry & OFFSET_MASK
        assert offset % again.cluster == 0
        assert offset < again.size
    endure(image, tmp_path)


# -- sizes --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_largest_disk_there_can_be(tmp_path: Path) -> None:
    path = tmp_path / "image"
    size = (1 << 61) - (2 << 20)
    run(*("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M"), path, str(size))
    with limited(30):
        opened = open_image(path, Wishes(writable=True))
        assert write(opened, size - 4096, 4096) is None
        there = bytearray(4096)
        opened.readv(size - 4096, [memoryview(there)])
        assert there == b"w" * 4096
        opened.readv(size // 2 // 512 * 512, [memoryview(there)])
        assert there == bytes(4096)
        opened.close()
        entries = list(map_image(path))
        assert [entry.data for entry in entries] == [False, True]
        assert sum(entry.length for entry in entries) == size
        assert not check_image(path).corruptions
    run("qemu-img", "check", "-q", path)


@pytest.mark.parametrize("name", ["plain"])
def test_an_l1_table_of_32_mib_in_a_hole(image: Seed) -> None:
    target = victim(image.path)
    target.set_word(36, 4 << 20, 4)
    with image.path.open("r+b") as file:
        file.truncate(64 * MIB)
    with limited(30):
        check_image(image.path)
        assert sum(entry.length for entry in map_image(image.path)) == target.header.size


@pytest.mark.parametrize("name", ["zstd"])
def test_65536_snapshots_of_one_l1_table(image: Seed) -> None:
    """Whoever follows each of them is never done."""
    target = victim(image.path)
    l1 = target.word(target.header.snapshots_offset)
    extra = extra_data(vm_state_size=0, disk_size=target.header.size)
    one = Snapshot(l1_table_offset=l1, l1_size=4 << 20, id="1", name="", extra_data=extra)
    place = -(-target.size // target.cluster) * target.cluster
    target.write(place, pack_snapshots([one] * 65536))
    with image.path.open("r+b") as file:
        file.truncate(128 * MIB)
    target.set_word(60, 65536 << 64 | place, 12)
    with limited(30):
        assert check_image(image.path).corruptions
        with pytest.raises(OpenFailed):
            open_image(image.path, Wishes(writable=True))


@pytest.mark.parametrize("name", ["zstd"])
def test_snapshots_of_overlapping_l1_tables(image: Seed) -> None:
    target = victim(image.path)
    l1 = target.word(target.header.snapshots_offset)
    extra = extra_data(vm_state_size=0, disk_size=target.header.size)
    one = Snapshot(l1_table_offset=l1, l1_size=0, id="1", name="", extra_data=extra)
    place = -(-target.size // target.cluster) * target.cluster
    sizes = [attrs.evolve(one, l1_size=(4 << 20) - number) for number in range(4096)]
    target.write(place, pack_snapshots(sizes))
    with image.path.open("r+b") as file:
        file.truncate(128 * MIB)
    target.set_word(60, 4096 << 64 | place, 12)
    before = image.path.read_bytes()
    with limited(30):
        assert check_image(image.path).errors
        assert check_image(image.path, repair="all").errors
        with pytest.raises(OpenFailed, match="too large together"):
            open_image(image.path, Wishes(writable=True))
    assert image.path.read_bytes() == before


@pytest.mark.parametrize("name", ["plain"])
def test_one_l2_table_for_the_whole_disk(image: Seed) -> None:
    """A quarter of a million L1 entries name one table of 8192 entries."""
    target = victim(image.path)
    entry = target.l1()[1]
    place = -(-target.size // target.cluster) * target.cluster
    target.write(place, struct.pack(">Q", entry) * (1 << 18))
    target.set_word(36, 1 << 18, 4)
    target.set_word(40, place)
    target.set_word(24, (1 << 18) * target.header.l1_coverage)
    with limited(30):
        assert check_image(image.path).corruptions
        host = open_image(image.path, Wishes())
        host.readv(1 << 40, [memoryview(bytearray(4096))])
        host.close()


def test_a_sparse_file_of_terabytes(seeds: Seeds, tmp_path: Path) -> None:
    seed = seeds.copy("plain", tmp_path / "image")
    os.truncate(seed.path, 3 << 40)
    with limited(30):
        check_image(seed.path)
        opened = open_image(seed.path, Wishes(writable=True))
        assert write(opened, 2 * MIB, 4096) is None
        opened.close()


# -- compressed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain"])
def test_bombs(image: Seed, tmp_path: Path) -> None:
    """Every cluster of the disk is one stream of 200 MiB."""
    target = victim(image.path)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(packer.compress(bytes(MIB)) for _ in range(200)) + packer.flush()
    place = -(-target.size // target.cluster) * target.cluster
    target.write(place, bomb.ljust(256 * KIB, b"\0"))
    sectors = 127 << 62 - (target.header.cluster_bits - 8)
    l2 = target.l1()[1] & OFFSET_MASK
    for number in range(64):
        target.set_word(l2 + 8 * number, COMPRESSED | sectors | place)
    with limited(30):
        opened = open_image(image.path, Wishes())
        disk = bytearray(opened.size)
        opened.readv(0, [memoryview(disk)])
        assert not any(disk)
        opened.close()
    endure(image, tmp_path, times=1)


@pytest.mark.parametrize("name", ["compressed"])
def test_what_does_not_unpack_is_an_error_for_that_cluster_alone(image: Seed) -> None:
    target = victim(image.path)
    guest, entry, _ = target.data(compressed=True)
    other, _, _ = target.data(5, compressed=True)
    target.write(entry & (1 << 54) - 1, b"\xff" * 4)
    opened = open_image(image.path, Wishes())
    with pytest.raises(CorruptImage):
        opened.readv(guest, [memoryview(bytearray(512))])
    opened.readv(other, [memoryview(bytearray(512))])
    opened.close()


# -- marks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain"])
def test_a_corrupt_image_is_not_written_to(image: Seed) -> None:
    victim(image.path).set_word(72, int(Incompatible.CORRUPT | Incompatible.DIRTY))
    before = image.path.read_bytes()
    with pytest.raises(OpenFailed, match="corrupt"):
        open_image(image.path, Wishes(writable=True))
    open_image(image.path, Wishes()).close()
    assert image.path.read_bytes() == before

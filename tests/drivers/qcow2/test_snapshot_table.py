"""The table of internal snapshots: what QEMU writes, what nobody may write."""

from __future__ import annotations

import datetime
import json
import struct
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qcow2_seeds import Seed, Seeds, image, qemu_check, run, seeds

from xbd.core.units import GIB, MIB
from xbd.drivers.qcow2 import layout
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.header import Header
from xbd.drivers.qcow2.host import Host, open_host
from xbd.drivers.qcow2.offline import read_header
from xbd.drivers.qcow2.snapshot_table import (
    MAX_EXTRA_BYTES,
    Snapshot,
    extra_data,
    l1_problem,
    load_snapshots,
    pack_snapshots,
    parse_snapshots,
    read_snapshots,
)

__all__ = ["image", "seeds"]

CLUSTER = 65536

WITH_SNAPSHOTS = [
    "version2",
    "wide-refcounts",
    "refcounts32",
    "refcounts8",
    "extended",
    "zstd",
    "luks",
]


def opened(path: Path, *, writable: bool = False) -> Host:
    return open_host(path, writable=writable)


def some_snapshot(**changes: object) -> Snapshot:
    snapshot = Snapshot(
        l1_table_offset=5 * CLUSTER,
        l1_size=2,
        id="1",
        name="before the upgrade",
        date_sec=1_700_000_000,
        date_nsec=5,
        vm_clock_nsec=77,
        short_vm_state_size=11,
        extra_data=extra_data(vm_state_size=GIB << 10, disk_size=GIB),
    )
    return attrs.evolve(snapshot, **changes)


some_header = Header(
    size=GIB,
    l1_size=2,
    l1_table_offset=3 * CLUSTER,
    refcount_table_offset=CLUSTER,
    refcount_table_clusters=1,
    nb_snapshots=1,
    snapshots_offset=6 * CLUSTER,
)


# -- QEMU's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_SNAPSHOTS)
def test_qemus_table_comes_back_byte_for_byte(image: Seed) -> None:
    host = opened(image.path)
    header = read_header(host)
    table = read_snapshots(host, header)
    packed = pack_snapshots(table.snapshots)
    assert packed == host.read(header.snapshots_offset, len(packed))
    assert table.length == len(packed)
    assert load_snapshots(host, header) == table.snapshots
    host.close()


@pytest.mark.parametrize("name", WITH_SNAPSHOTS)
def test_snapshots_are_what_qemu_says(image: Seed) -> None:
    host = opened(image.path)
    header = read_header(host)
    infos = [snapshot.info(header.size) for snapshot in load_snapshots(host, header)]
    host.close()
    told = json.loads(run("qemu-img", "info", "-U", "--output=json", image.path).stdout)
    assert [(info.id, info.name) for info in infos] == [
        (snapshot["id"], snapshot["name"]) for snapshot in told["snapshots"]
    ]
    for info, snapshot in zip(infos, told["snapshots"], strict=True):
        assert info.size == header.size
        assert info.vm_state_size == snapshot["vm-state-size"]
        assert info.icount == snapshot.get("icount")
        assert info.date == datetime.datetime.fromtimestamp(
            snapshot["date-sec"], datetime.UTC
        ) + datetime.timedelta(microseconds=snapshot["date-nsec"] // 1000)


def test_qemu_takes_a_table_of_ours(seeds: Seeds, tmp_path: Path) -> None:
    seed = seeds.copy("extended", tmp_path / "image")
    host = opened(seed.path, writable=True)
    header = read_header(host)
    (snapshot,) = load_snapshots(host, header)
    extra = extra_data(vm_state_size=0, disk_size=header.size, icount=99) + b"of the future"
    changed = attrs.evolve(snapshot, id="17", name="Größe\t1", extra_data=extra, date_sec=86400)
    host.write(header.snapshots_offset, pack_snapshots([changed]))
    host.close()
    told = json.loads(run("qemu-img", "info", "--output=json", seed.path).stdout)
    assert told["snapshots"][0]["id"] == "17"
    assert told["snapshots"][0]["name"] == "Größe\t1"
    assert told["snapshots"][0]["date-sec"] == 86400
    assert told["snapshots"][0]["icount"] == 99
    assert qemu_check(seed) is not None


def test_extra_data_that_nobody_knows_survives_qemu(seeds: Seeds, tmp_path: Path) -> None:
    """QEMU keeps it when it writes the table anew, and so do we."""
    seed = seeds.copy("extended", tmp_path / "image")
    host = opened(seed.path, writable=True)
    header = read_header(host)
    (snapshot,) = load_snapshots(host, header)
    extra = snapshot.extra_data[:24] + b"of the future"
    host.write(header.snapshots_offset, pack_snapshots([attrs.evolve(snapshot, extra_data=extra)]))
    host.close()
    run("qemu-img", "snapshot", "-c", "second", seed.path)
    host = opened(seed.path)
    header = read_header(host)
    first, _second = load_snapshots(host, header)
    host.close()
    assert first.extra_data == extra


# -- objects and bytes --------------------------------------------------------------------------

texts = st.text(max_size=40).filter(lambda text: "\0" not in text)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
snapshots = st.builds(
    Snapshot,
    l1_table_offset=u64,
    l1_size=u32,
    id=texts,
    name=texts,
    date_sec=u32,
    date_nsec=u32,
    vm_clock_nsec=u64,
    short_vm_state_size=u32,
    extra_data=st.binary(max_size=80),
)


@given(st.lists(snapshots, max_size=6), st.binary(max_size=100))
def test_what_is_packed_comes_back(items: list[Snapshot], behind: bytes) -> None:
    packed = pack_snapshots(items)
    table = parse_snapshots(packed + behind, len(items))
    assert list(table.snapshots) == items
    assert table.length == len(packed)
    assert not table.excess
    assert not table.lost


def test_entries_begin_at_multiples_of_8() -> None:
    packed = pack_snapshots([some_snapshot(name="x" * size) for size in range(9)])
    at = 0
    for size in range(9):
        assert struct.unpack_from(">Q", packed, at) == (5 * CLUSTER,)
        at += 40 + 24 + 1 + size
        at += -at % 8
    assert len(packed) <= at < len(packed) + 8


@pytest.mark.parametrize(
    ("length", "vm_state_size", "disk_size", "icount"),
    [
        (0, 11, None, None),
        (7, 11, None, None),
        (8, GIB << 10, None, None),
        (15, GIB << 10, None, None),
        (16, GIB << 10, GIB, None),
        (23, GIB << 10, GIB, None),
        (24, GIB << 10, GIB, 4),
    ],
)
def test_extra_data_may_end_early(
    length: int, vm_state_size: int, disk_size: int | None, icount: int | None
) -> None:
    extra = extra_data(vm_state_size=GIB << 10, disk_size=GIB, icount=4)
    snapshot = some_snapshot(extra_data=extra[:length])
    assert snapshot.vm_state_size == vm_state_size
    assert snapshot.disk_size == disk_size
    assert snapshot.icount == icount
    assert snapshot.info(7 * MIB).size == (disk_size or 7 * MIB)


def test_dates_that_can_not_be_are_told_without_harm() -> None:
    info = some_snapshot(date_sec=0xFFFFFFFF, date_nsec=0xFFFFFFFF).info(0)
    assert info.date.year == 2106
    assert info.date.microsecond == 999_999


def test_names_that_are_no_utf_8_come_back() -> None:
    snapshot = some_snapshot(name=b"caf\xe9".decode("utf-8", "surrogateescape"))
    packed = pack_snapshots([snapshot])
    assert packed.endswith(b"caf\xe9")
    assert parse_snapshots(packed, 1).snapshots == (snapshot,)


# -- limits -------------------------------------------------------------------------------------


@given(st.integers(0, 110))
def test_a_table_that_ends_early_is_refused(length: int) -> None:
    packed = pack_snapshots([some_snapshot(), some_snapshot()])
    with pytest.raises(CorruptImage, match="ends inside"):
        parse_snapshots(packed[:length], 2)


def test_too_much_extra_data_is_cut_and_told() -> None:
    whole = pack_snapshots([some_snapshot(extra_data=bytes(MAX_EXTRA_BYTES)), some_snapshot()])
    packed = bytearray(whole)
    packed[40 + MAX_EXTRA_BYTES : 40 + MAX_EXTRA_BYTES] = bytes(8)
    struct.pack_into(">I", packed, 36, MAX_EXTRA_BYTES + 8)
    table = parse_snapshots(packed, 2)
    assert table.excess == (0,)
    assert pack_snapshots(table.snapshots) == whole
    with pytest.raises(CorruptImage, match="too much extra"):
        pack_snapshots([some_snapshot(extra_data=bytes(MAX_EXTRA_BYTES + 1))])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"l1_table_offset": CLUSTER + 8}, "inside a cluster"),
        ({"l1_size": 32 * MIB // 8 + 1}, "larger than 32 MiB"),
        ({"l1_table_offset": 1 << 60}, "can't be at"),
        ({"l1_table_offset": 0}, "can't be at"),
    ],
)
def test_impossible_l1_tables_are_told(changes: dict[str, int], match: str) -> None:
    problem = l1_problem(some_snapshot(**changes), some_header)
    assert problem is not None
    assert match in problem


def test_limits_of_what_is_written() -> None:
    with pytest.raises(CorruptImage, match="65536 snapshots"):
        pack_snapshots([some_snapshot()] * (layout.MAX_SNAPSHOTS + 1))
    with pytest.raises(CorruptImage, match="65535 bytes"):
        pack_snapshots([some_snapshot(name="x" * 65536)])
    with pytest.raises(CorruptImage, match="64 MiB"):
        pack_snapshots([some_snapshot(name="x" * 65535)] * 1100)


def _image_with(path: Path, table: bytes, count: int, size: int = 0) -> tuple[Host, Header]:
    with path.open("wb") as file:
        file.seek(6 * CLUSTER)
        file.write(table)
        file.truncate(max(file.tell(), size))
    return opened(path), attrs.evolve(some_header, nb_snapshots=count)


def test_a_large_table_is_read_to_its_end(tmp_path: Path) -> None:
    items = [some_snapshot(id=str(number), name="n" * 60000) for number in range(40)]
    host, header = _image_with(tmp_path / "image", pack_snapshots(items), len(items))
    assert load_snapshots(host, header) == tuple(items)
    host.close()


@pytest.mark.parametrize("extra_length", [MIB, 100 * MIB, (1 << 32) - 1])
def test_an_absurd_table_costs_neither_time_nor_memory(tmp_path: Path, extra_length: int) -> None:
    """The largest count, and extra data that leap over a sparse file."""
    entry = bytearray(pack_snapshots([some_snapshot(extra_data=b"")]))
    struct.pack_into(">I", entry, 36, extra_length)
    host, header = _image_with(
        tmp_path / "image", bytes(entry), layout.MAX_SNAPSHOTS, size=200 * MIB
    )
    begin = time.process_time()
    table = read_snapshots(host, header)
    assert time.process_time() - begin < 2
    assert table.length <= layout.MAX_SNAPSHOT_TABLE_BYTES
    assert table.lost + len(table.snapshots) == layout.MAX_SNAPSHOTS
    with pytest.raises(CorruptImage):
        load_snapshots(host, header)
    host.close()


@given(st.binary(max_size=300), st.integers(1, 300))
def test_no_bytes_raise_anything_else(junk: bytes, count: int) -> None:
    with TemporaryDirectory() as directory:
        host, header = _image_with(Path(directory) / "image", junk, count)
        table = read_snapshots(host, header)
        host.close()
    # Behind the file's end there are zeroes: empty entries.
    assert len(table.snapshots) + table.lost == count

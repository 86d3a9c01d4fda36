"""L2 tables and clusters that are lent to the data path, which links these by itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from qcow2_walk import tool

from xbd.core.datapath import native
from xbd.core.datapath.native.extents import NativeExtents
from xbd.core.driver import Extent, WriteRequest
from xbd.core.nbd.claims import TableClaims
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import snapshots
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.placing import FIRST_LOT, Placer
from xbd.drivers.qcow2.refcounts import FIRST_RUN
from xbd.drivers.qcow2.sizing import set_size
from xbd.drivers.qcow2.writing import Writer
from xbd.drivers.qcow2.zeroing import Zeroer

pytestmark = pytest.mark.usefixtures("no_power_cuts")

CLUSTER = 4 * KIB
TABLE = 512 * CLUSTER
SIZE = 4 * TABLE
DATA = 512


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    tool("qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=4k", path, str(SIZE))
    return path


@pytest.fixture
def image(path: Path) -> Iterator[Image]:
    image = open_image(path, Wishes(writable=True))
    try:
        yield image
    finally:
        image.close()
    tool("qemu-img", "check", "-q", path)


@pytest.fixture(params=["python", "native"])
def claims(request: pytest.FixtureRequest) -> Any:
    if request.param == "python":
        return TableClaims()
    if native.why_not is not None:
        pytest.skip(f"no native data path: {native.why_not}")
    return NativeExtents(lambda *_, **__: None).claims


def sectors(offset: int) -> tuple[int, int]:
    """A range of a request."""
    return offset, offset + DATA


def place(placer: Placer, offset: int, claims: Any) -> None:
    placer.place([Extent(offset=offset, length=DATA)], claims)


def put(image: Image, offset: int, data: bytes) -> None:
    """As a data path does, where the image resolves."""
    extent = image.resolve(offset, len(data), for_write=True)
    assert extent is not None
    assert extent.length >= len(data)
    os.pwrite(extent.fd, data, extent.offset)


def claim(image: Image, claims: Any, offset: int, data: bytes) -> None:
    assert claims.take(offset, offset + len(data))
    put(image, offset, data)


def read(image: Image, offset: int, length: int = DATA) -> bytes:
    target = bytearray(length)
    image.readv(offset, [memoryview(target)])
    return bytes(target)


def write(image: Image, offset: int, data: bytes) -> None:
    request = WriteRequest(offset, [memoryview(bytearray(data))])
    Writer(image).write([request])
    assert request.error is None


def zeroer(image: Image) -> Zeroer:
    return Zeroer(image, Writer(image))


def test_what_is_claimed_is_there(image: Image, path: Path, claims: Any) -> None:
    """For readers at once, for `resolve`, and for whoever opens the image after a crash."""
    placer = Placer(image)
    place(placer, 0, claims)
    assert read(image, 9 * CLUSTER) == bytes(DATA)
    claim(image, claims, 9 * CLUSTER, b"c" * DATA)
    claim(image, claims, 11 * CLUSTER + 512, b"d" * DATA)
    assert read(image, 9 * CLUSTER) == b"c" * DATA
    assert read(image, 11 * CLUSTER, 2 * DATA) == bytes(DATA) + b"d" * DATA
    crashed = open_image(path, Wishes(lock=False))
    try:
        assert read(crashed, 9 * CLUSTER) == b"c" * DATA
    finally:
        crashed.close()


def test_tables_near_what_was_asked_for_are_lent(image: Image, claims: Any) -> None:
    placer = Placer(image)
    place(placer, 0, claims)
    assert claims.take(*sectors(TABLE - CLUSTER))
    assert not claims.take(*sectors(TABLE))
    placer.place([Extent(offset=TABLE - DATA, length=2 * DATA)], claims)
    assert claims.take(*sectors(2 * TABLE - CLUSTER))
    assert not claims.take(*sectors(2 * TABLE))


def test_who_goes_on_gets_more_clusters(image: Image, claims: Any) -> None:
    """And who does not has few reserved for him."""
    placer = Placer(image)
    lots = []
    for unit in range(0, 512):
        if not claims.take(*sectors(unit * CLUSTER)):
            place(placer, unit * CLUSTER, claims)
            lots.append(claims.supplied)
    assert lots[0] == FIRST_LOT
    assert len(lots) < 16
    assert max(lots) > 4 * FIRST_LOT
    assert image.host.size() < (512 + 4 * 512 + 2 * FIRST_RUN) * CLUSTER


def test_nothing_that_was_lent_is_lost(image: Image, path: Path, claims: Any) -> None:
    """When the image is closed, which the fixture checks."""
    placer = Placer(image)
    place(placer, 0, claims)
    assert claims.supplied
    size = path.stat().st_size
    image.close()
    assert not claims.take(*sectors(CLUSTER))
    assert path.stat().st_size < size


def others(image: Image) -> dict[str, Callable[[], None]]:
    """Who changes the first L2 table, or what it means."""
    return {
        "write": partial(write, image, 5 * CLUSTER, b"w" * DATA),
        "write in place": partial(write, image, 0, b"w" * DATA),
        "discard": partial(zeroer(image).discard, 0, CLUSTER),
        "zero": partial(zeroer(image).zero, 2 * CLUSTER, CLUSTER, may_unmap=False),
        "snapshot": partial(snapshots.create, image, "s"),
        "place": partial(Placer(image).place, [Extent(offset=7 * CLUSTER, length=1)]),
        "forget": image.tables.forget_cached,
    }


@pytest.mark.parametrize(
    "who", ["write", "write in place", "discard", "zero", "snapshot", "place", "forget"]
)
def test_who_changes_a_table_has_it_alone(image: Image, claims: Any, who: str) -> None:
    """What was claimed before is in it, and nothing is claimed meanwhile.

    Writers lend it again.
    """
    placer = Placer(image)
    place(placer, 0, claims)
    put(image, 0, b"p" * DATA)
    claim(image, claims, 3 * CLUSTER, b"c" * DATA)
    others(image)[who]()
    assert bool(claims.take(*sectors(8 * CLUSTER))) is who.startswith("write")
    assert read(image, 3 * CLUSTER) == b"c" * DATA
    before = {"write": b"p", "discard": b"\0", "write in place": b"w"}.get(who, b"p") * DATA
    assert read(image, 0) == before
    place(placer, 10 * CLUSTER, claims)
    claim(image, claims, 4 * CLUSTER, b"d" * DATA)
    assert read(image, 4 * CLUSTER) == b"d" * DATA


def test_a_corrupt_image_has_nothing_claimed(path: Path, claims: Any) -> None:
    image = open_image(path, Wishes(writable=True))
    place(Placer(image), 0, claims)
    image.mark_corrupt(CorruptImage("as if"))
    assert not claims.take(*sectors(CLUSTER))
    image.close()


def test_growing_takes_nothing_away(image: Image, claims: Any) -> None:
    placer = Placer(image)
    place(placer, 0, claims)
    claim(image, claims, CLUSTER, b"c" * DATA)
    set_size(image, zeroer(image), 600 * MIB)
    place(placer, 500 * MIB, claims)
    claim(image, claims, 500 * MIB + CLUSTER, b"d" * DATA)
    assert read(image, CLUSTER) == b"c" * DATA
    assert read(image, 500 * MIB + CLUSTER) == b"d" * DATA


def test_a_table_that_is_dropped_is_taken_back(path: Path, claims: Any) -> None:
    """Two tables fit into the cache."""
    image = open_image(path, Wishes(writable=True, cache_bytes=1))
    placer = Placer(image)
    for table in range(4):
        place(placer, table * TABLE, claims)
        claim(image, claims, table * TABLE + CLUSTER, b"%d" % table * DATA)
    assert [bool(claims.take(*sectors(table * TABLE + 2 * CLUSTER))) for table in range(4)] == [
        *(False, False),
        *(True, True),
    ]
    for table in range(4):
        assert read(image, table * TABLE + CLUSTER) == b"%d" % table * DATA
    image.close()
    tool("qemu-img", "check", "-q", path)


@pytest.fixture
def writing(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, bytes, Callable[[], None]], None]:
    """Writes, and does something when the data is written, but not linked."""
    real = image.data_host.writev

    def write_and(offset: int, data: bytes, meanwhile: Callable[[], None]) -> None:
        def writev(transfers: Any) -> Any:
            patched.undo()
            done = real(transfers)
            meanwhile()
            return done

        with monkeypatch.context() as patched:
            patched.setattr(image.data_host, "writev", writev)
            write(image, offset, data)

    return write_and


def test_who_was_slower_writes_to_the_place_of_the_faster_one(
    image: Image, claims: Any, writing: Any
) -> None:
    """Both have seen that there is no entry."""
    placer = Placer(image)
    place(placer, 0, claims)

    def claim_it() -> None:
        claim(image, claims, 3 * CLUSTER + DATA, b"c" * DATA)
        claim(image, claims, 4 * CLUSTER, b"o" * DATA)

    writing(3 * CLUSTER, b"w" * DATA, claim_it)
    assert read(image, 3 * CLUSTER, 3 * DATA) == b"w" * DATA + b"c" * DATA + bytes(DATA)
    claim(image, claims, 5 * CLUSTER, b"d" * DATA)


def test_only_some_of_a_batch_were_slower(image: Image, claims: Any, writing: Any) -> None:
    placer = Placer(image)
    place(placer, 0, claims)
    length = 3 * CLUSTER
    data = os.urandom(length)
    writing(2 * CLUSTER, data, lambda: claim(image, claims, 3 * CLUSTER, b"c" * DATA))
    assert read(image, 2 * CLUSTER, length) == data


def test_where_the_table_cannot_be_written_the_driver_says_so(
    image: Image, path: Path, claims: Any
) -> None:
    """What could not be entered is not used for anything else: it is leaked."""
    placer = Placer(image)
    place(placer, 0, claims)
    read_only = os.open(path, os.O_RDONLY)
    claims.begin(image.host.fd, read_only, CLUSTER, 1 << 63)
    claims.supply([MIB])
    image.tables.lend(0, claims)
    assert not claims.take(*sectors(CLUSTER))
    assert not claims.supplied
    os.close(read_only)
    assert read(image, CLUSTER) == bytes(DATA)
    write(image, CLUSTER, b"w" * DATA)
    assert read(image, CLUSTER) == b"w" * DATA
    image.close()
    tool("qemu-img", "check", "-q", "-r", "leaks", path)

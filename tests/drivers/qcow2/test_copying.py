"""Clusters over a backing file, or a snapshot, that are copied as they are written to."""

from __future__ import annotations

import mmap
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from qcow2_walk import tool

from xbd.core.driver import WriteRequest
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2 import snapshots
from xbd.drivers.qcow2.host import Host
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.writing import Writer

pytestmark = pytest.mark.usefixtures("no_power_cuts")

CLUSTER = 64 * KIB
SIZE = 2 * MIB
SHORT = 3 * CLUSTER // 2
"""The backing file ends so long before the disk."""


@attrs.define
class Overlay:
    """An image over a backing file that has something everywhere, and what it must read as."""

    image: Image
    path: Path
    content: bytearray

    def write(self, *places: tuple[int, int]) -> None:
        """Offset and length of each, at the same time."""
        requests = []
        for offset, length in places:
            buffer = memoryview(mmap.mmap(-1, length))[:length]
            buffer[:] = random.randbytes(length)
            self.content[offset : offset + length] = buffer
            requests.append(WriteRequest(offset, [buffer[: length // 2], buffer[length // 2 :]]))
        Writer(self.image).write(requests)
        assert [request.error for request in requests] == [None] * len(requests)

    def check(self) -> None:
        target = self.image.buffer(SIZE)
        self.image.readv(0, [target])
        assert target == self.content


@pytest.fixture(params=["raw", "qcow2"])
def overlay(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Overlay]:
    content = random.Random(1).randbytes(SIZE - SHORT)
    (tmp_path / "raw").write_bytes(content)
    base = tmp_path / "base"
    tool("qemu-img", "convert", "-O", request.param, tmp_path / "raw", base)
    path = tmp_path / "image"
    options = ("-b", base, "-F", request.param)
    tool("qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(SIZE))
    image = open_image(path, Wishes(writable=True, direct=True, image_dirs=[tmp_path]))
    if not image.data_host.direct:
        pytest.skip("this filesystem has no direct I/O")
    overlay = Overlay(image, path, bytearray(content).ljust(SIZE, b"\0"))
    overlay.check()  # tables are in memory now
    try:
        yield overlay
    finally:
        image.close()
    tool("qemu-img", "check", "-q", path)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What `Host.copy` says, of all calls."""
    said: list[bool] = []
    real = Host.copy

    def copy(self: Host, copies: Any) -> list[bool]:
        done = real(self, copies)
        said.extend(done)
        return done

    monkeypatch.setattr(Host, "copy", copy)
    return said


def test_the_rest_of_a_cluster_comes_from_behind(overlay: Overlay, copied: list[bool]) -> None:
    overlay.write((0, 4096))
    overlay.write((CLUSTER + 8192, 4096), (2 * CLUSTER + CLUSTER - 4096, 4096))
    assert copied == [True] * 3
    overlay.check()


def test_several_writes_to_a_cluster(overlay: Overlay, copied: list[bool]) -> None:
    """In any order; those that overlap each other are put together first."""
    overlay.write((8192, 4096), (0, 4096), (12288, 4096))
    overlay.write((CLUSTER, 8192), (CLUSTER + 4096, 8192))
    assert copied == [True]
    overlay.check()


def test_writes_over_many_clusters(overlay: Overlay, copied: list[bool]) -> None:
    overlay.write((CLUSTER // 2, 3 * CLUSTER))
    assert copied[:2] == [True, True]
    overlay.check()


def test_where_there_is_nothing_behind_nothing_is_copied(
    overlay: Overlay, copied: list[bool]
) -> None:
    """Behind the backing file's end, and over it."""
    end = SIZE - SHORT
    overlay.write((end - end % CLUSTER + 4096, 4096))
    overlay.write((SIZE - 8192, 4096))
    assert not any(copied)
    overlay.check()


def test_what_a_snapshot_has_is_copied(overlay: Overlay, copied: list[bool]) -> None:
    overlay.write((0, 4096), (CLUSTER, 4096))
    before = bytes(overlay.content)
    snapshots.create(overlay.image, "s")
    copied.clear()
    overlay.write((4096, 4096))
    assert copied == [True]
    overlay.check()
    snapshots.apply(overlay.image, "s")
    overlay.content[:] = before
    overlay.check()


@pytest.mark.parametrize("written", [False, True])
def test_what_could_not_be_copied_is_written_in_another_way(
    overlay: Overlay, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    """Also if some of it had been written."""

    def copy(self: Host, copies: Sequence[Any]) -> list[bool]:
        for _, new in copies if written else ():
            scratch = memoryview(mmap.mmap(-1, 4096))
            self.writev([attrs.evolve(new, buffers=[scratch])])
        return [False] * len(copies)

    monkeypatch.setattr(Host, "copy", copy)
    overlay.write((0, 4096), (CLUSTER + 4096, 8192))
    overlay.check()


def test_memory_that_is_used_again_shows_nothing(overlay: Overlay) -> None:
    for number in range(12):
        overlay.write((number * 2 * CLUSTER + 4096, 4096), (number * 2 * CLUSTER + 12288, 4096))
    overlay.check()


def slow_flush(
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[str], threading.Event, threading.Event]:
    """Flushes that begin and end, that one has begun, and what the first one waits for."""
    told: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def fdatasync(fd: int) -> None:
        told.append("begun")
        if not begun.is_set():
            begun.set()
            assert go_on.wait(20)
        told.append("ended")

    monkeypatch.setattr("os.fdatasync", fdatasync)
    return told, begun, go_on


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_who_flushes_at_the_same_time_shares_a_flush(
    overlay: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the one that had begun before they came: it may not cover what they wrote."""
    host = overlay.image.host
    told, begun, go_on = slow_flush(monkeypatch)
    first = in_thread(host.flush)
    assert begun.wait(20)
    entered = threading.Barrier(5)

    def flush() -> None:
        entered.wait(20)
        host.flush()

    others = [in_thread(flush) for _ in range(4)]
    entered.wait(20)
    go_on.set()
    for thread in (first, *others):
        thread.join(20)
    assert told[:3] == ["begun", "ended", "begun"]
    assert 2 <= told.count("begun") <= 5


def test_nobody_relies_on_a_flush_that_failed(
    overlay: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = overlay.image.host
    with monkeypatch.context() as patched:

        def fail(_: int) -> None:
            raise OSError(5, "no")

        patched.setattr("os.fdatasync", fail)
        with pytest.raises(Exception, match="flush"):
            host.flush()
    with pytest.raises(Exception, match="were lost"):
        host.flush()
    host._lost = 0

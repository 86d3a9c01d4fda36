"""Clusters reserved before anybody needs them: nobody waits for the disk then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from host_storage import loop_device, sparse
from qcow2_crashes import open_recorded
from qcow2_recipes import NAMED, Made
from qcow2_tape import RecordingHost, Tape
from qcow2_walk import tool

from xbd.core.driver import DriverError, NoSpace
from xbd.core.units import KIB
from xbd.drivers.qcow2 import snapshots
from xbd.drivers.qcow2.image import Image
from xbd.drivers.qcow2.opening import Wishes, open_image
from xbd.drivers.qcow2.refcounts import FIRST_RUN

pytestmark = pytest.mark.usefixtures("no_power_cuts")

CLUSTER = 4 * KIB


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return NAMED["4k"].make(tmp_path)


@pytest.fixture
def opened(made: Made) -> Iterator[tuple[Image, RecordingHost]]:
    image, (host,) = open_recorded(made, Tape())
    try:
        yield image, host
    finally:
        image.close()
    made.qemu_checks()


class Gate:
    """Holds up whoever reserves in a thread of its own, before the counts are durable."""

    def __init__(self, host: RecordingHost, error: DriverError | None = None) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self._error = error
        self._allocate = host.allocate
        host.allocate = self._pass  # type: ignore[method-assign]

    def _pass(self, offset: int, length: int) -> None:
        if threading.current_thread().name == "xbd-reserve":
            self.reached.set()
            assert self.open.wait(20)
            if self._error is not None:
                raise self._error
        self._allocate(offset, length)


def take_some(image: Image, count: int) -> list[int]:
    """As one who writes does: one after the other."""
    taken = []
    for _ in range(count):
        with image.lock:
            taken.append(image.refcounts.take())
        image.settle()
    return taken


def reserved_ahead(image: Image, gate: Gate) -> list[int]:
    """Take clusters until somebody reserves more, who stands at the gate then."""
    taken: list[int] = []
    while not gate.reached.is_set():
        taken += take_some(image, 1)
        if not image.refcounts.wants_more and len(taken) > FIRST_RUN:
            assert gate.reached.wait(20)
    return taken


def arrived(image: Image) -> int:
    """Wait for whoever reserves; what is in store then."""
    with image.lock:
        image.refcounts.await_arrival()
        return image.refcounts.in_store


def test_nobody_waits_while_more_is_reserved(opened: tuple[Image, RecordingHost]) -> None:
    image, host = opened
    gate = Gate(host)
    taken = reserved_ahead(image, gate)
    rest = image.refcounts.in_store
    assert rest > 0
    more = take_some(image, rest)
    assert image.refcounts.in_store == 0
    gate.open.set()
    assert arrived(image) > FIRST_RUN
    more += take_some(image, image.refcounts.in_store)
    assert len({*taken, *more}) == len(taken) + len(more)
    assert all(image.refcounts.get(cluster) == 1 for cluster in (*taken, *more))
    image.refcounts.release([*taken, *more])


def test_who_needs_more_than_there_is_reserves_too(opened: tuple[Image, RecordingHost]) -> None:
    """Without waiting for the other one, whose clusters nobody else gets."""
    image, host = opened
    gate = Gate(host)
    taken = reserved_ahead(image, gate)
    taken += take_some(image, image.refcounts.in_store + 1)
    gate.open.set()
    arrived(image)
    taken += take_some(image, image.refcounts.in_store)
    assert len(set(taken)) == len(taken)
    image.refcounts.release(taken)


def test_one_who_takes_a_cluster_has_none_reserved(opened: tuple[Image, RecordingHost]) -> None:
    image, _ = opened
    taken = take_some(image, FIRST_RUN)
    assert image.refcounts.in_store == 0
    assert arrived(image) == 0
    image.refcounts.release(taken)


def test_what_could_not_be_reserved_is_free_again(opened: tuple[Image, RecordingHost]) -> None:
    image, host = opened
    gate = Gate(host, DriverError("no", errno=5))
    taken = reserved_ahead(image, gate)
    gate.open.set()
    store = image.refcounts.in_store
    assert arrived(image) == store, "what is not durable is not taken"
    image.flush()
    used = sum(map(bool, image.refcounts.get_many(range(image.refcounts.end + 4 * FIRST_RUN))))
    assert used < len(taken) + store + FIRST_RUN
    image.refcounts.release(taken)


def test_an_image_that_can_have_no_more_threads_reserves_by_itself(
    opened: tuple[Image, RecordingHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    image, _ = opened
    monkeypatch.setattr(threading.Thread, "start", refuse)
    taken = take_some(image, 2 * FIRST_RUN)
    assert image.refcounts.in_store + len(taken) > 4 * FIRST_RUN
    image.refcounts.release(taken)


def closed(image: Image) -> None:
    image.close()


def snapshot(image: Image) -> None:
    snapshots.create(image, "s")
    snapshots.delete(image, "s")


@pytest.mark.parametrize("end", [closed, snapshot])
def test_who_lets_go_of_the_counts_waits(made: Made, end: Callable[[Image], None]) -> None:
    image, (host,) = open_recorded(made, Tape())
    gate = Gate(host)
    taken = reserved_ahead(image, gate)
    image.refcounts.release(taken)
    others = threading.Thread(target=end, args=(image,))
    others.start()
    gate.open.set()
    others.join(20)
    assert not others.is_alive()
    image.close()
    made.qemu_checks()


def test_the_last_clusters_are_waited_for(tmp_path: Path) -> None:
    """A block device is used to its end, whoever reserves it."""
    clusters = 6 * FIRST_RUN
    with loop_device(sparse(tmp_path / "device", clusters * CLUSTER), 512) as path:
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "64M")
        image = open_image(path, Wishes(writable=True))
        taken = take_some(image, clusters - 8)
        with pytest.raises(NoSpace, match="extend it first"):
            take_some(image, 8)
        assert len(set(taken)) == len(taken)
        image.close()

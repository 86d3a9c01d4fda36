"""Requests that are worked off together."""

from __future__ import annotations

from functools import partial

import pytest
import trio
import trio.testing

from xbd.drivers.qcow2.batches import MOST_REQUESTS, PATIENCE_SECONDS, Batches

MOST = 3


class Work:
    """Notes each batch, and takes as long as it is told."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.finished: list[int] = []
        self.under_way = self.most_under_way = 0
        self.seconds = 0.0
        self.error: Exception | None = None

    async def __call__(self, requests: list[int]) -> None:
        self.batches.append(requests)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await trio.sleep(self.seconds)
            if self.error is not None:
                raise self.error
        finally:
            self.under_way -= 1
            self.finished += requests


@pytest.fixture
def work() -> Work:
    return Work()


async def run_all(batches: Batches[int], requests: range) -> None:
    async with trio.open_nursery() as nursery:
        for request in requests:
            nursery.start_soon(batches.run, [request])


async def test_one(work: Work) -> None:
    await Batches(work, MOST).run([7])
    assert work.batches == [[7]]


async def test_who_has_all_of_them_waits_for_nobody(work: Work) -> None:
    batches = Batches(work, MOST)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(batches.run, [1, 2], gather=False))
        nursery.start_soon(partial(batches.run, [3], gather=False))
    assert sorted(work.batches) == [[1, 2], [3]]


async def test_what_comes_together_is_done_together(
    work: Work, autojump_clock: trio.testing.MockClock
) -> None:
    batches = Batches(work, MOST)
    work.seconds = 1
    await run_all(batches, range(20))
    assert sorted(work.finished) == list(range(20))
    assert len(work.batches) <= 2


async def test_no_batch_is_too_long(work: Work, autojump_clock: trio.testing.MockClock) -> None:
    work.seconds = 1
    await run_all(Batches(work, MOST), range(3 * MOST_REQUESTS))
    assert sorted(work.finished) == list(range(3 * MOST_REQUESTS))
    assert max(map(len, work.batches)) <= MOST_REQUESTS


async def test_who_brings_many_has_them_in_one_batch(
    work: Work, autojump_clock: trio.testing.MockClock
) -> None:
    batches = Batches(work, MOST)
    work.seconds = 1
    many = list(range(2 * MOST_REQUESTS))
    few = [[1000 + number, 2000 + number] for number in range(MOST_REQUESTS)]
    async with trio.open_nursery() as nursery:
        for requests in (many, *few):
            nursery.start_soon(batches.run, requests)
            await trio.testing.wait_all_tasks_blocked()
    assert work.batches[0] == many
    assert max(map(len, work.batches[1:])) <= MOST_REQUESTS
    assert [one for batch in work.batches[1:] for one in batch] == [
        one for two in few for one in two
    ]


async def test_what_comes_while_one_is_slow_does_not_wait_for_it(
    work: Work, autojump_clock: trio.testing.MockClock
) -> None:
    batches = Batches(work, MOST)
    work.seconds = 100
    async with trio.open_nursery() as nursery:
        for request in range(10):
            nursery.start_soon(batches.run, [request])
            await trio.sleep(2 * PATIENCE_SECONDS)
        assert work.most_under_way == MOST
        assert len(work.batches) == MOST
    assert work.most_under_way == MOST
    assert sorted(work.finished) == list(range(10))


async def test_an_error_is_everybodys(work: Work, autojump_clock: trio.testing.MockClock) -> None:
    batches = Batches(work, MOST)
    work.error = RuntimeError("no")
    failed = []

    async def run(request: int) -> None:
        try:
            await batches.run([request])
        except RuntimeError:
            failed.append(request)

    async with trio.open_nursery() as nursery:
        for request in range(5):
            nursery.start_soon(run, request)
    assert sorted(failed) == list(range(5))
    work.error = None
    await batches.run([9])  # and no longer than that


@pytest.mark.parametrize("turns", range(6))
async def test_who_is_cancelled_still_waits(
    work: Work, autojump_clock: trio.testing.MockClock, turns: int
) -> None:
    """Buffers are in use until then; and nobody else is left waiting."""
    batches = Batches(work, MOST)
    work.seconds = 1
    ended: list[int] = []

    async def run(request: int) -> None:
        try:
            await batches.run([request])
        finally:
            assert request in work.finished
            ended.append(request)

    with trio.move_on_after(60) as everything:
        async with trio.open_nursery() as nursery, trio.open_nursery() as cancelled:
            for request in range(4):
                (cancelled if request % 2 else nursery).start_soon(run, request)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            cancelled.cancel_scope.cancel()
    assert not everything.cancelled_caught
    assert sorted(ended) == list(range(4))


async def test_the_order_of_coming_is_kept(
    work: Work, autojump_clock: trio.testing.MockClock
) -> None:
    batches = Batches(work, MOST)
    work.seconds = 1
    async with trio.open_nursery() as nursery:
        for request in range(30):
            nursery.start_soon(batches.run, [request])
            await trio.testing.wait_all_tasks_blocked()
    assert [one for batch in work.batches for one in batch] == list(range(30))

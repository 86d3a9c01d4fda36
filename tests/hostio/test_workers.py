"""Blocking calls in threads."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from xbd.core.hostio import workers as workers_module
from xbd.core.hostio.workers import Workers


def drop_idle_threads() -> None:
    while workers_module._idle:
        workers_module._idle.pop().stop()


@pytest.fixture(params=["eventfd", "pipe"])
def workers(request, monkeypatch) -> Iterator[Workers]:
    if request.param == "pipe":
        monkeypatch.setattr(workers_module, "_event_fds", os.pipe)
    drop_idle_threads()  # which others made
    yield Workers(2, "test")
    drop_idle_threads()


async def test_a_call_returns_what_the_function_returns(workers: Workers) -> None:
    assert await workers.run(divmod, 17, 5) == (3, 2)


async def test_it_runs_in_another_thread(workers: Workers) -> None:
    assert await workers.run(threading.get_ident) != threading.get_ident()


async def test_a_call_raises_what_the_function_raises(workers: Workers) -> None:
    with pytest.raises(ZeroDivisionError):
        await workers.run(divmod, 1, 0)
    assert await workers.run(divmod, 1, 1) == (1, 0)


async def test_calls_run_at_the_same_time_up_to_the_limit(workers: Workers) -> None:
    both = threading.Barrier(2)
    running, most, lock = 0, 0, threading.Lock()

    def call() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait(10)  # passes only when two are here
        with lock:
            running -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(workers.run, call)
    assert most == 2


async def test_cancelled_while_it_runs_a_call_is_waited_for(workers: Workers) -> None:
    begun, go = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()
    ended = []

    def call() -> str:
        token.run_sync_soon(begun.set)
        go.wait(10)
        ended.append(True)
        return "whole"

    async def cancel(scope: trio.CancelScope) -> None:
        await begun.wait()
        scope.cancel()
        go.set()

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel, scope)
            assert await workers.run(call) == "whole"
    assert ended == [True]


async def test_cancelled_before_it_begins_a_call_never_runs(workers: Workers) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await workers.run(pytest.fail, "it ran")
    assert scope.cancelled_caught


async def test_who_gives_up_waiting_for_a_thread_takes_nobodys_turn(workers: Workers) -> None:
    go = threading.Event()
    ran = []
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(workers.run, go.wait, 10)
        await trio.testing.wait_all_tasks_blocked()
        scopes = [trio.CancelScope() for _ in range(3)]

        async def queue(number: int) -> None:
            with scopes[number]:
                await workers.run(ran.append, number)

        for number in range(3):
            nursery.start_soon(queue, number)
            await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()
        go.set()
    assert sorted(ran) == [1, 2]


def open_fds() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


async def work_side_by_side(count: int) -> list[threading.Thread]:
    """Which threads so many users have worked in, each with one of its own."""
    threads = []
    all_here = threading.Barrier(count)

    def call() -> None:
        threads.append(threading.current_thread())
        all_here.wait(10)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(Workers(1, f"user {number}").run, call)
    return threads


async def test_users_have_each_others_threads_when_they_are_free() -> None:
    drop_idle_threads()
    first = await work_side_by_side(5)
    assert {thread.name for thread in first} == {f"user {number}" for number in range(5)}
    assert set(await work_side_by_side(5)) == set(first)


async def test_threads_that_too_few_need_end_and_give_their_descriptors_back() -> None:
    drop_idle_threads()
    gc.collect()  # what other tests left open goes now, not between the two listings
    before = open_fds()
    threads = await work_side_by_side(workers_module._MOST_KEPT + 3)
    kept = [worker._thread for worker in workers_module._idle]
    assert len(kept) == workers_module._MOST_KEPT
    for thread in set(threads) - set(kept):
        thread.join(10)
        assert not thread.is_alive()
    drop_idle_threads()
    for thread in kept:
        thread.join(10)
        assert not thread.is_alive()
    assert open_fds() <= before


async def test_a_thread_whose_call_nobody_waits_for_any_more_is_given_to_nobody(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    async def interrupted(fd: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trio.lowlevel, "wait_readable", interrupted)
        with pytest.raises(KeyboardInterrupt):
            await workers.run(go.wait, 10)
    assert await workers.run(divmod, 17, 5) == (3, 2)  # not what the first call returns
    go.set()


def test_a_child_process_has_no_threads_of_its_parents() -> None:
    workers = Workers(1, "test")
    trio.run(workers.run, int)
    child = os.fork()
    if not child:
        signal.alarm(10)  # if nobody answers
        trio.run(workers.run, int)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

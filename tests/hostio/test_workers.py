"""Blocking calls in threads."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from xbd.core.hostio import workers as workers_module
from xbd.core.hostio.workers import Workers


@pytest.fixture(params=["eventfd", "pipe"])
def workers(request, monkeypatch) -> Iterator[Workers]:
    if request.param == "pipe":
        monkeypatch.setattr(workers_module, "_event_fds", os.pipe)
    made = Workers(2, "test")
    yield made
    made.close()


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


async def test_closing_ends_the_threads_and_gives_their_descriptors_back() -> None:
    gc.collect()  # what other tests left open goes now, not between the two listings
    before = open_fds()
    made = Workers(3, "closing")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(made.run, threading.Barrier(1).wait)
    threads = [thread for thread in threading.enumerate() if thread.name == "closing"]
    assert threads
    made.close()
    made.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert open_fds() <= before

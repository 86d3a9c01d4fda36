"""Which of several errors counts, what is written about it, and how often a device may fail."""

from __future__ import annotations

import errno

import pytest
import trio

from xbd.core.backend.bell import Bell
from xbd.core.backend.diagnostics import error_number, one_line
from xbd.core.backend.failure import (
    FailureBudget,
    for_store,
    is_store_lost,
    stops_daemon,
    worst,
)
from xbd.core.errors import (
    BadNegotiation,
    ConfigError,
    GrantFailed,
    HypervisorLost,
    MediaError,
    RingCorrupt,
    StoreLost,
)


def test_the_worst_of_a_group_counts():
    group = ExceptionGroup("", [MediaError("m"), ExceptionGroup("", [RingCorrupt("r")])])
    assert isinstance(worst(group), RingCorrupt)
    lost = ExceptionGroup("", [RingCorrupt("r"), HypervisorLost("h")])
    assert isinstance(worst(lost), HypervisorLost)
    assert stops_daemon(worst(lost))


def test_a_bug_counts_before_a_known_error_of_the_same_weight():
    bug = ZeroDivisionError("x")
    assert worst(ExceptionGroup("", [RingCorrupt("r"), bug])) is bug
    assert not stops_daemon(bug)


def test_a_lost_store_alone_is_no_failure():
    assert is_store_lost(StoreLost("x"))
    assert is_store_lost(ExceptionGroup("", [StoreLost("x"), StoreLost("y")]))
    assert not is_store_lost(ExceptionGroup("", [StoreLost("x"), RingCorrupt("y")]))


def test_lines_are_lines():
    assert one_line(ConfigError("a\nb\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ConfigError("x" * 5000))) < 600
    assert for_store(ConfigError("größe\x80")) == "gr\\xf6\\xdfe\\x80"


def test_numbers_of_errors():
    assert error_number(MediaError("x", errno=errno.EBUSY)) == errno.EBUSY
    assert error_number(OSError(errno.ENOENT, "x")) == errno.ENOENT
    assert error_number(BadNegotiation("x")) == errno.EINVAL
    assert error_number(GrantFailed("x")) == errno.EINVAL
    assert error_number(ZeroDivisionError()) == errno.EIO


def test_a_budget_runs_out():
    budget = FailureBudget(2, 600.0)
    assert [budget.spend() for _ in range(4)] == [True, True, False, False]


def test_a_budget_comes_back():
    budget = FailureBudget(1, 0.0)
    assert budget.spend()
    assert budget.spend()


async def test_a_bell_that_is_rung_often_is_one_look():
    bell = Bell()
    with trio.fail_after(1):
        await bell.wait()
    bell.ring()
    bell.ring()
    await bell.wait()
    assert not bell.take()
    bell.ring()
    assert bell.take()
    assert not bell.take()


async def test_who_rings_all_the_time_is_answered_slowly(autojump_clock):
    bell = Bell()
    began = trio.current_time()
    for _ in range(64 + 50):
        bell.ring()
        await bell.wait()
    assert trio.current_time() - began == pytest.approx(1.0)
    await trio.sleep(60)
    began = trio.current_time()
    for _ in range(64):
        bell.ring()
        await bell.wait()
    assert trio.current_time() == began, "after a while of quiet it is as quick as before"

"""Opening and closing disks: who gets which error, and in which words."""

from __future__ import annotations

import errno
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
import trio.testing

from xbd.core.driver import (
    ConfigError,
    DeviceBroken,
    DiskSpec,
    DriverDescriptor,
    MediaError,
    OpenContext,
    OpenFailed,
    OptionError,
    open_disk,
    open_with,
)
from xbd.core.driver.testing import Fault, FaultDevice, MemoryDevice, MemoryOptions, memory_driver
from xbd.core.errors import DriverNotFound

SPEC = DiskSpec.parse("memory:one?size=1M")


async def test_content_stays_between_openings() -> None:
    driver = memory_driver()
    async with open_with(driver, SPEC, device_id="xbdback1i1", writable=True) as access:
        assert access.geometry.size == 1 << 20
        await access.writev(0, [memoryview(b"a" * 512)])
    async with open_with(driver, SPEC, device_id="xbdback1i1", writable=False) as access:
        got = bytearray(512)
        await access.readv(0, [memoryview(got)])
        assert got == b"a" * 512


async def test_bad_options_name_the_disk() -> None:
    spec = DiskSpec.parse("memory:one?size=big&colour=red")
    with pytest.raises(OptionError, match=r"^disk memory:one: size: 'big' .*; unknown option"):
        async with open_with(memory_driver(), spec, device_id="x", writable=True):
            pass


async def test_an_unknown_driver_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DriverNotFound, match=r"no driver 'nosuch' \(installed: .*raw"):
        async with open_disk(DiskSpec.parse("nosuch:/x"), device_id="x", writable=True):
            pass


def failing(error: BaseException, *, when: str) -> DriverDescriptor[MemoryOptions]:
    """A memory driver that raises before or after its time."""

    @asynccontextmanager
    async def opening(context: OpenContext, options: MemoryOptions) -> AsyncIterator[MemoryDevice]:
        if when == "open":
            raise error
        yield MemoryDevice(options.size)
        if when == "close":
            raise error

    return attrs.evolve(memory_driver(), open=opening)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EBUSY, "it is in use: detach it"),
        (errno.ENOENT, "check the path"),
        (errno.EACCES, "owner, mode"),
        (errno.EROFS, "read-only"),
    ],
)
async def test_failed_opens_tell_errno_and_advice(number: int, advice: str) -> None:
    driver = failing(OSError(number, "x"), when="open")
    with pytest.raises(OpenFailed, match=advice) as caught:
        async with open_with(driver, SPEC, device_id="xbdback1i1", writable=True):
            pass
    message = str(caught.value)
    assert message.startswith("cannot open memory:one: ")
    assert f"errno {number}, {errno.errorcode[number]}" in message
    assert "\n" not in message
    assert caught.value.errno == number


async def test_config_errors_and_own_words_pass() -> None:
    for error in (ConfigError("the two options exclude each other"), OpenFailed("locked by pid 7")):
        with pytest.raises(type(error), match=str(error)):
            async with open_with(failing(error, when="open"), SPEC, device_id="x", writable=True):
                pass


async def test_a_bug_in_open_is_logged_and_told(caplog) -> None:
    driver = failing(KeyError("oops"), when="open")
    with pytest.raises(OpenFailed, match="bug in the driver: KeyError"):
        async with open_with(driver, SPEC, device_id="x", writable=True):
            pass
    assert "Traceback" in caplog.text


async def test_an_impossible_geometry_is_a_failed_open() -> None:
    spec = DiskSpec.parse("memory:odd?size=1M&block=1000")
    with pytest.raises(OpenFailed, match="geometry is impossible"):
        async with open_with(memory_driver(), spec, device_id="x", writable=True):
            pass


async def test_errors_while_closing_reach_the_user() -> None:
    driver = failing(OSError(errno.EIO, "x"), when="close")
    with pytest.raises(MediaError):
        async with open_with(driver, SPEC, device_id="x", writable=True):
            pass


async def test_the_users_own_error_wins_and_passes_unwrapped(caplog) -> None:
    class NurseryDriver:
        @asynccontextmanager
        async def open(self, context: OpenContext, options: MemoryOptions) -> AsyncIterator:
            async with trio.open_nursery() as nursery:
                device = MemoryDevice(options.size)
                nursery.start_soon(trio.sleep_forever)
                yield FaultDevice(device, Fault(operations={"aclose"}))
                await device.aclose()
                nursery.cancel_scope.cancel()

    driver = attrs.evolve(memory_driver(), open=NurseryDriver().open)
    with pytest.raises(ValueError, match="mine"):
        async with open_with(driver, SPEC, device_id="x", writable=True):
            raise ValueError("mine")
    assert "injected fault" in caplog.text


async def test_a_driver_whose_own_task_dies_breaks_the_device(caplog) -> None:
    @asynccontextmanager
    async def opening(context: OpenContext, options: MemoryOptions) -> AsyncIterator:
        async def dies() -> None:
            raise KeyError("task")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dies)
            yield MemoryDevice(options.size)

    driver = attrs.evolve(memory_driver(), open=opening)
    with pytest.raises(DeviceBroken, match="bug in the driver"):
        async with open_with(driver, SPEC, device_id="x", writable=True):
            await trio.sleep_forever()


async def test_cancelling_the_user_closes_the_device() -> None:
    devices = []

    @asynccontextmanager
    async def opening(context: OpenContext, options: MemoryOptions) -> AsyncIterator:
        devices.append(MemoryDevice(options.size))
        yield devices[0]

    driver = attrs.evolve(memory_driver(), open=opening)
    with trio.CancelScope() as scope:
        async with open_with(driver, SPEC, device_id="x", writable=True):
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert devices[0].closed


async def test_blocking_calls_run_in_threads_and_are_never_abandoned() -> None:
    contexts = []

    @asynccontextmanager
    async def opening(context: OpenContext, options: MemoryOptions) -> AsyncIterator:
        contexts.append(context)
        yield MemoryDevice(options.size)

    release = threading.Event()
    ended = []

    def block() -> None:
        release.wait()
        ended.append(threading.current_thread() is not threading.main_thread())

    driver = attrs.evolve(memory_driver(), open=opening)
    async with (
        open_with(driver, SPEC, device_id="x", writable=True),
        trio.open_nursery() as nursery,
    ):
        assert await contexts[0].run_blocking(max, 1, 2) == 2
        nursery.start_soon(contexts[0].run_blocking, block)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        release.set()
    assert ended == [True]


async def test_invalidations_reach_the_subscribers() -> None:
    contexts = []

    @asynccontextmanager
    async def opening(context: OpenContext, options: MemoryOptions) -> AsyncIterator:
        contexts.append(context)
        await context.invalidate(0, 1)  # nobody can have an answer yet
        yield MemoryDevice(options.size)

    forgotten = []

    async def forget(offset: int, length: int) -> None:
        forgotten.append((offset, length))

    driver = attrs.evolve(memory_driver(), open=opening)
    async with open_with(driver, SPEC, device_id="x", writable=True) as access:
        access.subscribe(forget)
        await contexts[0].invalidate(512, 1024)
        assert access.generation == 1
    assert forgotten == [(512, 1024)]

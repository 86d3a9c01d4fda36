"""Answers of `resolve` that are taken back: whoever takes them back waits for what uses them."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from data_paths import NATIVE, PYTHON
from piped_device import piped

from xbd.core.datapath import GrantMode, engine
from xbd.core.datapath.native import connection as native_connection
from xbd.core.errors import DeviceBroken
from xbd.core.frontend import FrontendOptions
from xbd.core.hostio import uring
from xbd.core.units import MIB, PAGE_SIZE

pytestmark = pytest.mark.parametrize("native_threads", [PYTHON, NATIVE], indirect=True)
"""Those that don't wait for a pipe."""


@pytest.fixture(autouse=True)
def _io_uring():
    try:
        engine.UringEngine().close()
    except OSError as error:
        pytest.skip(f"no io_uring: {error.strerror}")


class Waiter:
    """Someone who takes answers back."""

    def __init__(self, rig, nursery, offset, length):
        self.done = False
        self.error: DeviceBroken | None = None
        self.scope = trio.CancelScope()
        nursery.start_soon(self._run, rig, offset, length)

    async def _run(self, rig, offset, length):
        with self.scope:
            try:
                await rig.access.invalidate(offset, length)
            except DeviceBroken as error:
                self.error = error
            self.done = True


async def in_flight(rig, device, count=1):
    """Until so many reads of the pipe are."""
    with trio.fail_after(10):
        while rig.disk.connection.in_flight < count or not device.asked:
            await trio.lowlevel.checkpoint()
        await told(rig)


async def told(rig):
    """Whatever the threads were asked for before, they have dealt with, and said so."""
    await trio.testing.wait_all_tasks_blocked()
    for serving in rig.disk._serving:
        await serving.settled(2 * MIB - 512, 512)
    await trio.testing.wait_all_tasks_blocked()


async def read(rig, offset=0):
    assert await rig.front.read(offset, PAGE_SIZE) == b"p" * PAGE_SIZE


async def test_who_takes_back_waits_and_others_do_not(rig_maker):
    with piped() as device:
        async with rig_maker(device=device) as rig, trio.open_nursery() as nursery:
            nursery.start_soon(read, rig)
            await in_flight(rig, device)
            here = Waiter(rig, nursery, 0, 64)
            all_of_it = Waiter(rig, nursery, 0, 1 << 64)
            elsewhere = Waiter(rig, nursery, PAGE_SIZE, 1 << 63)
            await told(rig)
            assert (here.done, all_of_it.done, elsewhere.done) == (False, False, True)
            device.end_a_read()


async def test_the_second_who_takes_the_same_back_waits_too(rig_maker):
    """Nothing is known any more when it comes, but what was known is still in use."""
    with piped() as device:
        async with rig_maker(device=device) as rig, trio.open_nursery() as nursery:
            nursery.start_soon(read, rig)
            await in_flight(rig, device)
            waiters = [Waiter(rig, nursery, 0, PAGE_SIZE)]
            await told(rig)
            waiters += [Waiter(rig, nursery, 0, PAGE_SIZE), Waiter(rig, nursery, 0, MIB)]
            await told(rig)
            assert not any(waiter.done for waiter in waiters)
            device.end_a_read()


async def test_who_was_cancelled_did_not_wait_for_the_others(rig_maker):
    with piped() as device:
        async with rig_maker(device=device) as rig, trio.open_nursery() as nursery:
            nursery.start_soon(read, rig)
            await in_flight(rig, device)
            first = Waiter(rig, nursery, 0, PAGE_SIZE)
            await told(rig)
            first.scope.cancel()
            await told(rig)
            second = Waiter(rig, nursery, 0, PAGE_SIZE)
            await told(rig)
            assert not first.done
            assert not second.done
            device.end_a_read()
        assert second.done


async def test_what_was_learnt_meanwhile_is_waited_for_as_well(rig_maker):
    """The first one's wait says nothing of what has begun after it."""
    with piped() as device:
        async with rig_maker(device=device) as rig, trio.open_nursery() as nursery:
            nursery.start_soon(read, rig)
            await in_flight(rig, device)
            first = Waiter(rig, nursery, 0, PAGE_SIZE)
            await told(rig)
            device.asked = 0
            device.which = 1
            nursery.start_soon(read, rig)
            await in_flight(rig, device, 2)
            second = Waiter(rig, nursery, 0, PAGE_SIZE)
            await told(rig)
            device.end_a_read()
            with trio.fail_after(10):
                while not first.done:
                    await trio.lowlevel.checkpoint()
            third = Waiter(rig, nursery, 0, PAGE_SIZE)
            await told(rig)
            assert (second.done, third.done) == (False, False)
            device.end_a_read(1)


async def test_also_while_the_disk_is_being_drained(rig_maker):
    with piped() as device:
        async with rig_maker(device=device) as rig, trio.open_nursery() as nursery:
            nursery.start_soon(read, rig)
            await in_flight(rig, device)

            async def drain():
                await rig.disk.disconnect(drain=True)

            nursery.start_soon(drain)
            await told(rig)
            waiter = Waiter(rig, nursery, 0, PAGE_SIZE)
            await told(rig)
            assert not waiter.done
            device.end_a_read()
        assert waiter.done


async def test_also_while_the_connection_ends(rig_maker):
    """It waits for the storage, since memory is still read and written."""
    with piped() as device:
        async with rig_maker(device=device) as rig, trio.open_nursery() as nursery:
            nursery.start_soon(read, rig)
            await in_flight(rig, device)
            disconnected = trio.Event()

            async def disconnect():
                await rig.disk.disconnect(drain=False)
                disconnected.set()

            nursery.start_soon(disconnect)
            await trio.testing.wait_all_tasks_blocked(0.01)
            waiter = Waiter(rig, nursery, 0, PAGE_SIZE)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not waiter.done
            device.end_a_read()
            with trio.fail_after(10):
                await disconnected.wait()
                while not waiter.done:
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()  # the read may be answered or not


async def test_storage_that_does_not_answer_is_left_alone_after_a_while(
    rig_maker, monkeypatch, tmp_path
):
    """And who waits for it waits no longer, but is told; nothing is done with the disk any more."""
    monkeypatch.setattr(engine, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(native_connection, "CLOSE_SECONDS", 0.05)
    for module in (engine, uring):  # it does answer in the end
        monkeypatch.setattr(module, "_abandoned", [])
    journals = tmp_path / "journals"
    options = FrontendOptions(persistent=False)
    with piped() as device:
        maker = rig_maker(
            device=device, options=options, grants=GrantMode.COPY, journal_dir=journals
        )
        async with maker as rig, trio.open_nursery() as nursery:
            nursery.start_soon(read, rig)
            await in_flight(rig, device)
            waiter = Waiter(rig, nursery, 0, PAGE_SIZE)
            await told(rig)
            with trio.fail_after(10):
                await rig.disk.disconnect(drain=False)
                while not waiter.done:
                    await trio.lowlevel.checkpoint()
            assert "storage has not finished" in str(waiter.error)
            for call in (
                lambda: rig.access.invalidate(MIB, PAGE_SIZE),
                rig.access.flush,
                lambda: rig.access.readv(0, [memoryview(bytearray(512))]),
                rig.connect,
            ):
                with pytest.raises(DeviceBroken, match="storage has not finished"):
                    await call()
            assert rig.access.resolve(0, PAGE_SIZE, for_write=False) is None
            assert list(journals.iterdir()) == []
            (journals / "xbdback1i51712.0").touch()  # of the next connection
            device.end_a_read()
            with trio.fail_after(10):
                while rig.host.hypervisor.bound_ports or rig.host.hypervisor.mapped_pages:
                    await trio.lowlevel.checkpoint()
            assert list(journals.iterdir()) != []
            nursery.cancel_scope.cancel()

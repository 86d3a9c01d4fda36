"""A backend may die at any moment: the next one answers what is owed, and nothing twice."""

from __future__ import annotations

import itertools
import random

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from native_build import declarations, native_library

from xbd.core.blkif import (
    X86_32,
    X86_64,
    BackRing,
    Decoder,
    FrontRing,
    Limits,
    constants,
    encode,
    whole,
)
from xbd.core.datapath.journal import Journal, JournalMemory, RingIdentity
from xbd.core.datapath.recovery import take_over
from xbd.core.driver.testing import Fault, FaultDevice, MemoryDevice
from xbd.core.errors import PortFailed
from xbd.core.frontend.options import FrontendOptions
from xbd.core.units import KIB, MIB, PAGE_SIZE

LIMITS = Limits(
    size=MIB,
    logical_block=512,
    read_only=False,
    flush=True,
    barrier=True,
    discard=True,
    discard_secure=False,
    max_indirect_segments=256,
)


class Died(Exception):
    """The process was killed here."""


class Backend:
    """The data path's steps on ring and journal, in its order, with a death between any two."""

    def __init__(self, view, abi, path, identity, lives_for):
        self._steps = lives_for
        self.ring = BackRing(view, abi, 0, fence=self.step, attach=True)
        self._decoder = Decoder(abi, LIMITS)
        debt = take_over(path, identity, self.ring)
        self.step()
        self._journal = Journal(identity, self.ring.entries, abi.request_size, path, debt)
        self.step()
        decoded = self._decoder.decode_batch(b"".join(request.entry for request in debt.requests))
        self.work = dict(enumerate(whole(request) for request in decoded))

    def step(self):
        self._steps -= 1
        if self._steps < 0:
            raise Died

    def take(self):
        entries = self.ring.take()
        self.step()
        if entries:
            requests = [whole(request) for request in self._decoder.decode_batch(entries)]
            first = (self.ring.req_cons - len(requests)) & 0xFFFFFFFF
            slots = self._journal.record(first, entries)
            self.work.update(zip(slots, requests, strict=True))
        self.step()

    def answer(self, slots, carry_out):
        for slot in slots:
            carry_out(self.work[slot].id)
            self.step()
        self._journal.answering(slots, self.ring.rsp_prod_pvt)
        self.step()
        for slot in slots:
            request = self.work.pop(slot)
            self.ring.answer(request.id, request.operation, constants.RSP_OKAY)
            self.step()
        self.ring.push()
        self.step()
        self._journal.clear(slots)
        self.step()


class CBackend:
    """The same steps by the functions of the native data path, in its order."""

    def __init__(self, view, abi, path, identity, lives_for):
        self._ffi, self._lib = native_library(
            ["blkif.c", "journal.c"], declarations("api.h", "blkif.h", "journal.h")
        )
        self._steps = lives_for
        self._abi = abi
        ring = BackRing(view, abi, 0, fence=self.step, attach=True)
        debt = take_over(path, identity, ring)
        self.step()
        journal = JournalMemory(identity, ring.entries, abi.request_size, path, debt)
        self.step()
        marks, indices, copies = journal.arrays
        self._kept = (
            journal,
            self._ffi.from_buffer("uint64_t[]", marks),
            self._ffi.from_buffer("uint32_t[]", indices),
            self._ffi.from_buffer("uint8_t[]", copies),
            self._ffi.from_buffer("uint8_t[]", view),
        )
        self._journal = self._ffi.new("struct journal *")
        assert self._lib.journal_open(
            self._journal, *self._kept[1:4], ring.entries, abi.request_size, len(debt.requests)
        )
        self.ring = self._ffi.new("struct back_ring *")
        self._lib.ring_attach(
            self.ring,
            self._kept[4],
            self._ffi.addressof(self._lib.ABIS, abi is X86_32),
            ring.entries,
            ring.req_cons,
            ring.rsp_prod_pvt,
        )
        self.work = {
            slot: Decoder(abi, LIMITS).decode(request.entry)
            for slot, request in enumerate(debt.requests)
        }

    step = Backend.step

    def take(self):
        for _ in range(self._lib.ring_waiting(self.ring)):
            index = self.ring.req_cons
            copy = self._lib.journal_next(self._journal)
            self._lib.ring_take(self.ring, copy)
            self.step()
            found = bytes(self._ffi.buffer(copy, self._abi.request_size))
            slot = self._lib.journal_record(self._journal, index)
            self.work[slot] = Decoder(self._abi, LIMITS).decode(found)
            self.step()

    def answer(self, slots, carry_out):
        for slot in slots:
            carry_out(self.work[slot].id)
            self.step()
        for slot in slots:
            self._lib.journal_answering(self._journal, slot, self.ring.rsp_prod_pvt)
            self.step()
            request = self.work.pop(slot)
            self._lib.ring_answer(self.ring, request.id, request.operation, constants.RSP_OKAY)
            self.step()
        self._lib.ring_push(self.ring)
        self.step()
        for slot in slots:
            self._lib.journal_clear(self._journal, slot)
            self.step()


@pytest.mark.parametrize("makers", ["Python", "C", "Python and C"])
@given(
    seed=st.integers(0, 1 << 32),
    start=st.sampled_from([0, (1 << 32) - 50]),
    abi=st.sampled_from([X86_64, X86_32]),
)
@settings(max_examples=settings.default.max_examples // 2)
def test_every_request_is_answered_once_whenever_backends_die(
    tmp_path_factory, makers, seed, start, abi
):
    """And whatever they are made of: who follows has to know what the dead one left."""
    dice = random.Random(seed)
    in_c = {"Python": 0.0, "C": 1.0, "Python and C": 0.5}[makers]

    path = tmp_path_factory.mktemp("journal") / "ring"
    identity = RingIdentity(
        domid=1, devid=51712, queue=0, ring_order=0, event_channel=1, ring_refs=(9,),
        protocol=abi.protocol,
    )  # fmt: skip
    view = memoryview(bytearray(PAGE_SIZE))
    front = FrontRing(view, abi, 0, fence=lambda: None, start=start)
    numbers = itertools.count()
    asked, carried_out, answered = set(), set(), set()
    backend = None
    while len(answered) < 150:
        for _ in range(dice.randint(0, front.free)):
            number = next(numbers)
            asked.add(number)
            segments = [(dice.randint(1, 99), 0, 7)]
            front.submit(
                encode.encode_rw(abi, constants.WRITE, number, 8 * (number % 99), segments)
            )
        front.push()
        try:
            if backend is None:
                make = CBackend if dice.random() < in_c else Backend
                backend = make(view, abi, path, identity, dice.randint(3, 120))
            backend.take()
            done = dice.sample(sorted(backend.work), dice.randint(0, len(backend.work)))
            if done:
                backend.answer(done, carried_out.add)
        except Died:
            backend = None
        for number, operation, status in front.responses():
            assert (operation, status) == (constants.WRITE, constants.RSP_OKAY)
            assert number in asked, "an answer to nothing"
            assert number not in answered, "answered twice"
            assert number in carried_out, "answered before it was carried out"
            answered.add(number)


def started(tmp_path, count=3):
    """A ring with requests that a backend took and died over."""
    path = tmp_path / "ring"
    identity = RingIdentity(
        domid=1, devid=51712, queue=0, ring_order=0, event_channel=1, ring_refs=(9,),
        protocol=X86_64.protocol,
    )  # fmt: skip
    view = memoryview(bytearray(PAGE_SIZE))
    front = FrontRing(view, X86_64, 0, fence=lambda: None)
    for number in range(count):
        front.submit(encode.encode_rw(X86_64, constants.READ, number, 0, [(5, 0, 7)]))
    front.push()
    Backend(view, X86_64, path, identity, 1000).take()
    return path, identity, view


def attach(view):
    return BackRing(view, X86_64, 0, fence=lambda: None, attach=True)


def test_the_same_ring_goes_on(tmp_path):
    path, identity, view = started(tmp_path)
    ring = attach(view)
    assert [request.index for request in take_over(path, identity, ring).requests] == [0, 1, 2]
    assert ring.take() == b""


@pytest.mark.parametrize("asked", [0, 1, 3, 5])
def test_another_kernels_ring_on_the_same_pages_is_not_mistaken(tmp_path, asked):
    """After kexec page and port may be the same by chance: old reads must not hit new memory."""
    path, identity, view = started(tmp_path)
    front = FrontRing(view, X86_64, 0, fence=lambda: None)
    for number in range(asked):
        front.submit(encode.encode_rw(X86_64, constants.READ, 100 + number, 8, [(6, 0, 7)]))
    front.push()
    ring = attach(view)
    assert not take_over(path, identity, ring).requests
    assert len(ring.take()) == asked * X86_64.request_size


def test_a_guest_that_lies_about_its_ring_harms_itself_only(tmp_path):
    path, identity, view = started(tmp_path)
    words = view[:16].cast("I")
    for req_prod, rsp_prod in ((1 << 31, 0), (0, 3), (3, 1 << 31), (2, 0), (99, 98)):
        words[0], words[2] = req_prod, rsp_prod
        ring = attach(view)
        owed = take_over(path, identity, ring).requests
        assert len(owed) <= 3
        assert (ring.req_cons - ring.rsp_prod_pvt) & 0xFFFFFFFF == len(owed)


async def test_a_new_backend_finishes_what_an_old_one_left(rig_maker, tmp_path):
    """The data path itself: killed with requests in flight, and connected again."""
    gate = trio.Event()
    slow = Fault(operations={"writev"}, times=4, wait=gate, error=None)
    device = FaultDevice(MemoryDevice(MIB), slow)
    journals = tmp_path / "journal"
    async with (
        rig_maker(device=device, journal_dir=journals) as rig,
        trio.open_nursery() as nursery,
    ):
        for number in range(4):
            nursery.start_soon(rig.front.write, number * 8 * KIB, bytes([number + 1]) * 8 * KIB)
        await trio.testing.wait_all_tasks_blocked()
        await rig.front.read(MIB // 2, 4096)  # answered, in the slot of one that is not
        await rig.die(journals)
        gate.set()
        await rig.connect()
    assert rig.device.inner.disk.content[: 32 * KIB] == b"".join(
        bytes([number + 1]) * 8 * KIB for number in range(4)
    )


async def test_a_backend_that_could_not_begin_leaves_it_to_the_next_one(
    rig_maker, tmp_path, monkeypatch
):
    """One ring was opened already; its guest has answers that must not come again."""
    gate = trio.Event()
    slow = Fault(operations={"writev"}, times=2, wait=gate, error=None)
    device = FaultDevice(MemoryDevice(MIB), slow)
    journals = tmp_path / "journal"
    options = FrontendOptions(data_pages=64, queues=2)
    async with (
        rig_maker(device=device, journal_dir=journals, options=options) as rig,
        trio.open_nursery() as nursery,
    ):
        for number in range(2):  # one in each ring
            nursery.start_soon(rig.front.write, number * 8 * KIB, bytes([number + 1]) * 8 * KIB)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(4):
            await rig.front.read(MIB // 2, 4096)  # answered, and in the ring behind those
        await rig.die(journals)
        bind, calls = rig.host.hypervisor.bind_interdomain, itertools.count()

        def refuse(*arguments):
            if next(calls) == 1:
                raise PortFailed("not yet")
            return bind(*arguments)

        monkeypatch.setattr(rig.host.hypervisor, "bind_interdomain", refuse)
        with pytest.raises(PortFailed):
            await rig.connect()
        gate.set()
        await rig.connect()
    assert rig.device.inner.disk.content[: 16 * KIB] == b"".join(
        bytes([number + 1]) * 8 * KIB for number in range(2)
    )
    assert not list(journals.iterdir())

"""Both halves against each other, in random order and at each other's most delicate instants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from whole_requests import whole_batch

from xbd.core.blkif import (
    ARM,
    X86_32,
    X86_64,
    BackRing,
    Decoder,
    FrontRing,
    Limits,
    constants,
    encode,
)

U32 = 1 << 32
LIMITS = Limits(
    size=1 << 30,
    logical_block=512,
    read_only=False,
    flush=True,
    barrier=True,
    discard=True,
    discard_secure=True,
    max_indirect_segments=256,
)


class World:
    """A frontend and a backend that sleep when they may, woken by events alone.

    A fence of one side is where the other may run; the script says how often it does.
    """

    def __init__(self, abi, order, start, script):
        self.abi = abi
        self.script = script
        self.inside = False
        view = memoryview(bytearray(4096 << order))
        self.front = FrontRing(view, abi, order, fence=self.front_fence, start=start)
        self.back = BackRing(view, abi, order, fence=self.back_fence, attach=True)
        self.decoder = Decoder(abi, LIMITS)
        self.next_id = 0
        self.asked: dict[int, int] = {}
        self.open: list[tuple[int, int]] = []
        self.back_asleep = self.front_asleep = False
        self.back_event = self.front_event = True  # everybody looks once after connecting

    def next(self, choices):
        """The script's next number below `choices`; 0 when it is over."""
        return self.script.pop() % choices if self.script else 0

    def front_fence(self):
        self.at_fence(self.back_runs)

    def back_fence(self):
        self.at_fence(self.front_runs)

    def at_fence(self, other):
        if not self.inside and self.next(3) == 1:
            self.inside = True
            other()
            self.inside = False

    def entry(self):
        operation = (constants.READ, constants.WRITE, constants.DISCARD)[self.next(3)]
        request_id, self.next_id = self.next_id, self.next_id + 1
        self.asked[request_id] = operation
        if operation == constants.DISCARD:
            return encode.encode_discard(self.abi, request_id, request_id, 8)
        segments = [(request_id, 0, 7)] * (1 + self.next(11))
        return encode.encode_rw(self.abi, operation, request_id, request_id * 8, segments)

    def front_asks(self):
        for _ in range(min(self.front.free, self.next(40))):
            self.front.submit(self.entry())
        if self.front.push():
            self.back_event = True

    def front_looks(self):
        if self.front_asleep and not self.front_event:
            return
        self.front_asleep = self.front_event = False
        for request_id, operation, status in self.front.responses():
            assert self.asked.pop(request_id) == operation
            assert status == -(request_id % 3)
        self.front_asleep = not self.front.final_check()

    def front_runs(self):
        self.front_asks()
        self.front_looks()

    def back_looks(self):
        if self.back_asleep and not self.back_event:
            return
        self.back_asleep = self.back_event = False
        entries = self.back.take(1 + self.next(50) if self.next(2) else None)
        for request in whole_batch(self.decoder, entries):
            self.open.append((request.id, request.operation))
        self.back_asleep = not self.back.final_check()

    def back_answers(self, count):
        for _ in range(min(count, len(self.open))):
            request_id, operation = self.open.pop(self.next(len(self.open)))
            self.back.answer(request_id, operation, -(request_id % 3))
        if self.back.push():
            self.front_event = True

    def back_runs(self):
        self.back_looks()
        self.back_answers(self.next(20))

    def settle(self):
        """Nobody asks any more: events alone have to bring everything to its end."""
        for _ in range(4 * self.back.entries):
            self.back_looks()
            self.back_answers(len(self.open))
            self.front_looks()
            if not self.asked:
                return
        raise AssertionError(f"{len(self.asked)} requests are lost: a wake-up was")


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("abi", [X86_64, X86_32, ARM], ids=lambda abi: abi.name)
@given(
    before_wrap=st.integers(0, 300),
    script=st.lists(st.integers(0, 1 << 16), max_size=400),
    turns=st.lists(st.sampled_from(["asks", "looks", "back", "answers"]), max_size=60),
)
def test_every_request_is_answered_once_and_no_wakeup_is_lost(
    abi, order, before_wrap, script, turns
):
    world = World(abi, order, U32 - 1 - before_wrap, script)
    for turn in turns:
        if turn == "asks":
            world.front_asks()
        elif turn == "looks":
            world.front_looks()
        elif turn == "back":
            world.back_looks()
        else:
            world.back_answers(world.next(40))
    world.script.clear()
    world.settle()
    assert not world.open
    assert world.front.free == world.front.entries


@pytest.mark.parametrize("abi", [X86_64, X86_32], ids=lambda abi: abi.name)
@pytest.mark.parametrize("order", [0, 5])
def test_through_the_wrap_with_full_rings(abi, order):
    world = World(abi, order, U32 - 100, [])
    for round_ in range(8):
        for _ in range(world.front.free - round_):
            world.front.submit(world.entry())
        assert world.front.push() or not world.back_asleep
        world.back_event = True
        world.settle()
    assert world.next_id > 200


def test_this_test_notices_a_lost_wakeup():
    """A backend that looks first and asks for events afterwards: the property has to fail."""
    world = World(X86_64, 0, 0, [])
    back = world.back

    def careless():
        if back._waiting():
            return True
        if world.next_id == 0:
            world.front.submit(world.entry())
            assert not world.front.push()
        back._words[1] = (back.req_cons + 1) % U32
        return False

    back._words[1] = 7  # not asked for
    back.final_check = careless
    world.back_looks()
    with pytest.raises(AssertionError, match="a wake-up was"):
        world.settle()

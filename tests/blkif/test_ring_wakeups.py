"""No wake-up is lost, in any order in which two processors can run, with stores that come late."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_model import INDICES, Processor, every_schedule, run

from xbd.core.blkif import X86_64, BackRing, FrontRing

START = 2**32 - 2
REQ_EVENT, RSP_EVENT = 1, 3
SLOT = bytes(X86_64.request_size)


def nothing() -> None:
    """No fence while the ring is being set up."""


class Wakeups:
    """One side gives work in some pushes; the other takes it and goes to sleep.

    What comes in twos is the giver's, then the sleeper's.

    `armed`: whether the sleeper has asked for an event already, as after its last sleep, or has an
    old number in its event word, as while it is busy.
    """

    def __init__(
        self, *, pushes: int, armed: bool, eager: tuple[bool, bool], fences: tuple[bool, bool]
    ) -> None:
        view = memoryview(bytearray(4096))
        self.front = FrontRing(view, X86_64, 0, fence=nothing, start=START)
        self.back = BackRing(view, X86_64, 0, fence=nothing, attach=True)
        self.view = view
        self.pushes = pushes
        self.armed = armed
        self.event = False
        self.taken = 0
        self.eager = eager
        self.fences = fences

    def run(self, schedule):
        words = self.view[:16].cast("I")
        if not self.armed:
            words[self.event_word] = (START - 5) % 2**32
        memory = [words[index] for index in range(INDICES)]
        giver, sleeper = (Processor(memory, eager=eager) for eager in self.eager)
        halves = (self.giver, self.sleeper)
        for half, processor, fenced in zip(halves, (giver, sleeper), self.fences, strict=True):
            half._words = processor
            half._fence = processor.fence if fenced else processor.no_fence
        giver.start(self.gives)
        sleeper.start(self.takes)
        taken = run([giver, sleeper], schedule)
        assert self.taken == self.pushes or self.event, "asleep, with work, and no event"
        return taken

    def gives(self):
        for _ in range(self.pushes):
            self.give()
            self.event = self.giver.push() or self.event

    def takes(self):
        while True:
            self.take()
            if not self.sleeper.final_check():
                return


class RequestWakeups(Wakeups):
    event_word = REQ_EVENT
    giver = property(lambda self: self.front)
    sleeper = property(lambda self: self.back)

    def give(self):
        self.front.submit(SLOT)

    def take(self):
        self.taken += len(self.back.take()) // len(SLOT)


class ResponseWakeups(Wakeups):
    event_word = RSP_EVENT
    giver = property(lambda self: self.back)
    sleeper = property(lambda self: self.front)

    def __init__(self, **options):
        super().__init__(**options)
        for _ in range(self.pushes):
            self.front.submit(SLOT)
        self.front.push()
        self.back.take()

    def give(self):
        self.back.answer(0, 0, 0)

    def take(self):
        self.taken += len(self.front.responses())


DIRECTIONS = pytest.mark.parametrize("direction", [RequestWakeups, ResponseWakeups])
FENCED = (True, True)
LATE = [(True, True), (True, False), (False, True), (False, False)]


@DIRECTIONS
@pytest.mark.parametrize("armed", [True, False])
@pytest.mark.parametrize("eager", LATE)
def test_every_order_of_one_push_and_going_to_sleep(direction, armed, eager):
    def attempt(schedule):
        return direction(pushes=1, armed=armed, eager=eager, fences=FENCED).run(schedule)

    assert every_schedule(attempt) > 20


@DIRECTIONS
@given(
    schedule=st.lists(st.integers(0, 1), max_size=60),
    pushes=st.integers(2, 5),
    armed=st.booleans(),
    eager=st.sampled_from(LATE),
)
def test_many_pushes(direction, schedule, pushes, armed, eager):
    direction(pushes=pushes, armed=armed, eager=eager, fences=FENCED).run(schedule)


@DIRECTIONS
@pytest.mark.parametrize("fences", [(False, True), (True, False)])
def test_the_model_sees_what_a_missing_fence_does(direction, fences):
    """Each side needs its own."""

    def attempt(schedule):
        return direction(pushes=1, armed=False, eager=(False, False), fences=fences).run(schedule)

    with pytest.raises(AssertionError, match="asleep, with work"):
        every_schedule(attempt)


@DIRECTIONS
def test_the_model_sees_a_sleeper_that_does_not_look_again(direction):
    def attempt(schedule):
        wakeups = direction(pushes=1, armed=False, eager=(True, True), fences=FENCED)
        careful = wakeups.sleeper.final_check
        wakeups.sleeper.final_check = lambda: careful() and False
        return wakeups.run(schedule)

    with pytest.raises(AssertionError, match="asleep, with work"):
        every_schedule(attempt)

"""The extent cache against a map of single bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xbd.core.datapath.extents import ExtentCache
from xbd.core.driver import HostExtent

SIZE = 64
range_of_disk = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(
    lambda pair: (pair[0], min(pair[1], SIZE - pair[0]))
)


class Layout:
    """Where each byte lies; None: nowhere."""

    def __init__(self, owners: list[tuple[int, int] | None]) -> None:
        self.owners = owners
        self.asked = 0

    def resolve(self, offset, length, *, for_write):
        self.asked += 1
        extents = []
        at = offset
        while at < len(self.owners) and self.owners[at] is not None and at < offset + length:
            fd, host = self.owners[at]
            end = at
            while end < len(self.owners) and self.owners[end] == (fd, host + end - at):
                end += 1
            extents.append(HostExtent(fd=fd, offset=host, length=end - at))
            at = end
        return extents or None


@given(
    runs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 500), st.integers(1, 20))),
    steps=st.lists(st.tuples(st.sampled_from(["find", "forget"]), range_of_disk), max_size=40),
    for_write=st.booleans(),
)
def test_found_entries_say_what_the_driver_said(runs, steps, for_write):
    owners: list[tuple[int, int] | None] = []
    for fd, host, length in runs:
        owners += [None if fd == 0 else (fd, host + i) for i in range(length)]
    owners = (owners + [None] * SIZE)[:SIZE]
    layout = Layout(owners)
    cache = ExtentCache(layout.resolve)
    for step, (offset, length) in steps:
        if step == "forget":
            moved = {at: (9, 1000 + at) for at in range(offset, offset + length)}
            layout.owners = [moved.get(at, owner) for at, owner in enumerate(layout.owners)]
            cache.forget(offset, length)
            continue
        entry = cache.find(offset, length, for_write=for_write)
        wanted = layout.owners[offset : offset + length]
        in_one = wanted[0] is not None and all(
            owner == (wanted[0][0], wanted[0][1] + i) for i, owner in enumerate(wanted)
        )
        assert (entry is not None) == in_one
        if entry is not None:
            start, end, fd, delta = entry
            assert start <= offset
            assert offset + length <= end
            assert (fd, offset + delta) == wanted[0]


def test_an_answer_is_kept():
    layout = Layout([(4, i) for i in range(SIZE)])
    cache = ExtentCache(layout.resolve)
    for offset in range(SIZE):
        assert cache.find(offset, 1, for_write=False) == (0, SIZE, 4, 0)
    assert layout.asked == 1
    assert cache.find(3, 1, for_write=True) is not None
    assert layout.asked == 2  # reading and writing are asked for apart

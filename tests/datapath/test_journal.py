"""The journal against a model: after a crash at any point it tells exactly what is owed."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.datapath.journal import Journal, RingIdentity, read_journal

IDENTITY = RingIdentity(
    domid=3,
    devid=51712,
    queue=0,
    ring_order=1,
    event_channel=7,
    ring_refs=(8, 9),
    protocol="x86_64-abi",
    cookie="a-cookie",
)
SIZE = 112
ENTRIES = 64


def owed(path, identity, rsp_prod):
    return read_journal(path, identity, rsp_prod).requests


def entry(index: int) -> bytes:
    return index.to_bytes(8, "little") * (SIZE // 8)


def entries(first: int, count: int) -> bytes:
    return b"".join(entry((first + i) & 0xFFFFFFFF) for i in range(count))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "dir" / "xbdback3i51712.0"


def test_what_is_recorded_is_owed_in_order(path):
    journal = Journal(IDENTITY, ENTRIES, SIZE, path)
    journal.record(10, entries(10, 5))
    journal.record(15, entries(15, 2))
    still = owed(path, IDENTITY, rsp_prod=10)
    assert [request.index for request in still] == list(range(10, 17))
    assert [request.entry for request in still] == [entry(i) for i in range(10, 17)]
    journal.close()
    assert not path.exists()


def test_a_published_answer_is_not_owed_and_an_unpublished_one_is(path):
    journal = Journal(IDENTITY, ENTRIES, SIZE, path)
    slots = journal.record(0, entries(0, 4))
    journal.answering([slots[2], slots[0]], 0)  # response 0 is request 2's, response 1 request 0's
    assert [r.index for r in owed(path, IDENTITY, rsp_prod=0)] == [0, 1, 2, 3]
    assert [r.index for r in owed(path, IDENTITY, rsp_prod=1)] == [0, 1, 3]
    assert [r.index for r in owed(path, IDENTITY, rsp_prod=2)] == [1, 3]
    journal.clear([slots[2], slots[0]])
    assert [r.index for r in owed(path, IDENTITY, rsp_prod=2)] == [1, 3]


def test_indices_wrap_around(path):
    journal = Journal(IDENTITY, ENTRIES, SIZE, path)
    first = (1 << 32) - 2
    slots = journal.record(first, entries(first, 4))
    still = owed(path, IDENTITY, rsp_prod=first)
    assert [r.index for r in still] == [first, first + 1, 0, 1]
    journal.answering(slots[:3], first)
    assert [r.index for r in owed(path, IDENTITY, rsp_prod=1)] == [1]
    assert [r.index for r in owed(path, IDENTITY, rsp_prod=0)] == [0, 1]


@pytest.mark.parametrize("name", [field.name for field in attrs.fields(RingIdentity)])
def test_a_journal_of_another_ring_is_void(path, name):
    Journal(IDENTITY, ENTRIES, SIZE, path)
    value = getattr(IDENTITY, name)
    other = {str: "other", int: 5, tuple: (8, 11)}[type(value)]
    assert read_journal(path, attrs.evolve(IDENTITY, **{name: other}), rsp_prod=0) is None
    assert owed(path, IDENTITY, rsp_prod=0) == []


def test_a_missing_or_damaged_journal_is_void(path):
    assert read_journal(path, IDENTITY, rsp_prod=0) is None
    path.parent.mkdir()
    path.write_bytes(b"short")
    assert read_journal(path, IDENTITY, rsp_prod=0) is None
    path.write_bytes(b"\xff" * 20000)
    assert read_journal(path, IDENTITY, rsp_prod=0) is None


@given(data=st.data(), start=st.sampled_from([0, 5, (1 << 32) - 40]))
def test_out_of_order_answers_against_a_model(tmp_path_factory, data, start):
    """Any slot discipline is fine as long as the open requests are exactly the model's."""
    path = tmp_path_factory.mktemp("journal") / "ring"
    journal = Journal(IDENTITY, ENTRIES, SIZE, path)
    open_slots: dict[int, int] = {}
    produced = 0
    answered = 0
    for _ in range(data.draw(st.integers(1, 20))):
        room = ENTRIES - len(open_slots)
        count = data.draw(st.integers(0, room))
        if count:
            first = (start + produced) & 0xFFFFFFFF
            slots = journal.record(first, entries(first, count))
            assert len(set(slots)) == count
            assert not set(slots) & set(open_slots.values())
            open_slots.update((produced + i, slot) for i, slot in enumerate(slots))
            produced += count
        done = (
            data.draw(st.lists(st.sampled_from(sorted(open_slots)), unique=True))
            if (open_slots)
            else []
        )
        slots = [open_slots.pop(index) for index in done]
        rsp_prod = (start + answered) & 0xFFFFFFFF
        journal.answering(slots, rsp_prod)
        indices = {r.index for r in owed(path, IDENTITY, rsp_prod)}
        assert indices == {(start + i) & 0xFFFFFFFF for i in [*open_slots, *done]}
        answered += len(done)
        journal.clear(slots)
        still = owed(path, IDENTITY, (start + answered) & 0xFFFFFFFF)
        assert [r.index for r in still] == [(start + i) & 0xFFFFFFFF for i in sorted(open_slots)]
        assert all(r.entry == entry(r.index) for r in still)
        assert journal.open_requests == len(open_slots)
    journal.close()

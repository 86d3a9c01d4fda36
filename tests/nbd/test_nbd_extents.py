"""What is remembered of resolved extents is what was said and not taken back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.nbd import extents
from xbd.core.nbd.extents import Extents

SIZE = 40

steps = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(0, SIZE - 1),
        st.integers(1, SIZE),
        st.sampled_from([(3, 0), (3, 100), (4, 0)]),
    ),
    max_size=30,
)


@given(steps)
def test_against_a_list_of_bytes(script: list[tuple[bool, int, int, tuple[int, int]]]) -> None:
    known, model = Extents(), [None] * SIZE
    for add, start, length, place in script:
        end = min(start + length, SIZE)
        if add:
            known.add((start, end, *place))
        else:
            known.forget(start, end)
        model[start:end] = [place if add else None] * (end - start)
        runs = []
        for place, group in itertools.groupby(range(SIZE), lambda at: model[at]):
            at = list(group)
            if place is not None:
                runs.append((at[0], at[-1] + 1, *place))
        assert known._entries == runs
        assert known._starts == [run[0] for run in runs]
        for low, high in itertools.combinations(range(0, SIZE + 1, 3), 2):
            expected = [run for run in runs if run[0] <= low and high <= run[1]]
            assert known.find(low, high) == (expected[0] if expected else None)


def test_there_are_never_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extents, "MAX_ENTRIES", 10)
    known = Extents()
    for number in range(100):
        known.add((2 * number, 2 * number + 1, 3, 0))
        assert len(known) <= 10
        assert known.find(2 * number, 2 * number + 1)

"""Giving back, in reverse order."""

from __future__ import annotations

import pytest

from xbd.core.datapath.undo import Undo


def test_what_came_last_goes_first_and_once():
    undo = Undo()
    calls = []
    for name in "abc":
        undo.later(lambda name=name: calls.append(name))
    undo.close()
    undo.close()
    assert calls == ["c", "b", "a"]


def test_a_failure_keeps_nothing_from_being_given_back():
    undo = Undo()
    calls = []

    def fail():
        raise OSError("no")

    undo.later(lambda: calls.append("first"))
    undo.later(fail)
    undo.later(lambda: calls.append("last"))
    with pytest.raises(OSError, match="no"):
        undo.close()
    assert calls == ["last", "first"]

"""The state table against what the protocol demands, written down once more and differently."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from xbd.core.blkif import state_docs
from xbd.core.blkif.state import STEPS, Action, XenbusState, step

S = XenbusState
PAIRS = list(itertools.product(S, S, [True, False]))
DOCUMENT = Path(__file__).parents[2] / "docs" / "states.md"
MAY_BE_CONNECTED = (S.INITIALISED, S.CONNECTED, S.CLOSING)
OPEN = (S.INIT_WAIT, S.INITIALISED, S.CONNECTED)
OURS = (*OPEN, S.CLOSING, S.CLOSED)


def expected(ours: S, theirs: S, online: bool) -> tuple[Action, S]:
    """What to do, and which state is ours afterwards; by the frontend's state."""
    nothing = (Action.NONE, ours)
    if ours not in OURS:  # the toolstack's, or nobody's
        return nothing
    match theirs:
        case S.INITIALISED | S.CONNECTED if ours in OPEN:
            return Action.CONNECT, S.CONNECTED
        case S.INITIALISED if ours is S.CLOSED and online:
            return Action.CONNECT, S.CONNECTED
        case S.CLOSING:
            return Action.DISCONNECT, S.CLOSING if ours in OPEN else ours
        case S.CLOSED:
            return Action.DISCONNECT, S.CLOSED
        case S.INITIALISING if ours is S.CLOSED and online:
            return Action.PUBLISH, S.INIT_WAIT
        case S.INITIALISING | S.UNKNOWN if ours in MAY_BE_CONNECTED:
            return Action.DISCONNECT, S.CLOSED
    return nothing


@pytest.mark.parametrize(("ours", "theirs", "online"), PAIRS)
def test_every_pair(ours, theirs, online):
    todo = step(ours, theirs, online=online)
    following = ours if todo.next is None else todo.next
    assert (todo.action, following) == expected(ours, theirs, online)


# -- what must hold whatever the table says -------------------------------------------------


def test_states_that_are_not_ours_to_write():
    """0, 1 and 3 mean nothing from a backend; 7 and 8 make NetBSD panic."""
    for ours, theirs, online in PAIRS:
        todo = step(ours, theirs, online=online)
        assert todo.next in (None, S.INIT_WAIT, S.CONNECTED, S.CLOSING, S.CLOSED)


def test_connected_is_written_by_connecting_only():
    for ours, theirs, online in PAIRS:
        todo = step(ours, theirs, online=online)
        assert (todo.next is S.CONNECTED) == (todo.action is Action.CONNECT)
        if todo.action is Action.CONNECT:
            assert theirs in (S.INITIALISED, S.CONNECTED)


def test_closing_is_written_after_disconnecting_only():
    for ours, theirs, online in PAIRS:
        todo = step(ours, theirs, online=online)
        if todo.next in (S.CLOSING, S.CLOSED):
            assert todo.action is Action.DISCONNECT


def test_init_wait_is_written_with_features_only():
    for ours, theirs, online in PAIRS:
        todo = step(ours, theirs, online=online)
        assert (todo.next is S.INIT_WAIT) == (todo.action is Action.PUBLISH)


@pytest.mark.parametrize("theirs", S)
@pytest.mark.parametrize("online", [True, False])
def test_init_wait_is_held_until_the_frontend_comes(theirs, online):
    """libxl compares with InitWait for equality."""
    todo = step(S.INIT_WAIT, theirs, online=online)
    if theirs not in (S.INITIALISED, S.CONNECTED, S.CLOSING, S.CLOSED):
        assert todo.next is None
        assert todo.action is Action.NONE


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("online", [True, False])
def test_closing_is_followed_whatever_ours_is(ours, online):
    for theirs in (S.CLOSING, S.CLOSED):
        assert step(ours, theirs, online=online).action is Action.DISCONNECT
    assert step(ours, S.CLOSED, online=online).next is (None if ours is S.CLOSED else S.CLOSED)


@pytest.mark.parametrize("theirs", S)
def test_no_new_life_without_online(theirs):
    """A detached disk is not offered, connected or opened again."""
    for ours in (S.CLOSING, S.CLOSED):
        todo = step(ours, theirs, online=False)
        assert todo.action in (Action.NONE, Action.DISCONNECT)
        assert todo.next in (None, S.CLOSED)


@pytest.mark.parametrize("ours", MAY_BE_CONNECTED)
@pytest.mark.parametrize("online", [True, False])
def test_a_vanished_frontend_keeps_nothing(ours, online):
    assert step(ours, S.UNKNOWN, online=online).action is Action.DISCONNECT


def test_steps_come_to_rest():
    """While the frontend does nothing, so do we, after two changes at most."""
    for first, theirs, online in PAIRS:
        ours, changes = first, 0
        while (todo := step(ours, theirs, online=online)).next not in (None, ours):
            ours, changes = todo.next, changes + 1
            assert changes <= 2, f"from {first!r} with {theirs!r} the table runs in circles"


def test_no_entry_for_states_of_the_toolstack():
    assert {ours for ours, _ in STEPS} <= set(OURS)
    assert not {theirs for _, theirs in STEPS} & {S.INIT_WAIT, S.RECONFIGURING, S.RECONFIGURED}


@pytest.mark.parametrize(("key", "todo"), list(STEPS.items()))
def test_every_step_says_why(key, todo):
    assert todo.why, key
    assert todo.action is not Action.NONE, "what changes nothing is left out"


# -- whole lives ----------------------------------------------------------------------------


class Life:
    """Walks the table as the backend does: steps until nothing changes."""

    def __init__(self, ours: S) -> None:
        self.ours = ours
        self.theirs = S.INITIALISING
        self.online = True
        self.actions: list[Action] = []

    def look(self) -> None:
        while True:
            todo = step(self.ours, self.theirs, online=self.online)
            if todo.action is not Action.NONE:
                self.actions.append(todo.action)
            if todo.next in (None, self.ours):
                return
            self.ours = todo.next

    def frontend(self, theirs: S, ours: S, *actions: Action) -> None:
        """The frontend goes on; then ours is to be `ours`, by `actions` (repeats count once)."""
        self.theirs = theirs
        self.actions = []
        self.look()
        assert self.ours is ours
        assert [action for action, _ in itertools.groupby(self.actions)] == list(actions)

    def toolstack_detaches(self) -> None:
        self.online = False
        self.ours = S.CLOSING


def connected() -> Life:
    life = Life(S.INIT_WAIT)
    life.frontend(S.INITIALISED, S.CONNECTED, Action.CONNECT)
    life.frontend(S.CONNECTED, S.CONNECTED, Action.CONNECT)
    return life


def test_normal_start():
    life = Life(S.INIT_WAIT)
    life.frontend(S.INITIALISING, S.INIT_WAIT)
    life.frontend(S.INITIALISED, S.CONNECTED, Action.CONNECT)
    life.frontend(S.CONNECTED, S.CONNECTED, Action.CONNECT)


def test_frontend_that_goes_to_connected_at_once():
    Life(S.INIT_WAIT).frontend(S.CONNECTED, S.CONNECTED, Action.CONNECT)


def test_frontend_that_was_ready_before_us():
    """NetBSD does not wait for InitWait: Initialised is there when we first look."""
    life = Life(S.INITIALISING)
    life.frontend(S.INITIALISED, S.INITIALISING)
    life.ours = S.INIT_WAIT
    life.frontend(S.INITIALISED, S.CONNECTED, Action.CONNECT)


def test_shutdown():
    life = connected()
    life.frontend(S.CLOSING, S.CLOSING, Action.DISCONNECT)
    life.frontend(S.CLOSED, S.CLOSED, Action.DISCONNECT)
    life.toolstack_detaches()
    life.frontend(S.CLOSED, S.CLOSED, Action.DISCONNECT)


@pytest.mark.parametrize("closing", [True, False])
def test_kexec_or_boot_loader_that_closes(closing):
    life = connected()
    if closing:
        life.frontend(S.CLOSING, S.CLOSING, Action.DISCONNECT)
    life.frontend(S.CLOSED, S.CLOSED, Action.DISCONNECT)
    life.frontend(S.INITIALISING, S.INIT_WAIT, Action.PUBLISH)
    life.frontend(S.INITIALISED, S.CONNECTED, Action.CONNECT)


def test_crash_kernel_that_never_closes():
    life = connected()
    life.frontend(S.INITIALISING, S.INIT_WAIT, Action.DISCONNECT, Action.PUBLISH)
    life.frontend(S.INITIALISED, S.CONNECTED, Action.CONNECT)


def test_crash_kernel_that_closes_for_the_dead_one():
    life = connected()
    life.frontend(S.CLOSING, S.CLOSING, Action.DISCONNECT)
    life.frontend(S.CLOSED, S.CLOSED, Action.DISCONNECT)
    life.frontend(S.INITIALISING, S.INIT_WAIT, Action.PUBLISH)


def test_frontend_driver_that_is_loaded_again_and_hurries():
    """It writes its rings before we saw it begin."""
    life = connected()
    life.frontend(S.CLOSED, S.CLOSED, Action.DISCONNECT)
    life.frontend(S.INITIALISED, S.CONNECTED, Action.CONNECT)


def test_closing_missed_altogether():
    """Events are merged: we see the new rings while ours is still Connected."""
    connected().frontend(S.INITIALISED, S.CONNECTED, Action.CONNECT)


def test_resume_in_a_new_domain():
    """Restore: new directories, and a frontend that begins with Initialised."""
    Life(S.INIT_WAIT).frontend(S.INITIALISED, S.CONNECTED, Action.CONNECT)


def test_resume_in_the_same_domain_with_new_rings():
    """NetBSD does not close; whether the rings are new, only its keys can tell."""
    life = connected()
    life.frontend(S.INITIALISED, S.CONNECTED, Action.CONNECT)
    life.frontend(S.CONNECTED, S.CONNECTED, Action.CONNECT)


def test_cancelled_suspend():
    connected().frontend(S.CONNECTED, S.CONNECTED, Action.CONNECT)


def test_windows_suspend():
    life = connected()
    life.frontend(S.CLOSING, S.CLOSING, Action.DISCONNECT)
    life.frontend(S.CLOSED, S.CLOSED, Action.DISCONNECT)
    life.frontend(S.INITIALISING, S.INIT_WAIT, Action.PUBLISH)
    life.frontend(S.INITIALISED, S.CONNECTED, Action.CONNECT)


def test_detach_while_connected():
    """The guest goes on writing until it closes."""
    life = connected()
    life.toolstack_detaches()
    life.frontend(S.CONNECTED, S.CLOSING)
    life.frontend(S.CLOSING, S.CLOSING, Action.DISCONNECT)
    life.frontend(S.CLOSED, S.CLOSED, Action.DISCONNECT)
    life.frontend(S.INITIALISING, S.CLOSED)
    life.frontend(S.INITIALISED, S.CLOSED)


def test_detach_before_the_frontend_came():
    life = Life(S.INIT_WAIT)
    life.toolstack_detaches()
    life.frontend(S.INITIALISING, S.CLOSED, Action.DISCONNECT)


def test_guest_that_crashes():
    life = connected()
    life.frontend(S.UNKNOWN, S.CLOSED, Action.DISCONNECT)
    life.frontend(S.UNKNOWN, S.CLOSED)


@pytest.mark.parametrize("theirs", [S.INITIALISED, S.CONNECTED])
def test_daemon_that_dies_and_comes_back(theirs):
    """Ours is still Connected: attach to the rings as they are."""
    life = Life(S.CONNECTED)
    life.frontend(theirs, S.CONNECTED, Action.CONNECT)


def test_guest_that_closed_while_the_daemon_was_dead():
    life = Life(S.CONNECTED)
    life.frontend(S.CLOSED, S.CLOSED, Action.DISCONNECT)
    life.frontend(S.INITIALISING, S.INIT_WAIT, Action.PUBLISH)


def test_we_ask_a_frontend_to_close():
    """A broken disk: ours is Closing, and the frontend follows."""
    life = connected()
    life.ours = S.CLOSING
    life.frontend(S.CONNECTED, S.CLOSING)
    life.frontend(S.CLOSING, S.CLOSING, Action.DISCONNECT)
    life.frontend(S.CLOSED, S.CLOSED, Action.DISCONNECT)


@pytest.mark.parametrize("odd", [S.INIT_WAIT, S.RECONFIGURING, S.RECONFIGURED])
@pytest.mark.parametrize("ours", OURS)
def test_states_no_frontend_should_write(ours, odd):
    Life(ours).frontend(odd, ours)


# -- documentation --------------------------------------------------------------------------


def test_document_is_current():
    mend = "run: python -m xbd.core.blkif.state_docs > docs/states.md"
    assert DOCUMENT.read_text() == state_docs.render(), mend


def test_document_has_every_step():
    page = state_docs.render()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(STEPS)
    for (ours, theirs), todo in STEPS.items():
        matching = [row for row in rows if f"({ours})" in row[0] and f"({theirs})" in row[1]]
        assert len(matching) == 1
        assert matching[0][3] == todo.action.value
        assert matching[0][5] == f"{todo.why} |"


def test_diagram_has_every_change_of_ours():
    diagram = state_docs.render().partition("```mermaid")[2]
    for (ours, theirs), todo in STEPS.items():
        if todo.next not in (None, ours):
            names = [state.name.title().replace("_", "") for state in (ours, todo.next, theirs)]
            arrow = f"{names[0]} --> {names[1]}: "
            labels = [line for line in diagram.splitlines() if line.strip().startswith(arrow)]
            assert any(names[2] in label.partition(": ")[2] for label in labels)

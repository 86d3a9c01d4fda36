"""The life of a connection as one table: our state and the frontend's give the next step.

Sources: xen/include/public/io/xenbus.h; what xen-blkback does on the frontend's changes
(drivers/block/xen-blkback/xenbus.c); libxl, which compares our state with InitWait for equality.
States 7 and 8 are never written: no block driver uses them, and some frontends panic on them.
"""

from __future__ import annotations

import enum
from typing import Final

import attrs


class XenbusState(enum.IntEnum):
    """enum xenbus_state.  A directory or node that is gone reads as UNKNOWN."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8


class Action(enum.Enum):
    """What a step does before the new state is written."""

    NONE = "nothing"
    CONNECT = "connect; if connected, reconnect when the frontend's keys are new"
    DISCONNECT = "drain, unmap, unbind"
    PUBLISH = "publish features and geometry again"


@attrs.frozen
class Step:
    """One entry of the table."""

    action: Action = Action.NONE
    next: XenbusState | None = None
    """The state to write afterwards; None: ours stays."""
    needs_online: bool = False
    """Only while the toolstack keeps the disk attached (``online`` is 1)."""
    why: str = ""


_S = XenbusState
STAY: Final = Step()

_MEET = Step(Action.CONNECT, _S.CONNECTED, why="the frontend has written its rings")
_FOLLOW = Step(Action.DISCONNECT, _S.CLOSING, why="the frontend closes")
_LET_GO = Step(Action.DISCONNECT, why="the frontend closes")
_CLOSE = Step(Action.DISCONNECT, _S.CLOSED, why="the frontend has closed")
_GONE = Step(Action.DISCONNECT, _S.CLOSED, why="the frontend has vanished")
_ANEW = Step(
    Action.DISCONNECT,
    _S.CLOSED,
    why="another kernel took over (kexec, boot loader) without closing",
)

STEPS: Final[dict[tuple[XenbusState, XenbusState], Step]] = {
    # (ours, the frontend's)
    (_S.INIT_WAIT, _S.INITIALISED): _MEET,
    (_S.INIT_WAIT, _S.CONNECTED): _MEET,
    (_S.INIT_WAIT, _S.CLOSING): _FOLLOW,
    (_S.INIT_WAIT, _S.CLOSED): _CLOSE,
    (_S.INITIALISED, _S.UNKNOWN): _GONE,
    (_S.INITIALISED, _S.INITIALISING): _ANEW,
    (_S.INITIALISED, _S.INITIALISED): _MEET,
    (_S.INITIALISED, _S.CONNECTED): _MEET,
    (_S.INITIALISED, _S.CLOSING): _FOLLOW,
    (_S.INITIALISED, _S.CLOSED): _CLOSE,
    (_S.CONNECTED, _S.UNKNOWN): _GONE,
    (_S.CONNECTED, _S.INITIALISING): _ANEW,
    (_S.CONNECTED, _S.INITIALISED): _MEET,
    (_S.CONNECTED, _S.CONNECTED): _MEET,
    (_S.CONNECTED, _S.CLOSING): _FOLLOW,
    (_S.CONNECTED, _S.CLOSED): _CLOSE,
    (_S.CLOSING, _S.UNKNOWN): _GONE,
    (_S.CLOSING, _S.INITIALISING): _ANEW,
    (_S.CLOSING, _S.CLOSING): _LET_GO,
    (_S.CLOSING, _S.CLOSED): _CLOSE,
    (_S.CLOSED, _S.INITIALISING): Step(
        Action.PUBLISH, _S.INIT_WAIT, needs_online=True, why="the next kernel starts"
    ),
    (_S.CLOSED, _S.INITIALISED): Step(
        Action.CONNECT, _S.CONNECTED, needs_online=True, why="the frontend reconnects at once"
    ),
    (_S.CLOSED, _S.CLOSING): _LET_GO,
    (_S.CLOSED, _S.CLOSED): Step(Action.DISCONNECT, why="the frontend has closed"),
}
"""What is not here changes nothing.  States 0 and 1 of ours are the toolstack's: it attaches."""


def step(ours: XenbusState, theirs: XenbusState, *, online: bool) -> Step:
    """What to do now."""
    found = STEPS.get((ours, theirs), STAY)
    return STAY if found.needs_online and not online else found

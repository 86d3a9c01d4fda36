"""A device without an open disk: refused, failed or detached.  Only ever towards Closed."""

from __future__ import annotations

from xbd.core.backend.bell import Bell
from xbd.core.backend.keys import OwnKeys
from xbd.core.backend.node import Node
from xbd.core.backend.outcome import NEW, Outcome
from xbd.core.blkif.state import XenbusState

_WAITING = (XenbusState.INITIALISED, XenbusState.CONNECTED)
_NOT_CLOSED = (*_WAITING, XenbusState.CLOSING)
OPEN_STATES = (XenbusState.INIT_WAIT, XenbusState.INITIALISED, XenbusState.CONNECTED)


def refused_state(ours: XenbusState) -> XenbusState:
    """Our state when the disk could not be opened.

    InitWait in an attach: libxl waits for it before it looks for the error.
    """
    if ours in (*NEW, XenbusState.INIT_WAIT):
        return XenbusState.INIT_WAIT
    return XenbusState.CLOSING if ours in OPEN_STATES else XenbusState.CLOSED


def failed_state(ours: XenbusState) -> XenbusState:
    """Our state when an open disk is closed because of an error."""
    return XenbusState.CLOSING if ours in OPEN_STATES else ours


def next_state(own: OwnKeys, theirs: XenbusState | None) -> XenbusState:
    """Our state after a look at both sides."""
    ours = own.state
    if ours is XenbusState.INIT_WAIT:
        # As long as libxl waits for it, or its script is about to tell the reason, it stays.
        told = own.script_done or not own.script
        return XenbusState.CLOSING if theirs in _WAITING and told else ours
    if ours is XenbusState.CLOSING:
        return ours if theirs in _NOT_CLOSED and own.online else XenbusState.CLOSED
    return ours


async def serve_without_disk(node: Node, bell: Bell, *, retry: bool) -> Outcome:
    """Answer toolstack and guest as far as that goes without a disk.

    `retry`: end with AGAIN when the guest begins anew.
    """
    bell.ring()
    while True:
        await bell.wait()
        if bell.stopping:
            return Outcome.STOPPED
        own = await node.look_again()
        if own is None:
            return Outcome.VANISHED
        if own.state in NEW:
            return Outcome.RENEWED
        theirs = await node.frontend_state(own)
        begins_anew = own.online and theirs is XenbusState.INITIALISING
        if retry and begins_anew and own.state is XenbusState.CLOSED:
            return Outcome.AGAIN
        await node.switch(own.state, next_state(own, theirs))

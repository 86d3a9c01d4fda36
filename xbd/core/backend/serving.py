"""A device whose disk is open: connect, disconnect, publish anew, until somebody ends it.

What to do is the table in `xbd.core.blkif.state`; here is how.
"""

from __future__ import annotations

import sys

import attrs
import trio

from xbd.core.backend.bell import Bell, Pace
from xbd.core.backend.diagnostics import Diagnostics
from xbd.core.backend.keys import OwnKeys
from xbd.core.backend.link import Link
from xbd.core.backend.node import Node
from xbd.core.backend.outcome import NEW, Outcome
from xbd.core.backend.policy import OnStop, Policy
from xbd.core.blkif.state import Action, XenbusState, step
from xbd.core.datapath.disk import Disk
from xbd.core.errors import BadNegotiation, GrantFailed, PortFailed, StoreLost

_CLOSING = (XenbusState.UNKNOWN, XenbusState.CLOSING, XenbusState.CLOSED)
_RETRY_SECONDS = 0.1
_RETRIES_SECONDS = 10.0


@attrs.define(eq=False, kw_only=True)
class Serving:
    """One opened disk and its frontend."""

    node: Node
    disk: Disk
    link: Link
    bell: Bell
    policy: Policy
    diagnostics: Diagnostics
    pace: Pace
    """Of connects: a guest that connects and closes for ever must not keep the daemon busy."""
    _retry_until: float | None = attrs.field(default=None, init=False)

    async def run(self) -> Outcome:
        """Follow the two states.  Raises what closes the device."""
        while True:
            await self.bell.wait()
            try:
                if self.bell.stopping:
                    return await self._stop()
                outcome = await self._look()
            except StoreLost:
                continue  # the watches fire when it is back, and the guest's requests go on
            if outcome is not None:
                return outcome

    async def _look(self) -> Outcome | None:
        if self.link.failure is not None:
            raise self.link.failure
        own = await self.node.look_again()
        if own is None:
            await self._disconnect()
            return Outcome.VANISHED
        if own.state in NEW:
            await self._disconnect()
            return Outcome.RENEWED
        theirs = await self.node.frontend_state(own)
        return await self._take(own, theirs) if theirs is not None else None

    # -- steps ------------------------------------------------------------------------------

    async def _take(self, own: OwnKeys, theirs: XenbusState) -> Outcome | None:
        """The next step of the table."""
        ours = own.state
        detached = not own.online and ours in (XenbusState.CLOSING, XenbusState.CLOSED)
        if detached and not self.link.connected and theirs is not XenbusState.CLOSING:
            return Outcome.DETACHED
        if ours is XenbusState.INIT_WAIT and self._held(own):
            return None
        todo = step(ours, theirs, online=own.online)
        if todo.action is Action.CONNECT:
            if not await self._meet(own, theirs):
                return None
        elif todo.action is Action.DISCONNECT:
            await self._disconnect()
        elif todo.action is Action.PUBLISH:
            assert todo.next is not None, "features are only published with a state"
            await self.node.publish(own, self.disk, todo.next)
            self.bell.ring()
            return None
        if detached and todo.next is XenbusState.CLOSED:
            return Outcome.DETACHED  # which closes the disk before the toolstack sees Closed
        if todo.next not in (None, ours):
            # If the toolstack was faster, its own event rings the bell.
            await self.node.switch(ours, todo.next)
            self.bell.ring()
        return None

    def _held(self, own: OwnKeys) -> bool:
        """Whether libxl may still be waiting to see InitWait, and nothing later."""
        if not own.script or own.script_done:
            return False
        # NetBSD's libxl runs scripts for vbd alone, so there is nothing to wait for.
        return not (sys.platform.startswith("netbsd") and self.node.device.kind != "vbd")

    async def _meet(self, own: OwnKeys, theirs: XenbusState) -> bool:
        """The frontend has written its keys; False: they are not to be used."""
        try:
            frontend = await self.node.read_frontend(own, features=self.disk.features)
        except BadNegotiation:
            if self.link.connected and theirs is XenbusState.CONNECTED:
                return False  # it works, and only scribbles
            raise
        if frontend == self.link.frontend:
            return True
        if self.link.connected:
            # A guest that was suspended comes with new rings and never closes the old ones.
            await self._disconnect()
        await self.pace.wait()
        try:
            self.link.connect(frontend)
        except (GrantFailed, PortFailed):
            if own.state is not XenbusState.CONNECTED or self._tried_long_enough():
                raise
            self.link.look_again(_RETRY_SECONDS)
            return False
        self.diagnostics.connected(frontend, self.disk.describe())
        if own.state is XenbusState.CONNECTED and theirs is XenbusState.INITIALISED:
            # The guest waits for a Connected that we have written long ago.
            await self.node.repeat(XenbusState.CONNECTED)
        return True

    def _tried_long_enough(self) -> bool:
        """Connecting to a guest that another daemon has left connected may take a while.

        Its event channel is bound until that process is wholly gone, and on the embedded host
        the guest has yet to hand its memory to us.
        """
        now = trio.current_time()
        if self._retry_until is None:
            self._retry_until = now + _RETRIES_SECONDS
        return now > self._retry_until

    async def _disconnect(self) -> None:
        if not self.link.connected:
            return
        if not await self.link.drain(self.policy.limits.drain_seconds):
            self.diagnostics.stuck(self.policy.limits.drain_seconds)
        self.diagnostics.disconnected()

    # -- the end ----------------------------------------------------------------------------

    async def _stop(self) -> Outcome:
        """The daemon stops: close, or leave everything for the next daemon."""
        if self.link.connected and self.policy.on_stop is OnStop.CLOSE:
            if self.disk.paused:
                self.disk.resume()  # what the guest still has to write
            with trio.move_on_after(self.policy.limits.frontend_seconds):
                await self._ask_to_close()
        was_connected = self.link.connected
        await self._disconnect()
        if was_connected and self.policy.on_stop is OnStop.CLOSE:
            await self._close_for_good()
        return Outcome.STOPPED

    async def _ask_to_close(self) -> None:
        """State Closing; the guest may still write what it has until it closes too."""
        asked = False
        while self.link.connected:
            own = await self.node.look_again()
            if own is None:
                await self.link.abandon()
                return
            if not asked:
                asked = await self.node.switch(own.state, XenbusState.CLOSING)
            elif await self.node.frontend_state(own) in _CLOSING:
                return
            await self.bell.wait()

    async def _close_for_good(self) -> None:
        own = await self.node.look_again()
        if own is not None:
            await self.node.switch(own.state, XenbusState.CLOSED)

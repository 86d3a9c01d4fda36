"""The disk that an HVM guest sees until its own drivers run: QEMU emulates it, from ours by NBD.

libxl (Xen 4.19 and newer, for ``backendtype=tap`` with a script) has the guest's QEMU open
``nbd+unix:///?socket=PATH`` if the script left PATH in physical-device-path.  A guest unplugs the
emulated disk before its frontend connects, so nothing here keeps the two apart: both go through
one `DeviceAccess`, and a guest that uses both at once harms its own data alone.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import trio

from xbd.core.backend.diagnostics import Diagnostics
from xbd.core.backend.failure import worst
from xbd.core.backend.keys import OwnKeys
from xbd.core.driver import DeviceAccess
from xbd.core.nbd import Export, NbdServer, SocketUnavailable, listening

EMULATED_KIND: Final = "vbd3"
"""Of ``backendtype=tap``; with other kinds QEMU would take physical-device-path for an image."""


def may_be_emulated(kind: str, own: OwnKeys) -> bool:
    """Whether libxl can have QEMU emulate this disk.

    A read-only one only as a SCSI disk: for others libxl would refuse to start the guest.
    """
    return kind == EMULATED_KIND and (own.writable or own.dev.startswith("sd"))


@attrs.frozen
class Emulation:
    """A disk that QEMU may emulate."""

    path: Path
    """The socket."""
    _server: NbdServer

    @property
    def busy(self) -> bool:
        """Whether QEMU uses it now."""
        return self._server.busy


@asynccontextmanager
async def emulated(
    access: DeviceAccess, path: Path, diagnostics: Diagnostics, *, drain_seconds: float
) -> AsyncIterator[Emulation | None]:
    """Serve the disk to QEMU at `path` meanwhile.

    None: it is not served, because of what the log says.  Whatever goes wrong with QEMU is logged,
    and the guest's own drivers go on.  At the end, requests that were taken have `drain_seconds`
    to finish.
    """
    with ExitStack() as stack:
        try:
            listener = stack.enter_context(listening(path))
        except SocketUnavailable as error:
            diagnostics.not_emulated(error)
            yield None
            return
        server = NbdServer(Export(access=access))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, server, listener, diagnostics)
            yield Emulation(path, server)
            server.stop()
            nursery.cancel_scope.deadline = trio.current_time() + drain_seconds
            nursery.cancel_scope.shield = True


async def _serve(server: NbdServer, listener: socket.socket, diagnostics: Diagnostics) -> None:
    try:
        await server.run([listener])
    except* Exception as errors:
        diagnostics.not_emulated(worst(errors))

"""NBD server: disks for clients of the Network Block Device protocol.

The protocol's document is doc/proto.md of https://github.com/NetworkBlockDevice/nbd.

``server = await nursery.start(serve_nbd, access, path)`` serves a disk until ``server.stop()``.
"""

from xbd.core.hostio.listen import SocketUnavailable, listening
from xbd.core.nbd.export import Export
from xbd.core.nbd.limits import Limits
from xbd.core.nbd.server import NbdServer, serve_nbd

__all__ = ["Export", "Limits", "NbdServer", "SocketUnavailable", "listening", "serve_nbd"]

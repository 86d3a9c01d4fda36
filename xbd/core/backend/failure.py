"""Telling the toolstack what went wrong, and judging what an error means for a device."""

from __future__ import annotations

import time
from collections.abc import Iterator

import attrs

from xbd.core.backend.diagnostics import error_number, one_line
from xbd.core.backend.identity import DeviceId
from xbd.core.errors import Disposition, StoreLost, XbdError
from xbd.core.xenstore.base import StoreReader

STATUS_KEY = "xbd-status"
"""``open`` or ``error``; the hotplug script reads it once it is run."""
ERROR_KEY = "xbd-error"
"""With ``error``: one line for the administrator."""
NBD_KEY = "xbd-nbd"
"""With ``open``, for HVM guests: the socket from which QEMU can emulate the disk; the script makes
it known to libxl."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The plain exceptions inside of exception groups."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def _rank(error: BaseException) -> int:
    if isinstance(error, XbdError):
        return int(error.disposition)
    return int(Disposition.CLOSE_DEVICE)


def worst(error: BaseException) -> BaseException:
    """Of several errors the one to act on: the greatest disposition, bugs before known errors."""
    return max(leaves(error), key=lambda leaf: (_rank(leaf), not isinstance(leaf, XbdError)))


def stops_daemon(error: BaseException) -> bool:
    """Whether nothing can be served any more."""
    return _rank(error) >= Disposition.STOP_DAEMON


def is_store_lost(error: BaseException) -> bool:
    """Whether only the connection to XenStore broke, which comes back by itself."""
    return all(isinstance(leaf, StoreLost) for leaf in leaves(error))


def error_node(device: DeviceId, base: str) -> str:
    """Where Linux's xenbus_dev_error puts a device's last error."""
    return f"{base}/error/{device.node}/error"


def for_store(error: BaseException) -> str:
    """An error's line in the characters that XenStore allows for everyone."""
    return one_line(error).encode("ascii", "backslashreplace").decode("ascii")


async def write_error_node(
    tree: StoreReader, device: DeviceId, base: str, error: BaseException
) -> None:
    """As xenbus_dev_fatal does: the errno, a blank, the line."""
    await tree.write(error_node(device, base), f"{error_number(error)} {for_store(error)}")


async def clear_error_node(tree: StoreReader, device: DeviceId, base: str) -> None:
    """Remove the error and the directories that are empty without it."""
    path = f"{base}/error/{device.node}"
    if await tree.directory(path) is None:
        return
    await tree.remove(path)
    for _ in range(device.node.count("/")):
        path = path.rpartition("/")[0]
        if await tree.directory(path):
            return
        await tree.remove(path)


@attrs.define
class FailureBudget:
    """How often a device may fail in a while before it stays closed."""

    failures: int
    window_seconds: float
    _times: list[float] = attrs.field(factory=list, init=False)

    def spend(self) -> bool:
        """Note one failure; False: that was one too many."""
        now = time.monotonic()
        self._times = [at for at in self._times if now - at <= self.window_seconds]
        self._times.append(now)
        return len(self._times) <= self.failures

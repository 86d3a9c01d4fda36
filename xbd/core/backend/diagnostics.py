"""What a device says in the log: xbdback(4)'s three diagnostics, and everything about its end.

Lines that the toolstack causes are always written; those that a guest can cause are limited per
domain, whatever the number of its disks.
"""

from __future__ import annotations

import errno
from typing import Any

import attrs
import structlog

from xbd.core.backend.identity import DeviceId
from xbd.core.backend.vdev import vdev_name
from xbd.core.datapath.config import FrontendConfig
from xbd.core.driver import Geometry
from xbd.core.errors import DriverError, XbdError
from xbd.core.ratelimit import RateLimit
from xbd.core.units import Domid

_BURST = 20
_BURST_SECONDS = 10.0


class DomainLimits:
    """One rate limit for each domain that has disks."""

    def __init__(self) -> None:
        self._limits: dict[Domid, RateLimit] = {}

    def of(self, domid: Domid) -> RateLimit:
        return self._limits.setdefault(domid, RateLimit(burst=_BURST, seconds=_BURST_SECONDS))

    def forget(self, domid: Domid) -> None:
        """The domain has no disks any more."""
        self._limits.pop(domid, None)


def one_line(error: BaseException) -> str:
    """An error's text, on one line and not too long for a XenStore value."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:500]}..."


def error_number(error: BaseException) -> int:
    """The errno that describes an error best, as xenbus error nodes begin with one."""
    if isinstance(error, DriverError):
        return error.errno
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return errno.EINVAL if isinstance(error, XbdError) else errno.EIO


@attrs.frozen
class Diagnostics:
    """The log of one device."""

    device: DeviceId
    limit: RateLimit
    _log: Any = attrs.field(factory=lambda: structlog.get_logger("xbd.backend"))

    def attached(self, disk: str, geometry: Geometry, *, writable: bool) -> None:
        mode = "" if writable else ", read-only"
        self._always(
            f"attach device {disk} (size {geometry.size // 512} sectors of 512 bytes{mode})"
            f" for domain {self.device.domid}"
        )

    def open_failed(self, error: BaseException) -> None:
        """Its text names the disk, says why, and what to do."""
        text = one_line(error)
        if isinstance(error, DriverError) and f"errno {error.errno}" not in text:
            text += f" (errno {error.errno}, {errno.errorcode.get(error.errno, 'unknown')})"
        if isinstance(error, XbdError):
            self._write("error", text)
        else:
            self._bug("cannot open the disk after an internal error", error)

    def not_emulated(self, error: BaseException) -> None:
        """QEMU can't have the disk; the guest's own drivers can."""
        text = f"no emulated disk, only the guest's own drivers find it: {one_line(error)}"
        if isinstance(error, XbdError):
            self._limited("warning", text)
        else:
            self._bug(text, error)

    def connected(self, frontend: FrontendConfig, how: str | None) -> None:
        ports = ",".join(str(queue.event_channel) for queue in frontend.queues)
        devid = self.device.devid
        self._limited(
            "info",
            f"connect identifier {devid} ({vdev_name(devid)}) of domain {frontend.domid} using"
            f" event channel {ports}, protocol {frontend.abi.protocol},"
            f" rings of {1 << frontend.ring_order} page(s), data path {how}",
        )

    def disconnected(self) -> None:
        self._limited("info", "disconnect")

    def detached(self, why: str) -> None:
        self._always(f"detach device: {why}")

    def stuck(self, seconds: float) -> None:
        self._write(
            "error",
            f"storage did not finish in {seconds:.0f} s; requests in flight are abandoned",
        )

    def failed(self, error: BaseException) -> None:
        """The device is being closed.  An error that is not ours is a bug: with its traceback."""
        if isinstance(error, XbdError):
            self._limited("error", f"closing the device: {one_line(error)}")
        else:
            self._bug("closing the device after an internal error", error)

    def _bug(self, what: str, error: BaseException) -> None:
        self._log.error(
            f"{what}: {one_line(error)}",
            device=self.device.name,
            domain=self.device.domid,
            exc_info=error,
        )

    def worn_out(self, failures: int, seconds: float) -> None:
        self._write(
            "error",
            f"failed more than {failures} times in {seconds:.0f} s;"
            " it stays closed until it is attached again",
        )

    def note(self, text: str) -> None:
        """Something that a guest caused and that harms nobody."""
        self._limited("info", text)

    def _always(self, text: str) -> None:
        self._write("info", text)

    def _limited(self, level: str, text: str) -> None:
        held = self.limit.allows()
        if held is not None:
            more = f" ({held} lines about this domain were suppressed)" if held else ""
            self._write(level, text + more)

    def _write(self, level: str, text: str) -> None:
        getattr(self._log, level)(text, device=self.device.name, domain=self.device.domid)

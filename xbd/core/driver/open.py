"""Opening a disk: from its text to a `DeviceAccess`, and closing it again."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs

from xbd.core.driver.access import DeviceAccess
from xbd.core.driver.api import BlockDevice, Claims, Concurrency, DriverDescriptor, OpenContext
from xbd.core.driver.failures import open_error, request_error
from xbd.core.driver.options import parse_options
from xbd.core.driver.spec import DiskSpec
from xbd.core.errors import ConfigError, DeviceBroken, DriverError, OpenFailed, OptionError
from xbd.core.hostio.workers import Workers

_log = logging.getLogger(__name__)

DeviceMaker = Callable[[OpenContext], AbstractAsyncContextManager[BlockDevice]]
"""A driver's `open` that knows its options already."""

BLOCKING_THREADS: Final = 8
"""Threads that one PARALLEL device may occupy; a SERIAL one has 1."""


def open_disk(
    spec: DiskSpec, *, device_id: str, writable: bool, image_dirs: Sequence[Path] = ()
) -> AbstractAsyncContextManager[DeviceAccess]:
    """Load the driver and check its options, at once; then open the disk, and close it at the end.

    Raises `ConfigError` (no such driver, bad options) or `OpenFailed`, each one line for an
    administrator.
    """
    # Not at the top: finding drivers costs an import that tools without disks don't need.
    from xbd.core.driver.registry import load_driver

    return open_with(
        load_driver(spec.driver),
        spec,
        device_id=device_id,
        writable=writable,
        image_dirs=image_dirs,
    )


def open_with(
    descriptor: DriverDescriptor[Any],
    spec: DiskSpec,
    *,
    device_id: str,
    writable: bool,
    image_dirs: Sequence[Path] = (),
) -> AbstractAsyncContextManager[DeviceAccess]:
    """As `open_disk`, with a driver that needs no entry point (`spec.driver` is not looked at)."""
    try:
        options = parse_options(descriptor.options, spec.texts())
    except OptionError as error:
        raise OptionError(f"disk {spec}: {error}") from error
    return open_device(
        lambda context: descriptor.open(context, options),
        name=str(spec),
        concurrency=descriptor.concurrency,
        device_id=device_id,
        writable=writable,
        image_dirs=image_dirs,
    )


@asynccontextmanager
async def open_device(
    make: DeviceMaker,
    *,
    name: str,
    concurrency: Concurrency,
    device_id: str,
    writable: bool,
    image_dirs: Sequence[Path] = (),
) -> AsyncIterator[DeviceAccess]:
    """As `open_disk`, with a function that opens the device; `name` is for error texts."""
    session = _Session(name, device_id)
    # So many at a time for each: one guest's dead storage must not take the others' threads.
    workers = Workers(1 if concurrency is Concurrency.SERIAL else BLOCKING_THREADS, device_id)
    context = OpenContext(
        device_id=device_id,
        writable=writable,
        run_blocking=workers.run,
        invalidate=session.invalidate,
        image_dirs=tuple(image_dirs),
        claims=session.claims,
    )
    try:
        async with make(context) as device:
            session.access = DeviceAccess(
                device, device_id=device_id, concurrency=concurrency, writable=writable
            )
            try:
                yield session.access
            except Exception as error:
                # The user's own trouble.  It does not go through the driver's context, whose
                # nursery would wrap it in a group, and whose errors are handled differently.
                session.users_error = error
            finally:
                await session.close()
    except ConfigError:
        raise
    except Exception as error:
        session.driver_failed(error)
    if session.users_error is not None:
        raise session.users_error


@attrs.define
class _Session:
    """One disk between the beginning of its opening and the end of its closing."""

    disk: str
    device_id: str
    access: DeviceAccess | None = None
    users_error: Exception | None = None

    async def invalidate(self, offset: int, length: int) -> None:
        if self.access is not None:
            await self.access.invalidate(offset, length)

    def claims(self) -> Claims | None:
        return None if self.access is None else self.access.claims

    async def close(self) -> None:
        assert self.access is not None
        try:
            await self.access.aclose()
        except DriverError as error:
            if self.users_error is None:
                raise
            _log.error("%s: %s", self.device_id, error)

    def driver_failed(self, error: Exception) -> None:
        """The driver's context raised: while opening, from its own tasks, or while closing."""
        known = (
            open_error(self.disk, error)
            if self.access is None
            else request_error(f"{self.device_id}: {self.disk}", error)
        )
        if known is None:
            _log.error("%s: bug in the driver of %s", self.device_id, self.disk, exc_info=error)
            known = self._bug(error)
        if self.users_error is None:
            if known is error:
                raise error
            raise known from error
        _log.error("%s: %s", self.device_id, known)

    def _bug(self, error: Exception) -> DriverError:
        text = f"{self.disk}: bug in the driver: {type(error).__name__}: {error}"
        if self.access is None:
            return OpenFailed(f"cannot open {text}", errno=errno.EIO)
        return DeviceBroken(f"{self.device_id}: {text}", errno=errno.EIO)

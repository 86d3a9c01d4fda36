"""Finding drivers: any installed package may offer one as an entry point in ``xbd.drivers``.

Only the driver asked for is imported, so that a broken one does not disturb its neighbours.

stevedore keeps a cache of entry points in ``$XDG_CACHE_HOME/python-entrypoints``, by default
below ``~/.cache``.  A daemon without a home directory should have XDG_CACHE_HOME point to its
runtime directory, or to one with ``python-entrypoints/.disable`` in it, which stops the writing.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterable
from typing import Any

import attrs
from stevedore.driver import DriverManager

from xbd.core.driver.api import API_VERSION, ENTRY_POINT_GROUP, Capability, DriverDescriptor
from xbd.core.driver.options import check_options_class
from xbd.core.driver.spec import DRIVER_NAME
from xbd.core.errors import (
    ConfigError,
    DriverApiMismatch,
    DriverConflict,
    DriverLoadError,
    DriverNotFound,
    OptionError,
)


@attrs.frozen(kw_only=True)
class DriverInfo:
    """What is known about an installed driver, usable or not."""

    name: str
    package: str
    """The distribution that offers it; several, if they conflict."""
    version: str
    target: str
    """``module:object`` of the entry point."""
    summary: str = ""
    capabilities: Capability = Capability.NONE
    error: str | None = None
    """Why it can't be used, in one line; None: it can."""


@functools.cache
def load_driver(name: str) -> DriverDescriptor[Any]:
    """Import the driver `name` and check that it fits.

    Raises `DriverNotFound`, `DriverConflict`, `DriverApiMismatch` or `DriverLoadError`.
    """
    found = _entry_points()
    if name not in found:
        raise _not_found(name, found)
    # Before anything is imported: stevedore would import all of them to complain about two.
    if len(found[name]) > 1:
        claims = " and ".join(f"{_package(entry)} ({entry.value})" for entry in found[name])
        raise DriverConflict(f"driver {name!r} is offered by {claims}: uninstall one")
    return check_descriptor(name, _import(name))


def list_drivers() -> list[DriverInfo]:
    """All installed drivers by name.  Imports each; what goes wrong is in `DriverInfo.error`."""
    return [_info(name, entries) for name, entries in sorted(_entry_points().items())]


def driver_info(name: str) -> DriverInfo:
    """What is known about one driver; raises `DriverNotFound`."""
    found = _entry_points()
    if name not in found:
        raise _not_found(name, found)
    return _info(name, found[name])


def _info(name: str, entries: list[importlib.metadata.EntryPoint]) -> DriverInfo:
    about = DriverInfo(
        name=name,
        package=", ".join(_package(entry) for entry in entries),
        version=", ".join(entry.dist.version if entry.dist else "?" for entry in entries),
        target=", ".join(entry.value for entry in entries),
    )
    try:
        driver = load_driver(name)
    except ConfigError as error:
        return attrs.evolve(about, error=str(error))
    return attrs.evolve(about, summary=driver.summary, capabilities=driver.capabilities)


def _not_found(name: str, found: Iterable[str]) -> DriverNotFound:
    known = ", ".join(sorted(found)) or "none"
    return DriverNotFound(f"there is no driver {name!r} (installed: {known})")


def _entry_points() -> dict[str, list[importlib.metadata.EntryPoint]]:
    by_name: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        by_name.setdefault(entry.name, []).append(entry)
    return {name: sorted(entries, key=_package) for name, entries in by_name.items()}


def _package(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else "?"


def _import(name: str) -> Any:
    try:
        manager = DriverManager(
            ENTRY_POINT_GROUP,
            name,
            invoke_on_load=False,
            on_load_failure_callback=_raise_load_error,
        )
    except DriverLoadError:
        raise
    except (Exception, SystemExit) as error:
        raise DriverLoadError(f"driver {name!r} can't be loaded: {_one_line(error)}") from error
    return manager.driver


def _raise_load_error(_manager: Any, entry: Any, error: BaseException) -> None:
    raise DriverLoadError(
        f"driver {entry.name!r} can't be loaded from {entry.value}: {_one_line(error)}"
    ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def check_descriptor(name: str, found: object) -> DriverDescriptor[Any]:
    """`found`, if it is a driver of that name for this version of xbd.

    Raises `DriverLoadError` or `DriverApiMismatch`.
    """
    what = f"driver {name!r}"
    if not isinstance(found, DriverDescriptor):
        raise DriverLoadError(f"{what}: {type(found).__name__} is not a DriverDescriptor")
    if not DRIVER_NAME.fullmatch(name):
        raise DriverLoadError(f"{what}: a name is lower case letters, digits and '-'")
    if found.name != name:
        raise DriverLoadError(f"{what}: the driver calls itself {found.name!r}")
    if not _fits(found.api_version):
        ours = ".".join(map(str, API_VERSION))
        raise DriverApiMismatch(
            f"{what} was written for driver interface {_version(found.api_version)}, "
            f"this xbd has {ours}: install matching versions"
        )
    try:
        check_options_class(found.options)
    except OptionError as error:
        raise DriverLoadError(f"{what}: {error}") from error
    return found


def _fits(version: object) -> bool:
    match version:
        case (int(major), int(minor)):
            return major == API_VERSION[0] and minor <= API_VERSION[1]
        case _:
            return False


def _version(version: object) -> str:
    return ".".join(map(str, version)) if isinstance(version, tuple) else repr(version)

"""What an administrator decides about disks; the configuration file fills it in."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import attrs

from xbd.core.datapath.config import DataPath, GrantMode
from xbd.core.datapath.pages.budget import DOMAIN_PAGES


def between(low: float, high: float) -> Any:
    """An attrs validator for numbers; its error names the attribute."""

    def check(_instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
        if not low <= value <= high:
            raise ValueError(f"{attribute.name}: {value} is not between {low} and {high}")

    return check


class OnStop(enum.Enum):
    """What happens to connected disks when the daemon is told to stop."""

    CLOSE = "close"
    """Frontends are asked to close; guests lose the disks."""
    KEEP = "keep"
    """Requests are finished and the disks stay connected in XenStore: guests wait for the next
    daemon and never notice."""


@attrs.frozen(kw_only=True)
class Limits:
    """``[limits]``: what one guest or one stuck disk can cost."""

    disks_per_domain: int = attrs.field(default=64, validator=between(1, 4096))
    pages_per_domain: int = attrs.field(default=DOMAIN_PAGES, validator=between(0, 1 << 20))
    """Pages of one guest that are mapped or bounced at a time, beyond 264 for each ring."""
    drain_seconds: float = attrs.field(default=20.0, validator=between(0, 3600))
    """How long a closing disk waits for requests that storage has not finished."""
    frontend_seconds: float = attrs.field(default=10.0, validator=between(0, 3600))
    """How long a stopping daemon waits for guests to close their disks."""
    failures: int = attrs.field(default=5, validator=between(0, 1000))
    """A disk that fails more often than this ..."""
    failure_window_seconds: float = attrs.field(default=600.0, validator=between(1, 86400))
    """... in this time stays closed until the toolstack attaches it again."""


@attrs.frozen(kw_only=True)
class FeatureToggles:
    """``[features]``: what guests are offered, where the disk can do it."""

    flush: bool = True
    barrier: bool = True
    discard: bool = True
    persistent: bool = True
    """Persistent grants; never offered when grants are copied or mapped per request."""
    max_indirect_segments: int = attrs.field(default=256, validator=between(0, 4096))
    max_ring_page_order: int = attrs.field(default=4, validator=between(0, 5))
    max_queues: int = attrs.field(default=4, validator=between(1, 32))


@attrs.frozen(kw_only=True)
class Policy:
    """Everything a device needs to know beyond its own directory."""

    grants: GrantMode = GrantMode.AUTO
    datapath: DataPath = DataPath.AUTO
    io_threads: int = 0
    """Of the native data path; 0: by the number of CPUs."""
    spin_us: int = -1
    """How long one of them looks for work before it sleeps; -1: 50, and 0 with a single CPU."""
    journal_dir: Path | None = None
    image_dirs: tuple[Path, ...] = ()
    on_stop: OnStop = OnStop.CLOSE
    nbd_dir: Path | None = None
    """Where HVM guests' disks have sockets for QEMU; None: they are not emulated."""
    limits: Limits = attrs.field(factory=Limits)
    features: FeatureToggles = attrs.field(factory=FeatureToggles)

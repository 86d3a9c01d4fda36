"""The I/O threads that all disks of a process share, and how many pages they may map."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol
from weakref import WeakValueDictionary

from xbd.core.datapath.config import DataPath
from xbd.core.datapath.native import ffi, lib, why_not
from xbd.core.datapath.pages.budget import DOMAIN_PAGES
from xbd.core.errors import ConfigError

HOST_PAGES: Final = 200_000
"""Pages mapped at a time beyond the rings' reserves, all guests together: Xen has room for 262,144
mappings of a backend domain."""
MAX_SPIN_US: Final = 50
"""How long a thread looks for work before it sleeps, where it has a CPU to do so on."""
_MAX_THREADS: Final = 4
_MOST_EVENTS: Final = 64


class HasPages(Protocol):
    """What `Policy.limits` tells."""

    @property
    def pages_per_domain(self) -> int: ...


class ThreadsPolicy(Protocol):
    """What `Policy` tells."""

    @property
    def datapath(self) -> DataPath: ...

    @property
    def io_threads(self) -> int: ...

    @property
    def spin_us(self) -> int: ...

    @property
    def limits(self) -> HasPages: ...


@contextmanager
def start_threads(policy: ThreadsPolicy) -> Iterator[NativeThreads | None]:
    """The threads that are wanted; None: disks are served in Python.

    Raises `ConfigError` when the native data path is insisted on and can't be had.
    """
    check_data_path(policy.datapath)
    if policy.datapath is DataPath.PYTHON or why_not is not None:
        yield None
        return
    threads = NativeThreads(
        policy.io_threads, policy.spin_us, domain_pages=policy.limits.pages_per_domain
    )
    try:
        yield threads
    finally:
        threads.close()


def check_data_path(wanted: DataPath) -> None:
    """Raises `ConfigError` when the native one is insisted on, and there is none."""
    if wanted is DataPath.NATIVE and why_not is not None:
        raise ConfigError(
            f'datapath = "native" is not possible: {why_not}; install xbd again with a C '
            'compiler, or set datapath = "auto"'
        )


def describe_threads(threads: NativeThreads | None, wanted: DataPath) -> str:
    """Which data path new connections use, and why; for people."""
    if threads is not None:
        return threads.describe()
    return "python (as configured)" if wanted is DataPath.PYTHON else f"python ({why_not})"


class Budget:
    """Of one domain, or of the host."""

    def __init__(self, parent: Budget | None, pages: int) -> None:
        self.parent = parent
        made = lib.xbd_budget_new(ffi.NULL if parent is None else parent.handle, pages)
        if made == ffi.NULL:
            raise MemoryError
        self.handle: Any = ffi.gc(made, lib.xbd_budget_free)

    @property
    def left(self) -> int:
        """Pages that can be taken now."""
        left: int = lib.xbd_budget_left(self.handle)
        return left


class NativeThreads:
    """Started when they are made."""

    def __init__(
        self,
        count: int = 0,
        spin_us: int = -1,
        *,
        domain_pages: int = DOMAIN_PAGES,
        engine: str = "",
    ) -> None:
        """`count` 0: by the number of CPUs; `spin_us` -1: none where there is only one CPU.

        `engine`: "uring" or "preadv"; empty: io_uring where the kernel has it.
        """
        cpus = len(os.sched_getaffinity(0))
        self.count = count or min(_MAX_THREADS, max(1, cpus // 2))
        self.spin_us = spin_us if spin_us >= 0 else (MAX_SPIN_US if cpus > 1 else 0)
        choice = getattr(lib, f"XBD_ENGINE_{engine.upper() or 'AUTO'}")
        handle = lib.xbd_threads_start(self.count, self.spin_us, choice)
        if handle == ffi.NULL:
            raise ConfigError(f"the I/O threads can't be started: {os.strerror(ffi.errno)}")
        self.handle: Any = handle
        self.engine: str = ffi.string(lib.xbd_threads_engine(handle)).decode()
        self.events: Any = ffi.new("struct xbd_event[]", _MOST_EVENTS)
        """Where the connections fetch their events, each before it waits for anything."""
        self._host = Budget(None, HOST_PAGES)
        self._domain_pages = domain_pages
        self._domains: WeakValueDictionary[int, Budget] = WeakValueDictionary()
        self._abandoned = 0

    def budget_of(self, domid: int) -> Budget:
        """The domain's budget, the same one while anybody holds it."""
        budget = self._domains.get(domid)
        if budget is None:
            budget = self._domains[domid] = Budget(self._host, self._domain_pages)
        return budget

    @property
    def pages_left(self) -> int:
        """Pages that can be mapped beyond the rings' reserves."""
        return self._host.left

    def abandon(self) -> None:
        """A connection has not ended: the threads have to outlive it."""
        self._abandoned += 1

    def take_back(self) -> None:
        """It has ended after all."""
        self._abandoned -= 1

    def close(self) -> None:
        """When no connection is left.  Waits for the threads' end."""
        handle, self.handle = self.handle, None
        if handle is not None and not self._abandoned:
            lib.xbd_threads_stop(handle)

    def describe(self) -> str:
        """For people."""
        return f"native ({self.engine}, {self.count} thread{'s' if self.count > 1 else ''})"

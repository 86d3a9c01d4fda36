"""The daemon: puts the rooms together, and ends them in order.

It serves real guests through Xen's libraries, or, with a directory for the embedded host, other
processes as guests.  Above `Host` nothing knows which.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import sdnotify
import structlog
import trio

from xbd import __version__
from xbd.config import Config
from xbd.core.backend.device import Services
from xbd.core.backend.failure import worst
from xbd.core.backend.orders import ORDERS, carry_out
from xbd.core.backend.report import describe_device
from xbd.core.backend.supervisor import Supervisor
from xbd.core.control import SOCKET_NAME
from xbd.core.control.server import Handler, serve
from xbd.core.datapath.native.threads import NativeThreads, describe_threads, start_threads
from xbd.core.errors import ConfigError
from xbd.core.hypervisor import Hypervisor
from xbd.core.xenstore.server import EmbeddedXenStore
from xbd.hosts import Host, bury_guests, embedded_host, own_directory, xen_host

_STOP_SLACK_SECONDS: Final = 10.0
"""What a stop may take beyond the limits for frontends and storage."""

_GC_THRESHOLD: Final = 20_000
"""Objects more than were freed, before young ones are looked through."""

_log = structlog.get_logger("xbd.daemon")


async def run_daemon(config: Config, *, embedded: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends it at once.

    Raises `ConfigError` if it can't begin, `HypervisorLost` or `StoreLost` if it can't go on.
    """
    if embedded is not None:
        config = _for_embedded(config, embedded)
    if config.backend.journal_dir is not None:
        _make_directory("journal directory", config.backend.journal_dir)
    if config.backend.nbd_dir is not None:
        _make_directory("NBD directory", config.backend.nbd_dir)
    opening = xen_host(config) if embedded is None else embedded_host(embedded)
    try:
        async with opening as host:
            await Daemon(config, host).run()
            _report_leaks(host.hypervisor)
    except Exception as error:
        raise worst(error) from None


def _for_embedded(config: Config, directory: Path) -> Config:
    """Everything that the daemon makes lies in the embedded host's directory."""
    return attrs.evolve(
        config,
        backend=attrs.evolve(
            config.backend, journal_dir=directory / "journal", nbd_dir=directory / "nbd"
        ),
        control=attrs.evolve(config.control, socket=directory / SOCKET_NAME),
    )


def _make_directory(what: str, directory: Path) -> None:
    """Make it for us alone unless it is there; raises `ConfigError` if it can't be used."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {what} {directory}: {error.strerror}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"no permission to write to {what} {directory}")


def _report_leaks(hypervisor: Hypervisor) -> None:
    if hypervisor.mapped_pages or hypervisor.bound_ports:
        _log.error(
            "guest resources are left over",
            mapped_pages=hypervisor.mapped_pages,
            bound_ports=hypervisor.bound_ports,
        )


async def run_xenstored(directory: Path) -> None:
    """A XenStore by itself, which outlives the daemons that use it.  Until SIGTERM or SIGINT."""
    notifier = sdnotify.SystemdNotifier()
    _make_directory("directory", directory)
    try:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with EmbeddedXenStore.serve(directory):
                _log.info(f"XenStore is served in {directory}")
                notifier.notify("READY=1")
                async for _ in signals:
                    break
    except Exception as error:
        raise worst(error) from None


def _settle_memory() -> None:
    """What is there now stays: looking through it again and again cost 2 % of the data path."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)


class Daemon:
    """Supervisor, control socket and signals on one host."""

    def __init__(self, config: Config, host: Host) -> None:
        self._config = config
        self._host = host
        self._notifier = sdnotify.SystemdNotifier()
        self._started = time.monotonic()
        self._stopping = False
        self._threads: NativeThreads | None = None

    async def run(self) -> None:
        """Until told to stop."""
        store, config = self._host.store, self._config
        base = await own_directory(store, config.store.domid)
        with start_threads(config.policy) as self._threads:
            await self._serve(base)

    async def _serve(self, base: str) -> None:
        store, config = self._host.store, self._config
        services = Services(
            store=store,
            base=base,
            hypervisor=self._host.hypervisor,
            policy=config.policy,
            threads=self._threads,
        )
        supervisor = Supervisor(services, config.backend.kinds)
        supervisor.on_change = lambda: self._status(supervisor)
        async with trio.open_nursery() as nursery:
            await nursery.start(self._signals, supervisor, nursery.cancel_scope)
            await nursery.start(serve, config.control.socket, self._handlers(supervisor))
            if self._host.lost is not None:
                nursery.start_soon(bury_guests, self._host.lost, store, base, config.backend.kinds)
            nursery.start_soon(self._announce, supervisor)
            await supervisor.run()
            nursery.cancel_scope.cancel()
        if self._stopping:
            _log.info("stopped")

    async def _announce(self, supervisor: Supervisor) -> None:
        await supervisor.scanned.wait()
        _settle_memory()
        _log.info(
            f"xbd {__version__} serves {', '.join(self._config.backend.kinds)}",
            hypervisor=self._host.hypervisor.name,
            control=str(self._config.control.socket),
            data_path=describe_threads(self._threads, self._config.backend.datapath),
        )
        self._notifier.notify("READY=1")
        self._status(supervisor)

    def _status(self, supervisor: Supervisor) -> None:
        if not self._stopping:
            domains = {device.domid for device in supervisor.devices}
            count = len(supervisor.devices)
            self._notifier.notify(f"STATUS={count} disks of {len(domains)} domains")

    async def _signals(
        self,
        supervisor: Supervisor,
        everything: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None],
    ) -> None:
        limits = self._config.limits
        bound = limits.frontend_seconds + limits.drain_seconds + _STOP_SLACK_SECONDS
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                if self._stopping:
                    _log.warning("ending at once")
                    everything.cancel()
                    return
                self._stopping = True
                _log.info(f"stopping on {signal.Signals(number).name}")
                self._notifier.notify("STOPPING=1")
                supervisor.stop()
                everything.deadline = trio.current_time() + bound

    # -- control ----------------------------------------------------------------------------

    def _handlers(self, supervisor: Supervisor) -> dict[str, Handler]:
        async def list_devices(_arguments: dict[str, Any]) -> list[dict[str, Any]]:
            return [describe_device(supervisor.devices[key]) for key in sorted(supervisor.devices)]

        config = self._config

        async def status(_arguments: dict[str, Any]) -> dict[str, Any]:
            hypervisor = self._host.hypervisor
            return {
                "version": __version__,
                "pid": os.getpid(),
                "hypervisor": hypervisor.name,
                "data_path": describe_threads(self._threads, config.backend.datapath),
                "kinds": self._config.backend.kinds,
                "devices": len(supervisor.devices),
                "connections": Counter(
                    how
                    for device in supervisor.devices.values()
                    if device.disk is not None and (how := device.disk.describe()) is not None
                ),
                "mapped_pages": hypervisor.mapped_pages,
                "bound_ports": hypervisor.bound_ports,
                "uptime_seconds": round(time.monotonic() - self._started, 3),
                "stopping": self._stopping,
            }

        async def order(name: str, arguments: dict[str, Any]) -> None:
            _log.info(await carry_out(name, supervisor.devices.values(), arguments))

        orders = {name: partial(order, name) for name in ORDERS}
        return {"list": list_devices, "status": status, **orders}

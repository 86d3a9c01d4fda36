"""One device's life, from the toolstack's order to the last unmap.

A device is one task that sleeps until its bell rings, looks at both directories, takes one step,
and looks again until nothing is left to do.  So any number of events is one look, and steps of one
device never overlap.
"""

from __future__ import annotations

from pathlib import Path

import attrs
import trio

from xbd.core.backend.bell import Bell, Pace
from xbd.core.backend.diagnostics import Diagnostics
from xbd.core.backend.diskless import failed_state, refused_state, serve_without_disk
from xbd.core.backend.emulated import Emulation, emulated, may_be_emulated
from xbd.core.backend.failure import FailureBudget, is_store_lost, stops_daemon, worst
from xbd.core.backend.identity import DeviceId
from xbd.core.backend.keys import OwnKeys
from xbd.core.backend.link import Link
from xbd.core.backend.node import Node
from xbd.core.backend.outcome import NEW, Outcome
from xbd.core.backend.policy import Policy
from xbd.core.backend.publish import choose_features
from xbd.core.backend.serving import Serving
from xbd.core.blkif.state import XenbusState
from xbd.core.datapath import Budgets, Disk, FrontendConfig
from xbd.core.datapath.native.threads import NativeThreads
from xbd.core.driver import Capability, DeviceAccess, DiskSpec, open_disk
from xbd.core.errors import ConfigError, StoreError, StoreLost
from xbd.core.hypervisor import Hypervisor
from xbd.core.xenstore.base import Store

_FREE_CONNECTS = 8
_CONNECT_PAUSE_SECONDS = 1.0


def disk_text(own: OwnKeys) -> str:
    """The disk's text, without the format that libxl puts before it."""
    return own.params.removeprefix("aio:")


@attrs.define(eq=False, kw_only=True)
class Services:
    """What all devices share."""

    store: Store
    base: str
    """This domain's directory in XenStore, ``/local/domain/0``."""
    hypervisor: Hypervisor
    policy: Policy
    threads: NativeThreads | None = None
    """Of the native data path; None: disks are served in Python."""
    budgets: Budgets = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.budgets = Budgets(self.policy.limits.pages_per_domain)


class Device:
    """One backend directory and whatever is behind it."""

    def __init__(
        self,
        device: DeviceId,
        services: Services,
        diagnostics: Diagnostics,
        *,
        refusal: ConfigError | None = None,
    ) -> None:
        """`refusal`: a reason not to open the disk at all."""
        self.id = device
        self.disk: Disk | None = None
        self.last_error: str | None = None
        self._services = services
        self._policy = services.policy
        self._diagnostics = diagnostics
        self._refusal = refusal
        self._node = Node(services.store, services.base, device)
        self._bell = Bell()
        self._emulation: Emulation | None = None
        self._pace = Pace(_FREE_CONNECTS, _CONNECT_PAUSE_SECONDS)
        limits = services.policy.limits
        self._budget = FailureBudget(limits.failures, limits.failure_window_seconds)

    @property
    def own(self) -> OwnKeys | None:
        """Our directory as it was seen last."""
        return self._node.own

    @property
    def frontend_state(self) -> XenbusState | None:
        """The guest's state as it was seen last."""
        return self._node.theirs

    @property
    def frontend(self) -> FrontendConfig | None:
        """What the connected frontend chose; None while there is none."""
        connection = self.disk.connection if self.disk is not None else None
        return connection.frontend if connection is not None else None

    @property
    def nbd(self) -> Path | None:
        """The socket from which QEMU can emulate the disk."""
        return self._emulation.path if self._emulation is not None else None

    @property
    def emulating(self) -> bool:
        """Whether QEMU does so now."""
        return self._emulation is not None and self._emulation.busy

    @property
    def drain_seconds(self) -> float:
        """How long to wait for requests that storage has not finished."""
        return self._policy.limits.drain_seconds

    async def announce_size(self) -> None:
        """The disk has another size: tell the frontend."""
        if self.disk is not None:
            await self._node.announce_size(self.disk.access.geometry)

    def ring(self) -> None:
        """Something may have changed."""
        self._bell.ring()

    def stop(self) -> None:
        """Let `run` end, in the way that the policy wants."""
        self._bell.ring_for_stop()

    async def run(self) -> None:
        """Until the directory has vanished or the daemon stops.  Raises what stops the daemon."""
        while not self._bell.stopping:
            try:
                own = await self._node.read()
            except StoreLost:
                await self._bell.wait()
                continue
            if own is not None:
                await self._incarnation(own)
            elif self.last_error is not None:
                await self._forget_error()
            elif not self._bell.take():
                break  # and nothing can happen between this look and the end

    async def _forget_error(self) -> None:
        self.last_error = None
        try:
            await self._node.forget()
        except (StoreError, StoreLost) as error:
            self._diagnostics.note(f"cannot remove its error node: {error}")

    async def _incarnation(self, own: OwnKeys) -> Outcome:
        """From one attach by the toolstack to its end."""
        async with self._node.listen_to_frontend(own, self._bell.ring):
            outcome = await self._live(own)
        if outcome is not Outcome.AGAIN:
            self._diagnostics.detached(outcome.value)
        return outcome

    async def _live(self, own: OwnKeys) -> Outcome:
        self._bell.ring()
        try:
            if own.online or own.state not in (XenbusState.CLOSING, XenbusState.CLOSED):
                outcome = await self._with_disk(own)
                if outcome is not Outcome.DETACHED:
                    return outcome
            return await self._without_disk(retry=False)
        except Exception as error:
            return await self._failed(worst(error))

    async def _failed(self, error: BaseException) -> Outcome:
        """Close the device because of an error; serve it again if the guest tries again."""
        if stops_daemon(error):
            raise error
        if is_store_lost(error):
            return Outcome.AGAIN
        self._diagnostics.failed(error)
        self.last_error = str(error)
        retry = self._may_fail_again()
        try:
            own = await self._node.read()
            if own is not None:
                await self._node.fail(own.state, error, failed_state(own.state))
            return await self._without_disk(retry=retry)
        except StoreLost:
            return Outcome.AGAIN

    # -- with a disk ------------------------------------------------------------------------

    async def _with_disk(self, own: OwnKeys) -> Outcome:
        is_open = False
        try:
            spec = self._spec(own)
            opening = open_disk(
                spec,
                device_id=self.id.name,
                writable=own.writable,
                image_dirs=self._policy.image_dirs,
            )
            async with opening as access:
                is_open = True
                self._diagnostics.attached(str(spec), access.geometry, writable=own.writable)
                try:
                    return await self._serve(own, access)
                finally:
                    self.disk = self._emulation = None
        except Exception as error:
            if is_open:
                raise
            refusal = worst(error)
        return await self._refuse(own, refusal)

    def _spec(self, own: OwnKeys) -> DiskSpec:
        if self._refusal is not None:
            raise self._refusal
        return DiskSpec.parse(disk_text(own))

    async def _serve(self, own: OwnKeys, access: DeviceAccess) -> Outcome:
        path = await self._nbd_path(own)
        if path is None:
            return await self._serve_guest(own, access)
        emulation = emulated(access, path, self._diagnostics, drain_seconds=self.drain_seconds)
        async with emulation as self._emulation:
            return await self._serve_guest(own, access)

    async def _nbd_path(self, own: OwnKeys) -> Path | None:
        """Where QEMU is to find the disk: the same place after a restart."""
        directory = self._policy.nbd_dir
        if directory is None or not may_be_emulated(self.id.kind, own):
            return None
        return directory / self.id.name if await self._node.is_hvm() else None

    async def _serve_guest(self, own: OwnKeys, access: DeviceAccess) -> Outcome:
        policy = self._policy
        features = choose_features(policy.features, policy.grants, access.capabilities, own)
        self.disk = disk = Disk(
            access,
            name=self.id.name,
            devid=self.id.devid,
            read_only=Capability.WRITE not in access.capabilities,
            features=features,
            hypervisor=self._services.hypervisor,
            grants=policy.grants,
            journal_dir=policy.journal_dir,
            budget=self._services.budgets.of(self.id.domid),
            threads=self._services.threads,
        )
        if own.state in (*NEW, XenbusState.INIT_WAIT):
            new = XenbusState.INIT_WAIT
            if not await self._node.publish(own, disk, new, nbd=self.nbd):
                return Outcome.AGAIN
        async with trio.open_nursery() as nursery:
            link = Link(disk, nursery, self._bell)
            serving = Serving(
                node=self._node,
                disk=disk,
                link=link,
                bell=self._bell,
                policy=policy,
                diagnostics=self._diagnostics,
                pace=self._pace,
            )
            try:
                return await serving.run()
            finally:
                await link.abandon()
                nursery.cancel_scope.cancel()

    # -- without one ------------------------------------------------------------------------

    async def _refuse(self, own: OwnKeys, error: BaseException) -> Outcome:
        """The disk can't be opened: let the toolstack's attach fail with the reason."""
        self._diagnostics.open_failed(error)
        self.last_error = str(error)
        retry = self._may_fail_again()
        if not await self._node.fail(own.state, error, refused_state(own.state)):
            return Outcome.AGAIN
        return await self._without_disk(retry=retry)

    async def _without_disk(self, *, retry: bool) -> Outcome:
        return await serve_without_disk(self._node, self._bell, retry=retry)

    def _may_fail_again(self) -> bool:
        if self._budget.spend():
            return True
        limits = self._policy.limits
        self._diagnostics.worn_out(limits.failures, limits.failure_window_seconds)
        return False

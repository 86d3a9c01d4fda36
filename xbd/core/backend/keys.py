"""Reading a device's two directories in XenStore, bounded and typed.

The backend directory is the toolstack's and trusted; the frontend's is the guest's and hostile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import attrs

from xbd.core.blkif import pick_abi
from xbd.core.blkif.state import XenbusState
from xbd.core.datapath.config import Features, FrontendConfig, QueueConfig
from xbd.core.errors import BadNegotiation, StoreError
from xbd.core.units import Domid, GrantRef, Port
from xbd.core.xenstore.base import StoreReader

_MAX_U32: Final = 0xFFFFFFFF
_SHOWN: Final = 40
"""Characters of a guest's value that a log line or error text may show."""


def shown(value: str) -> str:
    """A guest's string, escaped and cut, fit for a log line."""
    text = ascii(value[: _SHOWN + 1])
    return text if len(value) <= _SHOWN else f"{text[:_SHOWN]}...'"


def parse_u32(text: str) -> int | None:
    """A plain decimal below 2**32, as ``%u`` prints it; None if it is anything else."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    number = int(text)
    return number if number <= _MAX_U32 else None


def parse_state(text: str) -> XenbusState | None:
    """A state; None if it is none of those there are."""
    number = parse_u32(text)
    try:
        return None if number is None else XenbusState(number)
    except ValueError:
        return None


@attrs.frozen(kw_only=True)
class OwnKeys:
    """What the toolstack and its script wrote into the backend directory."""

    frontend: str
    frontend_id: Domid
    state: XenbusState
    online: bool
    params: str
    mode: str
    dev: str
    device_type: str
    script: str
    removable: bool
    discard_enable: bool
    direct_io_safe: bool
    hotplug_status: str
    physical_device_path: str

    @property
    def writable(self) -> bool:
        return self.mode == "w"

    @property
    def script_done(self) -> bool:
        """Whether the toolstack has seen state 2 and gone on (see facts on libxl in docs/xl.md)."""
        return self.hotplug_status == "connected" or bool(self.physical_device_path)


_CHANGING: Final = ("state", "online", "hotplug-status", "physical-device-path")
"""What is written after a device was made; for anything else the toolstack makes it anew."""

_OWN_NAMES: Final = (
    "frontend",
    "frontend-id",
    "params",
    "mode",
    "dev",
    "device-type",
    "script",
    "removable",
    "discard-enable",
    "direct-io-safe",
    *_CHANGING,
)


async def _read_names(store: StoreReader, path: str, names: Sequence[str]) -> dict[str, str | None]:
    values = await store.read_all([f"{path}/{name}" for name in names])
    return dict(zip(names, values, strict=True))


def _changing(values: Mapping[str, str | None]) -> dict[str, Any]:
    """The fields of `OwnKeys` that these are."""
    return {
        "state": parse_state(values["state"] or "") or XenbusState.UNKNOWN,
        "online": values["online"] != "0",
        "hotplug_status": values["hotplug-status"] or "",
        "physical_device_path": values["physical-device-path"] or "",
    }


async def read_again(store: StoreReader, path: str, own: OwnKeys) -> OwnKeys | None:
    """As `read_own`, of what may have changed since then."""
    values = await _read_names(store, path, _CHANGING)
    return None if values["state"] is None else attrs.evolve(own, **_changing(values))


async def read_own(store: StoreReader, path: str) -> OwnKeys | None:
    """The backend directory; None if it is gone (or not whole, which is the same to libxl)."""
    values = await _read_names(store, path, _OWN_NAMES)
    frontend, frontend_id = values["frontend"], parse_u32(values["frontend-id"] or "")
    if frontend is None or frontend_id is None or values["state"] is None:
        return None
    return OwnKeys(
        frontend=frontend,
        frontend_id=Domid(frontend_id),
        params=values["params"] or "",
        mode=values["mode"] or "",
        dev=values["dev"] or "",
        device_type=values["device-type"] or "disk",
        script=values["script"] or "",
        removable=values["removable"] == "1",
        discard_enable=values["discard-enable"] != "0",
        direct_io_safe=values["direct-io-safe"] == "1",
        **_changing(values),
    )


async def read_frontend_state(store: StoreReader, frontend: str) -> XenbusState | None:
    """The frontend's state, Unknown if its directory is gone; None: nothing that means anything."""
    try:
        value = await store.read(f"{frontend}/state")
    except StoreError:
        return None  # a guest may forbid a driver domain to read
    return XenbusState.UNKNOWN if value is None else parse_state(value)


async def read_frontend(
    store: StoreReader, frontend: str, *, domid: Domid, features: Features, machine: str
) -> FrontendConfig:
    """What the frontend chose, checked against what was offered.

    `machine` is this host's (``platform.machine()``), which decides what a frontend means that
    names no protocol.  Raises `BadNegotiation` with one line that names the key.
    """
    keys = _FrontendKeys(store, frontend)
    await keys.fetch(_USUAL)
    protocol = await keys.text("protocol")
    abi = pick_abi(protocol, machine=machine)
    queue_count = await keys.number("multi-queue-num-queues", default=1)
    if not 1 <= queue_count <= features.max_queues:
        raise BadNegotiation(
            f"multi-queue-num-queues is {queue_count}, offered were 1 to {features.max_queues}"
        )
    order = await _ring_order(keys, features.max_ring_order)
    prefixes = [""] if queue_count == 1 else [f"queue-{i}/" for i in range(queue_count)]
    queues = [await _read_queue(keys, prefix, order) for prefix in prefixes]
    _refuse_twins(queues)
    wants_persistent = await keys.number("feature-persistent", default=0) == 1
    return FrontendConfig(
        domid=domid,
        abi=abi,
        ring_order=order or 0,
        queues=tuple(queues),
        persistent=wants_persistent and features.persistent,
    )


_USUAL: Final = (
    "protocol",
    "multi-queue-num-queues",
    "ring-page-order",
    "num-ring-pages",
    "ring-ref",
    "event-channel",
    "feature-persistent",
)
"""What nearly every frontend is asked for."""


class _FrontendKeys:
    """Numbers in a frontend's directory."""

    def __init__(self, store: StoreReader, path: str) -> None:
        self._store = store
        self._path = path
        self._fetched: dict[str, str | None] = {}

    async def fetch(self, names: Sequence[str]) -> None:
        """Read together what is not yet; where that fails, each one tells for itself later."""
        missing = [name for name in names if name not in self._fetched]
        with suppress(StoreError):
            self._fetched |= await _read_names(self._store, self._path, missing)

    async def text(self, name: str) -> str | None:
        if name in self._fetched:
            return self._fetched[name]
        try:
            return await self._store.read(f"{self._path}/{name}")
        except StoreError as error:
            raise BadNegotiation(f"{name} can't be read: {error}") from None

    async def optional(self, name: str) -> int | None:
        text = await self.text(name)
        if text is None:
            return None
        number = parse_u32(text)
        if number is None:
            raise BadNegotiation(f"{name} is {shown(text)}, not a number")
        return number

    async def number(self, name: str, *, default: int | None = None) -> int:
        number = await self.optional(name)
        if number is None:
            if default is None:
                raise BadNegotiation(f"{name} is missing")
            return default
        return number


async def _ring_order(keys: _FrontendKeys, max_order: int) -> int | None:
    """ring-page-order or its legacy twin; None if the ring is one page under the plain name."""
    order = await keys.optional("ring-page-order")
    if order is None:
        pages = await keys.optional("num-ring-pages")
        if pages is None or pages == 1:
            return None
        if pages == 0 or pages & (pages - 1):
            raise BadNegotiation(f"num-ring-pages is {pages}, not a power of two")
        order = pages.bit_length() - 1
    if order > max_order:
        raise BadNegotiation(f"ring-page-order is {order}, offered was {max_order} at most")
    return order


async def _read_queue(keys: _FrontendKeys, prefix: str, order: int | None) -> QueueConfig:
    pages: Sequence[int | str] = [""] if order is None else range(1 << order)
    names = [f"{prefix}ring-ref{page}" for page in pages]
    await keys.fetch([*names, f"{prefix}event-channel"])
    if order == 0:
        refs = [await _first_ref(keys, prefix)]
    else:
        refs = [await keys.number(name) for name in names]
    if len(set(refs)) != len(refs):
        raise BadNegotiation(f"{prefix or 'the ring'} names a page twice")
    port = await keys.number(f"{prefix}event-channel")
    return QueueConfig(ring_refs=tuple(map(GrantRef, refs)), event_channel=Port(port))


async def _first_ref(keys: _FrontendKeys, prefix: str) -> int:
    """Order 0 under the key ring-page-order: ring-ref0 by the book, ring-ref by some frontends."""
    ref = await keys.optional(f"{prefix}ring-ref0")
    return await keys.number(f"{prefix}ring-ref") if ref is None else ref


def _refuse_twins(queues: list[QueueConfig]) -> None:
    """Two rings must not share pages or a port: each would see the other's requests."""
    refs = [ref for queue in queues for ref in queue.ring_refs]
    ports = [queue.event_channel for queue in queues]
    if len(set(refs)) != len(refs) or len(set(ports)) != len(ports):
        raise BadNegotiation("two queues share a ring page or an event channel")

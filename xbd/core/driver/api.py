"""What a storage driver is: everything a driver author implements or is given.

All offsets, lengths and sizes are bytes.  Sectors do not exist here.
"""

from __future__ import annotations

import abc
import enum
from array import array
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

import attrs

from xbd.core.driver.image import ImageFormat
from xbd.core.errors import DriverError

API_VERSION: Final = (1, 1)
"""A driver needs the same major number and at most this minor number."""

ENTRY_POINT_GROUP: Final = "xbd.drivers"

OptionsT = TypeVar("OptionsT")
T = TypeVar("T")


class Capability(enum.Flag):
    """What an opened device can do beyond reading.  Fixed for as long as it is open."""

    NONE = 0
    WRITE = enum.auto()
    FLUSH = enum.auto()
    """`flush` makes finished writes durable.  Without it every write must be durable itself."""
    DISCARD = enum.auto()
    WRITE_ZEROES = enum.auto()
    """`write_zeroes` is cheaper than writing zeroes; without it the core writes zeroes."""
    RESIZE = enum.auto()
    SNAPSHOT = enum.auto()


class Concurrency(enum.Enum):
    """How many calls into one device may be in progress at a time."""

    SERIAL = "serial"
    PARALLEL = "parallel"


@attrs.frozen(kw_only=True)
class Geometry:
    """Sizes of an opened device, in bytes."""

    size: int
    logical_block: int = 512
    """Offsets and lengths of requests are multiples of this; the guest sees it as sector-size."""
    physical_block: int = 512
    request_alignment: int = 1
    """Offsets and lengths of what the driver is called with, and of host I/O through `resolve`,
    are multiples of this; of what is smaller the core makes reads and whole writes."""
    memory_alignment: int = 1
    """Buffer addresses and lengths are multiples of this; the core bounces what is not."""
    discard_granularity: int = 0
    """0: the device's logical block."""
    discard_alignment: int = 0
    max_transfer: int = 1 << 20
    """No readv or writev is longer than this; the core splits."""


@attrs.frozen(kw_only=True)
class Extent:
    """A range of the guest's disk."""

    offset: int
    length: int


@attrs.frozen(kw_only=True)
class HostExtent:
    """Where a range of the guest's disk lies: in the file open as `fd`, from `offset` on."""

    fd: int
    offset: int
    length: int


@attrs.frozen(kw_only=True)
class BlockStatus:
    """What is known of a range of the guest's disk, from where the last one ended."""

    length: int
    hole: bool
    """Nothing is stored for it here."""
    zero: bool
    """It reads as zeroes."""


@attrs.define(eq=False)
class ReadRequest:
    """Buffers for the disk's bytes from `offset` on; what became of them is in `error`."""

    offset: int
    buffers: Sequence[memoryview]
    error: DriverError | None = None
    alone: bool = False
    """Nothing else of this disk is under way: who has some of trio's own time for it, and needs no
    thread, keeps nobody waiting."""


@attrs.define(eq=False)
class WriteRequest:
    """Bytes for the disk at `offset`; what became of them is in `error`."""

    offset: int
    buffers: Sequence[memoryview]
    error: DriverError | None = None


class BlockDevice(abc.ABC):
    """An opened disk.

    The core guarantees: ranges lie inside the size; offsets and lengths are multiples of
    `logical_block`, `request_alignment` and `memory_alignment`, except that the disk's end may cut
    the last block short; buffers meet `memory_alignment`; no method is called without its
    capability; never two calls at once for a SERIAL driver (but `resolve` at any time).

    A method returns when the whole range is done, or raises `DriverError`: there is no short
    transfer.  No buffer may be kept after the return.  When a call is cancelled, buffers must
    not be touched any more once it has raised, by no thread and no kernel: either it waits for
    I/O that cannot be stopped, or it really stops it.
    """

    @property
    @abc.abstractmethod
    def geometry(self) -> Geometry: ...

    @property
    @abc.abstractmethod
    def capabilities(self) -> Capability: ...

    @abc.abstractmethod
    async def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, from `offset` on."""

    async def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write the buffers, one after the other, from `offset` on.

        On return the data is outside this process: it survives the death of the daemon.
        """
        raise NotImplementedError

    @property
    def batching(self) -> bool:
        """Whether there are `read_many` and `write_many`, for requests that arrive together."""
        return False

    async def read_many(self, requests: Sequence[ReadRequest]) -> None:
        """As `readv` of each, in any order; each one's `error` says how it went.

        What this raises is the failure of all of them.
        """
        raise NotImplementedError

    async def write_many(self, requests: Sequence[WriteRequest]) -> None:
        """As `writev` of each, in any order; as `read_many` for the rest."""
        raise NotImplementedError

    async def flush(self) -> None:
        """Make durable all writes, discards and zeroes that returned before this call."""
        raise NotImplementedError

    async def discard(self, extents: Sequence[Extent]) -> None:
        """Drop the content of the extents; what is read there afterwards is not defined."""
        raise NotImplementedError

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make the range read as zeroes; `may_unmap` allows to free the space."""
        raise NotImplementedError

    async def resize(self, size: int) -> Geometry:
        """Change the size; returns the new geometry."""
        raise NotImplementedError

    async def create_snapshot(self, name: str) -> None:
        """Keep, inside the image, the disk as all that has returned before this call left it.

        Nothing is being written, zeroed or discarded, and nothing resolves for writing, until
        this returns; what was resolved before was taken back.
        """
        raise NotImplementedError

    async def block_status(self, offset: int, length: int) -> Sequence[BlockStatus]:
        """What lies in the range: at least its first byte is told of, at most the disk's end.

        A driver that does not know says nothing of holes and zeroes.
        """
        return (BlockStatus(length=length, hole=False, zero=False),)

    def resolve(self, offset: int, length: int, *, for_write: bool) -> Sequence[HostExtent] | None:
        """Where these bytes lie in host files, if they simply lie there.

        No I/O and no waiting.  Extents follow each other and cover at least the first byte of the
        range, at most the device; an answer may reach beyond the range asked for.  None: use the
        async methods.  The core caches answers and does the I/O itself until the driver takes
        them back through `OpenContext.invalidate`; the fds stay open until `aclose`.
        """
        return None

    def zeroes(self, offset: int, length: int) -> int:
        """How many bytes from `offset` on read as zeroes for sure; it may be more than `length`.

        Asked where `resolve` knows nothing for reading, on the same terms: the answer is kept until
        it is taken back.
        """
        return 0

    def can_place(self, offset: int, length: int) -> bool:
        """Whether `place` would have `resolve` know more of this range for writing.

        No I/O and no waiting; it is asked when `resolve` knew less than all of it.
        """
        return False

    async def place(self, extents: Sequence[Extent]) -> None:
        """Find places for what lies nowhere yet: `resolve` knows them for writing on return.

        Nothing that is read changes by that, also if there is a crash at any time until the extents
        are written to, and after it.  They may begin and end anywhere.  What can't be placed
        stays as it is: `writev` is called for that.  No extents: `Claims` run out of places.
        """
        raise NotImplementedError

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Release everything.  Idempotent, called shielded from cancellation, implies no flush."""


class Claims(Protocol):
    """Lets the data path find places for first writes by itself, in tables that a driver lends it.

    For drivers whose tables have an entry of 64 bits, big-endian, for each unit of the disk, and 0
    for those that lie nowhere.  For a write to such a unit, the data path takes one of the places
    supplied, writes its entry to the file, and then to the memory that is lent; from then on
    `resolve` would know it, and reading and writing go there.  Entries reach the file before the
    data, and are not made durable.

    Units that lie nowhere read as zeroes, or else as `resolve` and `zeroes` say for reading: as
    what lies `behind`.  Where that is not zeroes, the data path can copy the rest of the unit, and
    makes entries when all of that is durable.

    Methods may be called in any thread; those that lend wait until an entry that is being
    made is in the host's hands.
    """

    @property
    def largest_copy(self) -> int:
        """Bytes of the largest unit that is copied; 0: there can't be anything `behind`."""

    def begin(
        self,
        fd: int,
        table_fd: int,
        unit: int,
        bits: int,
        *,
        behind: bool = False,
        copying: bool = False,
    ) -> None:
        """Before everything else.  `fd`, `table_fd`: for data and for entries, open until `end`.

        `unit`: bytes, a power of two.  `bits`: what an entry has beside its place.  `behind`: not
        all units that lie nowhere read as zeroes.  `copying`: those are copied, and `fd` is synced,
        whose failures have to be seen by other descriptors of the file as well.
        """

    def lend(self, offset: int, entries: array[int], position: int) -> None:
        """Entries from this offset of the disk on, in the machine's order, and where in the file.

        Until they are taken back the driver only looks at them.  Anybody may stop using what is
        lent at any time: it can be lent again.
        """

    def take_back(self, offset: int) -> None:
        """What was lent from this offset on.  Nothing changes there any more on return."""

    def supply(self, places: Sequence[int]) -> int:
        """More places, each a unit of zeroes in the file that an entry may name at any time.

        How many of them were taken, from the first on.
        """

    @property
    def supplied(self) -> int:
        """How many places are left."""

    def spoilt(self) -> list[int]:
        """Places that were written to, but that no entry names.  Nobody uses them any more."""

    def end(self) -> list[int]:
        """Take everything back; the places that are left."""


BlockingRunner = Callable[..., Awaitable[Any]]
"""``await run_blocking(function, *args)`` runs a blocking call in a thread, limited per device;
it is never abandoned: on cancellation it still waits for the call to end."""


@attrs.frozen(kw_only=True)
class OpenContext:
    """What the core hands to a driver's `open`."""

    device_id: str
    """For logs and error texts, for example ``xbdback3i51712``."""
    writable: bool
    """False: open everything read-only, whatever the options say."""
    run_blocking: BlockingRunner
    invalidate: Callable[[int, int], Awaitable[None]]
    """``await invalidate(offset, length)``: forget answers of `resolve` for this range of the
    guest's disk.  Returns when no I/O through an old answer is in flight any more; it waits for
    nothing else, so it may be awaited inside any method.  From before the call until after it
    `resolve` must not give the old answer any more.  Raises `DeviceBroken` when storage does not
    answer: then the disk is closed, and what lies there must be left alone."""
    image_dirs: Sequence[Path] = ()
    """Directories in which files that an image names may be opened; empty: none."""
    claims: Callable[[], Claims | None] = lambda: None
    """What tables can be lent to, if anything.  For `place`: there is nothing while opening."""


class ProbeScore(enum.IntEnum):
    """How sure a driver is that content is of its format."""

    NO = 0
    MAYBE = 1
    MAGIC = 2


@attrs.frozen(kw_only=True)
class DriverDescriptor(Generic[OptionsT]):
    """A driver's entry point is an instance of this.  Importing it must do no I/O."""

    name: str
    """Equals the entry point's name: lower case, ``[a-z0-9-]``."""
    summary: str
    """One line for ``xbd drivers list``."""
    api_version: tuple[int, int]
    options: type[OptionsT]
    """A frozen attrs class; each field was made by `option()`."""
    concurrency: Concurrency
    capabilities: Capability
    """The most that a device of this driver can do (for listings)."""
    open: Callable[[OpenContext, OptionsT], AbstractAsyncContextManager[BlockDevice]]
    """Opens the disk; raises `OpenFailed` or `ConfigError`.  Leaving the context closes it."""
    probe: Callable[[bytes], ProbeScore] | None = None
    """Given an image's first 64 KiB; pure.  Used for warnings only, never to pick a driver."""
    image_format: Callable[[], ImageFormat] | None = None
    """For drivers of image formats: what ``xbd image`` does to an image that is not in use."""

"""Compressed clusters on their way to those who read them: many at a time, and each only once.

Packed bytes that lie together are read together.  Clusters are unpacked on all CPUs that the
process may use, because a codec gives the GIL up while it works.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Final

import attrs

from xbd.core.driver import DriverError
from xbd.core.driver.buffers import aligned_buffer
from xbd.core.units import KIB, MIB
from xbd.drivers.qcow2.compressed import ClusterCache, Codec
from xbd.drivers.qcow2.errors import CorruptImage
from xbd.drivers.qcow2.host import PAGE, Host, Transfer
from xbd.drivers.qcow2.layout import compressed_extent

_MOST_AT_A_TIME: Final = 4 * MIB
"""Of unpacked bytes: bounds the memory of one call."""

_LONGEST_READ: Final = MIB
_LONGEST_GAP: Final = 4 * KIB
"""Between packed clusters that are read together."""

_LONG: Final = 128 * KIB
"""Who wants so much in a row is on the way through the whole image: the page cache would cost more
than it gives.  Others come back to what lies near."""

_MOST_AT_ONCE: Final = 64 * KIB
"""A cluster that is unpacked without a thread: that takes some 150 us."""

_MOST_THREADS: Final = 4


@attrs.define(eq=False)
class _Job:
    """One cluster to unpack."""

    entry: int
    length: int
    """How much of it is wanted."""
    offset: int
    packed_length: int
    packed: bytes | memoryview | DriverError = b""
    result: bytes | DriverError = b""

    @property
    def end(self) -> int:
        return self.offset + self.packed_length


class Unpacker:
    """The compressed clusters of one image.  Thread-safe."""

    def __init__(
        self, host: Host, cluster_bits: int, clusters: ClusterCache, codec: Callable[[], Codec]
    ) -> None:
        """`codec` makes one, or raises `OpenFailed`."""
        self._host = host
        self._bits = cluster_bits
        self._size = 1 << cluster_bits
        self._clusters = clusters
        self._codec = codec

    def known(self, entry: int, need: int) -> bytes | None:
        """At least the first `need` bytes of the cluster that an L2 entry names, if in memory."""
        data = self._clusters.get(entry)
        return data if data is not None and len(data) >= need else None

    def unpack_at_once(self, entry: int, need: int) -> bytes | None:
        """As `unpack`, for one small cluster whose packed bytes are in the page cache; else None.

        Waits for nothing, and takes as long as a cluster of 64 KiB does at most.
        """
        if self._size > _MOST_AT_ONCE:
            return None
        job = self._job(entry, need, again=self._clusters.get(entry) is not None)
        packed = self._host.read_at_once(job.offset, job.packed_length)
        if packed is None:
            return None
        try:
            data = self._decode(job, packed)
        except DriverError:
            return None  # `unpack` tries again, and says what is wrong
        self._clusters.put(entry, data)
        return data

    def unpack(self, needs: Mapping[int, int]) -> Iterator[tuple[int, bytes | DriverError]]:
        """For each L2 entry at least so many bytes of its cluster, or why not."""
        jobs = []
        for entry, need in needs.items():
            data = self._clusters.get(entry)
            if data is not None and len(data) >= need:
                yield entry, data
            else:
                jobs.append(self._job(entry, need, again=data is not None))
        jobs.sort(key=lambda job: job.offset)
        at_a_time = max(1, _MOST_AT_A_TIME >> self._bits)
        for first in range(0, len(jobs), at_a_time):
            some = jobs[first : first + at_a_time]
            self._read([*_runs(some)])
            _in_parallel(some, self._unpack)
            for job in some:
                if isinstance(job.result, bytes):
                    self._clusters.put(job.entry, job.result)
                yield job.entry, job.result

    def _job(self, entry: int, need: int, *, again: bool) -> _Job:
        offset, packed_length = compressed_extent(entry, self._bits)
        # Who reads something of a cluster at random may never want the rest; who comes again will.
        if again or need > self._size * 3 // 4 or not self._gradual():
            return _Job(entry, self._size, offset, packed_length)
        # Deflate makes nothing longer than this, unless it wants to: then there is a second try.
        return _Job(entry, need, offset, min(packed_length, need + need // 64 + KIB))

    def _gradual(self) -> bool:
        try:
            return self._codec().gradual
        except DriverError:
            return False  # unpacking says what is wrong

    def _read(self, runs: Sequence[Sequence[_Job]]) -> None:
        """Fetch the packed bytes: each run in one piece, all of them side by side."""
        short = [run for run in runs if _length(run) < _LONG]
        self._fetch(short, cached=True)
        self._fetch([run for run in runs if _length(run) >= _LONG], cached=False)

    def _fetch(self, runs: Sequence[Sequence[_Job]], *, cached: bool) -> None:
        # Past the page cache only whole sectors can be read; packed clusters begin anywhere.
        unit = 1 if cached else self._host.alignment.offset
        transfers = [_transfer(run, unit) for run in runs]
        failures = self._host.read_transfers(transfers, cached=cached)
        for run, transfer, failure in zip(runs, transfers, failures, strict=True):
            if failure is None:
                (data,) = transfer.buffers
                for job in run:
                    at = job.offset - transfer.offset
                    job.packed = data[at : at + job.packed_length]
            elif len(run) == 1:
                run[0].packed = failure
            else:
                self._read([[job] for job in run])

    def _unpack(self, job: _Job) -> None:
        if isinstance(job.packed, DriverError):
            job.result = job.packed
            return
        try:
            job.result = self._decode(job, job.packed)
        except CorruptImage as error:
            if job.length < self._size:
                self._unpack_whole(job)
            else:
                offset, _ = compressed_extent(job.entry, self._bits)
                job.result = CorruptImage(f"compressed cluster at {offset:#x}: {error}")
        except DriverError as error:
            job.result = error

    def _decode(self, job: _Job, packed: bytes | memoryview) -> bytes:
        codec = self._codec()
        if job.length < self._size:
            return codec.beginning(packed, job.length)
        return codec.decompress(packed, self._size)

    def _unpack_whole(self, job: _Job) -> None:
        job.length = self._size
        job.offset, job.packed_length = compressed_extent(job.entry, self._bits)
        self._read([[job]])
        self._unpack(job)


def _runs(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Neighbours together."""
    run: list[_Job] = []
    end = 0
    for job in jobs:
        if run and (job.offset > end + _LONGEST_GAP or job.end - run[0].offset > _LONGEST_READ):
            yield run
            run = []
        run.append(job)
        end = max(end, job.end)
    if run:
        yield run


def _length(run: Sequence[_Job]) -> int:
    return max(job.end for job in run) - run[0].offset


def _transfer(run: Sequence[_Job], unit: int) -> Transfer:
    """All of a run, in whole units."""
    start, end = run[0].offset, run[0].offset + _length(run)
    start -= start % unit
    end += -end % unit
    return Transfer(start, [aligned_buffer(end - start, PAGE)])


def _in_parallel(jobs: Sequence[_Job], work: Callable[[_Job], None]) -> None:
    """Work off all jobs, in this thread and, if that pays, in others."""
    rest = deque(jobs)

    def work_off() -> None:
        while True:
            try:
                job = rest.popleft()
            except IndexError:
                return
            work(job)

    helpers = min(_threads(), len(jobs)) - 1
    futures = [_pool().submit(work_off) for _ in range(helpers)]
    work_off()
    for future in futures:
        if not future.cancel():
            future.result()


@cache
def _threads() -> int:
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="qcow2 unpack")

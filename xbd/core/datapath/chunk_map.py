"""Where the chunks of a disk lie in a host file, in eight bytes each.

For disks whose extents are too many to keep one by one: a terabyte in scattered clusters of 64 KiB
has sixteen million of them.
"""

from __future__ import annotations

import contextlib
import mmap
from array import array

from xbd.core.units import PAGE_SIZE

PAGE_SHIFT = 9
PAGE_CHUNKS = 1 << PAGE_SHIFT
"""Chunks whose words are in one page of memory; memory is taken and counted by pages."""
MAX_CHUNKS = 1 << 27
"""Chunks that a map may reach over: with chunks of 64 KiB the first 8 TiB of a disk."""
KNOWN = 1
"""Added to what is kept for a chunk, so that 0 can mean: nothing is known."""

_LEAST_CHUNKS = 1 << 14


class ChunkMap:
    """For each chunk what to add for the host's offset.

    The memory is reserved as far as the disk is used, and taken where something is known.
    """

    def __init__(self, fd: int, shift: int) -> None:
        """`fd`: the host file; `shift`: a chunk has ``1 << shift`` bytes."""
        self.fd = fd
        self.shift = shift
        self._use(memoryview(b"").cast("q"))
        self._pages: dict[int, None] = {}
        """The pages in use, in the order in which they were taken."""

    def _use(self, words: memoryview) -> None:
        self.words = words
        """By chunk: the difference plus KNOWN, or 0.  It may end before the disk does."""
        size = 1 << self.shift
        self.view = (words, self.fd, self.shift, size - 1, size - PAGE_SIZE)
        """For a loop that looks up pages of a guest by itself: `words`, the file, `shift`, the
        bits of an offset within a chunk, and where the last page in a chunk begins."""

    @property
    def pages(self) -> int:
        """How many are in use."""
        return len(self._pages)

    def word(self, chunk: int) -> int:
        """What `words` has for a chunk, wherever that is."""
        return self.words[chunk] if chunk < len(self.words) else 0

    def fill(self, first: int, last: int, delta: int) -> bool:
        """Note it for the chunks from `first` to before `last`; False if there is no room."""
        word = delta + KNOWN
        if not word or not self._reach(last):
            return False
        for page in range(first // PAGE_CHUNKS, -(-last // PAGE_CHUNKS)):
            self._pages.setdefault(page)
        self._set(first, last, word)
        return True

    def clear(self, first: int, last: int) -> None:
        """Forget the chunks from `first` to before `last`."""
        pages = range(first // PAGE_CHUNKS, -(-min(last, len(self.words)) // PAGE_CHUNKS))
        for page in pages if len(pages) < len(self._pages) else list(self._pages):
            if page in self._pages:
                begin = page * PAGE_CHUNKS
                self._set(max(first, begin), min(last, begin + PAGE_CHUNKS), 0)

    def drop(self) -> None:
        """Give back the half of the pages that was taken first."""
        pages = list(self._pages)
        self._pages = dict.fromkeys(pages[len(pages) // 2 + 1 :])
        self._move(len(self.words))

    def _set(self, first: int, last: int, word: int) -> None:
        if last - first == 1:
            self.words[first] = word
        elif first < last:
            self.words[first:last] = memoryview(array("q", [word]) * (last - first))

    def _reach(self, chunks: int) -> bool:
        if chunks <= len(self.words):
            return True
        if chunks > MAX_CHUNKS:
            return False
        try:
            self._move(max(_LEAST_CHUNKS, 1 << (chunks - 1).bit_length()))
        except OSError:  # so much memory can't even be reserved
            return False
        return True

    def _move(self, chunks: int) -> None:
        """Into new memory, which has only the pages in use."""
        memory = mmap.mmap(-1, 8 * chunks, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # Linux, if it was built to have them
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        words = memoryview(memory).cast("q")
        for page in self._pages:
            begin, end = page * PAGE_CHUNKS, (page + 1) * PAGE_CHUNKS
            words[begin:end] = self.words[begin:end]
        self._use(words)

"""A full memory barrier, which Python has no word for.

Rings need one between a store and the load that follows it (ring.h: RING_FINAL_CHECK_FOR_*,
RING_PUSH_*_AND_CHECK_NOTIFY); even x86 reorders those.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
from collections.abc import Callable
from typing import Final

from xbd.core.errors import HypervisorUnavailable

_SEQ_CST: Final = 5  # memory_order_seq_cst of C11
_X86: Final = frozenset({"x86_64", "amd64", "i386", "i486", "i586", "i686", "x86"})


def _libatomic_fence() -> Callable[[], None] | None:
    """C11's atomic_thread_fence; None where libatomic is not installed."""
    try:
        # PyDLL, not CDLL: giving up the GIL here would cost a busy process a thread switch.
        function = ctypes.PyDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int]
    function.restype = None
    return functools.partial(function, _SEQ_CST)


def _lock_fence() -> Callable[[], None]:
    """An uncontended lock: taking it is a LOCK-prefixed instruction, a full barrier on x86 only."""
    lock = threading.Lock()
    acquire, release = lock.acquire, lock.release

    def fence() -> None:
        acquire()
        release()

    return fence


def _refuse(machine: str) -> Callable[[], None]:
    def fence() -> None:
        raise HypervisorUnavailable(
            f"libatomic.so.1 is missing, and {machine} has no other memory barrier for Python: "
            "install the package libatomic1"
        )

    return fence


def choose_fence(machine: str) -> Callable[[], None]:
    """The best barrier for `machine` (as platform.machine() names it)."""
    fence = _libatomic_fence()
    if fence is not None:
        return fence
    return _lock_fence() if machine.lower() in _X86 else _refuse(machine)


full_fence: Final[Callable[[], None]] = choose_fence(platform.machine())
"""No load or store moves across a call of this, in either direction.

Raises `HypervisorUnavailable` where there is none: call it once at start to find out.
"""

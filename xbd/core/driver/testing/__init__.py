"""For tests of drivers, and of what uses them: doubles, faults, and the conformance suite.

``await check_block_device(make, options)`` is a driver's whole test; see docs/driver-authors.md.
"""

from xbd.core.driver.testing.faults import Fault, FaultDevice
from xbd.core.driver.testing.memory import (
    ALL_CAPABILITIES,
    MEMORY,
    MemoryDevice,
    MemoryDisk,
    MemoryOptions,
    memory_driver,
)
from xbd.core.driver.testing.recording import Flush, RecordingDevice, Write, WriteLog
from xbd.core.driver.testing.wrapper import Wrapper

__all__ = [
    "ALL_CAPABILITIES",
    "MEMORY",
    "Fault",
    "FaultDevice",
    "Flush",
    "MemoryDevice",
    "MemoryDisk",
    "MemoryOptions",
    "RecordingDevice",
    "Wrapper",
    "Write",
    "WriteLog",
    "memory_driver",
]

"""For tests of drivers, and of what uses them: doubles, faults, and the conformance suite.

``await check_driver(DRIVER, "name:/path?size=1M")`` or ``await check_block_device(make)`` tests
whether a driver keeps the contract; docs/driver-authors.md shows how.
"""

from xbd.core.driver.testing.conformance import check_block_device, check_driver
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
    "check_block_device",
    "check_driver",
    "memory_driver",
]

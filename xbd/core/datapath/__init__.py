"""Rings in, answers out: the data path in Python, the one that others are compared with."""

from xbd.core.datapath.config import (
    DiskStats,
    Features,
    FrontendConfig,
    GrantMode,
    QueueConfig,
)
from xbd.core.datapath.connection import Connection
from xbd.core.datapath.disk import Disk
from xbd.core.datapath.pages import Budgets

__all__ = [
    "Budgets",
    "Connection",
    "Disk",
    "DiskStats",
    "Features",
    "FrontendConfig",
    "GrantMode",
    "QueueConfig",
]

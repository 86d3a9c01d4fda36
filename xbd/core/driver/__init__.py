"""Public for driver authors: everything a storage driver needs, under one name.

``from xbd.core.driver import ...`` is enough to write a driver; docs/driver-authors.md shows how.
"""

from xbd.core.driver.access import DeviceAccess
from xbd.core.driver.api import (
    API_VERSION,
    ENTRY_POINT_GROUP,
    BlockDevice,
    BlockingRunner,
    BlockStatus,
    Capability,
    Concurrency,
    DriverDescriptor,
    Extent,
    Geometry,
    HostExtent,
    OpenContext,
    ProbeScore,
)
from xbd.core.driver.image import (
    Backing,
    CheckReport,
    ImageFormat,
    ImageInfo,
    MapEntry,
    Progress,
    SnapshotInfo,
)
from xbd.core.driver.open import open_disk, open_with
from xbd.core.driver.options import (
    Converter,
    OptionInfo,
    absolute_path,
    boolean,
    choice,
    option,
    parse_options,
    positive_int,
    size,
    text,
)
from xbd.core.driver.spec import DiskSpec
from xbd.core.errors import (
    ConfigError,
    DeviceBroken,
    DriverError,
    MediaError,
    NoSpace,
    OpenFailed,
    OptionError,
    Unsupported,
)

__all__ = [
    "API_VERSION",
    "ENTRY_POINT_GROUP",
    "Backing",
    "BlockDevice",
    "BlockStatus",
    "BlockingRunner",
    "Capability",
    "CheckReport",
    "Concurrency",
    "ConfigError",
    "Converter",
    "DeviceAccess",
    "DeviceBroken",
    "DiskSpec",
    "DriverDescriptor",
    "DriverError",
    "Extent",
    "Geometry",
    "HostExtent",
    "ImageFormat",
    "ImageInfo",
    "MapEntry",
    "MediaError",
    "NoSpace",
    "OpenContext",
    "OpenFailed",
    "OptionError",
    "OptionInfo",
    "ProbeScore",
    "Progress",
    "SnapshotInfo",
    "Unsupported",
    "absolute_path",
    "boolean",
    "choice",
    "open_disk",
    "open_with",
    "option",
    "parse_options",
    "positive_int",
    "size",
    "text",
]

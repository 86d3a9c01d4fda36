"""Which disk of which guest: names, places in XenStore, and the numbers behind ``xvda``."""

from __future__ import annotations

from typing import Final

import attrs

from xbd.core.units import Domid

_MAX_DOMID: Final = 0x7FEF
"""The highest number of an ordinary domain (DOMID_FIRST_RESERVED - 1, public/xen.h)."""
_MAX_U32: Final = 0xFFFFFFFF


@attrs.frozen(order=True)
class DeviceId:
    """A backend directory, ``<base>/backend/<kind>/<domid>/<devid>``."""

    kind: str
    domid: Domid
    devid: int

    @property
    def name(self) -> str:
        """As xbdback(4) names it, everywhere a person reads."""
        return f"xbdback{self.domid}i{self.devid}"

    @property
    def node(self) -> str:
        """The directory relative to its domain's, as Linux names a xenbus device."""
        return f"backend/{self.kind}/{self.domid}/{self.devid}"

    def path(self, base: str) -> str:
        """The directory, below the backend domain's own (``/local/domain/0``)."""
        return f"{base}/{self.node}"


def parse_domid(text: str) -> Domid | None:
    """A domain's number from a directory's name; None if it is none."""
    number = _plain_number(text)
    return Domid(number) if number is not None and number <= _MAX_DOMID else None


def parse_devid(text: str) -> int | None:
    """A device's number from a directory's name; None if it is none."""
    return _plain_number(text)


def _plain_number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    number = int(text)
    return number if number <= _MAX_U32 and str(number) == text else None

"""Names of devices, and names of directories that are devices."""

from __future__ import annotations

import pytest

from xbd.core.backend.identity import DeviceId, parse_devid, parse_domid
from xbd.core.units import Domid


def test_names():
    device = DeviceId("vbd3", Domid(7), 51712)
    assert device.name == "xbdback7i51712"
    assert device.path("/local/domain/0") == "/local/domain/0/backend/vbd3/7/51712"


@pytest.mark.parametrize("text", ["", "x", "-1", "01", "1 ", "٣", "4294967296", "99999999999"])
def test_what_is_no_number_is_no_device(text):
    assert parse_devid(text) is None
    assert parse_domid(text) is None


def test_reserved_domains_have_no_disks():
    assert parse_domid("32751") == 0x7FEF
    assert parse_domid("32752") is None
    assert parse_devid("4294967295") == 0xFFFFFFFF

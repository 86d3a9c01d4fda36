"""Xen's disk numbers and names, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.backend.vdev import vdev_name, vdev_number

KNOWN = [
    (51712, "xvda"),
    (51713, "xvda1"),
    (51728, "xvdb"),
    (51727, "xvda15"),
    (51712 + 15 * 16, "xvdp"),
    ((1 << 28) | 16 << 8, "xvdq"),
    ((1 << 28) | 16, "xvda16"),
    ((1 << 28) | 26 << 8 | 3, "xvdaa3"),
    (768, "hda"),
    (769, "hda1"),
    (832, "hdb"),
    (5632, "hdc"),
    (5696, "hdd"),
    (2048, "sda"),
    (2064, "sdb"),
    (2049, "sda1"),
]


@pytest.mark.parametrize(("number", "name"), KNOWN)
def test_known_numbers(number, name):
    assert vdev_name(number) == name
    assert vdev_number(name) == number


@pytest.mark.parametrize(
    ("name", "number"),
    [("d0", 51712), ("d0p1", 51713), ("d16", (1 << 28) | 16 << 8), ("51712", 51712)],
)
def test_other_spellings(name, number):
    assert vdev_number(name) == number


@pytest.mark.parametrize(
    "name",
    ["", "xvd", "hde", "hda64", "sdq", "sda16", "xvda256", "xvda0", "vda", "d", "dp1", "xvdé"],
)
def test_no_names_of_disks(name):
    assert vdev_number(name) is None


@pytest.mark.parametrize("number", [0, 1, 999, 3 << 8 | 128, 1 << 29, 0xFFFFFFFF])
def test_a_number_without_a_name_is_shown_as_it_is(number):
    assert vdev_name(number) == str(number)


@given(st.integers(0, 0xFFFFFFFF))
def test_every_name_leads_to_the_same_disk_and_partition(number):
    name = vdev_name(number)
    back = vdev_number(name)
    assert back is not None
    assert vdev_name(back) == name

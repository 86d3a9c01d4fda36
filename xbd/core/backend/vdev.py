"""Xen's numbering of virtual disks, both ways (docs/man/xen-vbd-interface.7 of Xen).

=====================  ===================================================
``1 << 28 | d << 8``   xvd, disk d from 16 or partition from 16, + partition
``202 << 8 | d << 4``  xvd, disks 0 to 15, + partition 0 to 15
``8 << 8 | d << 4``    sd, disks 0 to 15, + partition 0 to 15
``3 << 8 | d << 6``    hd, disks 0 and 1, + partition 0 to 63
``22 << 8 | d << 6``   hd, disks 2 and 3, + partition 0 to 63
=====================  ===================================================
"""

from __future__ import annotations

import re
from typing import Final

_EXTENDED: Final = 1 << 28
_XVD, _SD, _HD_FIRST, _HD_SECOND = 202, 8, 3, 22
_MAX_DISK: Final = (1 << 20) - 1
_MAX_PARTITION: Final = 255
_NAME: Final = re.compile(r"(xvd|sd|hd)([a-z]{1,5})([1-9][0-9]{0,2})?")
_DISK_PARTITION: Final = re.compile(r"d(0|[1-9][0-9]{0,6})(?:p(0|[1-9][0-9]{0,2}))?")


def vdev_name(number: int) -> str:
    """The guest's name for a disk, 51712 -> xvda; the number itself where there is no name."""
    major, minor = number >> 8, number & 0xFF
    if _EXTENDED <= number < 2 * _EXTENDED:
        return _join("xvd", (number - _EXTENDED) >> 8, minor)
    if major == _XVD:
        return _join("xvd", minor >> 4, minor & 15)
    if major == _SD:
        return _join("sd", minor >> 4, minor & 15)
    if major in (_HD_FIRST, _HD_SECOND) and minor < 128:
        first = 0 if major == _HD_FIRST else 2
        return _join("hd", first + (minor >> 6), minor & 63)
    return str(number)


def vdev_number(name: str) -> int | None:
    """The number of ``xvda``, ``hda1``, ``d0p1`` or ``51712``; None if it is no name of a disk."""
    if name.isascii() and name.isdigit() and len(name) <= 10:
        return int(name)
    if match := _DISK_PARTITION.fullmatch(name):
        return _number("xvd", int(match[1]), int(match[2] or 0))
    if match := _NAME.fullmatch(name):
        return _number(match[1], _letters_to_disk(match[2]), int(match[3] or 0))
    return None


def _number(family: str, disk: int, partition: int) -> int | None:
    if family == "xvd":
        if disk < 16 and partition < 16:
            return _XVD << 8 | disk << 4 | partition
        if disk <= _MAX_DISK and partition <= _MAX_PARTITION:
            return _EXTENDED | disk << 8 | partition
    elif family == "sd":
        if disk < 16 and partition < 16:
            return _SD << 8 | disk << 4 | partition
    elif disk < 4 and partition < 64:
        return (_HD_FIRST if disk < 2 else _HD_SECOND) << 8 | (disk & 1) << 6 | partition
    return None


def _join(family: str, disk: int, partition: int) -> str:
    return f"{family}{_disk_to_letters(disk)}{partition or ''}"


def _disk_to_letters(disk: int) -> str:
    """0 -> a, 25 -> z, 26 -> aa: digits of base 26 that have no zero."""
    letters = ""
    disk += 1
    while disk:
        disk, digit = divmod(disk - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return letters


def _letters_to_disk(letters: str) -> int:
    disk = 0
    for letter in letters:
        disk = disk * 26 + ord(letter) - ord("a") + 1
    return disk - 1

"""The table of ``xbd list``."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from xbd.cli.list import human_size, print_devices

DEVICE = {
    "name": "xbdback3i51712",
    "vdev": "xvda",
    "driver": "qcow2",
    "image": "/srv/[bold]evil\x1b[2J.qcow2",
    "size": 1 << 30,
    "mode": "rw",
    "state": "connected",
    "paused": False,
    "protocol": "x86_64-abi",
    "queues": 2,
    "ring_pages": 16,
    "data_path": "python, io_uring, persistent",
    "stats": {"rd_req": 12, "wr_req": 3, "rd_bytes": 49152, "wr_bytes": 0, "errors": 0},
    "last_error": None,
}


def text_of(devices, width=400):
    output = io.StringIO()
    print_devices(Console(file=output, width=width, color_system=None), devices)
    return output.getvalue()


def test_a_connected_disk():
    text = text_of([DEVICE])
    for cell in ("xbdback3i51712", "xvda", "qcow2", "1 GiB", "rw", "x86_64-abi", "2x16", "48 KiB"):
        assert cell in text


def test_a_narrow_terminal_gets_three_tables():
    device = DEVICE | {"image": "/srv/guest.qcow2"}
    wide, narrow = text_of([device]), text_of([device], width=80)
    assert wide.count("xbdback3i51712") == 1
    assert narrow.count("xbdback3i51712") == 3
    assert {*wide.split()} == {*narrow.split()}
    assert max(map(len, narrow.splitlines())) <= 80


def test_empty_columns_are_left_out():
    assert "last error" not in text_of([DEVICE])
    assert "last error" in text_of([DEVICE, DEVICE | {"last_error": "storage is gone"}])


def test_names_are_only_text():
    text = text_of([DEVICE])
    assert "[bold]evil\\x1b[2J.qcow2" in text


def test_a_disk_that_was_refused():
    text = text_of(
        [
            DEVICE
            | {"driver": None, "size": None, "protocol": None, "queues": 0, "data_path": None}
            | {"state": "init_wait", "last_error": "cannot open imagefile:/x: No such file"}
        ]
    )
    assert "cannot open imagefile:/x" in text
    assert "init_wait" in text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1024, "1 KiB"),
        (1023 * 1024, "0.999 MiB"),
        (1536 << 20, "1.5 GiB"),
        (10 << 40, "10 TiB"),
        (5000 << 50, "5e+03 PiB"),
        (None, None),
    ],
)
def test_sizes(size, text):
    assert human_size(size) == text

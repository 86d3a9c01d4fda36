"""What an administrator reads where Xen can't be used."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from xbd.core.errors import HypervisorUnavailable
from xbd.core.hypervisor import xen, xenlibs


@pytest.fixture
def libraries():
    try:
        return xenlibs.XenLibraries()
    except HypervisorUnavailable as error:
        pytest.skip(str(error))


def test_a_missing_library_is_named_with_its_package():
    with pytest.raises(HypervisorUnavailable) as caught:
        xenlibs._open_library("libxennowhere.so.1")
    text = str(caught.value)
    assert text.startswith("libxennowhere.so.1 is missing")
    assert "libxennowhere1" in text
    assert "--embedded" in text
    assert "\n" not in text


@pytest.mark.skipif(Path("/dev/xen/gntdev").exists(), reason="there is a Xen")
def test_without_xen_there_is_one_clear_line(libraries, capfd):
    with pytest.raises(HypervisorUnavailable) as caught:
        xen.XenHypervisor()
    text = str(caught.value)
    assert "/dev/xen/gntdev is missing" in text
    assert "--embedded" in text or "modprobe xen-gntdev" in text
    assert "\n" not in text
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(Path("/dev/xen/evtchn").exists(), reason="there is a Xen")
def test_event_channels_alone_may_be_missing_too(libraries, capfd):
    with pytest.raises(HypervisorUnavailable, match="/dev/xen/evtchn is missing"):
        xen._EvtchnHandle(libraries)
    assert capfd.readouterr() == ("", "")


def test_each_reason_has_its_advice():
    assert "run as root" in str(xen._unavailable("/dev/xen/gntdev", errno.EACCES))
    assert "Too many open files" in str(xen._unavailable("/dev/xen/gntdev", errno.EMFILE))


def test_the_copy_segment_has_the_kernels_layout():
    kind = "xengnttab_grant_copy_segment_t"
    assert xenlibs.ffi.sizeof(kind) == 24
    offsets = [xenlibs.ffi.offsetof(kind, field) for field in ("source", "dest", "len", "status")]
    assert offsets == [0, 8, 16, 20]
    foreign = [xenlibs.ffi.offsetof(kind, "dest", "foreign", name) for name in ("offset", "domid")]
    assert foreign == [12, 14]

"""What is offered follows from the disk, the configuration and the toolstack."""

from __future__ import annotations

import pytest

from xbd.core.backend.keys import OwnKeys
from xbd.core.backend.policy import FeatureToggles
from xbd.core.backend.publish import choose_features, offer
from xbd.core.blkif.state import XenbusState
from xbd.core.datapath.config import Features, GrantMode
from xbd.core.driver import Capability, Geometry
from xbd.core.units import Domid

ALL = Capability.WRITE | Capability.FLUSH | Capability.DISCARD


def own(**keys):
    values = {
        "frontend": "/f",
        "frontend_id": Domid(1),
        "state": XenbusState.INITIALISING,
        "online": True,
        "params": "",
        "mode": "w",
        "dev": "",
        "device_type": "disk",
        "script": "",
        "removable": False,
        "discard_enable": True,
        "direct_io_safe": False,
        "hotplug_status": "",
        "physical_device_path": "",
    }
    return OwnKeys(**(values | keys))


def choose(toggles=None, grants=GrantMode.AUTO, capabilities=ALL, **keys):
    return choose_features(toggles or FeatureToggles(), grants, capabilities, own(**keys))


def test_everything_that_the_disk_can_do():
    features = choose()
    assert features.flush
    assert features.barrier
    assert features.discard
    assert features.persistent
    assert not features.discard_secure


def test_a_disk_that_cannot_flush_is_durable_by_itself():
    features = choose(capabilities=Capability.WRITE)
    assert not features.flush
    assert not features.barrier


@pytest.mark.parametrize(
    "why",
    [
        {"capabilities": Capability.WRITE | Capability.FLUSH},
        {"discard_enable": False},
        {"mode": "r"},
        {"toggles": FeatureToggles(discard=False)},
    ],
)
def test_no_discard(why):
    features = choose(**why)
    assert not features.discard
    assert "discard-granularity" not in offer(
        Geometry(size=1 << 20), features, own(), read_only=False
    )


@pytest.mark.parametrize(
    ("grants", "expected"),
    [
        (GrantMode.AUTO, True),
        (GrantMode.PERSISTENT, True),
        (GrantMode.COPY, False),
        (GrantMode.MAP, False),
    ],
)
def test_persistent_grants_are_not_offered_in_vain(grants, expected):
    """A frontend with persistent grants copies every request; that must have a use."""
    assert choose(grants=grants).persistent is expected


def test_the_keys():
    geometry = Geometry(
        size=8 << 20,
        logical_block=4096,
        physical_block=4096,
        discard_granularity=65536,
        discard_alignment=4096,
    )
    keys = offer(geometry, choose(), own(device_type="cdrom", removable=True), read_only=True)
    assert keys["sectors"] == 16384, "in units of 512 bytes, whatever sector-size is"
    assert keys["sector-size"] == 4096
    assert keys["physical-sector-size"] == 4096
    assert keys["info"] == 1 | 2 | 4
    assert keys["discard-granularity"] == 65536
    assert keys["discard-alignment"] == 4096
    assert keys["discard-secure"] == 0
    assert keys["max-ring-pages"] == 1 << keys["max-ring-page-order"]


def test_features_can_be_switched_off():
    toggles = FeatureToggles(
        flush=False,
        barrier=False,
        discard=False,
        persistent=False,
        max_indirect_segments=0,
        max_ring_page_order=0,
        max_queues=1,
    )
    assert choose(toggles) == Features(
        flush=False,
        barrier=False,
        discard=False,
        persistent=False,
        max_indirect_segments=0,
        max_ring_order=0,
        max_queues=1,
    )

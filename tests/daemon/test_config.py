"""The configuration file: defaults, every section, and one clear line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from xbd.config import Config, load_config, parse_config
from xbd.core.backend.policy import OnStop
from xbd.core.datapath.config import GrantMode
from xbd.core.errors import ConfigError


def test_an_empty_file_gives_the_defaults():
    assert parse_config("", name="x") == Config()


def test_every_section_is_read():
    config = parse_config(
        """
        [store]
        path = "/run/xenstored/socket"
        domid = 3
        [backend]
        kinds = ["vbd3", "vbd"]
        grants = "copy"
        journal_dir = "/run/j"
        image_dirs = ["/srv/images"]
        nbd_dir = "/run/n"
        on_stop = "keep"
        [limits]
        disks_per_domain = 7
        drain_seconds = 3
        [features]
        discard = false
        max_queues = 2
        [control]
        socket = "/run/c.sock"
        [log]
        level = "debug"
        format = "json"
        """,
        name="x",
    )
    assert config.store.path == Path("/run/xenstored/socket")
    assert config.store.domid == 3
    assert config.backend.kinds == ["vbd3", "vbd"]
    assert config.backend.grants is GrantMode.COPY
    assert config.backend.image_dirs == [Path("/srv/images")]
    assert config.backend.on_stop is OnStop.KEEP
    assert config.policy.nbd_dir == Path("/run/n")
    assert config.limits.disks_per_domain == 7
    assert config.limits.drain_seconds == 3.0
    assert config.features.discard is False
    assert config.features.max_queues == 2
    assert config.log.format == "json"


def test_an_empty_path_is_none():
    config = parse_config("[backend]\nnbd_dir = ''\njournal_dir = ''", name="x")
    assert config.backend.nbd_dir is None
    assert config.backend.journal_dir is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[backend]\nkind = ['vbd']", "unknown: backend.kind (known: datapath, grants, image_dirs"),
        ("[frontend]\n", "unknown: frontend (known: backend, control,"),
        ("kinds = 3", "kinds stands outside of a [section]"),
        ("[backend]\nkinds = 'vbd'", "backend.kinds: 'vbd' is not a list"),
        ("[backend]\nkinds = []", "backend.kinds: at least one kind"),
        ("[backend]\nkinds = ['../x']", "backend.kinds: '../x' is not a kind of backend"),
        ("[backend]\nkinds = [3]", "backend.kinds: 3 is not text"),
        ("[backend]\ngrants = 'steal'", "backend.grants: 'steal' is not one of: auto, persistent"),
        ("[backend]\ndatapath = 'rust'", "'rust' is not one of: auto, native, python"),
        ("[backend]\nio_threads = 65", "backend.io_threads: 65 is not between 0 and 64"),
        ("[backend]\nspin_us = 5000", "backend.spin_us: 5000 is not between -1 and 1000"),
        ("[backend]\non_stop = 'crash'", "backend.on_stop: 'crash' is not one of: close, keep"),
        ("[backend]\nimage_dirs = ['srv']", "backend.image_dirs: 'srv' is not an absolute path"),
        ("[backend]\nnbd_dir = 'nbd'", "backend.nbd_dir: 'nbd' is not an absolute path"),
        (
            "[backend]\nnbd_dir = '/run/a,b'",
            "backend.nbd_dir: '/run/a,b' has other characters than",
        ),
        ("[store]\npath = 'xenstored'", "store.path: 'xenstored' is not an absolute path"),
        ("[store]\npath = 5", "store.path: 5 is not a path"),
        ("[features]\nflush = 'no'", "features.flush: 'no' is not true or false"),
        ("[features]\nflush = 1", "features.flush: 1 is not true or false"),
        ("[features]\nmax_queues = 0", "features.max_queues: 0 is not between 1 and 32"),
        ("[features]\nmax_queues = '2'", "features.max_queues: '2' is not a whole number"),
        ("[limits]\ndrain_seconds = 'long'", "limits.drain_seconds: 'long' is not a number"),
        ("[limits]\ndisks_per_domain = true", "True is not a whole number"),
        ("[log]\nlevel = 'loud'", "log.level: 'loud' is not one of: debug, info"),
        ("[log", "not valid TOML"),
    ],
)
def test_a_mistake_is_one_clear_line(text, expected):
    with pytest.raises(ConfigError) as caught:
        parse_config(text, name="xbd.toml")
    line = str(caught.value)
    assert line.startswith("xbd.toml: ")
    assert expected in line
    assert "\n" not in line


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config("[log]\nlevel = 'loud'\n[features]\nflush = 3", name="x")
    assert "log.level" in str(caught.value)
    assert "features.flush" in str(caught.value)


def test_an_unreadable_file_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(tmp_path / "binary.toml")

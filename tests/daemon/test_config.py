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
    assert config.limits.disks_per_domain == 7
    assert config.limits.drain_seconds == 3.0
    assert config.features.discard is False
    assert config.features.max_queues == 2
    assert config.log.format == "json"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[backend]\nkind = ['vbd']", "unknown: backend.kind (known: grants, image_dirs"),
        ("[frontend]\n", "unknown: frontend (known: backend, control,"),
        ("kinds = 3", "kinds stands outside of a [section]"),
        ("[backend]\nkinds = 'vbd'", "backend.kinds: 'vbd' is not a list"),
        ("[backend]\nkinds = []", "at least one kind"),
        ("[backend]\nkinds = ['../x']", "'../x' is not a kind of backend"),
        ("[backend]\nkinds = [3]", "backend.kinds: 3 is not text"),
        ("[backend]\ngrants = 'steal'", "backend.grants: 'steal' is not one of: auto, persistent"),
        ("[backend]\non_stop = 'crash'", "backend.on_stop: 'crash' is not one of: close, keep"),
        ("[backend]\nimage_dirs = ['srv']", "'srv' is not an absolute path"),
        ("[store]\npath = 'xenstored'", "'xenstored' is not an absolute path"),
        ("[store]\npath = 5", "store.path: 5 is not a path"),
        ("[features]\nflush = 'no'", "features.flush: 'no' is not true or false"),
        ("[features]\nflush = 1", "features.flush: 1 is not true or false"),
        ("[features]\nmax_queues = 0", "0 is not between 1 and 32"),
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

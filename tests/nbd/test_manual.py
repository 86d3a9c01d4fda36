"""docs/nbd.md shows what runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from export_process import SECONDS

from xbd.cli import main
from xbd.core.nbd import Limits
from xbd.core.units import MIB

MANUAL = (Path(__file__).parents[2] / "docs" / "nbd.md").read_text()
SHOWN = re.findall(r"<!-- in bash -->\n```console\n(.*?)```\n", MANUAL, re.DOTALL)


def test_the_examples_run_word_for_word(tmp_path: Path) -> None:
    for program in ("bash", "nbdinfo", "nbdcopy", "qemu-img", "qemu-io"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    assert len(SHOWN) == 2
    for directory in ("srv", "run", "bin"):
        (tmp_path / directory).mkdir()
    command = tmp_path / "bin" / "xbd"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m xbd "$@"\n')
    command.chmod(0o755)
    text = "".join(SHOWN)
    text = text.replace("/srv/", f"{tmp_path}/srv/").replace("/run/", f"{tmp_path}/run/")
    script = "".join(f"{line[2:]}\n" for line in text.splitlines() if line.startswith("$ "))
    expected = [line for line in text.splitlines() if not line.startswith("$ ")]
    done = subprocess.run(
        ["bash", "-euc", f"PATH={tmp_path}/bin:$PATH\n{script}"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert expected
    for line in expected:
        assert line in done.stdout.splitlines()
    content = (tmp_path / "srv" / "backup.img").read_bytes()
    assert content[MIB : MIB + 65536] == b"\7" * 65536
    assert not list((tmp_path / "run").iterdir())


def test_every_option_is_explained() -> None:
    text = CliRunner().invoke(main, ["export", "--help"]).output
    options = set(re.findall(r"--[a-z-]+", text)) - {"--help"}
    table = MANUAL[MANUAL.index("## Options") : MANUAL.index("## What to know")]
    assert options == set(re.findall(r"^\| `(--[a-z-]+)", table, re.MULTILINE))


def test_the_limits_are_those_of_the_program() -> None:
    limits = Limits()
    words = " ".join(MANUAL.split())
    assert f"{limits.connections} clients; each may have {limits.requests} requests" in words
    assert f"and {limits.connection_bytes // MIB} MiB in flight" in words
    assert f"all together {limits.export_bytes // MIB} MiB" in words
    assert f"at least {limits.reserved_bytes // MIB} MiB" in words
    assert f"in {limits.negotiation_seconds:.0f} seconds" in words
    assert limits.farewell_seconds == 30

"""``xbd demo`` as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

import pytest

DEMO = [sys.executable, "-m", "xbd", "demo"]


@pytest.fixture
def home(tmp_path):
    """An environment whose temporary files can be looked at."""
    # A socket's path is short: pytest's own directory is too long for one.
    with tempfile.TemporaryDirectory(prefix="d", dir="/tmp") as short:
        yield {**os.environ, "TMPDIR": short, "COLUMNS": "200"}
        assert os.listdir(short) == []  # noqa: PTH208


def test_every_byte_comes_back_right(home):
    done = subprocess.run(
        [*DEMO, "--size", "2"], env=home, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "bytes came back right" in done.stdout
    for name in ("xbdback1i51712", "xbdback3i51712", "imagefile", "As the guests saw it"):
        assert name in done.stdout
    assert done.stderr == ""


def test_sigterm_cleans_up(home):
    with subprocess.Popen(
        [*DEMO, "--size", "64"],
        env=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors


def test_a_wrong_size_is_one_line(home):
    done = subprocess.run(
        [*DEMO, "--size", "0"], env=home, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr

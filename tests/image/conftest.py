"""For the commands that work on images."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from image_world import Run

from xbd.cli import main


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def image(place: Path) -> Run:
    """Runs ``xbd image``: returns what it prints, or with ``code=`` what it complains of."""

    def run(*words: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, ["image", *words])
        told = (result.stdout, result.stderr)
        assert result.exit_code == code, (told, result.exception)
        if code:
            assert "Traceback" not in result.stderr
            return result.stderr
        assert result.stderr == ""
        return result.stdout

    return run


@pytest.fixture
def qemu(place: Path) -> Run:
    """Runs one of QEMU's commands."""
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img")

    def run(*words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        assert "failed" not in done.stdout
        return done.stdout

    return run

"""The command as a whole: errors are one line, exit codes tell, imports stay lazy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner, Result

import xbd.cli
from xbd import __version__
from xbd.cli import SUBCOMMANDS, Subcommand, main
from xbd.core.errors import ConfigError, HypervisorUnavailable, OpenFailed

raised: list[BaseException] = []


@click.command()
def failing() -> None:
    """Raise what the test wants raised."""
    raise raised[0]


@pytest.fixture(autouse=True)
def _failing_command(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(xbd.cli.SUBCOMMANDS, "failing", Subcommand(f"{__name__}:failing", ""))
    yield
    raised.clear()


def run(error: BaseException) -> Result:
    raised.append(error)
    sys.modules.setdefault(__name__, sys.modules[failing.callback.__module__])  # type: ignore[union-attr]
    return CliRunner().invoke(main, ["failing"])


@pytest.mark.parametrize(
    ("error", "lines", "code"),
    [
        (ConfigError("no such option"), "xbd: no such option\n", 2),
        (HypervisorUnavailable("no Xen"), "xbd: no Xen\n", 1),
        (OpenFailed("in use"), "xbd: in use\n", 1),
        (ExceptionGroup("x", [ConfigError("a"), ExceptionGroup("y", [ConfigError("b")])]), None, 2),
        (KeyboardInterrupt(), "", 130),
        (BaseExceptionGroup("x", [KeyboardInterrupt(), ValueError()]), "", 130),
    ],
)
def test_errors_end_in_a_line_and_a_code(
    error: BaseException, lines: str | None, code: int
) -> None:
    result = run(error)
    assert result.exit_code == code
    assert result.stderr == ("xbd: a\nxbd: b\n" if lines is None else lines)


@pytest.mark.parametrize("error", [ValueError("x"), ExceptionGroup("x", [ValueError("x")])])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    assert run(error).exception is error


def test_version_and_help() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"xbd {__version__}\n"
    text = CliRunner().invoke(main, ["--help"]).output
    for name in SUBCOMMANDS:
        assert name in text


@pytest.mark.parametrize("name", [name for name in SUBCOMMANDS if name != "failing"])
def test_every_subcommand_is_where_the_table_says(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.name == name
    assert command.get_short_help_str(200) != ""


def test_an_unknown_subcommand_is_refused() -> None:
    assert CliRunner().invoke(main, ["nosuch"]).exit_code == 2


def test_help_imports_no_subcommand_and_nothing_slow() -> None:
    code = (
        "import sys\nfrom xbd.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "slow = {'trio', 'rich', 'stevedore', 'structlog', 'cattrs', 'xbd.cli.drivers'}\n"
        "sys.exit(str(slow & set(sys.modules)) if slow & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr

"""Log lines: for terminals, for journald, as JSON; never more than text."""

from __future__ import annotations

import io
import json
import logging
import os

import pytest
import structlog

from xbd.logs import setup_logs


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    yield io.StringIO()
    structlog.reset_defaults()
    logging.basicConfig(handlers=[logging.NullHandler()], force=True, level=logging.WARNING)


def test_a_line_for_people(stream):
    setup_logs("info", "text", stream=stream)
    log = structlog.get_logger("x")
    log.info("attach device", device="xbdback1i51712", domain=1)
    log.debug("hidden")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(" info: xbdback1i51712: attach device")


def test_fields_follow_the_text(stream):
    setup_logs("info", "text", stream=stream)
    structlog.get_logger().warning("guest gone", domain=3)
    assert stream.getvalue().endswith("warning: guest gone domain=3\n")


def test_journald_gets_priorities(stream, monkeypatch, tmp_path):
    with (tmp_path / "journal").open("w+") as journal:
        status = os.fstat(journal.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        setup_logs("info", "text", stream=journal)
        structlog.get_logger().error("no good", device="d")
        journal.seek(0)
        assert journal.read() == "<3>d: no good\n"


def test_journald_of_somebody_else(stream, monkeypatch):
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    setup_logs("info", "text", stream=stream)
    structlog.get_logger().error("no good")
    assert stream.getvalue().endswith(" error: no good\n")


def test_json(stream):
    setup_logs("info", "json", stream=stream)
    structlog.get_logger().info("attach", device="d", domain=1)
    entry = json.loads(stream.getvalue())
    assert entry["event"] == "attach"
    assert entry["device"] == "d"
    assert entry["level"] == "info"


def test_the_standard_librarys_loggers_write_the_same(stream):
    setup_logs("info", "text", stream=stream)
    logging.getLogger("a.driver").warning("%s: slow", "disk")
    assert stream.getvalue().endswith("warning: disk: slow\n")


def test_control_characters_are_shown_not_obeyed(stream):
    setup_logs("info", "text", stream=stream)
    structlog.get_logger().info("bad \x1b[2J value\nsecond line\u202e")
    assert stream.getvalue().count("\n") == 1
    assert "\\x1b[2J value\\nsecond line\\u202e" in stream.getvalue()


def test_a_traceback_follows_its_line(stream):
    setup_logs("info", "text", stream=stream)
    try:
        raise ZeroDivisionError("x")
    except ZeroDivisionError as error:
        structlog.get_logger().error("bug", exc_info=error)
    assert "error: bug\nTraceback" in stream.getvalue()
    assert "ZeroDivisionError: x" in stream.getvalue()

"""The state table for readers: ``python -m xbd.core.blkif.state_docs > docs/states.md``."""

from __future__ import annotations

import sys
from typing import Final

from xbd.core.blkif.state import STEPS, Action, Step, XenbusState

_NAMES: Final = {state: state.name.title().replace("_", "") for state in XenbusState}

INTRODUCTION: Final = """\
# States of a disk

<!-- Made by `python -m xbd.core.blkif.state_docs > docs/states.md`; change the table in
     xbd/core/blkif/state.py instead. -->

Backend and frontend each have a key `state` in XenStore, and each writes only its own.  Whenever
one of the two changes, the backend looks at both and takes one step; there is nothing else that it
remembers.  This page is that table.

A disk's life begins and ends with the toolstack: it writes Initialising (1) for both sides when it
attaches the disk, and Closing (5) with `online` = 0 into the backend's directory when it detaches
it.  In between the backend

* opens the disk, writes features and geometry, and only then InitWait (2).  It holds InitWait
  until the hotplug script has run, because libxl waits for exactly this value;
* connects when the frontend has written its rings, and is Connected (4).  A frontend that comes
  with other rings meanwhile, as after a suspend, is disconnected and connected again;
* follows the frontend's Closing (5) and Closed (6): no new requests, what is in flight ends, and
  everything of the guest's is given back before the state is written;
* stays Closed while `online` is 1, and offers the disk again when the next kernel starts (kexec,
  a boot loader).

Reconfiguring (7) and Reconfigured (8) are never written: no frontend uses them, and some stop
their guest when they see one.  A directory or node that is gone counts as Unknown (0).
"""


def render() -> str:
    """The whole page, Markdown."""
    parts = [INTRODUCTION, "## Table\n", _table(), "## Diagram\n", _diagram()]
    return "\n".join(parts)


def _label(state: XenbusState) -> str:
    return f"{_NAMES[state]} ({state.value})"


def _row(ours: XenbusState, theirs: XenbusState, step: Step) -> str:
    following = _label(step.next if step.next is not None else ours)
    condition = "`online` is 1" if step.needs_online else ""
    cells = (_label(ours), _label(theirs), condition, step.action.value, following, step.why)
    return f"| {' | '.join(cells)} |"


def _table() -> str:
    lines = [
        "What is not listed changes nothing.",
        "",
        "| Ours | The frontend's | Only if | The backend will | Then ours is | Why |",
        "|---|---|---|---|---|---|",
    ]
    ordered = sorted(STEPS.items(), key=lambda item: item[0])
    lines += [_row(ours, theirs, step) for (ours, theirs), step in ordered]
    return "\n".join(lines) + "\n"


def _diagram() -> str:
    """Changes of our own state; their labels are the frontend's states."""
    causes: dict[tuple[XenbusState, XenbusState, Action, bool], list[XenbusState]] = {}
    for (ours, theirs), step in sorted(STEPS.items(), key=lambda item: item[0]):
        if step.next is not None and step.next is not ours:
            change = (ours, step.next, step.action, step.needs_online)
            causes.setdefault(change, []).append(theirs)
    lines = [
        "Arrows are changes of our state, and their labels the frontend's states that cause them.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> InitWait: disk opened",
    ]
    for (ours, following, action, needs_online), frontends in causes.items():
        names = " or ".join(_NAMES[state] for state in frontends)
        online = ", online" if needs_online else ""
        lines.append(
            f"    {_NAMES[ours]} --> {_NAMES[following]}: {names}{online} / {action.name.lower()}"
        )
    lines += ["    Closed --> [*]: detached", "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render())

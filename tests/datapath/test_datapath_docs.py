"""docs/datapath.md says what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOM = ROOT / "xbd" / "core" / "datapath"
MANUAL = (ROOT / "docs" / "datapath.md").read_text()
BOUNDS = re.findall(r"^\| .* \| (\d+)[^|]* \| (`.*) \|$", MANUAL, re.MULTILINE)


def constants(path: Path) -> dict[str, float]:
    """Numbers that have names."""
    found = {}
    if path.suffix == ".c" or path.suffix == ".h":
        assignments = re.findall(r"\b([A-Z][A-Z_]+) = ([^,{};/]+?)\s*[,};]", path.read_text())
    else:
        assignments = re.findall(r"^([A-Z][A-Z_]+)(?:: Final)? = (.+)$", path.read_text(), re.M)
    for name, text in assignments:
        try:
            found[name] = _value(ast.parse(text, mode="eval").body, found)
        except (SyntaxError, KeyError, TypeError):
            continue
    return found


def _value(node: ast.AST, known: dict[str, float]) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name):
        return known[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.LShift):
        return int(_value(node.left, known)) << int(_value(node.right, known))
    raise TypeError(node)


ALL = {
    path: constants(path)
    for path in [
        *(ROOM.parent / "driver" / "together.py", *ROOM.rglob("*.py")),
        *(*ROOM.rglob("src/*.c"), *ROOM.rglob("src/*.h")),
    ]
}


@pytest.mark.parametrize(("bound", "names"), BOUNDS, ids=[names for _, names in BOUNDS])
def test_the_bounds_are_those_of_the_code(bound, names):
    for name, file in re.findall(r"`([A-Z_]+)`(?: of `([\w.]+)`)?", names):
        values = {
            value
            for path, found in ALL.items()
            for other, value in found.items()
            if other == name and file in ("", path.name)
        }
        assert values == {int(bound)}, f"{name} is {values}"


def test_there_is_a_test_for_each_rule_of_order():
    rules = MANUAL[MANUAL.index("| rule | test |") : MANUAL.index("## Errors")]
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for row in rules.splitlines()[2:]:
        named = re.findall(r"`(test_\w+)`", row)
        assert named or not row, f"no test is named: {row}"
        for name in named:
            assert f"def {name}(" in tests, f"there is no {name}"


def test_the_places_it_names_are_there():
    named = set(re.findall(r"`((?:xbd|tests)/[\w/.*]+)`", MANUAL))
    assert len(named) > 5
    for place in named:
        assert list(ROOT.glob(place)), place

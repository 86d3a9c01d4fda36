"""Checking and mending, with qemu-img as the judge."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from qcow2_damage import DAMAGES, Damage, victim
from qcow2_seeds import (
    NAMES,
    RECIPES,
    Field,
    Seed,
    Seeds,
    damage,
    image,
    interesting,
    qemu_check,
    qemu_reads,
    seeds,
)

from xbd.core.driver import CheckReport, ConfigError, DriverError
from xbd.drivers.qcow2.check import check_image

__all__ = ["image", "seeds"]


def verdict(found: CheckReport) -> str:
    if found.corruptions or found.errors:
        return "corrupt"
    return "leaks" if found.leaks else "clean"


def qemu_verdict(found: dict[str, Any] | None) -> str:
    # What it can't open, or can't go on with, is corrupt.
    if found is None or found.get("corruptions") or found["check-errors"]:
        return "corrupt"
    return "leaks" if found.get("leaks") else "clean"


def assert_clean(seed: Seed) -> None:
    found = qemu_check(seed)
    assert found is not None
    assert qemu_verdict(found) == "clean", found


# -- whole images -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lazy"])
def test_whole_images_are_clean_and_the_numbers_are_qemus(image: Seed) -> None:
    found = check_image(image.path)
    assert verdict(found) == "clean", found.messages
    told = qemu_check(image)
    assert told is not None
    assert found.total_clusters == told["total-clusters"]
    assert found.allocated_clusters == told.get("allocated-clusters", 0)
    assert found.compressed_clusters == told.get("compressed-clusters", 0)
    assert found.fragmented_clusters == told.get("fragmented-clusters", 0)
    assert found.image_end == told["image-end-offset"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lazy"])
def test_mending_a_whole_image_changes_nothing(image: Seed) -> None:
    before = image.path.read_bytes()
    for repair in ("leaks", "all"):
        found = check_image(image.path, repair=repair)
        assert verdict(found) == "clean"
        assert not found.corruptions_fixed
        assert not found.leaks_fixed
    assert image.path.read_bytes() == before


def test_only_known_kinds_of_mending(seeds: Seeds) -> None:
    with pytest.raises(ConfigError, match="leaks or all"):
        check_image(seeds["plain"].path, repair="everything")


# -- damaged on purpose -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_found_and_mended_and_the_rest_of_the_disk_is_what_it_was(
    seeds: Seeds, tmp_path: Path, what: str
) -> None:
    expected = DAMAGES[what]
    seed = seeds.copy(expected.recipe, tmp_path / "image")
    content = bytearray(qemu_reads(seed, tmp_path / "before"))
    target = victim(seed.path)
    lost = set(expected.act(target) or ())
    before = seed.path.read_bytes()
    found = check_image(seed.path)
    assert seed.path.read_bytes() == before
    told = qemu_check(seed)
    _compare(found, told, expected)
    after = check_image(seed.path, repair="all")
    if not expected.mended:
        assert verdict(after) == "corrupt"
        qemu_check(seed, "all")
        assert qemu_verdict(qemu_check(seed)) == "corrupt", "QEMU can mend it"
        return
    assert verdict(after) == "clean", after.messages
    assert after.corruptions_fixed == found.corruptions
    assert after.leaks_fixed == found.leaks
    assert_clean(seed)
    assert verdict(check_image(seed.path)) == "clean"
    if not expected.readable:
        return
    now = qemu_reads(seed, tmp_path / "after")
    assert len(now) == len(content)
    for at in range(0, len(now), target.cluster):
        end = at + target.cluster
        assert at in lost or now[at:end] == content[at:end], hex(at)


def _compare(found: CheckReport, told: dict[str, Any] | None, expected: Damage) -> None:
    assert verdict(found) == expected.verdict
    assert qemu_verdict(told) == (expected.qemu_verdict or expected.verdict)
    assert all(message.isprintable() for message in found.messages)
    if expected.same_numbers and not expected.qemu_verdict:
        assert told is not None
        assert not told["check-errors"]
        numbers = told.get("corruptions", 0), told.get("leaks", 0)
        assert (found.corruptions, found.leaks) == numbers, found.messages
    else:
        assert expected.why


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGES)
def test_leaks_alone_are_mended_only_where_nothing_else_is_wrong(
    seeds: Seeds, tmp_path: Path, what: str
) -> None:
    seed = seeds.copy(DAMAGES[what].recipe, tmp_path / "image")
    DAMAGES[what].act(victim(seed.path))
    before = seed.path.read_bytes()
    found = check_image(seed.path)
    after = check_image(seed.path, repair="leaks")
    if all(_is_leak_or_flag(message) for message in found.messages):
        assert verdict(after) == "clean"
        assert (after.corruptions_fixed, after.leaks_fixed) == (found.corruptions, found.leaks)
        assert_clean(seed)
    else:
        assert seed.path.read_bytes() == before
        assert (after.corruptions, after.leaks) == (found.corruptions, found.leaks)
        assert after.messages[-1].startswith("nothing is mended")


def _is_leak_or_flag(message: str) -> bool:
    counts = re.fullmatch(r"cluster \d+ has refcount (\d+) and is used (\d+) times", message)
    if counts:
        return int(counts[1]) > int(counts[2])
    return message.endswith("has a wrong COPIED flag")


# -- damaged by chance --------------------------------------------------------------------------

ROUNDS = 80


@pytest.mark.slow
def test_damage_by_chance_is_judged_and_mended_as_by_qemu(seeds: Seeds, tmp_path: Path) -> None:
    """Damage that only a key, a password or a missing file shows is left out."""
    kinds = {"clean": 0, "leaks": 0, "corrupt": 0}
    mended = 0
    fields: dict[str, list[Field]] = {}
    recipes = [recipe for recipe in RECIPES if not recipe.encrypted]
    for round_ in range(ROUNDS):
        dice = random.Random(round_)
        recipe = dice.choice(recipes)
        seed = seeds.copy(recipe.name, tmp_path / "image")
        if recipe.name not in fields:
            fields[recipe.name] = interesting(seeds[recipe.name].path)
        done = damage(seed.path, dice, fields[recipe.name], dice.choice((1, 1, 1, 2, 3)))
        told = qemu_check(seed)
        try:
            found = check_image(seed.path)
        except DriverError:
            assert qemu_verdict(told) == "corrupt", done
            continue
        what = verdict(found)
        kinds[what] += 1
        if told is not None:
            own = "names another cluster of the data file" in " ".join(found.messages)
            assert own or what == qemu_verdict(told), (round_, recipe.name, done, found.messages)
        if what == "clean":
            continue
        after = check_image(seed.path, repair="all")
        if verdict(after) == "clean":
            mended += 1
            if told is not None:
                assert_clean(seed)
        else:
            qemu_check(seed, "all")
            assert qemu_verdict(qemu_check(seed)) != "clean", (round_, recipe.name, done)
    assert min(kinds.values()) > 3, kinds
    assert mended > ROUNDS // 4

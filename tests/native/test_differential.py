"""Whatever a guest puts into its rings, all data paths answer alike; see differential.py."""

from __future__ import annotations

from contextlib import ExitStack

import attrs
import pytest
from data_paths import NATIVE, NATIVE_PREADV, threads_of
from differential import DEVICES, DataPath, Scenario, play_all
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from xbd.core.blkif import X86_32, X86_64
from xbd.core.datapath import Features, GrantMode, engine
from xbd.core.units import KIB, MIB

U32_END = 1 << 32
PHASES = set(Phase) - {Phase.explain}
if settings.default.max_examples < 1000:
    PHASES -= {Phase.shrink}  # it takes minutes: the thorough profile has the time
KINDS = [
    "nothing",
    *(["read", "write"] * 6),
    *(["indirect"] * 5),
    *("barrier", "empty barrier", "flush", "flush with data"),
    *(["discard"] * 2),
    *(["strange"] * 3),
    "grants",
]
SIZES = {
    512: (4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB + 512, 256 * KIB, 512),
    4096: (4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB + 4096, 4096),
}


@st.composite
def scenarios(draw, abi):
    logical_block = draw(st.sampled_from([512, 512, 4096]))
    alignment = draw(st.sampled_from([1, 1, 1, 512, 4096]))
    features = st.builds(
        Features,
        flush=st.sampled_from([True, True, True, False]),
        barrier=st.sampled_from([True, True, True, False]),
        discard=st.sampled_from([True, True, True, False]),
        discard_secure=st.booleans(),
        max_indirect_segments=st.sampled_from([256, 512, 40, 256, 512, 11, 0]),
    )
    return Scenario(
        abi=abi,
        mode=draw(st.sampled_from([GrantMode.PERSISTENT, GrantMode.MAP, GrantMode.COPY])),
        order=draw(st.sampled_from([0, 0, 1, 2])),
        queues=draw(st.integers(1, 3)),
        start=draw(
            st.one_of(st.just(0), st.integers(1, 60).map(lambda back: U32_END - back), st.just(7))
        ),
        device=draw(st.sampled_from(DEVICES)),
        size=draw(st.sampled_from(SIZES[logical_block])),
        logical_block=logical_block,
        request_alignment=alignment,
        memory_alignment=draw(st.sampled_from([1, alignment])),
        unit=draw(st.sampled_from([4 * KIB, 16 * KIB, 64 * KIB, 68 * KIB])),
        read_only=draw(st.sampled_from([False] * 7 + [True])),
        features=draw(features),
        seed=draw(st.integers(0, U32_END - 1)),
        requests=tuple(draw(st.lists(st.sampled_from(KINDS), min_size=30, max_size=90))),
        corrupt=draw(st.sampled_from([None, None, None, -1, 129, 1000, 1 << 31, U32_END - 200])),
    )


@pytest.fixture(scope="module")
def paths():
    """Those that are to be had here; the first one is what the others are compared with."""
    found = []
    try:
        engine.UringEngine().close()
    except OSError:
        pass
    else:
        found.append(DataPath("python, io_uring", None, engine.UringEngine))
    found.append(DataPath("python, threads", None, engine.ThreadEngine))
    with ExitStack() as stack:
        for name in (NATIVE, NATIVE_PREADV):
            found.append(DataPath(name, stack.enter_context(threads_of(name))))
        yield found


@pytest.mark.slow
@pytest.mark.timeout(max(120, 2 * settings.default.max_examples))
@pytest.mark.parametrize("abi", [X86_64, X86_32], ids=lambda abi: abi.name)
@given(data=st.data())
@settings(max_examples=settings.default.max_examples // 2, phases=PHASES)
def test_all_data_paths_do_the_same(tmp_path_factory, paths, abi, data):
    """The layout of arm is that of x86_64."""
    scenario = data.draw(scenarios(abi))
    (_, wanted), *others = play_all(scenario, paths, tmp_path_factory.mktemp("host"))
    for path, outcome in others:
        for field in attrs.fields(type(outcome)):
            found, expected = getattr(outcome, field.name), getattr(wanted, field.name)
            assert found == expected, f"{path.name} differs in {field.name}"
    if scenario.corrupt is None:
        assert wanted.failure is None
    else:
        assert wanted.failure is not None
        assert "RingCorrupt" in wanted.failure

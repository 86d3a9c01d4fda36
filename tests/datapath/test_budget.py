"""What a domain's rings may have mapped or bounced together, and that none waits for ever."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from xbd.core.datapath import Budgets, GrantMode
from xbd.core.datapath.pages import DomainBudget, RingShare
from xbd.core.datapath.pages.budget import RESERVE
from xbd.core.frontend import FrontendOptions
from xbd.core.units import KIB, MIB

STEPS = st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(1, 300)), max_size=60)


@given(limit=st.integers(0, 1000), longest=st.sampled_from([0, 256, 700]), steps=STEPS)
def test_shares_of_one_budget_against_a_model(limit, longest, steps):
    domain = DomainBudget(limit)
    shares = [RingShare(domain, longest) for _ in range(3)]
    reserve = max(RESERVE, longest + 8)
    for number, take, count in steps:
        share = shares[number]
        if not take:
            share.give_back(min(count, share.used))
        else:
            wanted = [ring.used for ring in shares]
            wanted[number] += count
            fits = sum(max(0, used - reserve) for used in wanted) <= limit
            assert share.take(count) == fits or wanted[number] <= reserve
            assert share.used <= wanted[number]
        beyond = sum(max(0, ring.used - reserve) for ring in shares)
        assert domain.free == limit - beyond >= 0
    for share in shares:
        share.give_back(share.used)
    assert domain.free == limit


def test_disks_of_a_domain_share_and_domains_do_not():
    budgets = Budgets(100)
    one, again, other = budgets.of(1), budgets.of(1), budgets.of(2)
    assert one is again
    assert one is not other
    one.free = 5
    del one, again
    assert budgets.of(1).free == 100  # nothing of the domain was left


@pytest.mark.parametrize("mode", [GrantMode.PERSISTENT, GrantMode.MAP, GrantMode.COPY])
async def test_rings_get_on_with_their_reserve_alone(rig_maker, mode):
    options = FrontendOptions(
        ring_order=1,
        queues=2,
        persistent=mode is GrantMode.PERSISTENT,
        indirect_segments=256,
        data_pages=3000,
    )
    budget = DomainBudget(0)
    async with rig_maker(grants=mode, options=options, budget=budget, size=8 * MIB) as rig:
        most = 0

        async def write(number: int) -> None:
            nonlocal most
            await rig.front.write(number * 700 * KIB, bytes([number + 1]) * 700 * KIB)
            most = max(most, rig.host.hypervisor.mapped_pages)

        with trio.fail_after(20):
            for _ in range(3):
                async with trio.open_nursery() as nursery:
                    for number in range(11):
                        nursery.start_soon(write, number)
            for number in range(11):
                data = await rig.front.read(number * 700 * KIB, 700 * KIB)
                assert data == bytes([number + 1]) * 700 * KIB
        assert most <= 2 * RESERVE + 4
        assert budget.free == 0


async def test_everything_is_given_back(rig_maker):
    for mode in (GrantMode.PERSISTENT, GrantMode.MAP, GrantMode.COPY):
        budget = DomainBudget(2000)
        options = FrontendOptions(persistent=mode is GrantMode.PERSISTENT, data_pages=1500)
        async with rig_maker(grants=mode, options=options, budget=budget) as rig:
            async with trio.open_nursery() as nursery:
                for number in range(32):
                    at = number * 44 * KIB
                    nursery.start_soon(rig.front.write, at, bytes([number]) * 44 * KIB)
            await rig.front.flush()
        assert budget.free == 2000

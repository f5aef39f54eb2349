"""Shared work: done once for all who wait, never answered from before the question, spread over time."""

import asyncio
from itertools import count

import pytest

from service.pacing import SingleFlight, jittered


class Work:
    """Counts its runs; each ends when it is let go."""

    def __init__(self) -> None:
        self.num_runs = 0
        self.let_go = asyncio.Event()

    async def __call__(self) -> int:
        self.num_runs += 1
        number = self.num_runs
        await self.let_go.wait()
        return number


async def settled() -> None:
    """Let every task that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_thousand_who_wait_cause_one_run() -> None:
    work = Work()
    flight = SingleFlight(work)
    waiting = [asyncio.create_task(flight.joined()) for _ in range(1000)]
    await settled()
    work.let_go.set()
    assert set(await asyncio.gather(*waiting)) == {1}
    assert work.num_runs == 1


async def test_who_needs_it_fresh_gets_no_run_that_began_before() -> None:
    work = Work()
    flight = SingleFlight(work)
    early = asyncio.create_task(flight.joined())
    await settled()
    late = [asyncio.create_task(flight.fresh()) for _ in range(1000)]
    await settled()
    assert work.num_runs == 1
    work.let_go.set()
    assert await early == 1
    assert set(await asyncio.gather(*late)) == {2}
    assert work.num_runs == 2


async def test_work_goes_on_when_those_who_wait_leave() -> None:
    work = Work()
    flight = SingleFlight(work)
    left, stays = asyncio.create_task(flight.joined()), asyncio.create_task(flight.joined())
    await settled()
    left.cancel()
    await settled()
    work.let_go.set()
    assert await stays == 1


async def test_a_fault_reaches_all_who_wait_and_the_next_run_is_another_try() -> None:
    numbers = count()

    async def work() -> int:
        if (number := next(numbers)) == 0:
            raise OSError("once")
        return number

    flight = SingleFlight(work)
    results = await asyncio.gather(*(flight.joined() for _ in range(3)), return_exceptions=True)
    assert [str(one) for one in results] == ["once"] * 3
    assert await flight.joined() == 1


async def test_runs_are_spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    yield_once = asyncio.sleep

    async def sleep(delay: float) -> None:
        waited.append(delay)
        await yield_once(0)

    monkeypatch.setattr("service.pacing.asyncio.sleep", sleep)
    work = Work()
    work.let_go.set()
    flight = SingleFlight(work, spacing_s=1000.0)
    await flight.joined()
    await flight.joined()
    assert waited[0] == 0.0
    assert 900.0 < waited[1] <= 1000.0


def test_an_interval_varies_about_what_is_asked_for() -> None:
    drawn = [jittered(10.0) for _ in range(2000)]
    assert 8.0 <= min(drawn) < 8.5
    assert 11.5 < max(drawn) <= 12.0
    assert 9.9 < sum(drawn) / len(drawn) < 10.1

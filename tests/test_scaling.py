"""The model of scale: its formulas as properties, its simulations against cases that can be worked out, and a page
that says what the committed results say."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling.assumptions import ASSUMPTIONS, CASES, values
from benchmarks.scaling.capacity import Limits, Workload, in_order, replica_images_s, tasks_in_memory
from benchmarks.scaling.checks import Check
from benchmarks.scaling.conclusions import rungs
from benchmarks.scaling.costs import Costs, Curve, Pass, Picture, costs_of, read_results
from benchmarks.scaling.forecast import forecast
from benchmarks.scaling.notation import duration, number, plain, size, table
from benchmarks.scaling.page import PAGE, TABLES, blocks_of, with_tables
from benchmarks.scaling.processor import Processor
from benchmarks.scaling.replica import ReplicaCosts, closed_loop, open_loop
from benchmarks.scaling.report import RESULT, digests, limits_of_service
from benchmarks.scaling.revision_log import MAX_ATTEMPTS, LogCosts, saturated_writers, spread
from benchmarks.scaling.store_model import (
    attempts_a_publication,
    best_epoch,
    changes_bytes,
    finding_s,
    loader_share,
    registrations_s,
    revision_line_bytes,
    served_after_s,
    share_given_up,
    start,
    whole_list_bytes,
)
from model_store import publishing

POSITIVE = st.floats(1e-3, 1e3)
PLAIN = ReplicaCosts(
    loop_s=0.0,
    beside_loop_s=0.0,
    decode_s=0.0,
    backbone_pass=Pass(0.0, 0.1),
    pass_threads=1,
    max_batch_size=1,
)
LOG = LogCosts(look_s=(0.05,), take_over_s=(0.05, 0.05), publish_s=(0.05, 0.05), follow_s=0.01, build_s=0.01)


@pytest.fixture(scope="module")
def costs() -> Costs:
    return costs_of(read_results())


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text())
    return found


def workload(costs: Costs, num_tasks: int = 1000) -> Workload:
    return Workload(num_tasks, costs.pictures[0])


# -- the page ----------------------------------------------------------------------------------------


def test_the_result_is_of_the_committed_measurements(result: dict[str, Any]) -> None:
    """Run `python -m benchmarks.scaling` after any other benchmark."""
    assert result["inputs"] == digests()


def test_the_forecast_is_what_the_model_says_now(result: dict[str, Any], costs: Costs) -> None:
    now = json.loads(json.dumps(forecast(costs, limits_of_service())))
    assert list(leaves(now)) == [
        (path, pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)
        for path, value in leaves(result["forecast"])
    ]


def leaves(value: Any, path: str = "") -> Any:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, f"{path}.{key}")
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from leaves(one, f"{path}[{i}]")
    else:
        yield path, value


def test_the_page_says_what_the_result_says(result: dict[str, Any]) -> None:
    page = PAGE.read_text()
    assert with_tables(page, result) == page
    assert sorted(blocks_of(page)) == sorted(TABLES)


def test_another_result_would_change_the_page(result: dict[str, Any]) -> None:
    other = json.loads(json.dumps(result))
    other["forecast"]["device"]["central"]["parts"][0][1] *= 2
    assert with_tables(PAGE.read_text(), other) != PAGE.read_text()


def test_the_words_of_the_page_are_so(result: dict[str, Any]) -> None:
    """What docs/scaling.md says outside its tables."""
    device = result["forecast"]["device"]["central"]
    assert device["parts"][0][0] != "device"
    assert dict(device["parts"])["event loop"] < dict(device["parts"])["device"]
    failed = [one["name"] for one in result["checks"] if not one["holds"]]
    explained = (
        "ViT-B/16: 70 % load, median",
        "ViT-Tiny: 70 % load",
        "overload: goodput",
        "registration among",
    )
    assert all(name.startswith(explained) for name in failed), failed
    full = {row["writers"]: row for row in result["writing"]}  # the last row of each: all that the log takes
    assert full[8]["published_s"] < full[1]["published_s"]
    assert full[8]["given_up"] > full[1]["given_up"] == 0.0
    many = result["following"][-1]
    assert many["last_s"] > many["formula_latest_s"]
    for row in result["on_a_device"]:
        if row["arrivals"] == "Poisson" and row["share"] < 1.0:
            assert row["refused"] == 0
            assert row["answered_s"] == pytest.approx(row["offered_s"], rel=0.02)
    bursts = [row for row in result["on_a_device"] if row["share"] < 1.0 and row["arrivals"] != "Poisson"]
    assert any(row["refused"] for row in bursts)


# -- measured costs ----------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(1, 10**5), POSITIVE, min_size=1, max_size=6), st.integers(1, 10**6))
def test_a_curve_goes_through_its_points_and_never_falls_beyond_them(
    points: dict[int, float], tasks: int
) -> None:
    curve = Curve.through(points.items())
    assert all(curve(n) == pytest.approx(value) for n, value in points.items())
    last = max(points)
    assert curve(last + tasks) >= points[last] - 1e-9
    assert curve(tasks) > 0.0


@given(POSITIVE, POSITIVE, st.integers(2, 64))
def test_a_pass_goes_through_what_it_was_fitted_to(base_s: float, each_s: float, many: int) -> None:
    fitted = Pass.through(base_s + each_s, base_s + many * each_s, many)
    assert fitted(1) == pytest.approx(base_s + each_s)
    assert fitted(many) == pytest.approx(base_s + many * each_s)


def test_a_pass_that_batches_badly_has_no_negative_base() -> None:
    fitted = Pass.through(0.01, 0.2, 8)
    assert fitted.base_s == 0.0
    assert fitted(8) == pytest.approx(0.2)


# -- capacity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [one.name for one in ASSUMPTIONS])
def test_a_better_assumption_never_carries_less(name: str, costs: Costs) -> None:
    """So that all at their worst and all at their best are the ends of the range."""
    for case in CASES:
        images = [
            in_order(replica_images_s(costs, values(case, **{name: one}), Limits(), workload(costs)))[0][1]
            for one in CASES
        ]
        tasks = [tasks_in_memory(costs, values(case, **{name: one})) for one in CASES]
        assert images == sorted(images)
        assert tasks == sorted(tasks)


def test_every_assumption_has_a_source_or_calls_itself_a_guess() -> None:
    for one in ASSUMPTIONS:
        assert one.sources or "guess" in one.reason or "All that is possible" in one.reason, one.name
        assert all(url.startswith("https://") for url in one.sources)


def test_more_tasks_and_larger_pictures_never_carry_more(costs: Costs) -> None:
    def images_s(num_tasks: int, picture: Picture) -> float:
        loaded = Workload(num_tasks, picture)
        return in_order(replica_images_s(costs, values(), Limits(), loaded))[0][1]

    small = [images_s(num_tasks, costs.pictures[0]) for num_tasks in (100, 1000, 10_000, 100_000)]
    assert small == sorted(small, reverse=True)
    assert images_s(1000, costs.pictures[-1]) <= small[1]


def test_memory_holds_the_tasks_and_no_more(costs: Costs) -> None:
    assumed = values()
    fits = tasks_in_memory(costs, assumed)
    room = assumed["device_bytes"] - assumed["device_reserve_bytes"]
    assert fits * costs.resident_bytes_a_task <= room < (fits + 1) * costs.resident_bytes_a_task


# -- the store ---------------------------------------------------------------------------------------


def test_a_list_of_tasks_grows_by_the_line_of_a_task() -> None:
    few, many = (
        json.dumps({"tasks": {f"task{i:05}": "a" * 64 for i in range(count)}}, indent=2)
        for count in (10, 110)
    )
    assert len(many) - len(few) == 100 * revision_line_bytes(len("task00000"))


@given(st.integers(1, 10**6), st.integers(1, 10**4))
def test_no_epoch_is_better_than_the_best(num_tasks: int, epoch: int) -> None:
    assert changes_bytes(num_tasks) <= changes_bytes(num_tasks, epoch) * 1.01 + revision_line_bytes()


def test_listing_changes_is_least_gain_for_few_tasks_and_most_for_many() -> None:
    gains = [whole_list_bytes(n) / changes_bytes(n) for n in (100, 1000, 10_000, 100_000)]
    assert gains == sorted(gains)
    assert gains[-1] == pytest.approx(100_000 / math.sqrt(2 * 100_000), rel=0.01)
    assert best_epoch(100_000) == 447


@pytest.mark.parametrize("writers", [1, 2, 4, 8])
def test_writers_without_pause_need_the_attempts_of_the_formula(writers: int) -> None:
    published = saturated_writers(LOG, writers, 200.0)
    done = len(published.seconds)
    assert done / 200.0 == pytest.approx(registrations_s(LOG), rel=0.02)
    assert published.num_attempts / done == pytest.approx(attempts_a_publication(LOG, writers), rel=0.05)


def test_the_simulation_tries_as_often_as_the_publisher() -> None:
    assert MAX_ATTEMPTS == publishing._ATTEMPTS


def test_one_writer_never_gives_up_and_a_crowd_mostly_does() -> None:
    assert share_given_up(1) == 0.0
    assert [share_given_up(n) for n in (2, 8, 80)] == sorted(share_given_up(n) for n in (2, 8, 80))
    assert share_given_up(80) > 0.5
    assert saturated_writers(LOG, 1, 50.0).num_given_up == 0


@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_every_follower_gets_every_change_by_the_latest_time_of_the_formula(jitter: float) -> None:
    mean_s, latest_s = served_after_s(LOG, 5.0, jitter)
    taken = spread(LOG, replicas=200, poll_s=5.0, gap_s=7.0, revisions=4, jitter=jitter)
    assert [len(one) for one in taken] == [200] * 4
    seconds = [second for one in taken for second in one]
    assert max(seconds) <= latest_s + 1e-9
    assert sum(seconds) / len(seconds) == pytest.approx(mean_s, rel=0.1)


def test_a_start_is_held_up_by_the_slowest_and_helped_by_reading_once_a_host(costs: Costs) -> None:
    alone, many = (start(costs, values(), hosts, 1000) for hosts in (1, 10_000))
    once = start(costs, values(), 10_000, 1000, once_a_host=True)
    assert alone.together_s == pytest.approx(alone.alone_s, rel=0.5)
    assert many.bound == "the store's request rate"
    assert many.together_s == pytest.approx(values()["devices"] * once.together_s)
    assert many.bytes_read == values()["devices"] * once.bytes_read


def test_the_end_of_a_long_history_is_found_by_doubling_steps() -> None:
    assumed = values()
    assert finding_s(assumed, 1) == finding_s(assumed, 1000) == assumed["list_s"]
    assert finding_s(assumed, 1001) == assumed["list_s"] + 2 * assumed["get_s"]
    assert finding_s(assumed, 1e6) < assumed["list_s"] + 50 * assumed["get_s"]


def test_following_never_takes_all_of_a_loader() -> None:
    assert 0.0 < loader_share(LOG, 5.0) < loader_share(LOG, 0.0) < 1.0


# -- simulated cores ---------------------------------------------------------------------------------


def ends(cores: float, jobs: list[tuple[float, int]]) -> list[float]:
    environment = simpy.Environment()
    processor, ended = Processor(environment, cores), [math.nan] * len(jobs)

    def run(i: int) -> Any:
        yield processor.run(*jobs[i])
        ended[i] = environment.now

    for i in range(len(jobs)):
        environment.process(run(i))
    environment.run()
    return ended


def test_threads_share_cores_equally_and_none_has_more_than_one() -> None:
    assert ends(2, [(1.0, 1)]) == [1.0]
    assert ends(2, [(1.0, 1), (1.0, 1)]) == [1.0, 1.0]
    assert ends(2, [(1.0, 2), (1.0, 2)]) == [2.0, 2.0]
    assert ends(1, [(1.0, 1), (2.0, 1)]) == [2.0, 3.0]


@given(
    st.floats(0.5, 8.0), st.lists(st.tuples(st.floats(0.01, 5.0), st.integers(1, 4)), min_size=1, max_size=8)
)
def test_work_is_neither_lost_nor_done_faster_than_the_cores_allow(
    cores: float, jobs: list[tuple[float, int]]
) -> None:
    ended = ends(cores, jobs)
    total = sum(cpu_s * threads for cpu_s, threads in jobs)
    assert max(ended) >= total / cores - 1e-6
    assert all(end >= cpu_s - 1e-6 for end, (cpu_s, _) in zip(ended, jobs, strict=True))
    order = [cpu_s for _, (cpu_s, _) in sorted(zip(ended, jobs, strict=True))]
    assert order == pytest.approx(sorted(order))  # all begin at once and have equal shares


# -- a simulated replica -----------------------------------------------------------------------------


def evenly(rate: float) -> Callable[[], float]:
    return lambda: 1.0 / rate


def test_one_client_waits_for_every_part_in_turn() -> None:
    costs = replace(PLAIN, loop_s=0.02, decode_s=0.03, bank_pass=Pass(0.02, 0.03))
    rate, outcomes = closed_loop(costs, cores=4, clients=1, seconds=20.0, warm_up_s=1.0)
    assert outcomes.quantile_s(0.5) == pytest.approx(0.02 + 0.03 + 0.1 + 0.05)
    assert rate == pytest.approx(5.0, rel=0.05)


def test_many_clients_get_what_the_slowest_part_carries() -> None:
    costs = replace(PLAIN, loop_s=0.25, pass_threads=0)
    rate, _ = closed_loop(costs, cores=4, clients=20, seconds=60.0, warm_up_s=10.0)
    assert rate == pytest.approx(4.0, rel=0.05)


def test_batches_hold_what_is_waiting_and_no_more_than_they_may() -> None:
    costs = replace(PLAIN, backbone_pass=Pass(0.1, 0.0), max_batch_size=4)
    rate, outcomes = closed_loop(costs, cores=4, clients=20, seconds=20.0, warm_up_s=2.0)
    assert max(outcomes.batch_sizes) == 4
    assert rate == pytest.approx(40.0, rel=0.05)
    _, alone = closed_loop(costs, cores=4, clients=1, seconds=5.0, warm_up_s=0.0)
    assert set(alone.batch_sizes) == {1}


def test_what_finds_no_room_is_refused_and_the_rest_waits_no_longer_than_the_queue() -> None:
    costs = replace(PLAIN, max_queued_images=5)
    rate, outcomes = open_loop(costs, cores=4, gaps_s=evenly(30.0), seconds=20.0, warm_up_s=2.0)
    assert rate == pytest.approx(10.0, rel=0.05)
    assert len(outcomes.refused_s) == pytest.approx(400, rel=0.05)
    assert outcomes.quantile_s(1.0) <= 5 * 0.1 + 0.1
    _, easy = open_loop(costs, cores=4, gaps_s=evenly(5.0), seconds=20.0, warm_up_s=2.0)
    assert not easy.refused_s


# -- words -------------------------------------------------------------------------------------------


def test_a_check_can_fail() -> None:
    check = Check("x", "s", measured=1.0, simulated=1.2, tolerance=0.25, source="x")
    assert check.holds
    assert not replace(check, simulated=1.3).holds
    assert not replace(check, simulated=0.7).holds


def test_parts_that_bind_together_are_one_rung() -> None:
    parts = [("loop", 100.0), ("pool", 300.0), ("thread", 310.0), ("network", 900.0)]
    assert rungs(parts) == [parts[:1], parts[1:3], parts[3:]]


def test_numbers_are_written_with_three_digits_that_count() -> None:
    assert [number(x) for x in (0, 0.01234, 1.234, 12.34, 123.4, 1234.5)] == [
        "0", "0.0123", "1.23", "12.3", "123", "1,230",
    ]  # fmt: skip
    assert [size(x) for x in (12, 1500, 2.5e9)] == ["12 B", "1.5 kB", "2.5 GB"]
    assert [duration(x) for x in (0.0123, 2.0, 600.0, 14_400.0)] == ["12.3 ms", "2 s", "10 min", "4 h"]
    assert [plain(x) for x in (989e12, 5500.0, 0.37, 4e-7)] == ["989·10¹²", "5,500", "0.37", "4.0e-07"]


def test_a_table_has_as_many_cells_in_every_row() -> None:
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"

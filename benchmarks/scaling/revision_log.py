"""Writers and followers of one revision log, simulated: conflicts, attempts, and how a change spreads.

A writer follows model_store/publishing.py: look for newer revisions and take them over, build and judge the
next set, put the module, create the next revision if nobody else did, else begin again. A follower looks for
revisions every so often and takes over the newest at once, however many it missed.
"""

import math
import random
from collections.abc import Generator
from dataclasses import dataclass, field

import simpy

Steps = Generator[simpy.Event, object, None]
MAX_ATTEMPTS = 20  # as model_store/publishing.py has it


@dataclass(frozen=True, slots=True)
class LogCosts:
    """What a step takes: the medians of its requests, one after another, and the work of a core."""

    look_s: tuple[float, ...]  # to see whether there is a newer revision
    take_over_s: tuple[float, ...]  # to read it, if there is
    publish_s: tuple[float, ...]  # to judge and write one's own
    follow_s: float  # to take over one change of others, without its requests
    build_s: float  # to check, build and judge a change of one's own, without its requests
    tail: float = 1.0  # 99th percentile of a request over its median; lognormal

    @property
    def lone_attempt_s(self) -> float:
        """An attempt when no other writer published since the last."""
        return sum(self.look_s) + self.build_s + sum(self.publish_s)

    @property
    def attempt_s(self) -> float:
        """An attempt that takes over another's revision first."""
        return self.lone_attempt_s + sum(self.take_over_s) + self.follow_s


@dataclass(slots=True)
class Published:
    """What became of the registrations of a simulation."""

    seconds: list[float] = field(default_factory=list)  # of those published, from asking to acknowledged
    num_attempts: int = 0
    num_given_up: int = 0


class RevisionLog:
    """The log, and the steps of those who use it; time is the environment's."""

    def __init__(self, environment: simpy.Environment, costs: LogCosts, seed: int) -> None:
        self._environment = environment
        self._costs = costs
        self._chance = random.Random(seed)
        self._sigma = math.log(costs.tail) / 2.326  # of the normal under the lognormal
        self.created_at: list[float] = [0.0]  # of every revision
        self.served_after_s: list[list[float]] = [[]]  # by revision: when each follower had it
        self.published = Published()

    @property
    def head(self) -> int:
        return len(self.created_at) - 1

    def _requests(self, medians_s: tuple[float, ...]) -> Steps:
        for median_s in medians_s:
            unlike = math.exp(self._sigma * self._chance.gauss(0.0, 1.0)) if self._sigma else 1.0
            yield self._environment.timeout(unlike * median_s)

    def _look(self, known: int) -> Generator[simpy.Event, object, int]:
        """The newest revision, taken over if it is new."""
        yield from self._requests(self._costs.look_s)
        head = self.head
        if head > known:
            yield from self._requests(self._costs.take_over_s)
            yield self._environment.timeout(self._costs.follow_s)
        return head

    def register(self, known: int, asked_at: float) -> Generator[simpy.Event, object, int]:
        """Publish one change by a writer that has revision `known`; the revision it has afterwards."""
        for _ in range(MAX_ATTEMPTS):
            self.published.num_attempts += 1
            known = yield from self._look(known)
            yield self._environment.timeout(self._costs.build_s)
            yield from self._requests(self._costs.publish_s)
            if self.head == known:
                self.created_at.append(self._environment.now)
                self.served_after_s.append([])
                self.published.seconds.append(self._environment.now - asked_at)
                return self.head
        self.published.num_given_up += 1
        return known

    def follow(self, poll_s: float, jitter: float) -> Steps:
        """A replica that looks every `poll_s`, give or take a share of it, having begun at any time."""
        known = 0
        yield self._environment.timeout(self._chance.uniform(0.0, poll_s))
        while True:
            head = yield from self._look(known)
            for revision in range(known + 1, head + 1):
                self.served_after_s[revision].append(self._environment.now - self.created_at[revision])
            known = head
            yield self._environment.timeout(poll_s * self._chance.uniform(1.0 - jitter, 1.0 + jitter))


def saturated_writers(costs: LogCosts, writers: int, seconds: float, seed: int = 0) -> Published:
    """Writers that register without pause."""
    environment = simpy.Environment()
    log = RevisionLog(environment, costs, seed)

    def write() -> Steps:
        known = 0
        while True:
            known = yield from log.register(known, environment.now)

    for _ in range(writers):
        environment.process(write())
    environment.run(until=seconds)
    return log.published


def offered_registrations(
    costs: LogCosts, writers: int, rate: float, seconds: float, seed: int = 0
) -> Published:
    """Registrations that come at random to any writer, which takes them one after another."""
    environment = simpy.Environment()
    log = RevisionLog(environment, costs, seed)
    chance = random.Random(seed + 1)
    queues = [simpy.Store(environment) for _ in range(writers)]

    def write(queue: simpy.Store) -> Steps:
        known = 0
        while True:
            asked_at = yield queue.get()
            known = yield from log.register(known, float(asked_at))

    def arrive() -> Steps:
        while True:
            yield environment.timeout(chance.expovariate(rate))
            queues[chance.randrange(writers)].put(environment.now)

    for queue in queues:
        environment.process(write(queue))
    environment.process(arrive())
    environment.run(until=seconds)
    return log.published


def spread(
    costs: LogCosts,
    replicas: int,
    poll_s: float,
    gap_s: float,
    revisions: int,
    *,
    jitter: float = 0.0,
    seed: int = 0,
) -> list[list[float]]:
    """Seconds until each replica serves each of `revisions` changes, made `gap_s` apart by one writer."""
    environment = simpy.Environment()
    log = RevisionLog(environment, costs, seed)
    for _ in range(replicas):
        environment.process(log.follow(poll_s, jitter))

    def write() -> Steps:
        known = 0
        for _ in range(revisions):
            yield environment.timeout(gap_s)
            known = yield from log.register(known, environment.now)

    environment.run(until=environment.process(write()))
    while len(log.served_after_s[-1]) < replicas:
        environment.run(until=environment.now + poll_s)
    return log.served_after_s[1:]

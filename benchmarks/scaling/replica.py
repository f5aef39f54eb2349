"""One process of the service, simulated: event loop, decode pool, batches, bounds and refusals.

    arrival → event loop → room? → decode pool → queue → pass of what is waiting → event loop → answer
                            └── 503

It follows service/engine.py and service/inference.py: the queue counts pictures from admission to answer, an
idle device starts at once with what is waiting, at most a batch of it. Work of the event loop is done one
piece at a time, whatever else the processor does meanwhile.
"""

import random
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import simpy

from benchmarks.scaling.costs import Pass
from benchmarks.scaling.processor import Processor

NOTHING = Pass(0.0, 0.0)
Steps = Generator[simpy.Event, object, None]


@dataclass(frozen=True, slots=True)
class ReplicaCosts:
    """What a picture costs one process, and how much it lets in."""

    loop_s: float  # on the event loop: half before the pass, half after
    beside_loop_s: float  # of a request on other threads
    decode_s: float
    backbone_pass: Pass  # wall seconds when nothing else runs
    pass_threads: int  # of the processor; 0: a device of its own
    bank_pass: Pass = NOTHING  # the bank's answers to a batch, on the inference thread
    client_s: float = 0.0  # the load generator's, where it shares the processor
    refusal_s: float = 0.0  # on the event loop
    decode_threads: int = 8
    max_batch_size: int = 8
    max_queued_images: int = 256
    max_connections: int = 1000


@dataclass(slots=True)
class Outcomes:
    """What became of the requests of a simulation."""

    answered_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    num_cut: int = 0  # connections beyond the limit
    batch_sizes: list[int] = field(default_factory=list)

    def quantile_s(self, share: float) -> float:
        """Of the times until an answer; not a number without any."""
        ordered = sorted(self.answered_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


class Replica:
    """A process of the service on `processor`; `ask` is one request with one picture."""

    def __init__(self, environment: simpy.Environment, processor: Processor, costs: ReplicaCosts) -> None:
        self._environment = environment
        self._processor = processor
        self._costs = costs
        self._loop = simpy.Resource(environment)
        self._decoders = simpy.Resource(environment, costs.decode_threads)
        self._waiting: deque[simpy.Event] = deque()
        self._arrived = environment.event()
        self._num_inside = 0
        self._num_connections = 0
        self.outcomes = Outcomes()
        environment.process(self._run_passes())

    def ask(self, is_counted: bool = True) -> Steps:
        """One request from the moment it is due; what becomes of it is recorded if it is counted."""
        costs, due = self._costs, self._environment.now
        if self._num_connections >= costs.max_connections:
            self.outcomes.num_cut += is_counted
            return
        self._num_connections += 1
        yield self._processor.run(costs.client_s)
        yield from self._on_loop(costs.refusal_s)
        if self._num_inside >= costs.max_queued_images:
            record = self.outcomes.refused_s
        else:
            self._num_inside += 1
            yield from self._answer()
            self._num_inside -= 1
            record = self.outcomes.answered_s
        self._num_connections -= 1
        if is_counted:
            record.append(self._environment.now - due)

    def _answer(self) -> Steps:
        costs = self._costs
        yield from self._on_loop(max(0.0, costs.loop_s / 2 - costs.refusal_s))
        with self._decoders.request() as place:
            yield place
            yield self._processor.run(costs.decode_s + costs.beside_loop_s)
        answered = self._environment.event()
        self._waiting.append(answered)
        if not self._arrived.triggered:
            self._arrived.succeed()
        yield answered
        yield from self._on_loop(costs.loop_s / 2)

    def _on_loop(self, cpu_s: float) -> Steps:
        with self._loop.request() as turn:
            yield turn
            yield self._processor.run(cpu_s)

    def _run_passes(self) -> Steps:
        costs = self._costs
        while True:
            if not self._waiting:
                self._arrived = self._environment.event()
                yield self._arrived
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), costs.max_batch_size))]
            seconds = costs.backbone_pass(len(batch))
            if costs.pass_threads:
                yield self._processor.run(seconds, costs.pass_threads)
            else:
                yield self._environment.timeout(seconds)
            yield self._processor.run(costs.bank_pass(len(batch)))
            self.outcomes.batch_sizes.append(len(batch))
            for answered in batch:
                answered.succeed()


# -- load --------------------------------------------------------------------------------------------


def closed_loop(
    costs: ReplicaCosts, cores: float, clients: int, seconds: float, warm_up_s: float
) -> tuple[float, Outcomes]:
    """Clients that each ask again when they are answered: answers a second, and the outcomes."""
    environment = simpy.Environment()
    replica = Replica(environment, Processor(environment, cores), costs)
    num_ended = 0

    def client() -> Steps:
        nonlocal num_ended
        while True:
            yield from replica.ask(environment.now >= warm_up_s)
            num_ended += environment.now >= warm_up_s

    for _ in range(clients):
        environment.process(client())
    environment.run(until=warm_up_s + seconds)
    return num_ended / seconds, replica.outcomes


def open_loop(
    costs: ReplicaCosts, cores: float, gaps_s: Callable[[], float], seconds: float, warm_up_s: float
) -> tuple[float, Outcomes]:
    """Requests `gaps_s()` apart, whatever becomes of those before: answers a second until the last one that
    was due within `seconds`, and the outcomes."""
    environment = simpy.Environment()
    replica = Replica(environment, Processor(environment, cores), costs)
    asked: list[simpy.Process] = []

    def arrivals() -> Steps:
        while environment.now < warm_up_s + seconds:
            yield environment.timeout(gaps_s())
            asked.append(environment.process(replica.ask(environment.now >= warm_up_s)))

    environment.run(until=environment.process(arrivals()))
    environment.run(until=simpy.AllOf(environment, asked))
    return len(replica.outcomes.answered_s) / (environment.now - warm_up_s), replica.outcomes


def poisson(rate: float, seed: int) -> Callable[[], float]:
    chance = random.Random(seed)
    return lambda: chance.expovariate(rate)


def bursts(rate: float, size: int, seed: int) -> Callable[[], float]:
    """Poisson bursts of `size` requests at once; `rate` requests a second in all."""
    chance = random.Random(seed)
    left = 0

    def gap() -> float:
        nonlocal left
        left = left - 1 if left else size - 1
        return chance.expovariate(rate / size) if left == size - 1 else 0.0

    return gap

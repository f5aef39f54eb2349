"""Cores shared by threads, as an operating system shares them, for simulations."""

import heapq
import itertools

import simpy


class Processor:
    """All threads that run have equal shares of the cores, and none more than one core.

    So one clock serves them all: the work that each running thread has been given so far, in seconds of a
    core. A job of several threads, such as a pass of the backbone, is done when every thread has its share.
    """

    def __init__(self, environment: simpy.Environment, cores: float) -> None:
        self._environment = environment
        self._cores = cores
        self._given_s = 0.0  # to every running thread
        self._seen_at = 0.0
        self._num_threads = 0
        self._jobs: list[tuple[float, int, int, simpy.Event]] = []  # ends at `given_s`, order, threads, done
        self._order = itertools.count()
        self._wake: simpy.Event | None = None
        self.busy_s = 0.0  # core seconds delivered

    def run(self, cpu_s: float, threads: int = 1) -> simpy.Event:
        """`cpu_s` seconds of work on each of `threads` threads; the event is their end."""
        self._advance()
        done = self._environment.event()
        heapq.heappush(self._jobs, (self._given_s + cpu_s, next(self._order), threads, done))
        self._num_threads += threads
        self._plan()
        return done

    @property
    def _speed(self) -> float:
        return min(1.0, self._cores / self._num_threads) if self._num_threads else 0.0

    def _advance(self) -> None:
        elapsed = self._environment.now - self._seen_at
        self._given_s += elapsed * self._speed
        self.busy_s += elapsed * self._speed * self._num_threads
        self._seen_at = self._environment.now

    def _plan(self) -> None:
        """Wake when the next job ends, unless the set of jobs changes before."""
        if not self._jobs:
            self._wake = None
            return
        wake = self._environment.timeout(max(0.0, self._jobs[0][0] - self._given_s) / self._speed)
        self._wake = wake
        wake.callbacks.append(self._end_jobs)  # type: ignore[union-attr]

    def _end_jobs(self, wake: simpy.Event) -> None:
        if wake is not self._wake:
            return  # overtaken by a later plan
        self._advance()
        ends_at = self._jobs[0][0]
        self._given_s = max(self._given_s, ends_at)  # rounding
        while self._jobs and self._jobs[0][0] <= self._given_s:
            _, _, threads, done = heapq.heappop(self._jobs)
            self._num_threads -= threads
            done.succeed()
        self._plan()

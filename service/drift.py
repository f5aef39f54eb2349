"""Do the pictures that a task answers still look like those it was made from? A test that may be looked at
at any time.

A p-value of a task with M known vectors says between which two of their scores a picture's own score falls:
in which of M + 1 cells. The known vectors are few, so even pictures exactly like them do not fill the cells
evenly: some cells are wide and some narrow, and no number of pictures makes that go away. But pictures and
known vectors that are exchangeable fall like the balls of Pólya's urn: after counts c_0 … c_M, the next one
falls into cell k with probability (c_k + 1) / (Σc + M + 1), whatever the distribution of the scores. Betting
against that at fair odds makes no money on average, and a gambler whose wealth ever reaches 1/α from 1 had a
chance of at most α (Ville 1939): the wealth is evidence that may be watched picture by picture.

The bets are on low p-values alone. Choosing among tasks takes a task's least typical pictures away from it,
so that what remains of sound traffic looks more typical than the known vectors, never less.

Source: Vovk, "Testing randomness online" (Statistical Science 2021); Ramdas et al., "Game-theoretic
statistics and safe anytime-valid inference" (Statistical Science 2023).
"""
# M known vectors

import math
from dataclasses import dataclass

# A bet of power κ pays κ·u^(κ−1) for a smoothed p-value u: the smaller κ, the bolder the bet on tiny values.
# Money is spread evenly over the powers, because nobody knows how far a drift will go.
POWERS = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True, slots=True)
class Drift:
    """What the last one or two windows say.

    `log10_wealth` is of the most that a window's gambler had, from 0; `p_value` is one over that wealth,
    valid however often it is looked at; `mean_p_value` of the pictures is about 0.5 or above without drift,
    and says how far it goes.
    """

    num_pictures: int
    log10_wealth: float
    p_value: float
    mean_p_value: float
    is_drifting: bool


class Gambler:
    """Bets on the next pictures being less typical than the urn says, from a wealth of 1.

    For pictures exchangeable with the M known vectors the wealth is a martingale.
    """

    def __init__(self, num_known: int) -> None:
        self._count_of_cell = [0] * (num_known + 1)
        self._log_wealth_of_power = [0.0] * len(POWERS)
        self.num_bets = 0
        self.max_log_wealth = 0.0  # natural

    @property
    def log_wealth(self) -> float:
        largest = max(self._log_wealth_of_power)
        total = sum(math.exp(one - largest) for one in self._log_wealth_of_power)
        return largest + math.log(total / len(POWERS))

    def bet(self, cell: int) -> None:
        """Settle the bets on the next picture, which fell into `cell`, 0 being the least typical."""
        num_balls = self.num_bets + len(self._count_of_cell)
        low = (sum(self._count_of_cell[:cell]) + cell) / num_balls
        high = low + (self._count_of_cell[cell] + 1) / num_balls
        # A bet pays its mean over the cell, so that no coin has to be thrown about where in it.
        self._log_wealth_of_power = [
            wealth + math.log((high**power - low**power) / (high - low))
            for wealth, power in zip(self._log_wealth_of_power, POWERS, strict=True)
        ]
        self._count_of_cell[cell] += 1
        self.num_bets += 1
        self.max_log_wealth = max(self.max_log_wealth, self.log_wealth)


class DriftWatch:
    """A gambler for each window of pictures, one after another; the last full window and the one under way
    say whether the task drifts. Of exchangeable windows a share of at most `alarm_rate` alarms."""

    def __init__(self, num_known: int, window: int, alarm_rate: float) -> None:
        self._num_known = num_known
        self._window = window
        self._alarm_rate = alarm_rate
        self._gambler = Gambler(num_known)
        self._sum_of_p_values = 0.0
        self._last: tuple[Gambler, float] | None = None

    def add(self, p_value: float) -> None:
        """Take in the conformal p-value of one picture."""
        if self._gambler.num_bets == self._window:
            self._last = self._gambler, self._sum_of_p_values
            self._gambler, self._sum_of_p_values = Gambler(self._num_known), 0.0
        cell = round(p_value * (self._num_known + 1)) - 1
        self._gambler.bet(min(max(cell, 0), self._num_known))
        self._sum_of_p_values += p_value

    def judge(self) -> Drift | None:
        """The state of the watch; None without known vectors or without pictures."""
        if self._num_known == 0 or self._gambler.num_bets == 0:
            return None
        windows = [(self._gambler, self._sum_of_p_values), *([self._last] if self._last else [])]
        log_wealth = max(gambler.max_log_wealth for gambler, _ in windows)
        num_pictures = sum(gambler.num_bets for gambler, _ in windows)
        p_value = math.exp(-log_wealth)
        return Drift(
            num_pictures=num_pictures,
            log10_wealth=log_wealth / math.log(10.0),
            p_value=p_value,
            mean_p_value=sum(total for _, total in windows) / num_pictures,
            is_drifting=p_value <= self._alarm_rate,
        )

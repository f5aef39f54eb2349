"""What the one store carries: registrations a second, how soon all serve them, starts, bytes, dollars."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.scaling.costs import Costs, Requests
from benchmarks.scaling.revision_log import MAX_ATTEMPTS, LogCosts

MONTH_S = 365.25 / 12 * 86_400
GB = 1e9
START_THREADS = 32  # Python's pool for reading modules, on a host with many processors


# -- how large revisions are -------------------------------------------------------------------------


def revision_line_bytes(name_length: int = 9) -> int:
    """Bytes of one task in a revision that lists all: indentation, name, digest, punctuation."""
    return len(f'    "{"x" * name_length}": "{"0" * 64}",\n')


def whole_list_bytes(num_tasks: int) -> float:
    """A revision that lists every task, beside its few other fields."""
    return revision_line_bytes() * num_tasks


def best_epoch(num_tasks: int) -> int:
    """After how many revisions to list everything again, when each lists what changed since: the number that
    makes a publication's bytes least, n/E + E/2 lines, is E = √(2n)."""
    return max(1, round(math.sqrt(2 * num_tasks)))


def changes_bytes(num_tasks: int, epoch: int | None = None) -> float:
    """Mean bytes of a publication that lists the changes since a whole list, one of which comes every `epoch`
    revisions."""
    every = epoch or best_epoch(num_tasks)
    return revision_line_bytes() * (num_tasks / every + every / 2)


def tasks_that_double_a_registration(costs: Costs) -> int:
    """From how many tasks on a whole list is larger than the module that is registered."""
    return round(costs.file_bytes / revision_line_bytes())


# -- writing -----------------------------------------------------------------------------------------


def log_costs(costs: Costs, assumed: Mapping[str, float], num_tasks: int) -> LogCosts:
    """Steps of writers and followers with so many tasks, from the requests that were counted."""
    speed = assumed["core_speed"]
    look, follow, register = (
        costs.requests_of(operation, num_tasks) for operation in ("look", "follow", "register")
    )
    return LogCosts(
        look_s=(assumed["list_s"],) * look.list + (assumed["get_s"],) * look.get,
        take_over_s=(assumed["list_s"],) * (follow.list - look.list)
        + (assumed["get_s"],) * (follow.get - look.get),
        publish_s=(assumed["get_s"],) * (register.get - look.get) + (assumed["put_s"],) * register.put,
        follow_s=costs.operation_s["follow"](num_tasks) / speed,
        build_s=costs.operation_s["register"](num_tasks) / speed,
        tail=assumed["tail"],
    )


def registrations_s(log: LogCosts) -> float:
    """What the log takes, from however many writers: whoever published last is the first to be done again, as
    the others have its revision to take over, and whoever began before it must begin again."""
    return 1.0 / log.lone_attempt_s


def attempts_a_publication(log: LogCosts, writers: int) -> float:
    """When all write without pause: while one attempt succeeds, the others make theirs in vain."""
    return 1.0 + (writers - 1) * log.lone_attempt_s / log.attempt_s


def share_given_up(writers: int) -> float:
    """Of registrations by writers who all write without pause and win by chance: lost MAX_ATTEMPTS times."""
    return (1.0 - 1.0 / writers) ** MAX_ATTEMPTS


# -- following ---------------------------------------------------------------------------------------


def served_after_s(log: LogCosts, poll_s: float, jitter: float = 0.0) -> tuple[float, float]:
    """Seconds after its publication that a replica serves a change: in the mean, and at the latest when
    requests take their median. A look comes `poll_s` after the end of the last one, give or take a share."""
    look_s = sum(log.look_s)
    work_s = look_s + sum(log.take_over_s) + log.follow_s
    unequal = jitter**2 / 3 * poll_s / 2  # long gaps are met more often than short ones
    return (poll_s + look_s) / 2 + unequal + work_s, (1.0 + jitter) * poll_s + look_s + work_s


def polling_dollars_month(
    look: Requests, assumed: Mapping[str, float], replicas: int, poll_s: float
) -> float:
    return replicas / poll_s * MONTH_S * dollars(look, assumed)


def dollars(requests: Requests, assumed: Mapping[str, float]) -> float:
    """Price of an operation's requests."""
    return (requests.put + requests.list) * assumed["put_dollars"] + requests.get * assumed["get_dollars"]


def registration_dollars(costs: Costs, assumed: Mapping[str, float], replicas: int, num_tasks: int) -> float:
    """A registration, and every replica that follows it; looking for it comes on top, once a poll."""
    follow = costs.requests_of("follow", num_tasks)
    taken_over = Requests(follow.get, follow.put, 0, follow.bytes_in, 0)  # the look is paid by the poll
    return dollars(costs.requests_of("register", num_tasks), assumed) + replicas * dollars(
        taken_over, assumed
    )


def loader_share(log: LogCosts, poll_s: float) -> float:
    """Of the time of a replica's loader thread that following takes while there is always something new: it
    takes over the newest revision at once, so more registrations do not add to it but for their modules."""
    requests_s = sum(log.look_s) + sum(log.take_over_s)
    return log.follow_s / (poll_s + requests_s + log.follow_s)


# -- starting ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Replicas that start at once."""

    bytes_read: float  # by all of them
    alone_s: float  # one replica, nothing else in its way
    together_s: float  # until the last one serves
    bound: str  # what takes that long
    dollars: float


def start(
    costs: Costs,
    assumed: Mapping[str, float],
    hosts: int,
    num_tasks: int,
    *,
    once_a_host: bool = False,
    prefixes: int = 1,
) -> Start:
    """Every replica of every host reads all modules, from as many prefixes of the store.

    `once_a_host`: one of them reads for all that share its host, which nothing does yet.
    """
    requests = costs.requests_of("start", num_tasks)
    readers_a_host = 1 if once_a_host else round(assumed["devices"])
    build_s = costs.operation_s["start"](num_tasks) / assumed["core_speed"]
    latency_s = requests.get * assumed["get_s"] / START_THREADS
    waits_s = {
        "reading and building": latency_s + build_s,
        "a host's network": readers_a_host * requests.bytes_in * 8 / assumed["network_bits_s"],
        "the store's request rate": hosts * readers_a_host * requests.get / (prefixes * assumed["get_rate"]),
    }
    bound = max(waits_s, key=lambda name: waits_s[name])
    return Start(
        bytes_read=hosts * readers_a_host * requests.bytes_in,
        alone_s=latency_s + build_s,
        together_s=waits_s[bound],
        bound=bound,
        dollars=hosts * readers_a_host * dollars(requests, assumed),
    )


def finding_s(assumed: Mapping[str, float], num_revisions: float) -> float:
    """Seconds in which a start finds the end of the history: a page, then steps that double and halve."""
    behind = max(0.0, num_revisions - assumed["keys_a_list"])
    return assumed["list_s"] + 2 * math.ceil(math.log2(behind + 1)) * assumed["get_s"]

"""What a host carries: the least of what its device, its cores, its links and its memory allow."""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.scaling.costs import Costs, Pass, Picture

PIXEL_BYTES = 3 * 224 * 224  # of a decoded picture, on its way to the device


@dataclass(frozen=True, slots=True)
class Limits:
    """Settings of the service that bound a process, as service/settings.py has them."""

    decode_threads: int = 8
    max_batch_size: int = 64  # on CUDA
    max_queued_images: int = 256
    max_connections: int = 1000
    poll_s: float = 5.0
    poll_jitter: float = 0.0  # share of it by which a look may come sooner or later


@dataclass(frozen=True, slots=True)
class Workload:
    """How many tasks are active, and what clients send: one picture a request."""

    num_tasks: int
    picture: Picture


def device_pass(assumed: Mapping[str, float]) -> Pass:
    """A pass of ViT-B/16 on the device."""
    each_s = assumed["picture_flop"] / (assumed["share_of_peak"] * assumed["peak_flops"])
    return Pass(assumed["pass_overhead_s"], each_s)


def replica_images_s(
    costs: Costs, assumed: Mapping[str, float], limits: Limits, workload: Workload
) -> dict[str, float]:
    """Images a second that each part of one process, with one device, could carry by itself.

    The inference thread does the passes and the banks' answers in turn; a batch is full at saturation.
    """
    threads = min(limits.decode_threads, assumed["processors"] / assumed["devices"])
    answers = costs.bank_pass(workload.num_tasks, assumed["bank_share"] / assumed["core_speed"])
    answers_s = answers(limits.max_batch_size)
    batch_s = device_pass(assumed)(limits.max_batch_size)
    cpu_s = (costs.request_s + workload.picture.decode_s) / assumed["core_speed"]
    network = assumed["network_bits_s"] / 8 / assumed["devices"]
    return {
        "event loop": assumed["core_speed"] / costs.serial_s(assumed["lock_share"]),
        "decode pool": threads * assumed["core_speed"] / workload.picture.decode_s,
        "device": limits.max_batch_size / batch_s,
        "inference thread": limits.max_batch_size / (batch_s + answers_s),
        "processors": assumed["processors"] / assumed["devices"] / cpu_s,
        "PCIe": assumed["pcie_bytes_s"] / PIXEL_BYTES,
        "network": network / workload.picture.size_bytes,
    }


def in_order(capacities: Mapping[str, float]) -> list[tuple[str, float]]:
    """Parts by what they carry, the bottleneck first. The inference thread is left out where it carries
    nearly what the device does, which it drives."""
    shown = dict(capacities)
    if shown["inference thread"] > 0.9 * shown["device"]:
        del shown["inference thread"]
    return sorted(shown.items(), key=lambda part: part[1])


def tasks_in_memory(costs: Costs, assumed: Mapping[str, float]) -> int:
    """How many tasks fit one device; every replica holds all of them."""
    room = assumed["device_bytes"] - assumed["device_reserve_bytes"]
    return int(room / costs.resident_bytes_a_task)

"""What was never measured here: a GPU, a host with eight of them, S3. Each value has a range and a source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TIMM_TABLES = "https://github.com/huggingface/pytorch-image-models/tree/main/results"
AITEMPLATE = "https://github.com/facebookincubator/AITemplate/blob/main/examples/04_vit/README.md"
SUPERBLOCK = "https://github.com/meta-pytorch/superblock/pull/9"
SUBQUADRATIC = "https://nvidia-bionemo.github.io/nvSubquadratic/benchmarks.html"
H100_PEAK = (
    "https://www.baseten.co/blog/unlocking-the-full-power-of-nvidia-h100-gpus-for-ml-inference-with-tensorrt/"
)
H200_SYSTEM = (
    "https://github.com/mlcommons/inference_results_v4.1/blob/main/closed/NVIDIA/systems/"
    "H200-SXM-141GBx8_TRT_MaxQ.json"
)
P5EN_PRICES = "https://github.com/dstackai/dstack/pull/4110"
EC2_NETWORK = "https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-instance-network-bandwidth"
S3_PRICES = "https://aws.amazon.com/s3/pricing/"
S3_RATES = "https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html"
S3_SMALL = (
    "https://docs.aws.amazon.com/whitepapers/latest/s3-optimizing-performance-best-practices/"
    "timeouts-and-retries-for-latency-sensitive-applications.html"
)
S3_SPLITS = "https://aws.amazon.com/premiumsupport/knowledge-center/s3-object-key-naming-pattern/"
S3_LIST = "https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html"
CONDITIONAL = "https://cdouglas.github.io/posts/2026/01/conditional"

Case = Literal["pessimistic", "central", "optimistic"]
CASES: tuple[Case, ...] = ("pessimistic", "central", "optimistic")


@dataclass(frozen=True, slots=True)
class Assumption:
    """A quantity that was not measured: its worst, likely and best value for us, and why."""

    name: str
    pessimistic: float
    central: float
    optimistic: float
    unit: str
    reason: str
    sources: tuple[str, ...] = ()

    def value(self, case: Case) -> float:
        return {
            "pessimistic": self.pessimistic,
            "central": self.central,
            "optimistic": self.optimistic,
        }[case]


def _fixed(name: str, value: float, unit: str, reason: str, *sources: str) -> Assumption:
    return Assumption(name, value, value, value, unit, reason, sources)


ASSUMPTIONS = (
    _fixed("peak_flops", 989e12, "FLOP/s", "H100 and H200, dense bfloat16: the same chip", H100_PEAK),
    _fixed("picture_flop", 35.16e9, "FLOP", "ViT-B/16 at 224 pixels: 17.58 GMAC", TIMM_TABLES),
    Assumption(
        "share_of_peak",
        0.22,
        0.37,
        0.59,
        "",
        "reached on an H100 by a smaller ViT, compiled, in training; on an A100 by ViT-B/16 in PyTorch "
        "(bfloat16) and in AITemplate (float16). timm's tables have no data-centre GPU; an RTX PRO 6000 of "
        "300 W makes 5,018 images/s there",
        (SUBQUADRATIC, SUPERBLOCK, AITEMPLATE, TIMM_TABLES),
    ),
    Assumption(
        "pass_overhead_s",
        5e-3,
        1e-3,
        3e-4,
        "s",
        "of a pass, whatever its size: an A100 takes 5 ms for one picture in eager PyTorch, 1 ms compiled",
        (AITEMPLATE,),
    ),
    Assumption(
        "bank_share",
        1.0,
        0.5,
        0.1,
        "",
        "of the processor time of a bank's answers that is left where the bank lies on the device: products "
        "go there, Python stays. A guess, at worst what was measured",
    ),
    Assumption(
        "lock_share",
        1.0,
        0.5,
        0.0,
        "",
        "of the other threads' work on a request that holds the interpreter lock, so that the event loop "
        "waits meanwhile. All that is possible",
    ),
    Assumption(
        "core_speed",
        0.7,
        1.0,
        1.5,
        "",
        "a virtual processor of the host over a core measured here. A guess",
    ),
    _fixed("devices", 8, "", "of a host: p5en.48xlarge, 8 × H200", P5EN_PRICES),
    _fixed("processors", 192, "", "virtual, of a host", P5EN_PRICES),
    Assumption(
        "device_reserve_bytes",
        16e9,
        8e9,
        4e9,
        "B",
        "backbone, graphs, activations and fragmentation, not for tasks. A guess",
    ),
    _fixed("device_bytes", 141e9, "B", "memory of an H200", H200_SYSTEM),
    _fixed(
        "pcie_bytes_s", 63e9, "B/s", "a device's share of 504 GB/s between eight and the host", H200_SYSTEM
    ),
    Assumption(
        "network_bits_s",
        50e9,
        100e9,
        200e9,
        "bit/s",
        "of a host for clients and store together; half of it where traffic passes a gateway",
        (EC2_NETWORK, H200_SYSTEM),
    ),
    Assumption("host_dollars_h", 79.12, 63.296, 26.57, "$/h", "on demand; best: spot", (P5EN_PRICES,)),
    Assumption(
        "get_s",
        0.2,
        0.05,
        0.02,
        "s",
        "first byte of a small object: tens of milliseconds, or 100 to 200 by another page",
        (S3_SMALL, S3_RATES),
    ),
    Assumption("list_s", 0.2, 0.05, 0.02, "s", "as a GET: nothing better was found", (S3_SMALL,)),
    Assumption(
        "put_s",
        0.2,
        0.063,
        0.03,
        "s",
        "a conditional write: 58 to 68 ms measured by others under load",
        (CONDITIONAL, S3_RATES),
    ),
    Assumption("tail", 10.0, 4.0, 2.0, "", "99th percentile of a request over its median. A guess"),
    _fixed(
        "get_rate",
        5500.0,
        "/s",
        "GET and HEAD of one prefix before it is split, which takes 30 to 60 minutes",
        S3_RATES,
        S3_SPLITS,
    ),
    _fixed("keys_a_list", 1000, "", "of one LIST request", S3_LIST),
    _fixed("put_dollars", 0.005 / 1000, "$", "a PUT or LIST, S3 Standard, us-east-1", S3_PRICES),
    _fixed("get_dollars", 0.0004 / 1000, "$", "a GET, also of what is not there", S3_PRICES),
    _fixed("storage_dollars", 0.023, "$/GB·month", "the first 50 TB", S3_PRICES),
    Assumption(
        "client_s",
        1e-3,
        5e-4,
        2e-4,
        "s",
        "processor time of the load generator for a request: it shared the two cores in every measurement. A "
        "guess, used in the checks alone",
    ),
)


def values(case: Case = "central", **other: Case) -> Mapping[str, float]:
    """Every assumption's value in one case, but for those named with another."""
    return {one.name: one.value(other.get(one.name, case)) for one in ASSUMPTIONS}

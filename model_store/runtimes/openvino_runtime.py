"""OpenVINO on the CPU, an optional extra."""

import os

import numpy as np
import openvino
import torch
from torch import Tensor

# Activations of the int8 products share a scale over so many features of one token. Over a whole token
# (768) the mean cosine of CLIP falls to 0.991, over 64 it stays at 0.999.
ACTIVATION_GROUP = 64
_HINT = {"float32": "f32", "int8": "f32", "bfloat16": "bf16", "int8-bfloat16": "bf16"}


class OpenVinoRuntime:
    """One stream of passes of an exported backbone that OpenVINO has compiled.

    In the int8 precisions activations are quantised while they pass, each group of a token by its own
    range, so that no calibration is needed and no picture depends on its batch-mates.
    """

    batch_buckets: tuple[int, ...] = ()

    def __init__(self, request: openvino.InferRequest) -> None:
        self.device = torch.device("cpu")
        self._request = request

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        cls_BD = self._request.infer([pixels_BCHW.numpy()])[0]
        return torch.from_numpy(np.array(cls_BD, dtype=np.float32))  # the next pass reuses the buffer


def load_openvino(export: bytes, precision: str, num_threads: int, num_streams: int) -> list[OpenVinoRuntime]:
    """`num_streams` runtimes that share their weights and, running side by side, `num_threads` threads.

    Several streams that have all cores to themselves stay each on its own: otherwise the system leaves two
    of them on one core for many milliseconds, and another core idle. Threads that leave cores to others are
    put wherever there is room.
    """
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(export),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": _HINT[precision],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": ACTIVATION_GROUP if "int8" in precision else 0,
            "NUM_STREAMS": num_streams,
            "INFERENCE_NUM_THREADS": num_threads,
            "ENABLE_CPU_PINNING": num_streams > 1 and num_threads >= _num_cores(),
        },
    )
    return [OpenVinoRuntime(compiled.create_infer_request()) for _ in range(num_streams)]


def _num_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

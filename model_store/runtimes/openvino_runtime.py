"""OpenVINO on the CPU, an optional extra."""

import numpy as np
import openvino
import torch
from torch import Tensor

# Activations of the int8 products share a scale over so many features of one token. Over a whole token
# (768) the mean cosine of CLIP falls to 0.991, over 64 it stays at 0.999.
ACTIVATION_GROUP = 64
_HINT = {"float32": "f32", "int8": "f32", "bfloat16": "bf16", "int8-bfloat16": "bf16"}


class OpenVinoRuntime:
    """An exported backbone compiled by OpenVINO.

    In the int8 precisions activations are quantised while they pass, each group of a token by its own
    range, so that no calibration is needed and no picture depends on its batch-mates.
    """

    batch_buckets: tuple[int, ...] = ()

    def __init__(self, export: bytes, precision: str, num_threads: int) -> None:
        self.device = torch.device("cpu")
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(export),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _HINT[precision],
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": ACTIVATION_GROUP if "int8" in precision else 0,
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": num_threads,
                "ENABLE_CPU_PINNING": False,  # pinned threads of two processes would share a core
            },
        )
        self._request = compiled.create_infer_request()

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        cls_BD = self._request.infer([pixels_BCHW.numpy()])[0]
        return torch.from_numpy(np.array(cls_BD, dtype=np.float32))  # the next pass reuses the buffer


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

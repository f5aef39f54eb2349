"""OpenVINO on the CPU, an optional extra."""

import os

import numpy as np
import openvino
import torch
from openvino import opset13 as opset
from torch import Tensor

from model_store.runtimes.byte_patches import as_graph_reads
from model_store.runtimes.runtime import ACTIVATION_GROUP, PLAIN_GROUP

_HINT = {"float32": "f32", "int8": "f32", "bfloat16": "bf16", "int8-bfloat16": "bf16"}
_PLAIN_PRODUCT = {"transpose_a": False, "transpose_b": False}


class OpenVinoRuntime:
    """One stream of passes of an exported backbone that OpenVINO has compiled.

    In the int8 precisions activations are quantised while they pass, each group of a token by its own
    range, so that no calibration is needed and no picture depends on its batch-mates.
    """

    batch_buckets: tuple[int, ...] = ()

    def __init__(self, request: openvino.InferRequest) -> None:
        self.device = torch.device("cpu")
        self._request = request
        self._shape = [axis.get_max_length() for axis in request.model_inputs[0].partial_shape]

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        given = as_graph_reads(pixels_BCHW, self._shape)
        cls_BD = self._request.infer([given.numpy()], share_inputs=True)[0]
        return torch.from_numpy(np.array(cls_BD, dtype=np.float32))  # the next pass reuses the buffer


def load_openvino(export: bytes, precision: str, num_threads: int, num_streams: int) -> list[OpenVinoRuntime]:
    """`num_streams` runtimes that share their weights and, running side by side, `num_threads` threads.

    Several streams that have all cores to themselves stay each on its own: otherwise the system leaves two
    of them on one core for many milliseconds, and another core idle. Threads that leave cores to others are
    put wherever there is room.
    """
    core = openvino.Core()
    model = with_keys_as_they_lie(core.read_model(export))
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": _HINT[precision],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": _activation_group(model) if "int8" in precision else 0,
            "NUM_STREAMS": num_streams,
            "INFERENCE_NUM_THREADS": num_threads,
            "ENABLE_CPU_PINNING": num_streams > 1 and num_threads >= _num_cores(),
        },
    )
    return [OpenVinoRuntime(compiled.create_infer_request()) for _ in range(num_streams)]


def with_keys_as_they_lie(model: openvino.Model) -> openvino.Model:
    """The model, its attention reading [B, N, H, F] keys by a product that turns its second factor.

    ONNX has no such product, so that exports turn the keys before it; OpenVINO's attention kernel does it
    while it reads them, in less time than the copy takes.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or node.get_attributes() != _PLAIN_PRODUCT:
            continue
        turned = node.input_value(1).get_node()
        if turned.get_type_name() == "Transpose" and _order_of(turned) == [0, 2, 3, 1]:
            lying = opset.transpose(turned.input_value(0), np.array([0, 2, 1, 3]))
            node.output(0).replace(opset.matmul(node.input_value(0), lying, False, True).output(0))
    return model


def _activation_group(model: openvino.Model) -> int:
    """Over how many features of a token activations share a scale in int8 products."""
    path = ["framework", ACTIVATION_GROUP]
    return int(model.get_rt_info(path).value) if model.has_rt_info(path) else PLAIN_GROUP


def _order_of(transpose: openvino.Node) -> list[int] | None:
    order = transpose.input_value(1).get_node()
    return order.get_data().tolist() if order.get_type_name() == "Constant" else None


def _num_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

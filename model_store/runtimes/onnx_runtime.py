"""ONNX Runtime on the CPU."""

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from model_store.runtimes.byte_patches import as_graph_reads
from model_store.runtimes.onnx_export import INPUT, OUTPUT

onnxruntime.disable_telemetry_events()  # a serving process tells nobody what it does


class OnnxRuntime:
    """One stream of passes of an exported backbone in an ONNX Runtime session."""

    batch_buckets: tuple[int, ...] = ()

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.device = torch.device("cpu")
        self._session = session
        self._shape = session.get_inputs()[0].shape

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        (cls_BD,) = self._session.run([OUTPUT], {INPUT: as_graph_reads(pixels_BCHW, self._shape).numpy()})
        return torch.from_numpy(np.asarray(cls_BD))


def load_onnxruntime(export: bytes, num_threads: int, num_streams: int) -> list[OnnxRuntime]:
    """`num_streams` runtimes that share their weights and, running side by side, `num_threads` threads.

    A session computes on threads of its own and on the thread that calls it, so several may call one.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(1, num_threads // num_streams)
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(export, options, providers=["CPUExecutionProvider"])
    return [OnnxRuntime(session) for _ in range(num_streams)]

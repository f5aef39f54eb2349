"""ONNX Runtime on the CPU."""

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from model_store.runtimes.onnx_export import INPUT, OUTPUT

onnxruntime.disable_telemetry_events()  # a serving process tells nobody what it does


class OnnxRuntime:
    """An exported backbone in an ONNX Runtime session."""

    batch_buckets: tuple[int, ...] = ()

    def __init__(self, export: bytes, num_threads: int) -> None:
        self.device = torch.device("cpu")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(export, options, providers=["CPUExecutionProvider"])

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        (cls_BD,) = self._session.run([OUTPUT], {INPUT: pixels_BCHW.numpy()})
        return torch.from_numpy(np.asarray(cls_BD))

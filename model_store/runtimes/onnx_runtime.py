"""ONNX Runtime on the CPU, and on CUDA where the package onnxruntime-gpu has taken its place."""

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from model_store.runtimes.byte_patches import as_graph_reads
from model_store.runtimes.onnx_export import INPUT, OUTPUT

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

onnxruntime.disable_telemetry_events()  # a serving process tells nobody what it does


class OnnxRuntime:
    """One stream of passes of an exported backbone in an ONNX Runtime session."""

    batch_buckets: tuple[int, ...] = ()

    def __init__(self, session: onnxruntime.InferenceSession, device: torch.device) -> None:
        self.device = device
        self._session = session
        self._shape = session.get_inputs()[0].shape

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        (cls_BD,) = self._session.run([OUTPUT], {INPUT: as_graph_reads(pixels_BCHW, self._shape).numpy()})
        return torch.from_numpy(np.asarray(cls_BD))


def load_onnxruntime(
    export: bytes, device: torch.device, num_threads: int, num_streams: int
) -> list[OnnxRuntime]:
    """`num_streams` runtimes that share their weights and, running side by side, `num_threads` threads.

    A session computes on threads of its own and on the thread that calls it, so several may call one.
    Raises RuntimeError where ONNX Runtime cannot use the device, and errors of its own.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(1, num_threads // num_streams)
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(export, options, providers=_providers(device))
    if device.type == "cuda" and _CUDA not in session.get_providers():  # it falls back without a fault
        raise RuntimeError("it could not load its CUDA provider: see its warnings")
    return [OnnxRuntime(session, device) for _ in range(num_streams)]


def _providers(device: torch.device) -> list[str | tuple[str, dict[str, str]]]:
    if device.type != "cuda":
        return [_CPU]
    # Products in float32 as the runtime's name says; no search among convolutions for every new batch size.
    options = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    return [(_CUDA, {"device_id": str(device.index or 0), **options}), _CPU]


def has_cuda() -> bool:
    """Whether the installed package was built for CUDA."""
    return _CUDA in onnxruntime.get_available_providers()

"""Exported forms of a backbone to running sessions; each engine is imported when it is asked for."""

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor

from model_store.errors import InvalidBackbone
from model_store.runtimes.runtime import ExportForm, Runtime, RuntimeKind


def load_export(
    kind: RuntimeKind, export: bytes, device: torch.device, num_threads: int, num_streams: int = 1
) -> Sequence[Runtime]:
    """An exported form in the engine of `kind`, as many runtimes as may run side by side on the threads of a
    CPU.

    Raises InvalidBackbone when the engine refuses it.
    """
    try:
        if kind.engine == "onnxruntime":
            from model_store.runtimes.onnx_runtime import load_onnxruntime

            return load_onnxruntime(export, device, num_threads, num_streams)
        if kind.engine == "openvino":
            from model_store.runtimes.openvino_runtime import load_openvino

            return load_openvino(export, kind.precision, num_threads, num_streams)
    except Exception as error:  # every engine has its own family of errors
        raise InvalidBackbone(f"{kind.engine} cannot load the exported backbone: {error}") from error
    raise AssertionError(f"{kind.name} runs no export")


def make_export(form: ExportForm, float_export: bytes, calibration_NCHW: Tensor) -> bytes:
    """An exported form from the float32 one; `calibration_NCHW` are pixels of real pictures."""
    from model_store.runtimes.onnx_export import calibrate_static, quantise_weights

    if form == "float":
        return float_export
    if form == "weight8":
        return quantise_weights(float_export)
    if form == "static8":
        return calibrate_static(float_export, calibration_NCHW)
    assert_never(form)

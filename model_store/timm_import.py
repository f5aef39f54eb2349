"""The one door to timm.

timm imports torchvision, and torchvision's Python code refers to two compiled operators at import time.
Where only a CPU build of torch is installed next to a CUDA build of torchvision, its compiled half cannot
load and the import fails with "operator torchvision::nms does not exist". Nothing here uses these
operators, so their schemas are declared when, and only when, they are missing.
"""

import importlib
from typing import Any

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def load_timm() -> Any:
    """The timm package, imported on first use."""
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for operator in ("torchvision::nms", "torchvision::qnms"):
        namespace, name = operator.split("::")
        if not hasattr(getattr(torch.ops, namespace), name):
            torch.library.define(operator, _SCHEMA)
    return importlib.import_module("timm")

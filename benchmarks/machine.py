"""What every result says about the machine it was taken on."""

import os
import platform

import torch

from model_store.tuning import hardware_name


def machine() -> dict[str, object]:
    """Processor, cores and load. A load above the cores before the run means that others were at work."""
    return {
        "hardware": hardware_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average_before": round(os.getloadavg()[0], 2),
    }

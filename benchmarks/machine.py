"""What every result says about the machine it was taken on."""

import os
import platform
from pathlib import Path

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


def resident_bytes(pid: int) -> int:
    """Resident memory of a process (Linux). Raises FileNotFoundError when it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise FileNotFoundError(f"process {pid} has ended: it has no memory left")

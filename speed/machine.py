"""What a benchmark ran on."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


def cores() -> int:
    """Those that this process may use, of a container's, a job's or all."""
    return len(os.sched_getaffinity(0))


def describe_machine() -> dict:
    """Processor, cores, memory, accelerator and versions, for a result file."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": cores(),
        "memory_gib": round(memory),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }

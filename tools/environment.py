"""Which software and hardware a measurement was made on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "ffcv",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "numba",
    "kornia",
    "numpy",
)


def describe_environment(device: torch.device) -> dict[str, str]:
    """Name and version of what runs: the device, the processor and the installed packages."""
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "processor": f"{_processor()}, {cores} cores, {threads} threads",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()

"""What the machine is, as JSON: ``python -m tests.gpu.machine FILE``. Nothing here may fail for want of something."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["describe", "main"]

PACKAGES = ("torch", "lightning", "pytorch-lightning", "torchmetrics", "numpy", "jsonargparse", "rich", "pytest")
GPU_FIELDS = "name,uuid,driver_version,memory.total,pcie.link.gen.current,compute_mode,mig.mode.current"


def main() -> None:
    """Writes and prints the facts."""
    found = describe()
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name}: {value}")
    gpus = found["cuda"].get("gpus", 0) if isinstance(found["cuda"], dict) else 0
    print(f"{gpus} GPUs, torch {found['packages']['torch']}, {found['cores']} cores")


def describe() -> dict[str, Any]:
    """Processor, memory, versions, and the GPU as the driver and as torch see it."""
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": _attempt(lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "shared_memory_gib": _attempt(lambda: shutil.disk_usage("/dev/shm").total / 2**30),
        "packages": {name: _version(name) for name in PACKAGES},
        "nvidia_smi": _run("nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader"),
        "nvidia_smi_table": _run("nvidia-smi"),
        "cuda": _attempt(_cuda),
    }


def _cuda() -> dict[str, Any]:
    import torch

    cuda: Any = torch.cuda
    # First: the tests fork, and only a count that asks the driver's management library leaves CUDA alone.
    found = {
        "counted_by_nvml": _attempt(cuda._device_count_nvml),
        "gpus": cuda.device_count(),
        "built": torch.version.cuda,
    }
    if found["gpus"]:
        properties = cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
            "nccl": _attempt(lambda: ".".join(map(str, cuda.nccl.version()))),
            "cudnn": torch.backends.cudnn.version(),
            "bf16": cuda.is_bf16_supported(),
            "sum_of_ones": float(torch.ones(1000, device="cuda").sum()),
        }
    return found


def _processor() -> str:
    def read() -> str:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))

    return str(_attempt(read))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout + done.stderr).strip()


def _attempt(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()

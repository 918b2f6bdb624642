"""Describe where and with what a run was made: peak memory, versions, git commit, process."""

import os
import platform
import resource
import socket
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("torch", "torchvision", "timm", "lightning", "safetensors", "visprompt")


def reset_peak_memory(device: torch.device) -> None:
    """Start the measurement of the peak memory of a run on a device."""
    if device.type == "cuda" and torch.cuda.is_initialized():  # before CUDA starts, the call would fail
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the high-water mark to the current size
    except OSError:
        return  # on other systems the peak is that of the whole process; `peak_memory` records that


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Return the peak memory since `reset_peak_memory` and what was measured.

    Args:
        device: The run's device. For a GPU the memory allocated on it is measured, else that of the process.

    Returns:
        For example {"bytes": 1073741824, "of": "GPU allocations"}.
    """
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "GPU allocations"}
    try:
        status = Path("/proc/self/status").read_text()
        kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
        return {"bytes": kib * 1024, "of": "process, this run"}
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return {
            "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            "of": "process, its whole life",
        }


def machine(device: torch.device, devices: int, accumulation: int) -> dict[str, Any]:
    """Return the hardware and threads of a run, with its number of devices and accumulation steps."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "devices": devices,
        "accumulation": accumulation,
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that can change a run's numbers."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


@cache  # the code of a process is that of its start
def git_commit() -> str | None:
    """Return the commit of the code, with a `+` if tracked files are changed; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        options = {"cwd": here, "capture_output": True, "text": True, "timeout": 10}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], check=True, **options)  # type: ignore[call-overload]  # one dict of options for both
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], check=True, **options)  # type: ignore[call-overload]  # as above
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def this_process() -> str:
    """Return the name of this process, for a message in another one: "process 17 on gpu3"."""
    return f"process {os.getpid()} on {socket.gethostname()}"

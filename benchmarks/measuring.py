"""The clock and the scale of the benchmarks, and the machine they ran on."""

import argparse
import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from visprompt.models.backbones import DEMO
from visprompt.runs.environment import git_commit, versions


def milliseconds(step: Callable[[], object], device: str) -> float:
    """Time of a step: CUDA events.

    On the CPU the process's CPU time where it has one thread, else wall time.
    """
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    step()
    return (clock() - begin) * 1000


def added_mib(step: Callable[[], object], device: str) -> float:
    """What a step takes at its peak beyond what its process held, MiB.

    PyTorch's on CUDA, else all (Linux only).

    The process should be a fresh one: on the CPU, memory that was freed before would hide what the step
    takes.
    """
    step()  # what the libraries take once is no part of a step
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # what the first step freed would otherwise hide what the second one takes
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew, at the present size
    resident = _proc("self/status", "VmRSS")
    step()
    return (int(_proc("self/status", "VmHWM").split()[0]) - int(resident.split()[0])) / 1024  # "1234 kB"


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark of a backbone: which, and on which device."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbone", default=DEMO, help="the embedded one, or a timm ViT with random weights"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser


def machine() -> str:
    """Processor, threads, GPU, versions and commit, for the line above a table."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    where = f"{_proc('cpuinfo', 'model name')}, {threads}, {gpu}"
    software = ", ".join(f"{name} {versions()[name]}" for name in ("python", "torch", "timm"))
    return f"{where}; {software}; commit {git_commit()}"


def _proc(file: str, key: str) -> str:
    return Path("/proc", file).read_text().partition(key)[2].partition("\n")[0].strip("\t :")

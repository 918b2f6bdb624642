"""How precisely a GPU multiplies float32 matrices: the setting `matmul_precision`."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from visprompt.runs.job import Job
from visprompt.text import Terminal

console = Terminal()
_TENSOR_CORES = (8, 0)  # compute capability from which a GPU has TensorFloat32


def may_act_on(job: Job) -> bool:
    """Return whether `matmul_precision` changes a job's numbers on a machine with a GPU.

    The machine that asks does not count: it may only plan what others run.
    """
    return job.trainer.accelerator in ("auto", "gpu", "cuda")


@contextmanager
def matmul_precision(job: Job) -> Iterator[None]:
    """Multiply float32 matrices as precisely as a job asks for, and leave the process as it was.

    On other devices than GPUs products are exact: oneDNN would follow the setting on some CPUs, and it is not
    part of the identity of runs there.
    """
    wanted = job.matmul_precision if may_act_on(job) and torch.cuda.is_available() else "highest"
    mkldnn: Any = torch.backends.mkldnn
    backends = torch.backends.cuda.matmul, mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        name = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the newer attributes of the backends, which have no name for all
        name = "highest"
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(name)
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def hint(job: Job, device: torch.device) -> None:
    """Name the faster settings, once in a process, if a job on a GPU multiplies in full float32."""
    if device.type == "cuda" and (job.precision, job.matmul_precision) == ("32-true", "highest"):
        _hint(device)


@lru_cache
def _hint(device: torch.device) -> None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) >= _TENSOR_CORES:
        console.print(
            f"float32 matrices are multiplied in full precision: on {torch.cuda.get_device_name(device)} "
            "matmul_precision=high or precision=bf16-mixed is faster, and makes another run",
            soft_wrap=True,
        )

"""Explain errors about missing memory in one sentence, and return a finished run's memory to the system."""

import ctypes
import errno
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from visprompt.errors import UserError
from visprompt.runs.devices import all_devices

if TYPE_CHECKING:  # `runs.job` takes seconds to import
    from visprompt.runs.job import Job

# parts of messages of RuntimeErrors about memory: by PyTorch on the CPU, PyTorch on a GPU, cuBLAS
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")
# parts of the message if the system killed a worker of a DataLoader, which it does when memory runs out
_WORKER = ("DataLoader worker", ("signal: Killed", "signal: Bus error"))


@contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error into one sentence.

    Args:
        advice: Returns what to do about it, for example "give a smaller batch_size=...".

    Raises:
        UserError: In place of an out-of-memory error; other errors pass unchanged.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        where = _place_without_memory(error)
        if where is None:
            raise
        raise UserError(f"there is not enough memory {where}: {advice()}") from None


def explained_for(job: "Job") -> AbstractContextManager[None]:
    """Turn an out-of-memory error of a job into one sentence that says which settings take less memory."""
    return explained(
        lambda: of_training(job.recipe.batch_size, job.trainer.accumulate_grad_batches, all_devices(job))
    )


def of_training(batch_size: int, parts: int, devices: int = 1) -> str:
    """Return which settings make training take less memory.

    Args:
        batch_size: The recipe's batch size.
        parts: The number of accumulation steps into which each batch is divided now.
        devices: The number of devices, over which each part is divided.
    """
    more = next((n for n in range(parts + 1, batch_size + 1) if batch_size % (n * devices) == 0), None)
    accumulate = (
        f"give trainer.accumulate_grad_batches={more}, which stays the same run (but is refused where batch "
        "norm is trained or a loss compares the images of a batch), or "
        if more
        else ""
    )
    return (
        f"{accumulate}give precision=bf16-mixed, a smaller backbone.image_size or recipe.batch_size, "
        "which make another"
    )


def _place_without_memory(error: Exception) -> str | None:
    """Return where memory ran out; None if the error is not about memory."""
    text, name = str(error), type(error).__name__
    if _WORKER[0] in text and any(word in text for word in _WORKER[1]):
        return "for the loader's workers (data.num_workers=0 starts none)"
    is_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not is_memory and name != "OutOfMemoryError" and not any(word in text for word in _WORDS):
        return None
    on_gpu = name == "OutOfMemoryError" or "CUDA" in text or "CUBLAS" in text
    return "on the GPU" if on_gpu else "on this machine"


def give_back() -> None:
    """Free the memory of a finished run and return it to the system.

    A trainer and its module refer to each other, so that their tensors stay until a full garbage collection,
    which is rare; and glibc keeps freed memory that is fragmented. Over 70 runs in one process this wasted
    250 MiB.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)

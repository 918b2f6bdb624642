"""Memory: the sentence where there is not enough, and what a run leaves behind given back to the system."""

import ctypes
import errno
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from visprompt.errors import UserError

if TYPE_CHECKING:  # `runs.job` takes seconds to import
    from visprompt.runs.job import Job

# what libraries say in errors of general kinds: PyTorch on the CPU, on a GPU, cuBLAS
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")
_WORKER = (
    "DataLoader worker",
    ("signal: Killed", "signal: Bus error"),
)  # the system ended it, for want of memory


@contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """Turn an error about memory that cannot be had into one sentence.

    Args:
        advice: Says what takes less, for example "give a smaller batch_size=...".

    Raises:
        UserError: In place of such an error; any other passes.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        where = _lacking(error)
        if where is None:
            raise
        raise UserError(f"there is not enough memory {where}: {advice()}") from None


def explained_for(job: "Job") -> AbstractContextManager[None]:
    """Turn an error about memory in a job's run into one sentence that says what takes less."""
    return explained(lambda: of_training(job.recipe.batch_size, job.trainer.accumulate_grad_batches))


def of_training(batch_size: int, parts: int) -> str:
    """Return what makes training take less memory.

    Args:
        batch_size: The recipe's.
        parts: Into how many parts each batch is dealt now.
    """
    more = next((n for n in range(parts + 1, batch_size + 1) if batch_size % n == 0), None)
    dealt = f"give trainer.accumulate_grad_batches={more}, which stays the same run, or " if more else "give "
    return (
        f"{dealt}precision=bf16-mixed, a smaller backbone.image_size or recipe.batch_size, which make another"
    )


def _lacking(error: Exception) -> str | None:
    """Return where memory was lacking; None where the error is of another kind."""
    text, kind = str(error), type(error).__name__
    if _WORKER[0] in text and any(word in text for word in _WORKER[1]):
        return "for the loader's workers, of which data.num_workers=0 takes none"
    is_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not is_memory and kind != "OutOfMemoryError" and not any(word in text for word in _WORDS):
        return None
    return (
        "on the GPU"
        if kind == "OutOfMemoryError" or "CUDA" in text or "CUBLAS" in text
        else "on this machine"
    )


def give_back() -> None:
    """Free what a run leaves behind, and returns it to the system.

    A trainer and its module refer to each other, so that their tensors stay until Python's rare full
    collection; and glibc keeps what was freed in pieces. Over 70 runs in one process that came to 250 MiB
    that nobody used.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)

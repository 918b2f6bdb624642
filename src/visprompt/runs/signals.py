"""End the process on SIGINT (Ctrl-C) and SIGTERM (schedulers): clean up, print a sentence, exit 130 or 143.

An entry point calls `install` before all other imports, which take seconds. The first signal raises `Ended`
in the main thread, so that `with` and `finally` blocks remove temporary files, release locks and end child
processes. During the first imports there is nothing to clean up, and the process ends at once. It also ends
at once on a second signal, and if the cleanup takes longer than `_PATIENCE`.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

# environment variable that `ranks.run_ranks` sets in a rank: the parent's process id; only the parent prints
PARENT = "VISPROMPT_PARENT"
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_SAME = 0.5  # seconds in which a second signal is ignored, because `timeout` and torchrun send theirs twice
_PATIENCE = 20.0  # seconds for the cleanup: Kubernetes and SLURM kill after 30


class Ended(SystemExit):
    """Raised when the process is to end; its code is 128 plus the signal's number.

    It is not an `Exception`, so that libraries do not catch it.
    """


_received: int | None = None  # the first signal
_since = 0.0  # when it came
_started = False  # whether there may be something to clean up
_said = False  # whether the sentence has been printed
_raised = False  # whether `Ended` has been raised
_again = False  # whether the next signal is the first one, delivered again by `_deliver_again`
_deferrals = 0  # how many `deferred` blocks are entered


def install() -> None:
    """Install handlers for SIGINT and SIGTERM, but keep handlers that are not Python's defaults.

    A background shell ignores SIGINT, and submitit installs its own handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _WORDS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, handle)
    if sys.unraisablehook is not _unraisable:
        sys.unraisablehook = _unraisable
        atexit.register(_say)
        os.register_at_fork(after_in_child=_restore)


def started() -> None:
    """Declare that from now on there may be something to clean up, also during an import."""
    global _started
    _started = True


def check() -> None:
    """Raise `Ended` if a signal has come: a library may have swallowed the first exception."""
    if _received is not None:
        _raise()


@contextmanager
def consequences() -> Iterator[None]:
    """Raise `Ended` in place of an error that a signal has caused, such as a missing loader worker."""
    try:
        yield
    except Exception:
        check()
        raise


def is_terminated() -> bool:
    """Return whether SIGTERM has come, so that a scheduler may start the same command again."""
    return _received == signal.SIGTERM


def sentence(number: int) -> str:
    """Return the sentence to print after a signal."""
    return f"{_WORDS[signal.Signals(number)]}: run the same command again to go on where it stopped"


@contextmanager
def deferred() -> Iterator[None]:
    """Let a short piece of work finish: raise `Ended` for a signal only at its end."""
    global _deferrals
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
        if _received is not None and not _raised and not _deferrals:
            _raise()


def handle(number: int, frame: FrameType | None) -> None:
    """Handle either signal.

    Raises:
        Ended: On the first signal, if there may be something to clean up.
    """
    global _received, _since, _again
    if _again:
        _again = False
        _raise()
    if _received is not None:
        if time.monotonic() - _since > _SAME:
            _quit()
        return
    _received, _since = number, time.monotonic()
    patience = threading.Timer(_PATIENCE, _quit)
    patience.daemon = True
    patience.start()
    if not _started and _importing(frame):
        atexit._run_exitfuncs()  # some libraries make temporary folders when they are imported
        _quit()
    if not _deferrals:
        _raise()


def _raise() -> NoReturn:
    global _raised
    _raised = True
    assert _received is not None
    raise Ended(128 + _received)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _say() -> None:
    """Print the sentence once if a signal has come; of the ranks of a run only the first prints it."""
    global _said
    ranks = (os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID"))
    if _received is None or _said or PARENT in os.environ or any(rank != "0" for rank in ranks):
        return
    _said = True
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):  # a closed pipe, or a signal during a write
            stream.flush()
    start = "\n" if os.isatty(2) else ""  # a terminal has printed ^C on this line
    with suppress(OSError):
        os.write(2, f"{start}{sentence(_received)}\n".encode())


def _quit() -> NoReturn:
    """End the process without cleaning up."""
    assert _received is not None
    _say()
    os._exit(128 + _received)


def _unraisable(unraisable: Any) -> None:
    """Deliver the signal again if Python dropped `Ended`, as it does in a finaliser or an exit callback."""
    if not isinstance(unraisable.exc_value, Ended):
        sys.__unraisablehook__(unraisable)
        return
    if sys._getframe().f_back is None:  # called by the interpreter, which is ending
        _quit()
    timer = threading.Timer(0.05, _deliver_again)
    timer.daemon = True
    timer.start()


def _deliver_again() -> None:
    global _again
    _again = True
    assert _received is not None
    os.kill(os.getpid(), _received)


def _restore() -> None:
    """Restore Python's handlers in a forked child, such as a loader's worker: the parent cleans up."""
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is handle:
            signal.signal(number, default)
